-- Purpose: note that a message is queued whose task has the claim. If it took that over from
--          another one, whose call it replaced, that one's message ends unrun when it arrives.
-- Defines: claim_confirm(key, replaced)
-- Commands: HMGET SET HDEL PTTL
local function claim_confirm(key, replaced)
    local owner, replaces, hands_on = unpack(redis.call('HMGET', key, 'owner', 'replaces',
        'hands_on'))
    redis.call('HDEL', key, 'unconfirmed')
    if not replaces then
        return
    end
    if not hands_on then
        -- The message waits for no longer than its claim would have.
        redis.call('SET', replaced .. replaces, owner, 'PX', math.max(redis.call('PTTL', key), 1))
    end
    redis.call('HDEL', key, 'replaces', 'replaces_attempt', 'hands_on')
end
