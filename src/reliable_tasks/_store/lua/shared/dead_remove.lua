-- Purpose: remove a dead letter, or the traces of one that is gone.
-- Defines: dead_remove(prefix, id, key), which returns whether it was there
--          key: its own
-- Commands: HMGET DEL ZREM ZCARD HSET HDEL
local function dead_remove(prefix, id, key)
    local kind, replayed = unpack(redis.call('HMGET', key, 'kind', 'replayed'))
    redis.call('ZREM', prefix .. 'all', id)
    redis.call('ZREM', prefix .. 'replayed', id)
    if not kind then
        return false
    end
    if not replayed then
        redis.call('ZREM', prefix .. 'of:' .. kind, id)
        local left = redis.call('ZCARD', prefix .. 'of:' .. kind)
        if left > 0 then
            redis.call('HSET', prefix .. 'counts', kind, left)
        else
            redis.call('HDEL', prefix .. 'counts', kind)
        end
    end
    redis.call('DEL', key)
    return true
end
