-- Leases shards to the worker ARGV[3], which announces ARGV[4] as JSON. ARGV[5] names the call, [6]
-- is the rows to reach (0 only announces), [7] the queue to take from, or '' before the choice, then
-- come the worker's queues.
-- Returns {leases, candidates}:
-- leases: {job, shard, domain, start, stop, 1 where isolated, token}..., where the queue was chosen
-- or a single queue has work;
-- candidates: {place of the queue, 1 where a `hi` shard is next, seconds unserved}..., where several
-- queues have work.
local worker, announcement, call, rows, chosen = unpack(ARGV, 3, 7)
rows = tonumber(rows)
local taken = {}

-- A call repeated after a lost reply gets that reply.
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

-- The streams of a queue in the order of service: `hi` last where CERTIFY was passed too often.
local function lanes(line)
  if tonumber(redis.call('HGET', key('passed'), line) or 0) < TERMS.fast_pulls then
    return LANES
  end
  return {'later', 'lo', 'hi'}
end

local function offers()
  local found = {}
  for at = 8, #ARGV do
    local served = redis.call('HGET', key('lines'), ARGV[at])
    if served then
      local next_one, lane = next_of(ARGV[at], lanes(ARGV[at]))
      if next_one then
        local since = math.max(tonumber(served), tonumber(next_one.submitted))
        table.insert(found, {at - 8, lane == 'hi' and 1 or 0, stamp(NOW - since)})
      end
    end
  end
  return found
end

-- Whether the shard must still be computed, and whether it is isolated.
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

-- Counts consecutive pulls that left CERTIFY waiting; this one took `slow_ones` of its shards.
local function pass(line, slow_ones)
  if slow_ones == 0 and next_of(line, {'later', 'lo'}) then
    redis.call('HINCRBY', key('passed'), line, 1)
    stay(TERMS.open_ms, key('passed'))
  else
    redis.call('HDEL', key('passed'), line)
  end
end

local function take_from(line)
  local slow_ones = 0
  for _, lane in ipairs(lanes(line)) do
    local stream, before = key('lane', lane, line), #taken
    if rows > 0 and redis.call('EXISTS', stream) == 1 then
      take_back(stream)
      take_new(stream)
    end
    slow_ones = slow_ones + (lane ~= 'hi' and #taken - before or 0)
  end
  pass(line, slow_ones)
  if redis.call('HEXISTS', key('lines'), line) == 1 then
    redis.call('HSET', key('lines'), line, stamp(NOW))
  end
  tidy(line)
  if #taken > 0 then
    redis.call('SET', key('pulled', worker), cjson.encode({call, taken}), 'PX', TERMS.lease_ms)
  end
end

local found = chosen == '' and rows > 0 and offers() or {}
if #found == 1 then
  chosen, found = ARGV[found[1][1] + 8], {}
end
if chosen ~= '' then
  take_from(chosen)
end
return {taken, found}
