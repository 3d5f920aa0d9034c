-- Purpose: say until when a run is covered: while its delivery is on lease, however long that
--          takes; where that is not known, until the end of its own lease.
-- Defines: covered_until(leases, delivery, lease_end, now), which returns ms; 0 if it is dead
-- Commands: ZSCORE
local function covered_until(leases, delivery, lease_end, now)
    local ends = tonumber(lease_end or 0)
    if delivery then
        local renewed = tonumber(redis.call('ZSCORE', leases, delivery) or 0)
        if renewed <= now then
            return 0
        end
        ends = math.max(ends, renewed)
    end
    return ends
end
