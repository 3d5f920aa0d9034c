-- Purpose: end a run, or a task that never ran: free the claim, or keep it for the copy that
--          follows (a continuation that is published already, or the same copy again).
-- KEYS[1]  the claim
-- KEYS[2]  where to remember '<owner>:<attempt>' of a task that was continued
-- ARGV[1]  owner: the task's id
-- ARGV[2]  attempt of the copy that ends
-- ARGV[3]  holder: its token
-- ARGV[4]  ttl: how long the same copy may wait in the queue, ms, or 0 if it does not go back
-- ARGV[5]  '1' if the copy may have ended before it entered: then a claim that nobody holds
--          is its own too; '0' if only the holder may release
-- ARGV[6]  ttl of that memory, ms: as long as a copy of an earlier attempt can come back; or 0
-- Returns: {1, owner}      freed
--          {2, owner}      kept for what follows: its copy, its continuation, the task that
--                          has its place, or the rest of the window for which it is taken
--          {3, ''}         it had lapsed already
--          {0, its owner}  not ours: another task's, or another run's
-- Commands: TIME HMGET HGET HSET HDEL SET PEXPIRE PTTL DEL
local owner, attempt, next_attempt, holder, holder_owner, lease_end, window, delivery =
    unpack(redis.call('HMGET', KEYS[1], 'owner', 'attempt', 'next_attempt', 'holder',
        'holder_owner', 'lease_end', 'until', 'delivery'))
if not owner then
    return {3, ''}
end
local function let_go()
    redis.call('HDEL', KEYS[1], 'holder', 'holder_attempt', 'holder_owner', 'lease_end',
        'delivery')
end
if owner ~= ARGV[1] then
    if holder == ARGV[3] and holder_owner == ARGV[1] then
        let_go()
        redis.call('PEXPIRE', KEYS[1], redis.call('HGET', KEYS[1], 'allowance'))
        return {2, owner}
    end
    return {0, owner}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if holder ~= ARGV[3] and (ARGV[5] ~= '1' or (holder and tonumber(lease_end) > now)) then
    return {0, owner}
end
local latest = math.max(tonumber(attempt), tonumber(next_attempt or 0))
if ARGV[4] == '0' and latest <= tonumber(ARGV[2]) then
    local left = tonumber(window or 0) - now
    if left > 0 then
        let_go()
        redis.call('HDEL', KEYS[1], 'next_attempt')
        -- No copy of it runs again.
        redis.call('HSET', KEYS[1], 'attempt', latest + 1, 'over', '1')
        redis.call('PEXPIRE', KEYS[1], left)
        return {2, owner}
    end
    redis.call('DEL', KEYS[1])
    if latest > 0 and ARGV[6] ~= '0' then
        redis.call('SET', KEYS[2], owner .. ':' .. string.format('%.0f', latest), 'PX', ARGV[6])
    end
    return {1, owner}
end
let_go()
redis.call('HDEL', KEYS[1], 'next_attempt')
if ARGV[4] == '0' then
    redis.call('HSET', KEYS[1], 'attempt', latest)
else
    local lives = math.max(tonumber(ARGV[4]), tonumber(window or 0) - now)
    if not delivery then
        lives = math.max(lives, redis.call('PTTL', KEYS[1]))
    end
    redis.call('PEXPIRE', KEYS[1], lives)
end
return {2, owner}
