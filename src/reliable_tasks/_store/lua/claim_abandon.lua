-- Purpose: take back an acquire or a continuation whose message was not published. Where it is not
--          known whether it was, the claim is unconfirmed until the message is seen: the next call
--          takes its place.
--          Safe to repeat.
-- KEYS[1]  the claim
-- KEYS[2]  replaced: what the key begins with of a task whose call was replaced; its id follows
-- ARGV[1]  owner: the task's id
-- ARGV[2]  token of the publish that failed
-- ARGV[3]  '1' if the message may be queued all the same
-- Returns: 1  taken back; who had the claim before has it again
--          0  nothing to take back: gone, changed since, or seen by a worker, so published after all
--          2  unconfirmed
-- Uses: admit_writes
-- Commands: HMGET HSET HDEL SET PTTL DEL
local owner, token, next_attempt, holder, holder_owner, replaces, replaces_attempt, hands_on,
    unconfirmed, seen = unpack(redis.call('HMGET', KEYS[1], 'owner', 'token', 'next_attempt',
        'holder', 'holder_owner', 'replaces', 'replaces_attempt', 'hands_on', 'unconfirmed',
        'seen'))
if owner ~= ARGV[1] or token ~= ARGV[2] then
    return 0
end
admit_writes(KEYS[1])
if next_attempt then
    redis.call('HDEL', KEYS[1], 'next_attempt', 'token')
    return 1
end
if replaces then
    if ARGV[3] == '1' and not hands_on and replaces ~= unconfirmed then
        -- Of two that may both be queued one is to run, and the other one's caller had an error.
        -- Where nobody knows of either, whichever comes takes the claim.
        redis.call('SET', KEYS[2] .. owner, replaces, 'PX',
            math.max(redis.call('PTTL', KEYS[1]), 1))
    end
    redis.call('HSET', KEYS[1], 'owner', replaces, 'attempt', replaces_attempt)
    redis.call('HDEL', KEYS[1], 'token', 'replaces', 'replaces_attempt', 'hands_on')
    if holder_owner == replaces then
        redis.call('HDEL', KEYS[1], 'holder_owner')
    end
    if not holder_owner or holder_owner == replaces then
        redis.call('HDEL', KEYS[1], 'allowance')
    end
    return 1
end
if holder or seen then
    return 0
end
if ARGV[3] == '1' or unconfirmed == 'again:' .. owner then
    redis.call('HSET', KEYS[1], 'unconfirmed', owner)
    return 2
end
redis.call('DEL', KEYS[1])
return 1
