-- Purpose: take back an acquire or a continuation whose message was not published.
--          Safe to repeat.
-- KEYS[1]  the claim
-- ARGV[1]  owner: the task's id
-- ARGV[2]  token of the publish that failed
-- Returns: 1  taken back
--          0  nothing to take back: gone, changed since, or started, so published after all
-- Commands: HMGET HDEL DEL
local owner, token, next_attempt, holder =
    unpack(redis.call('HMGET', KEYS[1], 'owner', 'token', 'next_attempt', 'holder'))
if owner ~= ARGV[1] or token ~= ARGV[2] then
    return 0
end
if next_attempt then
    redis.call('HDEL', KEYS[1], 'next_attempt', 'token')
    return 1
end
if holder then
    return 0
end
redis.call('DEL', KEYS[1])
return 1
