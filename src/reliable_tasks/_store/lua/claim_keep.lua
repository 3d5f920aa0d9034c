-- Purpose: keep the claim of a message that waits in a worker for longer than it may in a queue.
--          Safe to repeat.
-- KEYS[1]  the claim
-- ARGV[1]  owner: the task's id
-- ARGV[2]  ttl, ms
-- Returns: 1 if it is that task's, or else 0
-- Commands: HGET PTTL PEXPIRE
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] then
    return 0
end
redis.call('PEXPIRE', KEYS[1], math.max(tonumber(ARGV[2]), redis.call('PTTL', KEYS[1])))
return 1
