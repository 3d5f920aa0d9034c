-- Purpose: end a copy that was let in by run_enter, and keep its message as a dead letter. Its
--          broker is told afterwards: what it delivers again is known to be over.
--          Safe to repeat.
-- KEYS[1]  leases: sorted set, tag -> end of the lease, ms
-- KEYS[2]  the task's run
-- KEYS[3]  what the keys of dead letters begin with
-- ARGV[1]  tag of this copy
-- ARGV[2]  order of this copy
-- ARGV[3]  remembers: for how long to know that the copy is over, ms
-- ARGV[4]  meta: JSON, as dead_add has it
-- ARGV[5]  about: what is known of it
-- ARGV[6]  its traceback
-- ARGV[7]  the message
-- Returns: {whether its lease had not ended, id, how many there are}
--          {the same}  nothing is kept: it had published its task's continuation
--          {0}  somebody else has the run, or had it
--          {0, id, how many there are}  the run was over, for all this has been done before
-- Uses: dead_add leave_run admit_writes
-- Commands: HMGET ZREM
local holder, done = unpack(redis.call('HMGET', KEYS[2], 'tag', 'done'))
local kept = {}
admit_writes(KEYS[2])
local is_held = not holder or holder == ARGV[1]
if not is_held then
    redis.call('ZREM', KEYS[1], ARGV[1])
    return {0, unpack(dead_add(KEYS[3], ARGV[4]))}
end
if tonumber(done or -1) < tonumber(ARGV[2]) then
    -- Before the run is over: what is refused here, for want of a right, must not be lost.
    kept = dead_add(KEYS[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7])
end
local ended = leave_run(KEYS[1], KEYS[2], ARGV[1], ARGV[2], 'over', '0', ARGV[3]) and 1 or 0
return {ended, unpack(kept)}
