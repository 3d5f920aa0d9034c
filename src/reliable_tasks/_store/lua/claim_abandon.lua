-- Purpose: take back an acquire or a continuation whose message was not published.
--          Safe to repeat.
-- KEYS[1]  the claim
-- ARGV[1]  owner: the task's id
-- ARGV[2]  token of the publish that failed
-- Returns: 1  taken back; who had the claim before has it again
--          0  nothing to take back: gone, changed since, or started, so published after all
-- Uses: admit_writes
-- Commands: HMGET HSET HDEL DEL
local owner, token, next_attempt, holder, holder_owner, replaces, replaces_attempt =
    unpack(redis.call('HMGET', KEYS[1], 'owner', 'token', 'next_attempt', 'holder',
        'holder_owner', 'replaces', 'replaces_attempt'))
if owner ~= ARGV[1] or token ~= ARGV[2] then
    return 0
end
admit_writes(KEYS[1])
if next_attempt then
    redis.call('HDEL', KEYS[1], 'next_attempt', 'token')
    return 1
end
if replaces then
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
if holder then
    return 0
end
redis.call('DEL', KEYS[1])
return 1
