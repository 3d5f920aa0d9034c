-- Purpose: take the next messages of a worker's queues and record, in the same step, that the
--          worker has them on lease; or, with repeat, return again what this fetch took when
--          its reply was lost. Keys and layout are stock kombu's (unacked, unacked_index), so
--          that a stock worker can put the messages back should every one of ours be gone.
--          Safe to repeat with repeat = '1'.
-- KEYS[1]  unacked: hash, tag -> [message, exchange, routing key]
-- KEYS[2]  unacked_index: sorted set, tag -> seconds; stock sweepers go by it
-- KEYS[3]  leases: sorted set, tag -> end of the lease, ms
-- KEYS[4..]  the bell of each queue, then the list of each queue for the first priority, for
--          the second, and so on
-- ARGV[1]  lease, ms
-- ARGV[2]  tag prefix: what the tags of this fetch begin with, '<worker>:<fetch>:'
-- ARGV[3]  count: how many messages to take at most
-- ARGV[4]  queues: how many
-- ARGV[5]  rotates: '1' to serve the queues in turn, '0' to empty the first one first
-- ARGV[6]  repeat: '1' to return what an earlier call with this prefix took
-- ARGV[7]  run prefix: what the key of a task's run begins with
-- ARGV[8]  run ttl, ms
-- ARGV[9]  key prefix, which tags leave out
-- ARGV[10]  size: after so many bytes no more is taken
-- ARGV[11..]  for each queue: the end of its messages' entry in unacked, or '' where no
--          acknowledgement is wanted and none is recorded
-- Returns: {index of the list, message, code, crashes, ms of lease, number} for each message;
--          what code, crashes and lease mean stands in hold_run, and the number is the tag's
-- Uses: hold_run ring_bell admit_writes
-- Commands: TIME LINDEX HSET ZADD LTRIM HGET ZSCORE LLEN
local unacked, index, leases = KEYS[1], KEYS[2], KEYS[3]
local lease, prefix, count, queues = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local rotates, run_prefix, run_ttl, skip = ARGV[5] == '1', ARGV[7], ARGV[8], #ARGV[9]
local lists = #KEYS - 3 - queues
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease_end = string.format('%.0f', now + lease)
local index_score = string.format('%.3f', (now + lease) / 1000)

admit_writes(leases)
local function guard(tag, message)
    local ok, decoded = pcall(cjson.decode, message)
    local headers = ok and type(decoded) == 'table' and decoded['headers']
    local id = type(headers) == 'table' and headers['id']
    if type(id) ~= 'string' then
        return {1, 0, 0}
    end
    return hold_run(run_prefix .. '{' .. id .. '}', leases, tag, now, run_ttl)
end

local taken = {}
if ARGV[6] == '1' then
    for i = 1, count do
        for list = 1, lists do
            local tag = prefix .. i .. ':' .. string.sub(KEYS[3 + queues + list], skip + 1)
            local entry = redis.call('ZSCORE', leases, tag) and redis.call('HGET', unacked, tag)
            -- A stock worker that put the message back knows nothing of the lease.
            if entry then
                local ending = ARGV[11 + (list - 1) % queues]
                local message = string.sub(entry, 2, -1 - #ending)
                local held = guard(tag, message)
                taken[#taken + 1] = {list, message, held[1], held[2], held[3], i}
            end
        end
    end
    return taken
end

local order, is_empty, size = {}, {}, 0
for queue = 1, queues do
    order[queue] = queue
end
for i = 1, count do
    local found
    for priority = 0, lists / queues - 1 do
        for place = 1, queues do
            local list = priority * queues + order[place]
            local message = not is_empty[list] and redis.call('LINDEX', KEYS[3 + queues + list], -1)
            if message then
                found = {list, message, place}
                break
            end
            is_empty[list] = true
        end
        if found then
            break
        end
    end
    if not found then
        break
    end
    local list, message, place = unpack(found)
    local key = KEYS[3 + queues + list]
    local ending = ARGV[11 + (list - 1) % queues]
    local held = {1, 0, 0}
    if ending ~= '' then
        -- Recorded before it is taken: what is refused here, for want of a right, must not be lost.
        local tag = prefix .. i .. ':' .. string.sub(key, skip + 1)
        redis.call('HSET', unacked, tag, '[' .. message .. ending)
        redis.call('ZADD', index, index_score, tag)
        redis.call('ZADD', leases, lease_end, tag)
        held = guard(tag, message)
    end
    -- RPOP would hand the message over once more.
    redis.call('LTRIM', key, 0, -2)
    taken[i] = {list, message, held[1], held[2], held[3], i}
    if rotates then
        table.insert(order, table.remove(order, place))
    end
    size = size + #message
    if size >= tonumber(ARGV[10]) then
        break
    end
end
if #taken == count or size >= tonumber(ARGV[10]) then
    for queue = 1, queues do
        for list = queue, lists, queues do
            if redis.call('LLEN', KEYS[3 + queues + list]) > 0 then
                ring_bell(KEYS[3 + queue])
                break
            end
        end
    end
end
return taken
