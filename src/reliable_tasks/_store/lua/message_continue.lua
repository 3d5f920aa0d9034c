-- Purpose: note that a delivery has published all of its task's continuation, which was more
--          than one message: no copy of it must run again.
--          Safe to repeat.
-- KEYS[1]  the task's run
-- ARGV[1]  tag of the delivery
-- Returns: 1  noted
--          0  the delivery is over
-- Uses: admit_writes
-- Commands: HGET HSET
if redis.call('HGET', KEYS[1], 'tag') ~= ARGV[1] then
    return 0
end
admit_writes(KEYS[1])
redis.call('HSET', KEYS[1], 'continued:' .. ARGV[1], '1')
return 1
