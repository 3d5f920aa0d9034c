-- Purpose: take a claim for a task that is about to be published.
--          Safe to repeat: a second call with the same token answers as the first did.
-- KEYS[1]  the claim
-- KEYS[2]  replaced: what the key begins with of a task whose call was replaced; its id follows
-- KEYS[3]  leases of messages: sorted set, tag -> end of the lease, ms
-- ARGV[1]  owner: the task's id
-- ARGV[2]  attempt: which continuation of the task this is
-- ARGV[3]  token: made once per publish; 'call token' where somebody else may make the same call,
--          who has the claim as well, and takes it back no more than this one then
-- ARGV[4]  ttl: how long the message may wait, ms
-- ARGV[5]  task: the task's name, for people who look
-- ARGV[6]  how: 'acquire', if it is free; 'window', the same, and nobody frees it before the ttl;
--          'replace', in the place of the owner, whose message ends unrun
-- ARGV[7]  holder: token of the run that makes this call, or ''. It hands its own claim on: the
--          task is the owner at once, and starts when that run has ended
-- Returns: {1, owner, ttl in ms, fence}           acquired
--          {2, the owner before, ttl in ms, fence}  acquired from the one that had it; to be
--                                                 confirmed when the message is queued
--          {0, its owner, ms until it lapses, fence}  somebody else's
-- Uses: claim_mourn claim_acquire
-- Commands: none
claim_mourn(KEYS[1], KEYS[3], ARGV[4])
return claim_acquire(KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6],
    ARGV[7])
