-- Purpose: what the script claim_acquire does; its header is the contract.
-- Defines: claim_acquire(key, mine, my_attempt, my_token, ttl, task)
-- Commands: TIME HMGET HSET PEXPIRE PTTL
local function claim_acquire(key, mine, my_attempt, my_token, ttl, task)
    local owner, token, fence = unpack(redis.call('HMGET', key, 'owner', 'token', 'fence'))
    if owner then
        if owner == mine and token == my_token then
            -- A write, though a small one: WAIT waits for the last write of its own connection.
            redis.call('PEXPIRE', key, ttl)
            return {1, owner, tonumber(ttl), fence}
        end
        return {0, owner, redis.call('PTTL', key), fence}
    end
    -- A fence must keep growing after its claim is gone, so it starts at the server's clock.
    local now = redis.call('TIME')
    fence = string.format('%.0f', now[1] * 1000000 + now[2])
    redis.call('HSET', key, 'owner', mine, 'attempt', my_attempt, 'token', my_token,
        'fence', fence, 'task', task, 'since', string.format('%.0f', now[1] * 1000))
    redis.call('PEXPIRE', key, ttl)
    return {1, mine, tonumber(ttl), fence}
end
