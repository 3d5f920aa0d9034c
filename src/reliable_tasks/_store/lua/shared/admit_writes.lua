-- Purpose: have the rest of a script refused nothing for want of memory: the server asks before a
--          script's first write alone, and never refuses one that frees. What such a script
--          writes is small, or is moved from elsewhere.
-- Defines: admit_writes(zset)
--          zset: the key of a sorted set, which stays as it is
-- Commands: ZREM
local function admit_writes(zset)
    redis.call('ZREM', zset, '')
end
