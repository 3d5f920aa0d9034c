-- Purpose: let a copy of a task start, or say why it must not.
--          Safe to repeat: the holder enters again.
-- KEYS[1]  the claim
-- KEYS[2]  '<owner>:<attempt>' of the task that ended last, if it was ever continued
-- KEYS[3]  leases of messages: sorted set, tag -> end of the lease, ms
-- KEYS[4]  replaced: what the key begins with of a task whose call was replaced; its id follows
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
--          {3, owner, ms until its lease ends, fence}  another copy of this task runs
--          {4, owner, ms to wait, fence}              what had the claim before still runs; or it
--                                                     is not known yet who has it
--          {5, owner, 0, fence}                       the call was replaced by that owner's
--          {0, its owner, ms until it lapses, fence}  another task owns the key
-- Uses: covered_until claim_confirm in_doubt admit_writes
-- Commands: TIME HMGET GET ZSCORE HDEL HSET SET PEXPIRE PTTL
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local owner, attempt, holder, fence, holder_attempt, holder_owner, replaces, since, delivery, ends,
    unconfirmed =
    unpack(redis.call('HMGET', KEYS[1], 'owner', 'attempt', 'holder', 'fence', 'holder_attempt',
        'holder_owner', 'replaces', 'since', 'delivery', 'lease_end', 'unconfirmed'))
local covered = covered_until(KEYS[3], delivery, ends, now)
local runs = holder and covered > now
local hands_on = false
admit_writes(KEYS[1])
if owner ~= ARGV[1] then
    if holder_owner == ARGV[1] and runs then
        if holder == ARGV[3] then
            return {1, owner, covered - now, fence}
        end
        return {3, owner, covered - now, fence}
    end
    local replaced_by = redis.call('GET', KEYS[4] .. ARGV[1])
    if replaced_by then
        return {5, replaced_by, 0, fence or 0}
    end
    if holder_owner == ARGV[1] then
        -- It has handed its claim on and was interrupted; its successor has not started yet.
        hands_on = true
    elseif replaces == ARGV[1] then
        local left = in_doubt(since)
        if left > 0 then
            return {4, owner, left, fence}
        end
        redis.call('HDEL', KEYS[1], 'replaces', 'replaces_attempt', 'hands_on')
        owner, attempt = ARGV[1], ARGV[2]
    else
        local ended, last = string.match(redis.call('GET', KEYS[2]) or '', '^(.*):(%d+)$')
        if ended == ARGV[1] and tonumber(last) >= tonumber(ARGV[2]) then
            return {2, ended, 0, fence or 0}
        end
        if owner and owner == unconfirmed and not holder then
            -- Perhaps there is no message of that one.
            redis.call('SET', KEYS[4] .. owner, ARGV[1], 'PX',
                math.max(redis.call('PTTL', KEYS[1]), 1))
            owner = nil
        end
    end
end
if owner and owner ~= ARGV[1] and not hands_on then
    if ARGV[8] == '' then
        return {0, owner, redis.call('PTTL', KEYS[1]), fence}
    elseif runs then
        return {0, owner, covered - now, fence}
    end
    owner = nil
end
if not owner then
    -- Never claimed (published by name), lapsed in a long queue, or a dead task's: it is free.
    redis.call('HDEL', KEYS[1], 'token', 'replaces', 'replaces_attempt', 'hands_on',
        'unconfirmed')
    redis.call('HSET', KEYS[1], 'task', ARGV[6], 'since', string.format('%.0f', now))
elseif ARGV[8] == '' and not hands_on and tonumber(attempt) > tonumber(ARGV[2]) then
    return {2, owner, 0, fence}
elseif holder ~= ARGV[3] and runs then
    local code = 3
    if holder_owner or tonumber(holder_attempt) < tonumber(ARGV[2]) then
        code = 4
    end
    return {code, owner, covered - now, fence}
end
if not owner or holder ~= ARGV[3] then
    fence = string.format('%.0f', math.max(tonumber(fence or 0) + 1, time[1] * 1000000 + time[2]))
end
if not hands_on then
    -- It was published, for it is here.
    claim_confirm(KEYS[1], KEYS[4])
    redis.call('HDEL', KEYS[1], 'next_attempt', 'holder_owner', 'allowance')
    redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'attempt', ARGV[2])
end
local lives = tonumber(ARGV[5])
redis.call('HDEL', KEYS[1], 'delivery')
if tonumber(redis.call('ZSCORE', KEYS[3], ARGV[7]) or 0) > now then
    redis.call('HSET', KEYS[1], 'delivery', ARGV[7])
    -- As long as the guard knows of a run.
    lives = math.max(lives, 7 * 86400000)
end
redis.call('HSET', KEYS[1], 'fence', fence, 'holder', ARGV[3], 'holder_attempt', ARGV[2],
    'seen', '1', 'lease_end', string.format('%.0f', now + ARGV[4]))
redis.call('PEXPIRE', KEYS[1], lives)
return {1, ARGV[1], tonumber(ARGV[4]), fence}
