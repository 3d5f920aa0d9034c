-- Purpose: end the leases of a worker that is dead, a part at a time; not those of one that was
--          heard of meanwhile. A worker that beats first and renews then finds out which it was.
--          Safe to repeat.
-- KEYS[1]  leases: sorted set, tag -> end of the lease, ms
-- KEYS[2]  beats: sorted set, worker -> its last beat, ms
-- ARGV[1]  worker
-- ARGV[2]  silent: for how long it must not have been heard of, ms
-- ARGV[3]  cursor: where to go on, '0' at first
-- Returns: {cursor, how many leases were ended}; the cursor is '0' at the end
--          {'', 0}  it was heard of
-- Uses: admit_writes
-- Commands: TIME ZSCORE ZSCAN ZADD
local time = redis.call('TIME')
local beat = redis.call('ZSCORE', KEYS[2], ARGV[1])
if not beat or time[1] * 1000 + math.floor(time[2] / 1000) - beat < tonumber(ARGV[2]) then
    return {'', 0}
end
admit_writes(KEYS[1])
local cursor, found =
    unpack(redis.call('ZSCAN', KEYS[1], ARGV[3], 'MATCH', ARGV[1] .. ':*', 'COUNT', 200))
for i = 1, #found, 2 do
    redis.call('ZADD', KEYS[1], 'XX', 0, found[i])
end
return {cursor, #found / 2}
