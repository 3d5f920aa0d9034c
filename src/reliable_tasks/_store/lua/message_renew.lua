-- Purpose: renew the leases of deliveries; those that are over are left alone.
--          Safe to repeat.
-- KEYS[1]  leases: sorted set, tag -> end of the lease, ms
-- KEYS[2]  unacked_index: sorted set, tag -> seconds; stock sweepers go by it
-- ARGV[1]  lease, ms
-- ARGV[2]  the tags, at most 250: a JSON list, for a client packs one argument sooner than many
-- ARGV[3]  index: '1' to renew what stock sweepers go by, too, '0' to leave it
-- Returns: the tags among them whose delivery is over
-- Uses: admit_writes
-- Commands: TIME ZADD ZMSCORE
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease_end = string.format('%.0f', now + ARGV[1])
local tags = cjson.decode(ARGV[2])
local scored = {}
local function score_all(score)
    for i, tag in ipairs(tags) do
        scored[2 * i - 1], scored[2 * i] = score, tag
    end
    return unpack(scored)
end
admit_writes(KEYS[1])
if ARGV[3] == '1' then
    redis.call('ZADD', KEYS[2], 'XX', score_all(string.format('%.3f', (now + ARGV[1]) / 1000)))
end
if redis.call('ZADD', KEYS[1], 'XX', 'CH', score_all(lease_end)) == #tags then
    return {}
end
local over = {}
for i, score in ipairs(redis.call('ZMSCORE', KEYS[1], unpack(tags))) do
    if not score then
        over[#over + 1] = tags[i]
    end
end
return over
