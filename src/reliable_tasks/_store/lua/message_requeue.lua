-- Purpose: end a delivery and put its message back into the list it came from.
--          Safe to repeat.
-- KEYS[1]  unacked: hash, tag -> [message, exchange, routing key]
-- KEYS[2]  unacked_index: sorted set, tag -> seconds
-- KEYS[3]  leases: sorted set, tag -> end of the lease, ms
-- KEYS[4]  the task's run
-- KEYS[5]  the list
-- KEYS[6]  the bell of its queue
-- ARGV[1]  tag of the delivery
-- ARGV[2]  message, as it shall wait from now on
-- ARGV[3]  'front' to be the next one taken, 'back' to wait behind all others
-- ARGV[4]  started: '1' to take back the crash that was counted ahead
-- ARGV[5]  longest: '0', or to do it only if the lease has ended: how long one can be, ms
-- ARGV[6]  crash: what is known of it, as count_crash has it, or ''
-- Returns: 1  put back
--          3  put back: it had been laid aside for so long
--          2  not put back: the copy had published a continuation of its task
--          0  the delivery is over already, or its lease has not ended
-- Uses: release_run explain_crash ring_bell admit_writes
-- Commands: TIME ZSCORE HEXISTS HGET HDEL ZREM RPUSH LPUSH
if ARGV[5] ~= '0' then
    local time = redis.call('TIME')
    local lease_end = redis.call('ZSCORE', KEYS[3], ARGV[1])
    local left = tonumber(lease_end or 0) - time[1] * 1000 - math.floor(time[2] / 1000)
    -- No lease lasts longer: it was given before the clock went back.
    if left > 0 and left <= tonumber(ARGV[5]) then
        return 0
    end
end
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then
    redis.call('ZREM', KEYS[3], ARGV[1])
    redis.call('ZREM', KEYS[2], ARGV[1])
    return 0
end
admit_writes(KEYS[3])
local holder = redis.call('HGET', KEYS[4], 'tag')
local was_aside = holder == 'aside:' .. ARGV[1]
if holder == ARGV[1] then
    explain_crash(KEYS[4], ARGV[6])
end
local has_continued = release_run(KEYS[4], ARGV[1], ARGV[4], false, 0)
if not has_continued then
    -- Before it is taken away: what is refused here, for want of a right, must not be lost.
    if ARGV[3] == 'front' then
        redis.call('RPUSH', KEYS[5], ARGV[2])
    else
        redis.call('LPUSH', KEYS[5], ARGV[2])
    end
end
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[1], ARGV[1])
if has_continued then
    return 2
end
ring_bell(KEYS[6])
if was_aside then
    return 3
end
return 1
