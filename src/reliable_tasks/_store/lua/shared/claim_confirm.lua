-- Purpose: note that a message is queued whose task took the claim over from another one. If that
--          one's call was replaced, its message ends unrun when it arrives.
-- Defines: claim_confirm(key, replaced)
-- Commands: HMGET HSET HDEL PEXPIRE PTTL
local function claim_confirm(key, replaced)
    local owner, replaces, hands_on = unpack(redis.call('HMGET', key, 'owner', 'replaces',
        'hands_on'))
    if not replaces then
        return
    end
    if not hands_on then
        redis.call('HSET', replaced, replaces, owner)
        redis.call('PEXPIRE', replaced, math.max(redis.call('PTTL', key),
            redis.call('PTTL', replaced)))
    end
    redis.call('HDEL', key, 'replaces', 'replaces_attempt', 'hands_on')
end
