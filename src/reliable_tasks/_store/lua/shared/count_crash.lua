-- Purpose: count a start as a crash, until its end takes it back, and note who starts.
-- Defines: count_crash(run, text)
--          text: process, 'e' if only the task's end is run or '-', worker, and how it ended
-- Commands: TIME HMGET HINCRBY HSET
local function count_crash(run, text)
    local before, history = unpack(redis.call('HMGET', run, 'start', 'history'))
    if before then
        -- That one stands. Enough for some twenty of them.
        history = (history or '') .. before .. '\n'
        if #history > 2000 then
            -- Not in the midst of a line, or of a letter.
            history = string.match(string.sub(history, -2000), '\n(.*)$')
        end
        redis.call('HSET', run, 'history', history)
    end
    local time = redis.call('TIME')
    local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
    redis.call('HINCRBY', run, 'crashes', 1)
    redis.call('HSET', run, 'start', now .. ' ' .. text)
end
