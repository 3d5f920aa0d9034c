-- Purpose: let the claim of a run lapse in time whose worker is dead. While its delivery is on
--          lease it is known for long; from its death on it waits as that of a call in the queue.
-- Defines: claim_mourn(key, leases, ttl)
-- Commands: TIME HGET ZSCORE PTTL PEXPIRE
local function claim_mourn(key, leases, ttl)
    local delivery = redis.call('HGET', key, 'delivery')
    if not delivery then
        return
    end
    local time = redis.call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    if tonumber(redis.call('ZSCORE', leases, delivery) or 0) <= now then
        redis.call('PEXPIRE', key, math.min(tonumber(ttl), redis.call('PTTL', key)))
    end
end
