-- Purpose: keep the message of a part of a chord that has succeeded, for as long as another part
--          may die: then the whole chord can be replayed. Safe to repeat.
-- KEYS[1]  what is kept of the chord: hash, task id -> its message, or @ and the dead letter
-- ARGV[1]  id of the task
-- ARGV[2]  its message
-- ARGV[3]  size: how many parts the chord has; when all have succeeded, nothing is kept
-- ARGV[4]  ttl: for how long if none of them dies, ms
-- Returns: how many parts are kept
-- Uses: admit_writes
-- Commands: HSET HLEN HEXISTS DEL PEXPIRE
admit_writes(KEYS[1])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
local count = redis.call('HLEN', KEYS[1])
if redis.call('HEXISTS', KEYS[1], '@') == 1 then
    return count - 1
end
if count >= tonumber(ARGV[3]) then
    redis.call('DEL', KEYS[1])
    return 0
end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return count
