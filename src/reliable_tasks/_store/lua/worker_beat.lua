-- Purpose: say that a worker lives, and elect the one that sweeps. Whoever sweeps says when
--          the server last did not look like itself: another process, or a clock that jumped.
--          Then no lease counts before each keeper had the time to renew its own.
-- KEYS[1]  beats: sorted set, worker -> its last beat, ms
-- KEYS[2]  keepers: hash, worker -> how to tell its connection
-- KEYS[3]  sweeper: hash: worker, until, beat (ms), server, held_until (ms)
-- ARGV[1]  worker
-- ARGV[2]  how to tell the connection of its keeper, or ''
-- ARGV[3]  server: the id of the server process, as the keeper knows it
-- ARGV[4]  lease: the longest that a sweep may have to wait, ms
-- ARGV[5]  elapsed since this worker's beat before, by its own clock, ms, or '0'
-- ARGV[6]  interval of the election, ms
-- ARGV[7]  jump: how much the clock may differ from what has elapsed, ms, without having jumped
-- ARGV[8]  gap in ms after which nobody has swept for a while
-- ARGV[9]  renewal: within which time each keeper that lives has renewed its leases, ms
-- Returns: {now in ms, 1 if this worker sweeps or else 0, ms for which nobody may sweep}
-- Uses: admit_writes
-- Commands: TIME ZADD HSET HMGET
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local elapsed, jump = tonumber(ARGV[5]), tonumber(ARGV[7])
admit_writes(KEYS[1])
redis.call('ZADD', KEYS[1], string.format('%.0f', now), ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
local sweeper, ends, beat, server, held_until =
    unpack(redis.call('HMGET', KEYS[3], 'worker', 'until', 'beat', 'server', 'held_until'))
ends, beat, held_until = tonumber(ends or 0), tonumber(beat or 0), tonumber(held_until or 0)
-- A clock that went back would leave the office to one who died.
if sweeper and sweeper ~= ARGV[1] and ends > now and ends < now + 10 * ARGV[6] then
    return {now, 0, 0}
end
local since = now - beat
-- Where nobody ever swept, nobody holds what could be mistaken.
if server then
    local goes_on = sweeper == ARGV[1] and elapsed > 0
    local expected = goes_on and elapsed or 0
    if server ~= ARGV[3] or since < expected - jump or (goes_on and since > expected + jump) then
        held_until = now + ARGV[4]
    elseif not goes_on and since > tonumber(ARGV[8]) then
        -- Nobody swept for a while: no worker was up, or the clock jumped. Who lives renews
        -- within this time.
        held_until = math.max(held_until, now + ARGV[9])
    end
end
held_until = math.min(held_until, now + ARGV[4])
redis.call('HSET', KEYS[3], 'worker', ARGV[1], 'until', string.format('%.0f', now + ARGV[6]),
    'beat', string.format('%.0f', now), 'server', ARGV[3],
    'held_until', string.format('%.0f', held_until))
return {now, 1, math.max(held_until - now, 0)}
