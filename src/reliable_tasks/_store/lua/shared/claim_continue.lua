-- Purpose: what the script claim_continue does; its header is the contract.
-- Defines: claim_continue(key, mine, my_attempt, my_token, ttl, task, my_holder)
-- Commands: TIME HMGET HSET PEXPIRE PTTL
local function claim_continue(key, mine, my_attempt, my_token, ttl, task, my_holder)
    local owner, fence, holder, attempt, token, next_attempt = unpack(redis.call('HMGET', key,
        'owner', 'fence', 'holder', 'attempt', 'token', 'next_attempt'))
    local time = redis.call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    if not owner then
        fence = string.format('%.0f', time[1] * 1000000 + time[2])
        redis.call('HSET', key, 'owner', mine, 'attempt', my_attempt - 1, 'fence', fence,
            'task', task, 'since', string.format('%.0f', now))
    elseif owner == mine and token == my_token
        and tonumber(next_attempt or attempt) == tonumber(my_attempt) then
        -- This publish has continued it: its reply was lost, or it goes to several queues.
        redis.call('PEXPIRE', key, ttl)
        return {1, mine, tonumber(ttl), fence}
    elseif owner ~= mine
        or tonumber(attempt) >= tonumber(my_attempt)
        or (holder and my_holder ~= '' and holder ~= my_holder) then
        return {0, owner, redis.call('PTTL', key), fence}
    end
    redis.call('HSET', key, 'next_attempt', my_attempt, 'token', my_token)
    redis.call('PEXPIRE', key, ttl)
    return {1, mine, tonumber(ttl), fence}
end
