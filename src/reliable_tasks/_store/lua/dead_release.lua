-- Purpose: note how the replay of a dead letter went, for who was let in by dead_reserve.
--          Safe to repeat.
-- KEYS[1]  what the keys of dead letters begin with
-- KEYS[2]  the dead letter
-- ARGV[1]  its id
-- ARGV[2]  token of the caller
-- ARGV[3]  'sent'; 'doubt', if it may have been sent: the next one sends it under the same id; or
--          'refused', if it was not
-- ARGV[4]  id of the new task, or ''. Who has sent that has sent it, though somebody else was let
--          in since
-- Returns: 1, or 0 if somebody else was let in since, or there is none
-- Uses: admit_writes
-- Commands: TIME HMGET HSET HDEL ZADD ZREM ZCARD
local kind, id, token, replayed, doubted = unpack(redis.call('HMGET', KEYS[2], 'kind', 'replay_id',
    'replay_token', 'replayed', 'replay_doubted'))
if not kind or (token ~= ARGV[2] and not (ARGV[3] == 'sent' and id == ARGV[4])) then
    return 0
end
admit_writes(KEYS[2])
if ARGV[3] == 'doubt' then
    redis.call('HSET', KEYS[2], 'replay_until', '0', 'replay_doubted', '1')
    return 1
end
if ARGV[3] == 'refused' then
    if doubted then
        redis.call('HSET', KEYS[2], 'replay_until', '0')
    else
        redis.call('HDEL', KEYS[2], 'replay_id', 'replay_token', 'replay_until')
    end
    return 1
end
if replayed then
    return 1
end
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
redis.call('ZREM', KEYS[1] .. 'all', ARGV[1])
redis.call('ZREM', KEYS[1] .. 'of:' .. kind, ARGV[1])
redis.call('ZADD', KEYS[1] .. 'replayed', now, ARGV[1])
local left = redis.call('ZCARD', KEYS[1] .. 'of:' .. kind)
if left > 0 then
    redis.call('HSET', KEYS[1] .. 'counts', kind, left)
else
    redis.call('HDEL', KEYS[1] .. 'counts', kind)
end
redis.call('HSET', KEYS[2], 'replayed', now)
return 1
