-- Purpose: count a start as a crash until its end takes it back; or take it back now, where a
--          copy that was started goes on waiting. Nobody waits for the answer.
-- KEYS[1]  the task's run
-- ARGV[1]  tag of the delivery
-- ARGV[2]  how much to count: 1 or -1
-- Returns: nothing of interest
-- Uses: admit_writes
-- Commands: HGET HINCRBY
if redis.call('HGET', KEYS[1], 'tag') == ARGV[1] then
    admit_writes(KEYS[1])
    redis.call('HINCRBY', KEYS[1], 'crashes', ARGV[2])
end
return 0
