-- Purpose: free a claim by hand, whoever holds it, unless it changed hands meanwhile.
--          Safe to repeat.
-- KEYS[1]  the claim
-- ARGV[1]  owner: whose claim it was when somebody looked
-- ARGV[2]  fence of it
-- Returns: 1  freed
--          0  it is another one's by now, or nobody's
-- Commands: HMGET DEL
local owner, fence = unpack(redis.call('HMGET', KEYS[1], 'owner', 'fence'))
if owner ~= ARGV[1] or fence ~= ARGV[2] then
    return 0
end
redis.call('DEL', KEYS[1])
return 1
