-- Purpose: note that the message of a run is about to be acknowledged while its child may still be
--          alive: from now on its own lease covers it, for a while at least.
--          Safe to repeat.
-- KEYS[1]  the claim
-- ARGV[1]  holder: token of the run
-- ARGV[2]  grace: how long it may take to kill the child, ms
-- Returns: 1, or 0 if it does not hold the claim
-- Uses: admit_writes
-- Commands: TIME HMGET HSET HDEL PEXPIRE
local holder, ends, allowance = unpack(redis.call('HMGET', KEYS[1], 'holder', 'lease_end',
    'allowance'))
if holder ~= ARGV[1] then
    return 0
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
admit_writes(KEYS[1])
ends = math.max(tonumber(ends), now + ARGV[2])
redis.call('HSET', KEYS[1], 'lease_end', string.format('%.0f', ends))
redis.call('HDEL', KEYS[1], 'delivery')
redis.call('PEXPIRE', KEYS[1], math.max(ends - now, tonumber(allowance or 0)))
return 1
