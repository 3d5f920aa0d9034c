-- Purpose: throw messages away that wait in a list, and free the claims of the tasks that will not
--          run, or tell of those that are kept elsewhere. A claim whose run goes on is that run's
--          again, and ends with it.
--          A repetition throws more away.
-- KEYS[1]  the list
-- KEYS[2]  leases: sorted set, tag -> end of the lease, ms
-- ARGV[1]  count: at most so many messages
-- ARGV[2]  bytes: after so many no more, for reading a message blocks the server
-- ARGV[3]  claims: what the key of a claim begins with; the name follows in braces
-- ARGV[4]  replaced: the same of tasks whose calls were replaced; a colon and the id follow
-- Returns: {how many there were, {key, owner, attempt, task}, ..}  with the claims that are not here
-- Uses: claim_is_of covered_until claim_give_back admit_writes
-- Commands: TIME RPOP EXISTS DEL
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
admit_writes(KEYS[2])
local elsewhere = {}
local function free(claim, task)
    local name = '{' .. claim.key .. '}'
    local key = ARGV[3] .. name
    if redis.call('EXISTS', key) == 0 then
        elsewhere[#elsewhere + 1] = {claim.key, claim.owner, claim.attempt, task}
        return
    end
    local is_of, holder, delivery, ends = claim_is_of(key, claim.owner, claim.attempt)
    if not is_of then
        return
    end
    if holder and covered_until(KEYS[2], delivery, ends, now) > now then
        claim_give_back(key, ARGV[4] .. name .. ':')
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
        if type(claim) == 'table' and type(claim.key) == 'string' and type(claim.owner) == 'string'
            and type(claim.attempt) == 'number' and type(read.headers.task) == 'string' then
            free(claim, read.headers.task)
        end
    end
end
return {count, unpack(elsewhere)}
