-- Purpose: keep the message of a part of a chord that has succeeded, for as long as another part
--          may die: then the whole chord can be replayed. Safe to repeat.
-- KEYS[1]  what is kept of the chord: hash, task id -> its message, or @ and the dead letter; '#' ->
--          how many parts it has, and '@' if one of them has died
-- ARGV[1]  id of the task; '#' for the number of parts
-- ARGV[2]  its message, or that number
-- ARGV[3]  ttl: for how long if none of them dies, ms
-- Returns: 1, or 0 if nothing is kept any more: all parts have succeeded
-- Uses: admit_writes
-- Commands: HSET HGET HLEN HEXISTS DEL PEXPIRE
admit_writes(KEYS[1])
local known = redis.call('HGET', KEYS[1], ARGV[1])
-- One that has died is not alive again because a copy of its message was acknowledged later.
if not known or string.sub(known, 1, 1) ~= '@' then
    redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
end
if redis.call('HEXISTS', KEYS[1], '@') == 1 then
    return 1
end
local size = redis.call('HGET', KEYS[1], '#')
if size and redis.call('HLEN', KEYS[1]) > tonumber(size) then
    redis.call('DEL', KEYS[1])
    return 0
end
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
