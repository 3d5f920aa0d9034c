-- Purpose: renew the leases of deliveries; those that are over are left alone.
--          Safe to repeat.
-- KEYS[1]  leases: sorted set, tag -> end of the lease, ms
-- KEYS[2]  unacked_index: sorted set, tag -> seconds; stock sweepers go by it
-- ARGV[1]  lease, ms
-- ARGV[2..]  the tags, at most 250
-- Returns: the tags among them whose delivery is over
-- Uses: admit_writes
-- Commands: TIME ZADD ZMSCORE
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease_end = string.format('%.0f', now + ARGV[1])
local index_score = string.format('%.3f', (now + ARGV[1]) / 1000)
local leases, index, tags = {}, {}, {}
for i = 2, #ARGV do
    local place = 2 * (i - 2)
    leases[place + 1], leases[place + 2] = lease_end, ARGV[i]
    index[place + 1], index[place + 2] = index_score, ARGV[i]
    tags[i - 1] = ARGV[i]
end
admit_writes(KEYS[1])
redis.call('ZADD', KEYS[1], 'XX', unpack(leases))
redis.call('ZADD', KEYS[2], 'XX', unpack(index))
local over = {}
for i, score in ipairs(redis.call('ZMSCORE', KEYS[1], unpack(tags))) do
    if not score then
        over[#over + 1] = tags[i]
    end
end
return over
