-- Begins every script; sweep.lua follows. KEYS[1] is the prefix of all keys, ARGV[1] the limits and
-- times as JSON, ARGV[2] the time in Unix seconds, or '' for the Redis server's.
local GROUP, FREE = 'workers', '(free)'
local PREFIX, TERMS, CLOCK = KEYS[1], cjson.decode(ARGV[1]), redis.call('TIME')
local NOW = tonumber(ARGV[2]) or tonumber(CLOCK[1]) + tonumber(CLOCK[2]) / 1e6
local OPEN = {queued = true, running = true}
-- The streams of a queue, in the order of service: PREDICT, later rounds of CERTIFY, other CERTIFY.
local LANES = {'hi', 'later', 'lo'}

local function key(...)
  return PREFIX .. table.concat({...}, ':')
end

local function stamp(seconds)
  return string.format('%.6f', seconds)
end

local function stay(milliseconds, ...)
  for _, name in ipairs({...}) do
    redis.call('PEXPIRE', name, milliseconds)
  end
end

local function in_lots(items, call)
  for first = 1, #items, 1000 do
    call(unpack(items, first, math.min(first + 999, #items)))
  end
end

local heard_already = {}

local function heard(worker)
  if heard_already[worker] then
    return
  end
  heard_already[worker] = true
  redis.call('ZADD', key('workers'), 'XX', stamp(NOW), worker)
  local digest = redis.call('HGET', key('announced'), worker)
  stay(TERMS.silence_ms, key('announced'), key('announcement', digest or ''))
  redis.call('PEXPIRE', key('workers'), TERMS.open_ms)
end

-- XPENDING; creates a lost group again, which then delivers every entry once more.
local function pending(stream, ...)
  local found = redis.pcall('XPENDING', stream, GROUP, ...)
  if not found.err then
    return found
  end
  if redis.call('EXISTS', stream) == 1 then
    redis.call('XGROUP', 'CREATE', stream, GROUP, '0')
  end
  return {}
end

local function message(entry)
  local fields = {}
  for at = 1, #entry[2], 2 do
    fields[entry[2][at]] = entry[2][at + 1]
  end
  return fields
end

local function read(stream, id)
  local entry = redis.call('XRANGE', stream, id, id)[1]
  return entry and message(entry)
end

local function drop(stream, id)
  redis.call('XACK', stream, GROUP, id)
  redis.call('XDEL', stream, id)
end

-- Calls f(delivery, fields) for every shard that was put back, until f returns true.
local function each_free(stream, call)
  local from, some = '-', nil
  repeat
    some = pending(stream, from, '+', 16, FREE)
    for _, delivery in ipairs(some) do
      local fields = read(stream, delivery[1])
      if not fields then
        drop(stream, delivery[1])
      elseif call(delivery, fields) then
        return
      end
      from = '(' .. delivery[1]
    end
  until #some < 16
end

-- The next message of the stream, or nil where no shard waits.
local function head(stream)
  local first
  each_free(stream, function(_, fields)
    first = fields
    return true
  end)
  local groups = not first and redis.pcall('XINFO', 'GROUPS', stream)
  if not groups or groups.err then
    return first
  end
  local last = '0-0'
  for at = 1, #groups[1], 2 do
    last = groups[1][at] == 'last-delivered-id' and groups[1][at + 1] or last
  end
  local entry = redis.call('XRANGE', stream, '(' .. last, '+', 'COUNT', 1)[1]
  return entry and message(entry)
end

-- The next message of the queue in the first of these streams that has one, and its stream's lane.
local function next_of(line, lanes)
  for _, lane in ipairs(lanes) do
    local first = head(key('lane', lane, line))
    if first then
      return first, lane
    end
  end
end

-- Entries are deleted as they are acknowledged, so an empty stream has no pending entry.
local function tidy(line)
  local gone = 0
  for _, lane in ipairs(LANES) do
    local stream = key('lane', lane, line)
    if redis.call('XLEN', stream) == 0 then
      redis.call('DEL', stream)
      gone = gone + 1
    end
  end
  if gone == #LANES then
    redis.call('HDEL', key('lines'), line)
    redis.call('HDEL', key('passed'), line)
  end
end

-- A token names one delivery: entry, number of deliveries, job, worker. Entries of two streams may
-- have the same id, but not within a round.
local function token_of(id, deliveries, job, worker)
  return table.concat({id, deliveries, job, worker}, '/')
end

local function held(stream, token)
  local id, deliveries, worker = string.match(token, '^([^/]+)/([^/]+)/[^/]+/(.*)$')
  local found = stream and pending(stream, id, id, 1)[1]
  if found and found[2] == worker and found[4] == tonumber(deliveries) then
    heard(worker)
    return id, worker
  end
end

-- Calls f(place, job, shard, token, ...) for the leases of ARGV[3..] (job, shard, token) still held.
local function each_held(call)
  for at = 3, #ARGV, 3 do
    local id, shard, token = unpack(ARGV, at, at + 2)
    local stream = redis.call('HGET', key('job', id), 'stream')
    local entry, worker = held(stream, token)
    if entry then
      call((at - 3) / 3, id, shard, token, stream, entry, worker)
    end
  end
end

local told_already = false

-- Every idle worker pulls at a message, so a script publishes at most one.
local function tell_workers()
  if not told_already then
    redis.call('PUBLISH', key('arrived'), '')
  end
  told_already = true
end

local function put_back(stream, entry, id, shard)
  redis.call('HDEL', key('job', id), 's:' .. shard)
  redis.call('XCLAIM', stream, GROUP, FREE, 0, entry, 'JUSTID')
  tell_workers()
end

-- Lists a job whose round is complete, for the API processes.
local function mark_due(id)
  if redis.call('ZADD', key('due'), 'NX', stamp(NOW), id) == 1 then
    redis.call('PUBLISH', key('due'), '')
  end
  stay(TERMS.open_ms, key('due'))
end

local function run(id, state)
  if state == 'queued' then
    redis.call('HSET', key('job', id), 'state', 'running', 'started', stamp(NOW))
    redis.call('PUBLISH', key('changed', id), '')
  end
end

-- The backlog is one hash, so that its figures by job, owner and priority agree with the total.
local function open(id, owner, rows, lane)
  redis.call('HINCRBY', key('backlog'), 'all', rows)
  redis.call('HSET', key('backlog'), 'rows:' .. id, rows)
  if lane == 'hi' then
    redis.call('HSET', key('backlog'), 'hi:' .. id, '')
    redis.call('HINCRBY', key('backlog'), 'hi', rows)
  end
  if owner then
    redis.call('HSET', key('backlog'), 'owner:' .. id, owner)
    redis.call('HINCRBY', key('backlog'), 'of:' .. owner, rows)
  end
end

-- Subtracts `rows` of an open job from the backlog; without a number, all rows left.
local function settle(id, rows)
  local left, owner, fast = unpack(redis.call('HMGET', key('backlog'), 'rows:' .. id,
    'owner:' .. id, 'hi:' .. id))
  if left then
    local less = 0 - (rows or left)
    redis.call('HINCRBY', key('backlog'), 'all', less)
    redis.call('HINCRBY', key('backlog'), 'rows:' .. id, less)
    if fast and redis.call('HINCRBY', key('backlog'), 'hi', less) <= 0 then
      redis.call('HDEL', key('backlog'), 'hi')
    end
    if owner and redis.call('HINCRBY', key('backlog'), 'of:' .. owner, less) <= 0 then
      redis.call('HDEL', key('backlog'), 'of:' .. owner)
    end
  end
end

local function close(id)
  settle(id)
  redis.call('HDEL', key('backlog'), 'rows:' .. id, 'owner:' .. id, 'hi:' .. id)
  redis.call('ZREM', key('opened'), id)
  redis.call('ZREM', key('due'), id)
end

-- A cancelled job leaves a short-lived mark for its watchers; without the mark, the job was lost.
local function erase(id)
  local caller, state = unpack(redis.call('HMGET', key('job', id), 'caller', 'state'))
  if state == 'cancelled' then
    redis.call('SET', key('cancelled', id), '', 'PX', TERMS.silence_ms)
  end
  if caller and redis.call('GET', key('caller', caller)) == id then
    redis.call('DEL', key('caller', caller))
  end
  redis.call('DEL', key('job', id), key('image', id), key('done', id), key('entries', id))
  redis.call('ZREM', key('ended'), id)
  redis.call('PUBLISH', key('changed', id), '')
end

-- Deletes the shards of a job from its stream, and the set of counted ones.
local function withdraw(id)
  local entries = key('entries', id)
  local line, stream = unpack(redis.call('HMGET', key('job', id), 'line', 'stream'))
  in_lots(redis.call('HVALS', entries), function(...)
    redis.call('XACK', stream, GROUP, ...)
    redis.call('XDEL', stream, ...)
  end)
  tidy(line)
  redis.call('DEL', entries, key('done', id))
end

-- The image is deleted at once: no response needs it, and it is most of a job's memory.
local function finish(id, state, problem)
  local job = key('job', id)
  local caller = redis.call('HGET', job, 'caller')
  withdraw(id)
  close(id)
  redis.call('DEL', key('image', id))
  redis.call('HSET', job, 'state', state, 'finished', stamp(NOW), 'problem', problem or '')
  stay(TERMS.retention_ms, job, caller ~= '' and key('caller', caller) or nil)
  redis.call('ZADD', key('ended'), stamp(NOW), id)
  redis.call('PEXPIRE', key('ended'), TERMS.retention_ms)
  local most = redis.call('ZCARD', key('ended')) - TERMS.max_finished_jobs
  if most > 0 then -- More than one only after `max_finished_jobs` was lowered: 100 at a time.
    for _, oldest in ipairs(redis.call('ZRANGE', key('ended'), 0, math.min(most, 100) - 1)) do
      erase(oldest)
    end
  end
  redis.call('PUBLISH', key('changed', id), '')
end

-- The priority of a job, from its decoded JSON.
local function lane_of(job)
  return job.mode == 'predict' and 'hi' or 'lo'
end

-- Rows that an open job adds to the backlog, from its decoded JSON: its noise rows and setup rows.
local function charge_of(job)
  return job.n0 + job.n + (job.setup_rows or 0)
end

-- The fields that the messages of all shards of a job share.
local function labels(job, submitted)
  return {bundle = job.bundle, submitted = submitted,
    traceparent = job.traceparent ~= cjson.null and job.traceparent or '',
    deadline = stamp(tonumber(submitted) + TERMS.retention_ms / 1000)}
end

-- A dead letter records for the operator which rows ended a job, without its image or key.
local function bury(id, shard, fields, problem)
  local failures, deaths = unpack(redis.call('HMGET', key('job', id), 'f:' .. shard, 'd:' .. shard))
  redis.call('XADD', key('dead'), 'MAXLEN', '~', TERMS.dead_letters, '*', 'job', id,
    'shard', shard, 'domain', fields.domain, 'start', fields.start, 'stop', fields.stop,
    'bundle', fields.bundle, 'failures', failures or 0, 'deaths', deaths or 0, 'problem', problem,
    'traceparent', fields.traceparent or '')
  stay(TERMS.retention_ms, key('dead'))
  finish(id, 'failed', problem)
end

local function speed()
  local rows, seconds = 0, 0
  local fields = redis.call('HGETALL', key('speed'))
  for at = 1, #fields, 2 do
    local kind = string.sub(fields[at], 1, 2)
    rows = rows + (kind == 'r:' and tonumber(fields[at + 1]) or 0)
    seconds = seconds + (kind == 's:' and tonumber(fields[at + 1]) or 0)
  end
  return rows, stamp(seconds)
end

local function backlog()
  return tonumber(redis.call('HGET', key('backlog'), 'all') or 0)
end

local function open_rows(owner)
  return tonumber(redis.call('HGET', key('backlog'), 'of:' .. owner) or 0)
end

-- Distinct announcements of live workers, each with its number of workers.
local function announcements()
  local makers = {}
  for _, digest in ipairs(redis.call('HVALS', key('announced'))) do
    makers[digest] = (makers[digest] or 0) + 1
  end
  local found = {}
  for digest, count in pairs(makers) do
    local text = redis.call('GET', key('announcement', digest))
    if text then
      table.insert(found, {text, count})
    end
  end
  return found
end

local function enqueue(id, stream, fields, shard, domain, start, stop)
  local entry = redis.call('XADD', stream, '*', 'job', id, 'shard', shard, 'domain', domain,
    'start', start, 'stop', stop, 'bundle', fields.bundle, 'submitted', fields.submitted,
    'deadline', fields.deadline, 'traceparent', fields.traceparent)
  redis.call('HSET', key('entries', id), shard, entry)
end
