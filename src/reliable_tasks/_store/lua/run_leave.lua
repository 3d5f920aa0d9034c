-- Purpose: end a copy that was let in by run_enter: its task is over, or its message goes back.
--          Safe to repeat.
-- KEYS[1]  leases: sorted set, tag -> end of the lease, ms
-- KEYS[2]  the task's run
-- ARGV[1]  tag of this copy
-- ARGV[2]  order of this copy
-- ARGV[3]  'over', or 'back' if the message goes back to its queue
-- ARGV[4]  '1' to take back the crash that was counted when it was let in
-- ARGV[5]  remembers: for how long to know that the copy is over, ms
-- Returns: 1  ended
--          0  it was over: its lease had ended, or somebody else runs the task
-- Commands: ZREM HMGET HSET HDEL HINCRBY PEXPIRE
local ended = redis.call('ZREM', KEYS[1], ARGV[1])
local holder, crashes, done = unpack(redis.call('HMGET', KEYS[2], 'tag', 'crashes', 'done'))
local has_continued = tonumber(done or -1) >= tonumber(ARGV[2])
if ARGV[3] == 'over' and not has_continued then
    -- Also when another copy runs: what this one did is done.
    redis.call('HSET', KEYS[2], 'done', ARGV[2])
end
if holder and holder ~= ARGV[1] then
    return 0
end
redis.call('HSET', KEYS[2], 'tag', ARGV[3] == 'over' and 'over' or 'queued')
crashes = tonumber(crashes or 0)
if ARGV[3] == 'over' and not has_continued then
    redis.call('HDEL', KEYS[2], 'crashes')
    crashes = 0
elseif ARGV[4] == '1' and crashes > 0 then
    crashes = redis.call('HINCRBY', KEYS[2], 'crashes', -1)
end
-- What goes on, and has crashed, is known for as long as it may wait.
if crashes == 0 then
    redis.call('PEXPIRE', KEYS[2], ARGV[5])
end
return ended
