-- Purpose: keep a dead letter, once for each delivery.
-- Defines: dead_add(prefix, meta, about, trace, message), which returns the id that it is kept
--          under, and how many there are
--          prefix: what the keys of dead letters begin with
--          meta: JSON: id, cause, task, delivery, max_age (ms), max_count; and chord and member
--          where its task is a part of a chord
--          about, trace, message: what is kept as it is; without them nothing is kept, and
--          what is returned is empty unless it was kept before
-- Commands: TIME HMGET HGET HINCRBY EXISTS HSET ZADD ZCARD PEXPIRE
local function dead_add(prefix, meta, about, trace, message)
    local letter, all = cjson.decode(meta), prefix .. 'all'
    local first = prefix .. 'letter:' .. letter.id
    local others = tonumber(redis.call('HGET', first, 'others') or 0)
    local id
    -- A task that died, and was sent again under the same id: all are kept. A repetition is of one
    -- of the latest.
    for number = math.max(others - 20, 0), others do
        local one = number == 0 and letter.id or letter.id .. '.' .. number
        local known, at, replayed = unpack(
            redis.call('HMGET', prefix .. 'letter:' .. one, 'delivery', 'at', 'replayed'))
        -- What is told by its content alone can have been sent again since.
        local is_another = replayed and string.sub(letter.delivery, 1, 8) == 'content:'
        if known == letter.delivery and not is_another then
            if at then
                return {one, redis.call('ZCARD', all)}
            end
            -- The rest of it was refused.
            id = one
        end
    end
    if not about then
        return {}
    end
    if not id then
        id = letter.id
        local is_known = redis.call('EXISTS', first) == 1
        while is_known and redis.call('EXISTS', prefix .. 'letter:' .. id) == 1 do
            id = letter.id .. '.' .. redis.call('HINCRBY', first, 'others', 1)
        end
    end
    local time = redis.call('TIME')
    local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
    local kind = letter.cause .. ':' .. letter.task
    local key, of = prefix .. 'letter:' .. id, prefix .. 'of:' .. kind
    redis.call('HSET', key, 'delivery', letter.delivery, 'kind', kind, 'about', about,
        'traceback', trace, 'message', message)
    redis.call('HSET', prefix .. 'bounds', 'max_age', letter.max_age,
        'max_count', letter.max_count)
    if letter.chord then
        local chord = prefix .. 'chord:' .. letter.chord
        redis.call('HSET', chord, '@', '1', letter.member, '@' .. id)
        redis.call('PEXPIRE', chord, letter.max_age)
    end
    redis.call('ZADD', all, now, id)
    redis.call('ZADD', of, now, id)
    redis.call('HSET', prefix .. 'counts', kind, redis.call('ZCARD', of))
    -- Last: what is refused before, for want of a right, is done by a repetition.
    redis.call('HSET', key, 'at', now)
    return {id, redis.call('ZCARD', all)}
end
