-- Purpose: ask the guard again for a copy that waited, because another one was alive or because
--          its own lease may have ended meanwhile.
--          Safe to repeat.
-- KEYS[1]  leases: sorted set, tag -> end of the lease, ms
-- KEYS[2]  the task's run
-- KEYS[3]  unacked: hash, tag -> [message, exchange, routing key]
-- ARGV[1]  tag of this copy
-- ARGV[2]  run ttl, ms
-- Returns: {code, crashes, ms of lease} as hold_run does, or
--          {2, 0, 0}  the delivery is over: its message was put back
-- Uses: hold_run
-- Commands: TIME HEXISTS
if redis.call('HEXISTS', KEYS[3], ARGV[1]) == 0 then
    return {2, 0, 0}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
return hold_run(KEYS[2], KEYS[1], ARGV[1], now, ARGV[2])
