-- Purpose: free the claim of a task that starts, or say why it must not start.
--          Safe to repeat.
-- KEYS[1]  the claim
-- KEYS[2]  replaced: hash, task whose call was replaced -> the task that has its place
-- ARGV[1]  owner: the task's id
-- ARGV[2]  attempt of this copy
-- Returns: {1, owner, 0, fence or 0}  free: it starts
--          {2, owner, 0, fence}      a later attempt exists
--          {5, owner, 0, fence}      the call was replaced by that owner's
--          {0, its owner, ms until it lapses, fence}  another task owns the key
-- Commands: HMGET HGET PTTL DEL
local owner, attempt, fence = unpack(redis.call('HMGET', KEYS[1], 'owner', 'attempt', 'fence'))
if owner ~= ARGV[1] then
    local replaced_by = redis.call('HGET', KEYS[2], ARGV[1])
    if replaced_by then
        return {5, replaced_by, 0, fence or 0}
    end
    if owner then
        return {0, owner, redis.call('PTTL', KEYS[1]), fence}
    end
    return {1, ARGV[1], 0, 0}
end
if tonumber(attempt) > tonumber(ARGV[2]) then
    return {2, owner, 0, fence}
end
redis.call('DEL', KEYS[1])
return {1, owner, 0, fence}
