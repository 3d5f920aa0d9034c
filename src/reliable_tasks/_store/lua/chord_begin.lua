-- Purpose: note that a chord is about to be sent anew, unless somebody has begun to send it, or has
--          sent it, and all that was kept of it is gone. Safe to repeat.
-- KEYS[1]  what is kept of the chord: as chord_keep has it; and '!', who has begun
-- ARGV[1]  token of the caller
-- ARGV[2]  id of what it sends last
-- Returns: 1 if the caller is the first, or 0
-- Uses: admit_writes
-- Commands: HMGET HSET
local mine = ARGV[1] .. ' ' .. ARGV[2]
local size, begun = unpack(redis.call('HMGET', KEYS[1], '#', '!'))
if not size or (begun and begun ~= mine) then
    return 0
end
admit_writes(KEYS[1])
redis.call('HSET', KEYS[1], '!', mine)
return 1
