-- Purpose: notice that the worker is dead that ran a task, and let its claim lapse in time. While
--          a delivery is on lease the claim of what it runs is known for long, however long that
--          takes; from its death on the claim waits as that of a call in the queue does.
-- Defines: claim_mourn(key, leases, ttl), which returns whether it is dead
-- Commands: TIME HMGET ZSCORE PTTL PEXPIRE
local function claim_mourn(key, leases, ttl)
    local delivery, window = unpack(redis.call('HMGET', key, 'delivery', 'until'))
    if not delivery then
        return false
    end
    local time = redis.call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    if tonumber(redis.call('ZSCORE', leases, delivery) or 0) > now then
        return false
    end
    local lives = math.max(tonumber(ttl), tonumber(window or 0) - now)
    redis.call('PEXPIRE', key, math.min(lives, redis.call('PTTL', key)))
    return true
end
