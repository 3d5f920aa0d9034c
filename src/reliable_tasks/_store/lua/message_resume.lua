-- Purpose: let a run that lost its message have it again under its own tag: the worker that runs
--          the task was taken for dead, and has now been handed the message a second time.
--          Safe to repeat.
-- KEYS[1]  unacked: hash, tag -> [message, exchange, routing key]
-- KEYS[2]  unacked_index: sorted set, tag -> seconds; stock sweepers go by it
-- KEYS[3]  leases: sorted set, tag -> end of the lease, ms
-- KEYS[4]  the task's run
-- ARGV[1]  tag of the copy that came
-- ARGV[2]  tag of the run that goes on
-- ARGV[3]  lease, ms
-- Returns: 1  the message is the run's
--          0  the copy is over, or does not hold the run
-- Commands: TIME HGET HSET HDEL ZADD ZREM
if redis.call('HGET', KEYS[4], 'tag') == ARGV[2] then
    return 1
end
local entry = redis.call('HGET', KEYS[1], ARGV[1])
if not entry or redis.call('HGET', KEYS[4], 'tag') ~= ARGV[1] then
    return 0
end
local time = redis.call('TIME')
local ends = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[3]
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('HSET', KEYS[1], ARGV[2], entry)
redis.call('ZADD', KEYS[2], string.format('%.3f', ends / 1000), ARGV[2])
redis.call('ZADD', KEYS[3], string.format('%.0f', ends), ARGV[2])
redis.call('HSET', KEYS[4], 'tag', ARGV[2])
return 1
