-- Purpose: forget a worker: it has ended and handed back what it held, or it is dead.
-- KEYS[1]  beats: sorted set, worker -> its last beat, ms
-- KEYS[2]  keepers: hash, worker -> how to tell its connection
-- KEYS[3]  sweeper: hash
-- ARGV[1]  worker
-- Returns: nothing of interest
-- Commands: ZREM HDEL HGET HSET
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
if redis.call('HGET', KEYS[3], 'worker') == ARGV[1] then
    redis.call('HSET', KEYS[3], 'until', '0')
end
return 0
