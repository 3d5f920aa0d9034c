-- Purpose: end a copy that was let in by run_enter: its task is over, or its message goes back.
--          Safe to repeat.
-- KEYS[1]  leases: sorted set, tag -> end of the lease, ms
-- KEYS[2]  the task's run
-- ARGV[1]  tag of this copy
-- ARGV[2]  order of this copy
-- ARGV[3]  'over', or 'back' if the message goes back to its queue
-- ARGV[4]  '1' to take back the crash that was counted when it was let in
-- ARGV[5]  remembers: for how long to know that the copy is over, ms
-- ARGV[6]  crash: what is known of it, as count_crash has it, or ''
-- Returns: 1  ended
--          0  it was over: its lease had ended, or somebody else runs the task
-- Uses: leave_run explain_crash admit_writes
-- Commands: HGET
admit_writes(KEYS[2])
if redis.call('HGET', KEYS[2], 'tag') == ARGV[1] then
    explain_crash(KEYS[2], ARGV[6])
end
if leave_run(KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]) then
    return 1
end
return 0
