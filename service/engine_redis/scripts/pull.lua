-- Leases work to the worker ARGV[3], who announces ARGV[4] as JSON: ARGV[5] names the call, [6] the
-- rows to reach, [7] the line to take from, or '' where that is not chosen yet, then its lines.
-- Returns {{job, shard, domain, start, stop, 1 where solitary, token}...} where the line was chosen
-- or one line alone has work, and besides, where several have, {place of the line, 1 where a `hi`
-- shard is next, seconds for which that has gone unserved}... to choose from.
local worker, announcement, call, rows, chosen = unpack(ARGV, 3, 7)
rows = tonumber(rows)
local taken = {}

-- A call that is made again, for its reply got lost, gets that reply.
local answer = redis.call('GET', key('pulled', worker))
if answer then
  local name, leases = unpack(cjson.decode(answer))
  if name == call then
    return {leases, {}}
  end
end
sweep()
local digest = redis.sha1hex(announcement)
redis.call('ZADD', key('workers'), stamp(NOW), worker)
redis.call('HSET', key('announced'), worker, digest)
redis.call('SET', key('announcement', digest), announcement, 'PX', TERMS.silence_ms)
redis.call('PEXPIRE', key('workers'), TERMS.open_ms)
redis.call('PEXPIRE', key('announced'), TERMS.silence_ms)
if redis.call('EXISTS', key('unserved')) == 1 then
  for at = 8, #ARGV do
    redis.call('HDEL', key('unserved'), ARGV[at])
  end
end

-- Everything handed back to the stream, some at a time: f(delivery, fields) until it returns true.
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

local function offers()
  local found = {}
  for at = 8, #ARGV do
    local served = redis.call('HGET', key('lines'), ARGV[at])
    if served then
      local fast = head(key('lane', 'hi', ARGV[at]))
      local next_one = fast or head(key('lane', 'lo', ARGV[at]))
      if next_one then
        local since = math.max(tonumber(served), tonumber(next_one.submitted))
        table.insert(found, {at - 8, fast and 1 or 0, stamp(NOW - since)})
      end
    end
  end
  return found
end

-- Whether the shard is still to be computed, and if so alone.
local function wanted(fields)
  local state, deaths = unpack(redis.call('HMGET', key('job', fields.job), 'state',
    'd:' .. fields.shard))
  local late = NOW >= tonumber(fields.deadline)
  local done = redis.call('SISMEMBER', key('done', fields.job), fields.shard) == 1
  return OPEN[state] and not late and not done, tonumber(deaths or 0) > 0
end

local function take(fields, solitary, entry, deliveries)
  table.insert(taken, {fields.job, fields.shard, fields.domain, fields.start, fields.stop,
    solitary and 1 or 0, token_of(entry, deliveries, fields.job, worker)})
  rows = solitary and 0 or rows - (tonumber(fields.stop) - tonumber(fields.start))
end

local function take_back(stream)
  each_free(stream, function(delivery, fields)
    local entry, open, solitary = delivery[1], wanted(fields)
    if not open then
      drop(stream, entry)
    elseif not solitary or #taken == 0 then
      redis.call('XCLAIM', stream, GROUP, worker, 0, entry)
      take(fields, solitary, entry, delivery[4] + 1)
    end
    return rows <= 0
  end)
end

local function take_new(stream)
  while rows > 0 do
    local found = redis.call('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', 1, 'STREAMS', stream,
      '>')
    if not found then
      return
    end
    local entry = found[1][2][1]
    local fields = message(entry)
    local open, solitary = wanted(fields)
    if not open then
      drop(stream, entry[1])
    elseif solitary and #taken > 0 then
      redis.call('XCLAIM', stream, GROUP, FREE, 0, entry[1], 'JUSTID')
    else
      take(fields, solitary, entry[1], 1)
    end
  end
end

local function take_from(line)
  for _, lane in ipairs({'hi', 'lo'}) do
    local stream = key('lane', lane, line)
    if rows > 0 and redis.call('EXISTS', stream) == 1 then
      take_back(stream)
      take_new(stream)
    end
  end
  if redis.call('HEXISTS', key('lines'), line) == 1 then
    redis.call('HSET', key('lines'), line, stamp(NOW))
  end
  tidy(line)
  if #taken > 0 then
    redis.call('SET', key('pulled', worker), cjson.encode({call, taken}), 'PX', TERMS.lease_ms)
  end
end

local found = chosen == '' and offers() or {}
if #found == 1 then
  chosen, found = ARGV[found[1][1] + 8], {}
end
if chosen ~= '' then
  take_from(chosen)
end
return {taken, found}
