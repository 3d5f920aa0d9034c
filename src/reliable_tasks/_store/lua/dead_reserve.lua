-- Purpose: let one caller replay a dead letter: it decides on the new task's id for all that ask.
--          Who is let in again, for the time of the first one is over, gets the same id.
-- KEYS[1]  the dead letter
-- ARGV[1]  new id: that of the task that would be sent
-- ARGV[2]  token of the caller
-- ARGV[3]  window: for how long nobody else may send it, ms
-- Returns: {1, id}  the caller is to send a task of this id, which nobody else does
--          {2, id}  the same, but somebody may have sent it before
--          {3, id}  it was sent before
--          {4, id}  somebody sends it now
--          {0, ''}  there is no such dead letter
-- Uses: admit_writes
-- Commands: TIME HMGET HSET
local kind, id, token, ends, replayed =
    unpack(redis.call('HMGET', KEYS[1], 'kind', 'replay_id', 'replay_token', 'replay_until', 'replayed'))
if not kind then
    return {0, ''}
end
if replayed then
    return {3, id}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if token and token ~= ARGV[2] and tonumber(ends) > now then
    return {4, id}
end
admit_writes(KEYS[1])
redis.call('HSET', KEYS[1], 'replay_id', id or ARGV[1], 'replay_token', ARGV[2],
    'replay_until', string.format('%.0f', now + ARGV[3]))
if id then
    redis.call('HSET', KEYS[1], 'replay_doubted', '1')
    return {2, id}
end
return {1, ARGV[1]}
