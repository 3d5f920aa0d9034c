-- Purpose: let a task wait for the one that owns its key, or learn how that one ended. Who took
--          the place of a followed task is followed in its stead. In this order:
--          the task has the key itself                           3
--          it follows nobody yet, and only asks                  0
--          the followed task has ended, and has the key no more  2
--          it has given its key up, and goes on                  1
--          nobody has the key: this task is to take it           0
--          somebody has it                                       1
--          Safe to repeat.
-- KEYS[1]  the claim
-- KEYS[2]  followed: what the key begins with that remembers how a followed task ended; its id
--          follows. There stands '' while it is queued or runs, 'started' where it gave its key up
--          when it started, its state when it has ended, and '>until:id' where it follows itself
-- ARGV[1]  the task's id
-- ARGV[2]  id of the task that it follows, unless it follows another one by now; '' if it may
--          follow somebody already; its own if it is to follow whoever has the key
-- ARGV[3]  until when it follows, ms by the server's clock, or '' for the ttl from now on
-- ARGV[4]  ttl, ms
-- Returns: {0, followed, ms left, until, ''}     nobody has the key, and no end is known
--          {1, followed, ms left, until, ''}     that task owns it, or runs
--          {2, followed, ms left, until, state}  that task has ended
--          {3, '', ms left, until, ''}           the key is the task's own
-- Uses: admit_writes
-- Commands: TIME HMGET GET SET PTTL
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local mine, ttl = ARGV[1], tonumber(ARGV[4])
local owner, runner, window, unconfirmed = unpack(redis.call('HMGET', KEYS[1], 'owner',
    'holder_owner', 'window', 'unconfirmed'))
if owner and owner == unconfirmed and owner ~= mine then
    -- Perhaps there is no message of that one.
    owner = nil
end

local function read(id)
    local state = redis.call('GET', KEYS[2] .. id)
    local until_then, next_one = string.match(state or '', '^>(%d*):(.*)$')
    return not next_one and state, next_one, tonumber(until_then)
end

local _, before, since = read(mine)
local ends = tonumber(ARGV[3]) or since or now + ttl
local followed = before or ARGV[2]

local function answer(code, state)
    return {code, followed, ends - now, string.format('%.0f', ends), state}
end

local function note(id, what)
    admit_writes(KEYS[1])
    -- Longer than anybody follows, so that each learns that its time is over.
    redis.call('SET', KEYS[2] .. id, what, 'PX',
        math.max(2 * ttl, redis.call('PTTL', KEYS[2] .. id)))
end

if owner == mine then
    followed = ''
    return answer(3, '')
end
if ARGV[2] == mine then
    followed = mine
elseif followed == '' then
    followed = mine
    return answer(0, '')
end
local state
if followed ~= mine then
    -- Each has the place of the one before, so they are few.
    for _ = 1, 100 do
        local next_one
        state, next_one = read(followed)
        if not next_one or followed == owner or followed == mine then
            break
        end
        followed = next_one
    end
end

local function has_ended()
    -- An id can be used again: what owns the key has ended only where nobody frees that.
    return state and string.match(state, '^%u') and followed ~= mine
        and (owner ~= followed or window)
end

if has_ended() then
    return answer(2, state)
end
if state == 'started' and followed ~= mine then
    return answer(1, '')
end
if not owner then
    if followed ~= mine then
        -- Others that follow the same one are to follow this one.
        note(followed, '>:' .. mine)
    elseif ARGV[2] ~= mine then
        -- It was told so before.
        followed = before or ARGV[2]
    end
    if not before then
        note(mine, '')
    end
    return answer(0, '')
end
if owner ~= followed and runner ~= followed then
    if followed ~= mine then
        note(followed, '>:' .. owner)
    end
    note(mine, '>' .. string.format('%.0f', ends) .. ':' .. owner)
    followed = owner
    state = read(followed)
    if has_ended() then
        return answer(2, state)
    end
end
note(followed, state == 'started' and state or '')
return answer(1, '')
