-- Purpose: have the rest of a script refused nothing for want of memory: the server asks before a
--          script's first write alone, and never refuses one that frees. What such a script
--          writes is small, or is moved from elsewhere.
-- Defines: admit_writes(key)
--          key: one of the script's keys, which stays as it is, and so does whatever is beside it:
--          no key of anybody's has a zero byte
-- Commands: DEL
local function admit_writes(key)
    redis.call('DEL', key .. '\0admit')
end
