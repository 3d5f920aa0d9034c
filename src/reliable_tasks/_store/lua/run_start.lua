-- Purpose: count a start as a crash until its end takes it back; or take it back now, where a
--          copy that was started goes on waiting; or say more of one that was counted. Nobody waits
--          for the answer.
-- KEYS[1]  the task's run
-- ARGV[1]  tag of the delivery
-- ARGV[2]  how much to count: 1, -1 or 0
-- ARGV[3]  who starts it, as count_crash has it
-- Returns: nothing of interest
-- Uses: count_crash explain_crash admit_writes
-- Commands: HGET HINCRBY HDEL
if redis.call('HGET', KEYS[1], 'tag') == ARGV[1] then
    admit_writes(KEYS[1])
    if ARGV[2] == '1' then
        count_crash(KEYS[1], ARGV[3])
    elseif ARGV[2] == '-1' then
        redis.call('HINCRBY', KEYS[1], 'crashes', -1)
        redis.call('HDEL', KEYS[1], 'start')
    else
        explain_crash(KEYS[1], ARGV[3])
    end
end
return 0
