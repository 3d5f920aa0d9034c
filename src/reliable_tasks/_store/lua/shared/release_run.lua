-- Purpose: let go of a run that a copy holds; it ends unless its task was continued.
-- Defines: release_run(run, tag, attempt, started, is_over, remembers)
--          started: '1' takes back one crash, which was counted when the copy was started
--          is_over: whether nothing but a continuation can follow
--          remembers: how long to know of a run that is over, ms, lest an earlier copy of it,
--          stopped and forgotten, publishes a continuation; 0 if there was no other copy
-- Commands: HMGET HDEL HSET PEXPIRE DEL
local function release_run(run, tag, attempt, started, is_over, remembers)
    local holder, latest, crashes = unpack(redis.call('HMGET', run, 'tag', 'attempt', 'crashes'))
    if holder ~= tag then
        return
    end
    if is_over and tonumber(latest) <= tonumber(attempt) then
        if remembers > 0 then
            redis.call('HDEL', run, 'crashes')
            redis.call('HSET', run, 'tag', 'over')
            redis.call('PEXPIRE', run, remembers)
        else
            redis.call('DEL', run)
        end
        return
    end
    crashes = tonumber(crashes or 0)
    if started == '1' and crashes > 0 then
        crashes = crashes - 1
        redis.call('HSET', run, 'crashes', crashes)
    end
    redis.call('HDEL', run, 'tag')
end
