-- Purpose: drop the dead letters that are too old, or too many: the oldest first, and those that
--          were replayed before others. Some at a time; a repetition drops more.
-- KEYS[1]  what the keys of dead letters begin with
-- ARGV[1]  limit: how many to drop at most of either
-- Returns: {dropped for their age, dropped for their number, how many get too old in the last tenth
--          of their time, how many there are, and may be}; none of them with the replayed
-- Uses: dead_remove admit_writes
-- Commands: TIME HMGET ZCARD ZCOUNT ZRANGE ZRANGEBYSCORE
local prefix = KEYS[1]
local all, replayed = prefix .. 'all', prefix .. 'replayed'
local max_age, max_count = unpack(redis.call('HMGET', prefix .. 'bounds', 'max_age', 'max_count'))
if not max_age then
    return {0, 0, 0, 0, 0}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function before(age)
    return string.format('(%.0f', now - max_age * age)
end
admit_writes(prefix)
local function drop(ids)
    for _, id in ipairs(ids) do
        dead_remove(prefix, id, prefix .. 'letter:' .. id)
    end
    return #ids
end
local function aged_of(set)
    return redis.call('ZRANGEBYSCORE', set, '-inf', before(1), 'LIMIT', 0, ARGV[1])
end
-- Those that were replayed are no loss.
drop(aged_of(replayed))
local aged, many = drop(aged_of(all)), 0
for _, set in ipairs({replayed, all}) do
    local over = redis.call('ZCARD', all) + redis.call('ZCARD', replayed) - max_count
    if over > 0 then
        local dropped = drop(redis.call('ZRANGE', set, 0, math.min(over, tonumber(ARGV[1])) - 1))
        if set == all then
            many = dropped
        end
    end
end
return {aged, many, redis.call('ZCOUNT', all, '-inf', before(0.9)), redis.call('ZCARD', all),
    tonumber(max_count)}
