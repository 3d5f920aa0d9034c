-- Purpose: note how a task ended that has freed its key before, if somebody follows it.
--          Safe to repeat.
-- KEYS[1]  followed: where it stands how the task ended
-- ARGV[1]  state that it ended in
-- Returns: nothing
-- Uses: admit_writes
-- Commands: SET
admit_writes(KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'XX', 'KEEPTTL')
