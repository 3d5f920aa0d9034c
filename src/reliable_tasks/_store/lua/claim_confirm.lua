-- Purpose: note that the message is queued of a task that took a claim over.
--          Safe to repeat.
-- KEYS[1]  the claim
-- KEYS[2]  replaced: what the key begins with of a task whose call was replaced; its id follows
-- KEYS[3]  '<owner>:<attempt>' of the task that started last, where that freed the claim
-- ARGV[1]  owner: the task's id
-- ARGV[2]  attempt: which continuation of the task this is
-- Returns: nothing
-- Uses: claim_confirm admit_writes
-- Commands: HMGET GET HSET HDEL SET PTTL
local owner, replaces, hands_on = unpack(redis.call('HMGET', KEYS[1], 'owner', 'replaces',
    'hands_on'))
admit_writes(KEYS[1])
if owner == ARGV[1] then
    claim_confirm(KEYS[1], KEYS[2])
elseif not owner
    or string.match(redis.call('GET', KEYS[3]) or '', '^(.*):%d+$') == ARGV[1] then
    -- It has started already.
    return
elseif not replaces then
    -- Another call has taken its place meanwhile, which could not know that there is a message.
    redis.call('SET', KEYS[2] .. ARGV[1], owner, 'PX', math.max(redis.call('PTTL', KEYS[1]), 1))
elseif replaces ~= ARGV[1] then
    -- That call may still fail: then the claim is given back to this task, and not to the one
    -- that it has replaced for certain.
    if not hands_on then
        redis.call('SET', KEYS[2] .. replaces, ARGV[1], 'PX',
            math.max(redis.call('PTTL', KEYS[1]), 1))
    end
    redis.call('HSET', KEYS[1], 'replaces', ARGV[1], 'replaces_attempt', ARGV[2])
    redis.call('HDEL', KEYS[1], 'hands_on')
end
