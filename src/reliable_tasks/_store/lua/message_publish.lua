-- Purpose: put a message into a queue, once, however often its producer has to try; and with
--          it make the claim of a once-task, and note that a task was continued.
--          Safe to repeat.
-- KEYS[1]  the publish token's key
-- KEYS[2]  the list
-- KEYS[3]  the bell of its queue
-- KEYS[4]  the run of the task that the message continues, or the list again
-- KEYS[5]  the claim, or the list again
-- KEYS[6]  replaced: what the key begins with of a task whose call was replaced, or the list
--          again; its id follows
-- KEYS[7]  leases: sorted set, tag -> end of the lease, ms
-- ARGV[1]  message
-- ARGV[2]  token ttl: for how long a repetition is recognised, ms
-- ARGV[3]  tag of the delivery that publishes its continuation, or ''
-- ARGV[4]  claim: '' for none; 'continue'; or how claim_acquire is to take it
-- ARGV[5]  owner: the task's id
-- ARGV[6]  attempt of the claim
-- ARGV[7]  claim ttl: how long the message may wait, ms
-- ARGV[8]  task: the task's name, for people who look
-- ARGV[9]  holder: the token of the run that continues its claim, or hands it on, or ''
-- ARGV[10]  expiry ttl of the queue's lists, ms, or '0'
-- ARGV[11]  token, one for all queues that the message is routed to
-- ARGV[12]  run ttl, ms, for a run that was unknown
-- ARGV[13]  only: '1' if a delivery has one continuation, whoever asks for another
-- ARGV[14..]  the lists that the expiry concerns
-- Returns: 1                  queued
--          {1, owner, 0, ''}  queued in the place of the task that had the claim before
--          {2, '', 0, ''}     it was queued before, or another continuation was
--          {3, '', 0, ''}     refused: the delivery that would continue itself is over
--          {0, owner, ms until it lapses, fence}  refused: another task has the claim
-- Uses: ring_bell claim_mourn claim_acquire claim_continue claim_confirm
-- Commands: EXISTS HGET HDEL HSET LPUSH SET PEXPIRE
if redis.call('EXISTS', KEYS[1]) == 1 then
    -- A write, though a small one: WAIT waits for the last write of its own connection.
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
    return {2, '', 0, ''}
end
local mark = 'continued:' .. ARGV[3]
if ARGV[13] == '1' then
    -- A publish can be repeated by a run that did not hear of it and began again.
    local published = redis.call('HGET', KEYS[4], mark)
    if published and published ~= ARGV[11] then
        return {2, '', 0, ''}
    end
end
-- A run that is unknown was forgotten by the server, not taken over.
if ARGV[3] ~= '' and redis.call('EXISTS', KEYS[4]) == 1
    and redis.call('HGET', KEYS[4], 'tag') ~= ARGV[3] then
    return {3, '', 0, ''}
end
local before = ''
if ARGV[4] ~= '' then
    local ticket
    if ARGV[4] == 'continue' then
        ticket = claim_continue(KEYS[5], ARGV[5], ARGV[6], ARGV[11], ARGV[7], ARGV[8], ARGV[9])
    else
        claim_mourn(KEYS[5], KEYS[7], ARGV[7])
        ticket = claim_acquire(KEYS[5], KEYS[6], ARGV[5], ARGV[6], ARGV[11], ARGV[7], ARGV[8],
            ARGV[4], ARGV[9])
    end
    if ticket[1] == 0 then
        return ticket
    end
    if ticket[1] == 2 then
        before = ticket[2]
    end
    -- What is queued in the same step counts as published at once.
    redis.call('HDEL', KEYS[5], 'next_attempt')
    redis.call('HSET', KEYS[5], 'attempt', ARGV[6])
    claim_confirm(KEYS[5], KEYS[6])
end
redis.call('LPUSH', KEYS[2], ARGV[1])
redis.call('SET', KEYS[1], '1', 'PX', ARGV[2])
if ARGV[3] ~= '' then
    if redis.call('EXISTS', KEYS[4]) == 0 then
        -- Nobody else has come since it was forgotten.
        redis.call('HSET', KEYS[4], 'tag', ARGV[3])
        redis.call('PEXPIRE', KEYS[4], ARGV[12])
    end
    redis.call('HSET', KEYS[4], mark, ARGV[11])
end
if ARGV[10] ~= '0' then
    for i = 14, #ARGV do
        redis.call('PEXPIRE', ARGV[i], ARGV[10])
    end
end
ring_bell(KEYS[3])
if before == '' then
    return 1
end
return {1, before, 0, ''}
