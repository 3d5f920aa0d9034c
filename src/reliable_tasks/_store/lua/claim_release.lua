-- Purpose: end a run, or a task that never ran: free the claim, or keep it for the copy that
--          follows (a continuation that is published already, or the same copy again).
-- KEYS[1]  the claim
-- KEYS[2]  where to remember '<owner>:<attempt>' of a task that was continued
-- KEYS[3]  replaced: what the key begins with of a task whose call was replaced; its id follows
-- KEYS[4]  leases of messages: sorted set, tag -> end of the lease, ms
-- KEYS[5]  followed: what the key begins with that remembers how a followed task ended; its id
--          follows
-- ARGV[1]  owner: the task's id
-- ARGV[2]  attempt of the copy that ends
-- ARGV[3]  holder: its token
-- ARGV[4]  ttl: how long the same copy may wait in the queue, ms, or 0 if it does not go back
-- ARGV[5]  '1' if the copy may have ended before it entered: then a claim that nobody holds
--          is its own too; '0' if only the holder may release
-- ARGV[6]  ttl of that memory, ms: as long as a copy of an earlier attempt can come back; or 0
-- ARGV[7]  state that the task ended in, for those that follow it, or ''
-- ARGV[8]  ttl, ms, of what is noted of that, or '' to note it only if somebody follows
-- Returns: {1, owner}      freed
--          {2, owner}      kept for what follows: its copy, its continuation, or the task that
--                          has its place
--          {3, ''}         it had lapsed already
--          {0, its owner}  not ours: another task's, or another run's
-- Uses: covered_until claim_give_back admit_writes
-- Commands: TIME HMGET EXISTS HSET HDEL SET PEXPIRE PTTL DEL
admit_writes(KEYS[1])
if ARGV[7] ~= '' then
    if ARGV[8] ~= '' then
        redis.call('SET', KEYS[5] .. ARGV[1], ARGV[7], 'PX', ARGV[8])
    else
        redis.call('SET', KEYS[5] .. ARGV[1], ARGV[7], 'XX', 'KEEPTTL')
    end
end
local owner, attempt, next_attempt, holder, holder_owner, ends, delivery, replaces, allowance =
    unpack(redis.call('HMGET', KEYS[1], 'owner', 'attempt', 'next_attempt', 'holder',
        'holder_owner', 'lease_end', 'delivery', 'replaces', 'allowance'))
if not owner then
    return {3, ''}
end
local is_over, may_be_unentered = ARGV[4] == '0', ARGV[5] == '1'
local function let_go()
    redis.call('HDEL', KEYS[1], 'holder', 'holder_attempt', 'holder_owner', 'lease_end',
        'delivery')
end
if owner ~= ARGV[1] then
    local is_holder = holder == ARGV[3] and holder_owner == ARGV[1]
    if is_over and replaces == ARGV[1] and (is_holder or may_be_unentered) then
        -- Nothing could be given back to it any more.
        redis.call('HDEL', KEYS[1], 'replaces', 'replaces_attempt', 'hands_on')
    end
    if not is_holder then
        return {0, owner}
    end
    if is_over then
        let_go()
    else
        -- It may come back before its successor starts.
        redis.call('HSET', KEYS[1], 'lease_end', '0')
        redis.call('HDEL', KEYS[1], 'delivery')
    end
    redis.call('PEXPIRE', KEYS[1], allowance or redis.call('PTTL', KEYS[1]))
    return {2, owner}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local runs = holder and covered_until(KEYS[4], delivery, ends, now) > now
if holder ~= ARGV[3] and (runs or not may_be_unentered) then
    if holder_owner and may_be_unentered and is_over then
        claim_give_back(KEYS[1], KEYS[3])
        return {1, owner}
    elseif holder_owner and not is_over then
        return {2, owner}
    end
    return {0, owner}
end
if holder_owner and holder ~= ARGV[3] and is_over
    and redis.call('EXISTS', KEYS[3] .. holder_owner) == 0 then
    -- Who handed it on was interrupted, and comes back.
    claim_give_back(KEYS[1], KEYS[3])
    return {1, owner}
end
local latest = math.max(tonumber(attempt), tonumber(next_attempt or 0))
if is_over and latest <= tonumber(ARGV[2]) then
    redis.call('DEL', KEYS[1])
    if latest > 0 and ARGV[6] ~= '0' then
        redis.call('SET', KEYS[2], owner .. ':' .. string.format('%.0f', latest), 'PX', ARGV[6])
    end
    return {1, owner}
end
let_go()
redis.call('HDEL', KEYS[1], 'next_attempt')
if is_over then
    redis.call('HSET', KEYS[1], 'attempt', latest)
else
    local lives = tonumber(ARGV[4])
    if not delivery then
        lives = math.max(lives, redis.call('PTTL', KEYS[1]))
    end
    redis.call('PEXPIRE', KEYS[1], lives)
end
return {2, owner}
