-- Purpose: let go of a run that a copy holds.
-- Defines: release_run(run, tag, started, is_over, remembers), which returns whether the copy
--          had published a continuation of its task
--          started: '1' takes back one crash, which was counted when the copy was started
--          is_over: the copy does not go back to its queue
--          remembers: how long to know of a run that is over, ms, lest an earlier copy of it,
--          stopped and forgotten, publishes a continuation; 0 if there was no other copy
-- Commands: HMGET HDEL HLEN HSET HINCRBY PEXPIRE DEL
local function release_run(run, tag, started, is_over, remembers)
    local mark = 'continued:' .. tag
    local holder, continued, crashes = unpack(redis.call('HMGET', run, 'tag', mark, 'crashes'))
    local has_continued = continued ~= false
    if has_continued then
        redis.call('HDEL', run, mark)
    end
    if holder ~= tag then
        return has_continued
    end
    if is_over and not has_continued then
        redis.call('HDEL', run, 'crashes', 'start', 'history')
        if remembers > 0 then
            redis.call('HSET', run, 'tag', 'over')
            redis.call('PEXPIRE', run, remembers)
        elseif redis.call('HLEN', run) > 1 then
            -- A copy that was continued has not been swept yet, and must be dropped then.
            redis.call('HSET', run, 'tag', 'over')
        else
            redis.call('DEL', run)
        end
        return false
    end
    if started == '1' and tonumber(crashes or 0) > 0 then
        redis.call('HINCRBY', run, 'crashes', -1)
        redis.call('HDEL', run, 'start')
    end
    -- Not deleted: the copy that let go must not publish a continuation any more.
    redis.call('HSET', run, 'tag', 'queued')
    return has_continued
end
