-- Purpose: say whether a call would find its key taken, before its message is made.
-- KEYS[1]  the claim
-- KEYS[2]  leases of messages: sorted set, tag -> end of the lease, ms
-- ARGV[1]  ttl: how long the message of such a call may wait, ms
-- Returns: {1, '', 0, 0}                       it is free, or the next call takes its place
--          {0, its owner, ms until it lapses, fence}  it is taken
-- Uses: claim_mourn
-- Commands: HMGET PTTL
claim_mourn(KEYS[1], KEYS[2], ARGV[1])
local owner, fence, unconfirmed = unpack(redis.call('HMGET', KEYS[1], 'owner', 'fence',
    'unconfirmed'))
if not owner or owner == unconfirmed then
    return {1, '', 0, 0}
end
return {0, owner, redis.call('PTTL', KEYS[1]), fence}
