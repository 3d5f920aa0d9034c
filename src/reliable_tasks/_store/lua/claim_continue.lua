-- Purpose: let the owner publish its own continuation (a retry, a replacement): the claim
--          stays, and waits for it. Earlier copies count as continued only when the run that
--          published has ended, or the continuation has started: before, the publish may fail
--          or its process die, and then nobody but an earlier copy is left to run.
--          Safe to repeat.
-- KEYS[1]  the claim
-- ARGV[1]  owner: the task's id
-- ARGV[2]  attempt of the continuation
-- ARGV[3]  token: made once per publish
-- ARGV[4]  ttl: how long the continuation may wait, ms
-- ARGV[5]  task: the task's name, for people who look
-- ARGV[6]  holder: the token of the run that continues, or '' where it is not known
-- Returns: {1, owner, ttl in ms, fence}           continued, or taken anew because it had lapsed
--          {0, its owner, ms until it lapses, fence}  another task or another run has it
-- Uses: admit_writes claim_continue
-- Commands: none
admit_writes(KEYS[1])
return claim_continue(KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6])
