-- Purpose: let the owner publish its own continuation (a retry, a replacement): the claim
--          stays, and waits for it. Earlier copies count as continued only when the run that
--          published has ended, or the continuation has started: before, the publish may fail
--          or its process die, and then nobody but an earlier copy is left to run.
--          Safe to repeat.
-- KEYS[1]  the claim
-- ARGV[1]  owner: the task's id
-- ARGV[2]  attempt of the continuation
-- ARGV[3]  token: made once per publish
-- ARGV[4]  ttl: how long the continuation may wait, ms
-- ARGV[5]  task: the task's name, for people who look
-- ARGV[6]  holder: the token of the run that continues, or '' where it is not known
-- Returns: {1, owner, ttl in ms, fence}           continued, or taken anew because it had lapsed
--          {0, its owner, ms until it lapses, fence}  another task or another run has it
-- Commands: TIME HMGET HSET PEXPIRE PTTL
local owner, fence, holder, attempt =
    unpack(redis.call('HMGET', KEYS[1], 'owner', 'fence', 'holder', 'attempt'))
local now = redis.call('TIME')
if not owner then
    fence = string.format('%.0f', now[1] * 1000000 + now[2])
    redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'attempt', ARGV[2] - 1, 'fence', fence,
        'task', ARGV[5], 'since', string.format('%.0f', now[1] * 1000))
elseif owner ~= ARGV[1]
    or tonumber(attempt) >= tonumber(ARGV[2])
    or (holder and ARGV[6] ~= '' and holder ~= ARGV[6]) then
    return {0, owner, redis.call('PTTL', KEYS[1]), fence}
end
redis.call('HSET', KEYS[1], 'next_attempt', ARGV[2], 'token', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return {1, ARGV[1], tonumber(ARGV[4]), fence}
