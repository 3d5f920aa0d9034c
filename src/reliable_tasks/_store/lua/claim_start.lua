-- Purpose: free the claim of a task that starts, or say why it must not start.
--          Safe to repeat.
-- KEYS[1]  the claim
-- KEYS[2]  replaced: what the key begins with of a task whose call was replaced; its id follows
-- KEYS[3]  where to remember '<owner>:<attempt>' of the one that started last
-- KEYS[4]  followed: what the key begins with that remembers how a followed task ended; its id
--          follows
-- ARGV[1]  owner: the task's id
-- ARGV[2]  attempt of this copy
-- ARGV[3]  ttl of that memory, ms
-- Returns: {1, owner, 0, fence or 0}  free: it starts, or it had started before
--          {2, owner, 0, fence}      a later attempt exists
--          {4, owner, ms to wait, fence}  it is not known yet who has the claim
--          {5, owner, 0, fence}      the call was replaced by that owner's
--          {0, its owner, ms until it lapses, fence}  another task owns the key
-- Uses: claim_confirm in_doubt admit_writes
-- Commands: HMGET GET SET PTTL DEL
local owner, attempt, fence, replaces, since, unconfirmed = unpack(redis.call('HMGET', KEYS[1],
    'owner', 'attempt', 'fence', 'replaces', 'since', 'unconfirmed'))
local started = ARGV[1] .. ':' .. ARGV[2]
if owner ~= ARGV[1] then
    local replaced_by = redis.call('GET', KEYS[2] .. ARGV[1])
    if replaced_by then
        return {5, replaced_by, 0, fence or 0}
    end
    if not owner or redis.call('GET', KEYS[3]) == started then
        return {1, ARGV[1], 0, fence or 0}
    end
    if replaces == ARGV[1] then
        local left = in_doubt(since)
        if left > 0 then
            return {4, owner, left, fence}
        end
        return {1, ARGV[1], 0, fence}
    end
    if owner == unconfirmed then
        -- Perhaps there is no message of that one.
        return {1, ARGV[1], 0, fence}
    end
    return {0, owner, redis.call('PTTL', KEYS[1]), fence}
end
if tonumber(attempt) > tonumber(ARGV[2]) then
    return {2, owner, 0, fence}
end
admit_writes(KEYS[1])
-- It was published, for it is here.
claim_confirm(KEYS[1], KEYS[2])
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[3], started, 'PX', ARGV[3])
redis.call('SET', KEYS[4] .. ARGV[1], 'started', 'XX', 'KEEPTTL')
return {1, owner, 0, fence}
