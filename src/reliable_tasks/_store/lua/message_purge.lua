-- Purpose: throw messages away that wait in a list, and free the claims of the tasks that will not
--          run. A claim whose run goes on is that run's again, and ends with it.
--          A repetition throws more away.
-- KEYS[1]  the list
-- ARGV[1]  count: at most so many messages
-- ARGV[2]  bytes: after so many no more, for reading a message blocks the server
-- ARGV[3]  claims: what the key of a claim begins with; the name follows in braces
-- Returns: how many there were
-- Commands: RPOP HMGET HSET HDEL DEL
local function free(claim)
    local key = ARGV[3] .. '{' .. claim.key .. '}'
    local owner, attempt, window, holder, holder_owner, holder_attempt = unpack(redis.call('HMGET',
        key, 'owner', 'attempt', 'until', 'holder', 'holder_owner', 'holder_attempt'))
    if owner ~= claim.owner or tonumber(attempt) ~= claim.attempt or window then
        return
    end
    if holder then
        redis.call('HSET', key, 'owner', holder_owner or owner, 'attempt', holder_attempt)
        redis.call('HDEL', key, 'holder_owner', 'next_attempt', 'allowance')
    else
        redis.call('DEL', key)
    end
end
local count, bytes = 0, 0
while count < tonumber(ARGV[1]) and bytes < tonumber(ARGV[2]) do
    local message = redis.call('RPOP', KEYS[1])
    if not message then
        break
    end
    count, bytes = count + 1, bytes + #message
    if string.find(message, '"reliable_claim"', 1, true) then
        local is_read, read = pcall(cjson.decode, message)
        local claim = is_read and type(read) == 'table' and type(read.headers) == 'table'
            and read.headers.reliable_claim
        if type(claim) == 'table' and type(claim.key) == 'string' then
            free(claim)
        end
    end
end
return count
