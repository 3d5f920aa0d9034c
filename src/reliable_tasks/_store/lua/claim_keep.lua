-- Purpose: keep the claim of a message that waits in a worker for longer than it may in a queue; or
--          say who has it. A message that is seen was published.
--          Safe to repeat.
-- KEYS[1]  the claim
-- KEYS[2]  replaced: what the key begins with of a task whose call was replaced; its id follows
-- ARGV[1]  owner: the task's id
-- ARGV[2]  ttl, ms, or 0 where it lives for no longer than it does
-- Returns: {1, owner, 0, 0}           it is that task's
--          {4, owner, ms to wait, 0}  it is not known yet who has it
--          {5, owner, 0, 0}           the call was replaced by that owner's
--          {0, owner or '', 0, 0}     another task's, or nobody's
-- Uses: admit_writes claim_confirm in_doubt
-- Commands: HMGET HSET GET PTTL PEXPIRE
local owner, replaces, since = unpack(redis.call('HMGET', KEYS[1], 'owner', 'replaces', 'since'))
if owner == ARGV[1] then
    admit_writes(KEYS[1])
    claim_confirm(KEYS[1], KEYS[2])
    redis.call('HSET', KEYS[1], 'seen', '1')
    redis.call('PEXPIRE', KEYS[1], math.max(tonumber(ARGV[2]), redis.call('PTTL', KEYS[1])))
    return {1, owner, 0, 0}
end
local replaced_by = redis.call('GET', KEYS[2] .. ARGV[1])
if replaced_by then
    return {5, replaced_by, 0, 0}
end
if owner and replaces == ARGV[1] then
    local left = in_doubt(since)
    if left > 0 then
        return {4, owner, left, 0}
    end
end
return {0, owner or '', 0, 0}
