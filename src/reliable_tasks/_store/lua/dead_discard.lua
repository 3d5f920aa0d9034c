-- Purpose: remove a dead letter. Safe to repeat.
-- KEYS[1]  what the keys of dead letters begin with
-- KEYS[2]  the dead letter
-- ARGV[1]  its id
-- Returns: 1, or 0 if there is none
-- Uses: dead_remove admit_writes
-- Commands: none
admit_writes(KEYS[1])
if dead_remove(KEYS[1], ARGV[1], KEYS[2]) then
    return 1
end
return 0
