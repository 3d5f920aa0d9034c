-- Purpose: give a claim back to the task that runs with it, or that ran and comes back, for the one
--          that has taken it over will not run. The end of that run frees it.
-- Defines: claim_give_back(key, replaced)
-- Commands: HMGET HSET HDEL DEL
local function claim_give_back(key, replaced)
    local owner, runner, attempt = unpack(redis.call('HMGET', key, 'owner', 'holder_owner',
        'holder_attempt'))
    redis.call('HSET', key, 'owner', runner or owner, 'attempt', attempt)
    redis.call('HDEL', key, 'holder_owner', 'next_attempt', 'token', 'allowance', 'replaces',
        'replaces_attempt', 'hands_on')
    if runner then
        redis.call('DEL', replaced .. runner)
    end
end
