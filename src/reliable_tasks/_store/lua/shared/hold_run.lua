-- Purpose: the guard: note which copy of a task may run, or say that another one is alive.
-- Defines: hold_run(run, leases, tag, now, ttl), which returns
--          {1, crashes, 0}             this copy holds the run
--          {3, crashes, ms of lease}   another copy of it is held by a worker that lives
-- Commands: HMGET ZSCORE HSET PEXPIRE
local function hold_run(run, leases, tag, now, ttl)
    local holder, crashes = unpack(redis.call('HMGET', run, 'tag', 'crashes'))
    crashes = tonumber(crashes or 0)
    if holder and holder ~= tag then
        local lease_end = tonumber(redis.call('ZSCORE', leases, holder) or 0)
        if lease_end > now then
            return {3, crashes, lease_end - now}
        end
    end
    redis.call('HSET', run, 'tag', tag)
    redis.call('PEXPIRE', run, ttl)
    return {1, crashes, 0}
end
