-- Purpose: make the claim of a task of a lock that celery-once has taken for it. That is a string
--          with a token which nobody keeps; its task is the one that comes with no claim of ours.
--          Safe to repeat.
-- KEYS[1]  the claim, under celery-once's own key
-- ARGV[1]  owner: the task's id
-- ARGV[2]  attempt of its message
-- ARGV[3]  task: the task's name, for people who look
-- Returns: 1, or 0 if there is no such lock
-- Commands: GET PTTL DEL HSET PEXPIRE TIME
local token = redis.pcall('GET', KEYS[1])
if type(token) ~= 'string' then
    -- Nothing, or an error: it is a claim already.
    return 0
end
local lives = redis.call('PTTL', KEYS[1])
redis.call('DEL', KEYS[1])
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'attempt', ARGV[2], 'task', ARGV[3],
    'fence', string.format('%.0f', time[1] * 1000000 + time[2]),
    'since', string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)))
if lives > 0 then
    redis.call('PEXPIRE', KEYS[1], lives)
end
return 1
