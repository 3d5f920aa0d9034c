-- Purpose: take back an acquire or a continuation whose message was not published.
--          Safe to repeat.
-- KEYS[1]  the claim
-- ARGV[1]  owner: the task's id
-- ARGV[2]  token of the publish that failed
-- ARGV[3]  attempt to return to, or '' to free the claim
-- Returns: 1  taken back
--          0  nothing to take back: gone, changed since, or started, so published after all
-- Commands: HMGET HSET DEL
local owner, token, attempt, holder_attempt =
    unpack(redis.call('HMGET', KEYS[1], 'owner', 'token', 'attempt', 'holder_attempt'))
if owner ~= ARGV[1] or token ~= ARGV[2] or holder_attempt == attempt then
    return 0
end
if ARGV[3] == '' then
    redis.call('DEL', KEYS[1])
else
    redis.call('HSET', KEYS[1], 'attempt', ARGV[3], 'token', '')
end
return 1
