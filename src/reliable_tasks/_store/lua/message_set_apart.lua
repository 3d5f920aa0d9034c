-- Purpose: end the delivery of a message that nobody can read, and keep the message where
--          somebody can look at it. Where memory is short it works too, for what it frees comes
--          first. A repetition keeps the message twice.
-- KEYS[1]  unacked: hash, tag -> [message, exchange, routing key]
-- KEYS[2]  unacked_index: sorted set, tag -> seconds
-- KEYS[3]  leases: sorted set, tag -> end of the lease, ms
-- KEYS[4]  the list of such messages
-- ARGV[1]  tag of the delivery
-- ARGV[2]  message, as far as it is known
-- Returns: how many are kept by now
-- Commands: ZREM HDEL RPUSH
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[1], ARGV[1])
return redis.call('RPUSH', KEYS[4], ARGV[2])
