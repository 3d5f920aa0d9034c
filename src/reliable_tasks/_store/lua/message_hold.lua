-- Purpose: ask the guard again for a copy that waited, because another one was alive or because
--          its own lease may have ended meanwhile. That of one that may run is renewed, lest it
--          be put back in the moment in which it starts.
--          Safe to repeat.
-- KEYS[1]  leases: sorted set, tag -> end of the lease, ms
-- KEYS[2]  the task's run
-- KEYS[3]  unacked: hash, tag -> [message, exchange, routing key]
-- KEYS[4]  unacked_index: sorted set, tag -> seconds; stock sweepers go by it
-- ARGV[1]  tag of this copy
-- ARGV[2]  run ttl, ms
-- ARGV[3]  lease, ms
-- Returns: {code, crashes, ms of lease} as hold_run does, or
--          {2, 0, 0}  the delivery is over: its message was put back
--          {4, 0, 0}  it has published its task's continuation already
-- Uses: hold_run admit_writes
-- Commands: TIME HEXISTS ZSCORE ZADD
if redis.call('HEXISTS', KEYS[3], ARGV[1]) == 0 or not redis.call('ZSCORE', KEYS[1], ARGV[1]) then
    return {2, 0, 0}
end
if redis.call('HEXISTS', KEYS[2], 'continued:' .. ARGV[1]) == 1 then
    return {4, 0, 0}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
admit_writes(KEYS[1])
local held = hold_run(KEYS[2], KEYS[1], ARGV[1], now, ARGV[2])
if held[1] == 1 then
    redis.call('ZADD', KEYS[1], 'XX', string.format('%.0f', now + ARGV[3]), ARGV[1])
    redis.call('ZADD', KEYS[4], 'XX', string.format('%.3f', (now + ARGV[3]) / 1000), ARGV[1])
end
return held
