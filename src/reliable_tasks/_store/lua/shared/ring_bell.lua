-- Purpose: wake one worker that waits for a queue. One token is enough: who finds more
--          messages than it can take rings again.
-- Defines: ring_bell(bell)
-- Commands: LLEN RPUSH PEXPIRE
local function ring_bell(bell)
    if redis.call('LLEN', bell) == 0 then
        redis.call('RPUSH', bell, '1')
        redis.call('PEXPIRE', bell, 60000)
    end
end
