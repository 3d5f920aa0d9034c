-- Purpose: say for how long (ms) it is still to be waited for the word that a message is queued
--          which is to take another one's place: its caller may be about to publish, or has died.
-- Defines: in_doubt(since), which returns ms; not more than 0 if that is long enough
-- Commands: TIME
local function in_doubt(since)
    local time = redis.call('TIME')
    return tonumber(since) + 30000 - time[1] * 1000 - math.floor(time[2] / 1000)
end
