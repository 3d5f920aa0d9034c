-- Purpose: keep a dead letter whose message was acknowledged before. Safe to repeat.
-- KEYS[1]  what the keys of dead letters begin with
-- ARGV[1]  meta: JSON, as dead_add has it
-- ARGV[2]  about: what is known of it
-- ARGV[3]  its traceback
-- ARGV[4]  the message
-- Returns: {id, how many there are}
-- Uses: dead_add admit_writes
-- Commands: none
admit_writes(KEYS[1])
return dead_add(KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4])
