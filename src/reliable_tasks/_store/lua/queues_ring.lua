-- Purpose: wake a worker for each queue whose messages came without a bell: from producers
--          that do not have this library.
-- KEYS[1]  queues: sorted set, the JSON of [bell, list, list, ...] -> last named, ms
-- ARGV[1]  age in ms after which a queue that no worker names is forgotten
-- Returns: how many bells were rung
-- Uses: ring_bell
-- Commands: TIME ZREMRANGEBYSCORE ZRANGE LLEN
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now - ARGV[1]))
local rung = 0
for _, member in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    local lists = cjson.decode(member)
    for i = 2, #lists do
        if redis.call('LLEN', lists[i]) > 0 then
            ring_bell(lists[1])
            rung = rung + 1
            break
        end
    end
end
return rung
