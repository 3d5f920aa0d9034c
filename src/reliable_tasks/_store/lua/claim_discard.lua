-- Purpose: free the claim of a message that is gone: thrown away elsewhere, or by its worker's death
--          when its task had been continued by another one. One whose run goes on is that run's
--          again, and ends with it.
--          Safe to repeat.
-- KEYS[1]  the claim
-- KEYS[2]  replaced: what the key begins with of a task whose call was replaced; its id follows
-- KEYS[3]  leases of messages: sorted set, tag -> end of the lease, ms
-- ARGV[1]  owner: the task's id
-- ARGV[2]  attempt of the message
-- ARGV[3]  '1' if its run is over, which is not known here
-- Returns: 1 if it was the message's, or else 0
-- Uses: admit_writes claim_is_of covered_until claim_give_back
-- Commands: TIME DEL
local is_of, holder, delivery, ends = claim_is_of(KEYS[1], ARGV[1], ARGV[2])
if not is_of then
    return 0
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
admit_writes(KEYS[1])
if holder and ARGV[3] ~= '1' and covered_until(KEYS[3], delivery, ends, now) > now then
    claim_give_back(KEYS[1], KEYS[2])
else
    redis.call('DEL', KEYS[1])
end
return 1
