-- Purpose: let go of a run that run_enter let a copy have.
-- Defines: leave_run(leases, run, tag, order, ending, takes_back, remembers), which returns whether
--          its lease had not ended and nobody else has the run
--          ending: 'over', or 'back' if the message goes back to its queue
--          takes_back: '1' to take back the crash that was counted when it was let in
--          remembers: for how long to know that the copy is over, ms
-- Commands: ZREM HMGET HSET HDEL HINCRBY PEXPIRE
local function leave_run(leases, run, tag, order, ending, takes_back, remembers)
    local ended = redis.call('ZREM', leases, tag) == 1
    local holder, crashes, done = unpack(redis.call('HMGET', run, 'tag', 'crashes', 'done'))
    local has_continued = tonumber(done or -1) >= tonumber(order)
    if ending == 'over' and not has_continued then
        -- Also when another copy runs: what this one did is done.
        redis.call('HSET', run, 'done', order)
    end
    if holder and holder ~= tag then
        return false
    end
    redis.call('HSET', run, 'tag', ending == 'over' and 'over' or 'queued')
    crashes = tonumber(crashes or 0)
    if ending == 'over' and not has_continued then
        redis.call('HDEL', run, 'crashes', 'start', 'history')
        crashes = 0
    elseif takes_back == '1' and crashes > 0 then
        crashes = redis.call('HINCRBY', run, 'crashes', -1)
        redis.call('HDEL', run, 'start')
    end
    -- What goes on, and has crashed, is known for as long as it may wait.
    if crashes == 0 then
        redis.call('PEXPIRE', run, remembers)
    end
    return ended
end
