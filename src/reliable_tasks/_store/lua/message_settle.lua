-- Purpose: end a delivery: acknowledge or discard its message. A tag belongs to one delivery,
--          so one that was taken back meanwhile settles nothing.
--          Safe to repeat.
-- KEYS[1]  unacked: hash, tag -> [message, exchange, routing key]
-- KEYS[2]  unacked_index: sorted set, tag -> seconds
-- KEYS[3]  leases: sorted set, tag -> end of the lease, ms
-- KEYS[4]  the task's run
-- ARGV[1]  tag of the delivery
-- ARGV[2]  started: '1' if a crash was counted ahead when the copy was started
-- ARGV[3]  remembers: for how long to know that the task is over, ms, where it had other
--          copies, else '0'
-- Returns: 1  settled
--          0  the delivery was over: somebody else has the message, or had it
-- Uses: release_run
-- Commands: HDEL ZREM
redis.call('ZREM', KEYS[3], ARGV[1])
-- Not the lease: a stock worker that takes the message back does not know of it.
local settled = redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
release_run(KEYS[4], ARGV[1], ARGV[2], true, tonumber(ARGV[3]))
return settled
