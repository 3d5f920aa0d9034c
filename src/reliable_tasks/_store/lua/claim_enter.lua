-- Purpose: let a copy of a task start, or say why it must not.
--          Safe to repeat: the holder enters again.
-- KEYS[1]  the claim
-- KEYS[2]  '<owner>:<attempt>' of the task that ended last, if it was ever continued
-- KEYS[3]  leases of messages: sorted set, tag -> end of the lease, ms
-- KEYS[4]  replaced: hash, task whose call was replaced -> the task that has its place
-- ARGV[1]  owner: the task's id
-- ARGV[2]  attempt of this copy
-- ARGV[3]  holder: this copy's token
-- ARGV[4]  lease: how long the run is covered, ms
-- ARGV[5]  ttl: how long the claim lives if nobody releases it, ms
-- ARGV[6]  task: the task's name, for people who look
-- ARGV[7]  tag of this copy's delivery, or '': its worker renews that lease, so a holder
--          whose delivery is over is dead, however long its run was covered; and one whose
--          delivery is not lives, whatever that takes
-- ARGV[8]  'takes' a claim over from a task whose holder is dead; '' leaves it to the copy of
--          that task that comes back
-- Returns: {1, owner, lease in ms, fence}             entered
--          {2, owner, 0, fence}                       a later attempt exists, or it has ended
--          {3, owner, ms until its lease ends, fence}  another copy of this attempt runs
--          {4, owner, ms until its lease ends, fence}  what had the claim before this attempt,
--                                                      or this task, still runs
--          {5, owner, 0, fence}                       the call was replaced by that owner's
--          {0, its owner, ms until it lapses, fence}  another task owns the key
-- Uses: claim_mourn
-- Commands: TIME HMGET HGET GET ZSCORE HDEL HSET PEXPIRE PTTL
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local owner, attempt, holder, lease_end, fence, holder_attempt, delivery, holder_owner, window =
    unpack(redis.call('HMGET', KEYS[1], 'owner', 'attempt', 'holder', 'lease_end', 'fence',
        'holder_attempt', 'delivery', 'holder_owner', 'until'))
local is_leased = tonumber(redis.call('ZSCORE', KEYS[3], ARGV[7]) or 0) > now
if claim_mourn(KEYS[1], KEYS[3], ARGV[5]) then
    lease_end = '0'
elseif delivery then
    lease_end = math.max(tonumber(lease_end), tonumber(redis.call('ZSCORE', KEYS[3], delivery)))
end
local runs = holder and tonumber(lease_end) > now
if owner ~= ARGV[1] then
    local replaced_by = redis.call('HGET', KEYS[4], ARGV[1])
    if replaced_by then
        return {5, replaced_by, 0, fence or 0}
    end
    local ended, last = string.match(redis.call('GET', KEYS[2]) or '', '^(.*):(%d+)$')
    if ended == ARGV[1] and tonumber(last) >= tonumber(ARGV[2]) then
        return {2, ended, 0, fence or 0}
    end
end
if owner and owner ~= ARGV[1] then
    if ARGV[8] == '' then
        return {0, owner, redis.call('PTTL', KEYS[1]), fence}
    elseif runs then
        return {0, owner, tonumber(lease_end) - now, fence}
    end
    owner = nil
end
if not owner then
    -- Never claimed (published by name), lapsed in a long queue, or a dead task's: it is free.
    redis.call('HDEL', KEYS[1], 'token', 'until')
    redis.call('HSET', KEYS[1], 'task', ARGV[6], 'since', string.format('%.0f', now))
elseif tonumber(attempt) > tonumber(ARGV[2]) then
    return {2, owner, 0, fence}
elseif holder ~= ARGV[3] and runs then
    local code = 3
    if holder_owner or tonumber(holder_attempt) < tonumber(ARGV[2]) then
        code = 4
    end
    return {code, owner, tonumber(lease_end) - now, fence}
end
if not owner or holder ~= ARGV[3] then
    fence = string.format('%.0f', math.max(tonumber(fence or 0) + 1, time[1] * 1000000 + time[2]))
end
redis.call('HDEL', KEYS[1], 'next_attempt', 'delivery', 'holder_owner', 'replaces',
    'replaces_attempt', 'allowance')
local lives = math.max(tonumber(ARGV[5]), tonumber(window or 0) - now)
if is_leased then
    redis.call('HSET', KEYS[1], 'delivery', ARGV[7])
    -- As long as the guard knows of a run.
    lives = math.max(lives, 7 * 86400000)
end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'attempt', ARGV[2], 'fence', fence,
    'holder', ARGV[3], 'holder_attempt', ARGV[2],
    'lease_end', string.format('%.0f', now + ARGV[4]))
redis.call('PEXPIRE', KEYS[1], lives)
return {1, ARGV[1], tonumber(ARGV[4]), fence}
