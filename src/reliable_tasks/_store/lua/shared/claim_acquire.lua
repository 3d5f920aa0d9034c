-- Purpose: what the script claim_acquire does; its header is the contract.
-- Defines: claim_acquire(key, replaced, mine, my_attempt, my_token, ttl, task, how, my_holder)
-- Commands: TIME HMGET HSET HDEL PEXPIRE PTTL DEL
local function claim_acquire(key, replaced, mine, my_attempt, my_token, ttl, task, how, my_holder)
    local owner, token, fence, attempt, holder, holder_owner, replaces, unconfirmed =
        unpack(redis.call('HMGET', key, 'owner', 'token', 'fence', 'attempt', 'holder',
            'holder_owner', 'replaces', 'unconfirmed'))
    local lives = math.max(tonumber(ttl), redis.call('PTTL', key))
    local in_doubt = owner and owner == unconfirmed
    local call = string.match(my_token, '^.+ ')
    local is_same_call = token == my_token or (call and token and string.match(token, '^.+ ') == call)
    if owner == mine and is_same_call and not in_doubt then
        if token ~= my_token then
            -- Its message may be queued by either of them, so neither takes it back.
            redis.call('HSET', key, 'token', call)
        end
        -- A write, though a small one: WAIT waits for the last write of its own connection.
        if how == 'window' then
            lives = redis.call('PTTL', key)
        end
        redis.call('PEXPIRE', key, lives)
        if replaces then
            return {2, replaces, tonumber(ttl), fence}
        end
        return {1, owner, tonumber(ttl), fence}
    end
    local hands_on = owner and my_holder ~= '' and holder == my_holder and not holder_owner
    if owner == mine and in_doubt then
        -- Its caller tries again, and what it tried before stays in doubt.
        redis.call('HSET', key, 'token', my_token, 'attempt', my_attempt, 'unconfirmed',
            'again:' .. mine)
        redis.call('PEXPIRE', key, lives)
        return {1, owner, tonumber(ttl), fence}
    end
    if owner and (owner == mine or not (hands_on or in_doubt or how == 'replace')) then
        return {0, owner, redis.call('PTTL', key), fence}
    end
    local time = redis.call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    -- A fence must keep growing after its claim is gone, so it starts at the server's clock.
    fence = string.format('%.0f', math.max(tonumber(fence or 0) + 1, time[1] * 1000000 + time[2]))
    if owner then
        -- Until it is certain that the message is queued. One that is not may have come between.
        if not replaces then
            redis.call('HSET', key, 'replaces', owner, 'replaces_attempt', attempt)
            if hands_on then
                redis.call('HSET', key, 'hands_on', '1')
            end
        end
        if holder and not holder_owner then
            redis.call('HSET', key, 'holder_owner', owner)
        end
        redis.call('HSET', key, 'allowance', ttl)
        redis.call('HDEL', key, 'next_attempt', 'seen')
    elseif how == 'window' then
        redis.call('HSET', key, 'window', '1')
    end
    redis.call('HSET', key, 'owner', mine, 'attempt', my_attempt, 'token', my_token,
        'fence', fence, 'task', task, 'since', string.format('%.0f', now))
    redis.call('PEXPIRE', key, lives)
    redis.call('DEL', replaced .. mine)
    if owner then
        return {2, owner, tonumber(ttl), fence}
    end
    return {1, mine, tonumber(ttl), fence}
end
