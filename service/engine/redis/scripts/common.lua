-- Begins every script; jobs.lua and sweep.lua follow. KEYS[1] is the prefix of all keys, ARGV[1] the
-- limits and times as JSON, ARGV[2] the time in Unix seconds, or '' for the Redis server's.
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

