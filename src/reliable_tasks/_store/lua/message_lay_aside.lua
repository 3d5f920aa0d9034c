-- Purpose: let go of a delivery whose task waits for its turn, until a time: then the one that
--          sweeps puts its message back. Safe to repeat.
-- KEYS[1]  unacked: hash, tag -> [message, exchange, routing key]
-- KEYS[2]  unacked_index: sorted set, tag -> seconds
-- KEYS[3]  leases: sorted set, tag -> end of the lease, ms
-- KEYS[4]  the task's run
-- ARGV[1]  tag of the delivery
-- ARGV[2]  pause, ms
-- ARGV[3]  started: '1' to take back the crash that was counted ahead
-- ARGV[4]  entry of the message in unacked, as it shall wait from now on, or ''
-- Returns: 1  let go of
--          2  over: the copy had published a continuation of its task
--          0  the delivery is over already
-- Uses: release_run admit_writes
-- Commands: TIME HEXISTS HGET HSET ZADD HDEL ZREM
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then
    return 0
end
admit_writes(KEYS[3])
local holds = redis.call('HGET', KEYS[4], 'tag') == ARGV[1]
if release_run(KEYS[4], ARGV[1], ARGV[3], false, 0) then
    redis.call('ZREM', KEYS[3], ARGV[1])
    redis.call('ZREM', KEYS[2], ARGV[1])
    redis.call('HDEL', KEYS[1], ARGV[1])
    return 2
end
if holds then
    redis.call('HSET', KEYS[4], 'tag', 'aside:' .. ARGV[1])
end
if ARGV[4] ~= '' then
    redis.call('HSET', KEYS[1], ARGV[1], ARGV[4])
end
local time = redis.call('TIME')
local ends = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[2]
redis.call('ZADD', KEYS[3], 'XX', string.format('%.0f', ends), ARGV[1])
redis.call('ZADD', KEYS[2], 'XX', string.format('%.0f', ends / 1000), ARGV[1])
return 1
