-- Leases shards of the line ARGV[3] to the worker ARGV[4] until ARGV[5] rows are reached. Returns
-- {job, shard, domain, start, stop, 1 where solitary, token} of each.
local line, worker, rows = ARGV[3], ARGV[4], tonumber(ARGV[5])
local taken = {}

-- The shard's job and whether it must run alone; nothing where it is not to be computed any more.
local function wanted(fields)
  local state, deaths = unpack(redis.call('HMGET', key('job', fields.job), 'state',
    'd:' .. fields.shard))
  local late = NOW >= tonumber(fields.deadline)
  local done = redis.call('SISMEMBER', key('done', fields.job), fields.shard) == 1
  return OPEN[state] and not late and not done, tonumber(deaths or 0) > 0
end

local function take(fields, solitary, entry, deliveries)
  table.insert(taken, {fields.job, fields.shard, fields.domain, fields.start, fields.stop,
    solitary and 1 or 0, token_of(entry, deliveries, worker)})
  rows = solitary and 0 or rows - (tonumber(fields.stop) - tonumber(fields.start))
end

local function take_back(stream)
  for _, delivery in ipairs(pending(stream, '-', '+', 1000, FREE)) do
    if rows <= 0 then
      return
    end
    local entry = delivery[1]
    local fields = read(stream, entry)
    local open, solitary = false, false
    if fields then
      open, solitary = wanted(fields)
    end
    if not open then
      drop(stream, entry)
    elseif not solitary or #taken == 0 then
      redis.call('XCLAIM', stream, GROUP, worker, 0, entry)
      take(fields, solitary, entry, delivery[4] + 1)
    end
  end
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

for _, lane in ipairs({'hi', 'lo'}) do
  local stream = key('lane', lane, line)
  if redis.call('EXISTS', stream) == 1 then
    take_back(stream)
    take_new(stream)
  end
end
if redis.call('HEXISTS', key('lines'), line) == 1 then
  redis.call('HSET', key('lines'), line, stamp(NOW))
end
tidy(line)
return taken
