-- Purpose: let a copy of a task in whose broker knows nothing of leases, count its start as a
--          crash until its end takes it back, and give it a lease here; or say why not.
--          Safe to repeat.
-- KEYS[1]  leases: sorted set, tag -> end of the lease, ms
-- KEYS[2]  the task's run
-- ARGV[1]  tag of this copy
-- ARGV[2]  order of this copy: that of each continuation of a task is greater
-- ARGV[3]  '1' if the broker, or one of us, says that the message was delivered before
-- ARGV[4]  run ttl, ms
-- ARGV[5]  lease, ms
-- ARGV[6]  who starts it, as count_crash has it
-- Returns: {1, crashes, 0}             let in
--          {2, crashes, 0}             over: a copy of this order ended, or was continued
--          {3, crashes, ms of lease}   another copy is alive
-- Uses: hold_run count_crash admit_writes
-- Commands: TIME HMGET HDEL HSET ZADD
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local order = tonumber(ARGV[2])
local holder, crashes, done, begun =
    unpack(redis.call('HMGET', KEYS[2], 'tag', 'crashes', 'done', 'order'))
crashes = tonumber(crashes or 0)
local ended, last = tonumber(done or -1), tonumber(begun or -1)
if ARGV[3] == '1' and (ended >= order or last > order) then
    return {2, crashes, 0}
end
admit_writes(KEYS[2])
local held = hold_run(KEYS[2], KEYS[1], ARGV[1], now, ARGV[4])
if held[1] ~= 1 then
    return held
end
redis.call('ZADD', KEYS[1], string.format('%.0f', now + ARGV[5]), ARGV[1])
if holder == ARGV[1] then
    held[2] = math.max(crashes - 1, 0)
    return held
end
if ended >= order then
    -- Somebody sent a task again under the id of one that has run: copies of it may come, too.
    redis.call('HDEL', KEYS[2], 'done')
end
redis.call('HSET', KEYS[2], 'order', ARGV[2])
count_crash(KEYS[2], ARGV[6])
return held
