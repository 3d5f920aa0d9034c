-- Purpose: ask the guard for a copy that waited because another one was alive, or that came
--          from a broker which knows nothing of leases; then the copy gets one here.
--          Safe to repeat.
-- KEYS[1]  leases: sorted set, tag -> end of the lease, ms
-- KEYS[2]  the task's run
-- ARGV[1]  tag of this copy
-- ARGV[2]  run ttl, ms
-- ARGV[3]  lease, ms, or '0' where the broker's own lease covers the copy
-- Returns: {code, crashes, ms of lease} as hold_run does
-- Uses: hold_run
-- Commands: TIME ZADD
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local held = hold_run(KEYS[2], KEYS[1], ARGV[1], now, ARGV[2])
if held[1] == 1 and ARGV[3] ~= '0' then
    redis.call('ZADD', KEYS[1], string.format('%.0f', now + ARGV[3]), ARGV[1])
end
return held
