-- Purpose: note that the message is queued of a task that took a claim over.
--          Safe to repeat.
-- KEYS[1]  the claim
-- KEYS[2]  replaced: hash, task whose call was replaced -> the task that has its place
-- ARGV[1]  owner: the task's id
-- Returns: nothing
-- Uses: claim_confirm
-- Commands: HGET HSET PEXPIRE PTTL
local owner = redis.call('HGET', KEYS[1], 'owner')
if owner == ARGV[1] then
    claim_confirm(KEYS[1], KEYS[2])
elseif owner then
    -- Another call has taken its place meanwhile, which could not know that there is a message.
    redis.call('HSET', KEYS[2], ARGV[1], owner)
    redis.call('PEXPIRE', KEYS[2], math.max(redis.call('PTTL', KEYS[1]),
        redis.call('PTTL', KEYS[2])))
end
