-- Purpose: note that a copy of a task has published its continuation: no copy of the same order
--          must run again.
--          Safe to repeat.
-- KEYS[1]  the task's run
-- ARGV[1]  order of the copy
-- ARGV[2]  remembers: for how long to know it where nothing else is known of the run, ms
-- Returns: 1
-- Uses: admit_writes
-- Commands: HGET HSET PTTL PEXPIRE
admit_writes(KEYS[1])
if tonumber(redis.call('HGET', KEYS[1], 'done') or -1) < tonumber(ARGV[1]) then
    redis.call('HSET', KEYS[1], 'done', ARGV[1])
end
if redis.call('PTTL', KEYS[1]) < 0 then
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
return 1
