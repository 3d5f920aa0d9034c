-- Purpose: let the claim of a run lapse in time whose worker is dead. While its delivery is on
--          lease it is known for long; from its death on it waits as that of a call in the queue,
--          for the ttl or for as long as was allowed to the task that has taken it over.
-- Defines: claim_mourn(key, leases, ttl)
-- Commands: TIME HMGET ZSCORE PTTL PEXPIRE
local function claim_mourn(key, leases, ttl)
    local delivery, allowance = unpack(redis.call('HMGET', key, 'delivery', 'allowance'))
    if not delivery then
        return
    end
    local time = redis.call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    if tonumber(redis.call('ZSCORE', leases, delivery) or 0) <= now then
        redis.call('PEXPIRE', key, math.min(tonumber(allowance or ttl), redis.call('PTTL', key)))
    end
end
