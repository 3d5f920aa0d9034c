-- Purpose: keep a dead letter, once for each delivery.
-- Defines: dead_add(prefix, meta, about, trace, message), which returns the id that it is kept
--          under, and how many there are
--          prefix: what the keys of dead letters begin with
--          meta: JSON: id, cause, task, delivery, max_age (ms), max_count; and chord and member
--          where its task is a part of a chord
--          about, trace, message: what is kept as it is
-- Commands: TIME HMGET HGET HINCRBY EXISTS HSET ZADD ZCARD PEXPIRE
local function dead_add(prefix, meta, about, trace, message)
    local letter, all = cjson.decode(meta), prefix .. 'all'
    local first = prefix .. 'letter:' .. letter.id
    local known, others = unpack(redis.call('HMGET', first, 'delivery', 'others'))
    local id = letter.id
    if others then
        id = letter.id .. '.' .. others
        if redis.call('HGET', prefix .. 'letter:' .. id, 'delivery') == letter.delivery then
            return {id, redis.call('ZCARD', all)}
        end
    end
    id = letter.id
    if known == letter.delivery then
        return {id, redis.call('ZCARD', all)}
    end
    -- A task that died, and was sent again under the same id: both are kept.
    while known and redis.call('EXISTS', prefix .. 'letter:' .. id) == 1 do
        id = letter.id .. '.' .. redis.call('HINCRBY', first, 'others', 1)
    end
    local time = redis.call('TIME')
    local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
    local kind = letter.cause .. ':' .. letter.task
    redis.call('HSET', prefix .. 'letter:' .. id, 'delivery', letter.delivery, 'kind', kind,
        'at', now, 'about', about, 'traceback', trace, 'message', message)
    redis.call('ZADD', all, now, id)
    redis.call('ZADD', prefix .. 'of:' .. kind, now, id)
    redis.call('HINCRBY', prefix .. 'counts', kind, 1)
    redis.call('HSET', prefix .. 'bounds', 'max_age', letter.max_age,
        'max_count', letter.max_count)
    if letter.chord then
        local chord = prefix .. 'chord:' .. letter.chord
        redis.call('HSET', chord, '@', '1', letter.member, '@' .. id)
        redis.call('PEXPIRE', chord, letter.max_age)
    end
    return {id, redis.call('ZCARD', all)}
end
