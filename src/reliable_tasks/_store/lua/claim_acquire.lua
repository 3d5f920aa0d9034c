-- Purpose: take a free claim for a task that is about to be published.
--          Safe to repeat: a second call with the same token answers as the first did.
-- KEYS[1]  the claim
-- ARGV[1]  owner: the task's id
-- ARGV[2]  attempt: which continuation of the task this is
-- ARGV[3]  token: made once per publish
-- ARGV[4]  ttl: how long the message may wait, ms
-- ARGV[5]  task: the task's name, for people who look
-- Returns: {1, owner, ttl in ms, fence}           acquired
--          {0, its owner, ms until it lapses, fence}  somebody else's
-- Commands: TIME HMGET HSET PEXPIRE PTTL
local owner, token, fence = unpack(redis.call('HMGET', KEYS[1], 'owner', 'token', 'fence'))
if owner then
    if owner == ARGV[1] and token == ARGV[3] then
        return {1, owner, redis.call('PTTL', KEYS[1]), fence}
    end
    return {0, owner, redis.call('PTTL', KEYS[1]), fence}
end
-- A fence must keep growing after its claim is gone, so it starts at the server's clock.
local now = redis.call('TIME')
fence = string.format('%.0f', now[1] * 1000000 + now[2])
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'attempt', ARGV[2], 'token', ARGV[3],
    'fence', fence, 'task', ARGV[5], 'since', string.format('%.0f', now[1] * 1000))
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return {1, ARGV[1], tonumber(ARGV[4]), fence}
