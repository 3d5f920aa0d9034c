-- Purpose: end a delivery and keep its message as a dead letter, also where memory is short.
--          Safe to repeat.
-- KEYS[1]  unacked: hash, tag -> [message, exchange, routing key]
-- KEYS[2]  unacked_index: sorted set, tag -> seconds
-- KEYS[3]  leases: sorted set, tag -> end of the lease, ms
-- KEYS[4]  the task's run
-- KEYS[5]  what the keys of dead letters begin with
-- ARGV[1]  tag of the delivery
-- ARGV[2]  started: '1' if a crash was counted ahead when the copy was started
-- ARGV[3]  remembers: for how long to know that the task is over, ms, where it had other
--          copies, else '0'
-- ARGV[4]  meta: JSON, as dead_add has it
-- ARGV[5]  about: what is known of it
-- ARGV[6]  its traceback
-- ARGV[7]  the message
-- Returns: {1, id, how many there are}
--          {1}  nothing is kept: it had published its task's continuation
--          {0}  the delivery was over: somebody else has the message, or had it
--          {0, id, how many there are}  it was over, for all this has been done before
-- Uses: dead_add release_run admit_writes
-- Commands: HEXISTS HDEL ZREM
local unacked, index, leases = KEYS[1], KEYS[2], KEYS[3]
admit_writes(leases)
local kept = {}
local was_held = redis.call('HEXISTS', unacked, ARGV[1])
if was_held == 0 then
    kept = dead_add(KEYS[5], ARGV[4])
elseif redis.call('HEXISTS', KEYS[4], 'continued:' .. ARGV[1]) == 0 then
    -- Before it is taken away: what is refused here, for want of a right, must not be lost.
    kept = dead_add(KEYS[5], ARGV[4], ARGV[5], ARGV[6], ARGV[7])
end
redis.call('ZREM', leases, ARGV[1])
redis.call('HDEL', unacked, ARGV[1])
redis.call('ZREM', index, ARGV[1])
release_run(KEYS[4], ARGV[1], ARGV[2], true, tonumber(ARGV[3]))
return {was_held, unpack(kept)}
