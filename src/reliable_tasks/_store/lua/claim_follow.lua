-- Purpose: let a task wait for the one that owns its key, or learn how that one ended. Who took
--          the place of a followed task is followed in its stead.
--          Safe to repeat.
-- KEYS[1]  the claim
-- KEYS[2]  followed: what the key begins with that remembers how a followed task ended; its id
--          follows. There stands '' while it is queued or runs, 'started' where it gave its key up
--          when it started, its state when it has ended, and '>until:id' where it follows itself
-- ARGV[1]  the task's id
-- ARGV[2]  id of the task that it follows; its own if that is the owner, whoever it is; '' if it
--          may follow somebody already
-- ARGV[3]  until when it follows, ms by the server's clock, or '' for the ttl from now on
-- ARGV[4]  ttl, ms
-- Returns: {0, followed, ms left, until, ''}     nobody has the key, and no end is known
--          {1, followed, ms left, until, ''}     that task owns it, or runs
--          {2, followed, ms left, until, state}  that task has ended
--          {3, '', ms left, until, ''}           the key is the task's own
-- Commands: TIME HMGET GET SET PTTL
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local mine, followed, ends, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local begins = followed ~= ''
if not begins then
    followed = mine
end
local owner, runner = unpack(redis.call('HMGET', KEYS[1], 'owner', 'holder_owner'))

local function answer(code, state)
    ends = ends or now + ttl
    return {code, followed, ends - now, string.format('%.0f', ends), state}
end

if owner == mine then
    followed = ''
    return answer(3, '')
end
local state
-- Each has the place of the one before, so they are few.
for _ = 1, 100 do
    state = redis.call('GET', KEYS[2] .. followed)
    local until_then, next_one = string.match(state or '', '^>(%d*):(.*)$')
    if not next_one then
        break
    end
    if followed == mine then
        ends = ends or tonumber(until_then)
    end
    state, followed = nil, next_one
    if followed == owner then
        state = redis.call('GET', KEYS[2] .. followed)
        break
    end
end
if followed ~= mine and state and string.match(state, '^%u') then
    return answer(2, state)
end
if state ~= 'started' then
    if not owner then
        return answer(0, '')
    end
    if followed == mine and not begins then
        return answer(0, '')
    end
    if owner ~= followed and runner ~= followed then
        local until_then = ''
        if followed == mine then
            ends = ends or now + ttl
            until_then = string.format('%.0f', ends)
        end
        -- Longer than it follows, so that it learns that its time is over.
        redis.call('SET', KEYS[2] .. followed, '>' .. until_then .. ':' .. owner, 'PX', 2 * ttl)
        followed = owner
        state = redis.call('GET', KEYS[2] .. followed)
    end
    if not state or string.sub(state, 1, 1) == '>' then
        state = ''
    end
    redis.call('SET', KEYS[2] .. followed, state, 'PX',
        math.max(2 * ttl, redis.call('PTTL', KEYS[2] .. followed)))
end
return answer(1, '')
