-- Purpose: end the delivery of a message that nobody can read, and keep the message where
--          somebody can look at it, also where memory is short. A repetition keeps it twice.
-- KEYS[1]  unacked: hash, tag -> [message, exchange, routing key]
-- KEYS[2]  unacked_index: sorted set, tag -> seconds
-- KEYS[3]  leases: sorted set, tag -> end of the lease, ms
-- KEYS[4]  the list of such messages
-- ARGV[1]  tag of the delivery
-- ARGV[2]  message, as far as it is known
-- Returns: how many are kept by now
-- Uses: admit_writes
-- Commands: ZREM HDEL RPUSH
local unacked, index, leases = KEYS[1], KEYS[2], KEYS[3]
admit_writes(leases)
local kept = redis.call('RPUSH', KEYS[4], ARGV[2])
redis.call('ZREM', leases, ARGV[1])
redis.call('ZREM', index, ARGV[1])
redis.call('HDEL', unacked, ARGV[1])
return kept
