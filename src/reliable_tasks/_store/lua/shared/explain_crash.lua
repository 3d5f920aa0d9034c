-- Purpose: say more of the latest start of a task that counts as a crash.
-- Defines: explain_crash(run, text)
--          text: as in count_crash; '' to say nothing
-- Commands: HGET HSET
local function explain_crash(run, text)
    local start = text ~= '' and redis.call('HGET', run, 'start')
    if start then
        redis.call('HSET', run, 'start', string.match(start, '^%d+ ') .. text)
    end
end
