-- Purpose: say whether a claim is that of a message: its task owns the key, by this very attempt,
--          which is the latest that was published, and not for a window of time, which nobody ends.
-- Defines: claim_is_of(key, owner, attempt), which returns whether it is, and of its holder the
--          token, the tag of its delivery and the end of its lease, ms
-- Commands: HMGET
local function claim_is_of(key, owner, attempt)
    local owns, known, continued, window, holder, delivery, ends = unpack(redis.call('HMGET', key,
        'owner', 'attempt', 'next_attempt', 'window', 'holder', 'delivery', 'lease_end'))
    local is_of = owns == owner and tonumber(continued or known) == tonumber(attempt) and not window
    return is_of, holder, delivery, ends
end
