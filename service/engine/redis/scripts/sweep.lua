-- Begins every script, after jobs.lua: expires leases, workers and jobs.
local MOST_AT_ONCE = 500

-- Expires an unrenewed delivery; counts a worker crash where the shard was being computed.
local function lapse(stream, entry, worker, deliveries)
  local fields = read(stream, entry)
  if not fields then
    return drop(stream, entry)
  end
  local id, shard = fields.job, fields.shard
  local job = key('job', id)
  local state, started = unpack(redis.call('HMGET', job, 'state', 's:' .. shard))
  if not OPEN[state] then
    return drop(stream, entry)
  end
  if started == token_of(entry, deliveries, id, worker) then
    if redis.call('HINCRBY', job, 'd:' .. shard, 1) > TERMS.deaths_allowed then
      return bury(id, shard, fields, '')
    end
  end
  put_back(stream, entry, id, shard)
end

-- Expires at most `most` leases, and returns their number.
local function lapse_all(stream, most)
  local from, late, lapsed = '-', nil, 0
  repeat
    late = pending(stream, 'IDLE', TERMS.lease_ms, from, '+', 100)
    for _, delivery in ipairs(late) do
      if delivery[2] ~= FREE and lapsed < most then
        lapse(stream, delivery[1], delivery[2], delivery[4])
        lapsed = lapsed + 1
      end
      from = '(' .. delivery[1]
    end
  until #late < 100 or lapsed >= most
  return lapsed
end

local function dismiss(worker, streams)
  redis.call('ZREM', key('workers'), worker)
  redis.call('HDEL', key('announced'), worker)
  for _, stream in ipairs(streams) do
    if redis.call('EXISTS', stream) == 1 and #pending(stream, '-', '+', 1, worker) == 0 then
      redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, worker)
    end
  end
end

local function oldest(name, until_then, most)
  return redis.call('ZRANGE', key(name), '-inf', until_then, 'BYSCORE', 'LIMIT', 0, most)
end

-- Runs once per `sweep_ms`, and expires at most MOST_AT_ONCE items, so that Redis is not blocked for
-- long; the next script continues where items are left.
local function sweep()
  if not redis.call('SET', key('swept'), '', 'NX', 'PX', TERMS.sweep_ms) then
    return
  end
  local streams, left = {}, MOST_AT_ONCE
  for _, line in ipairs(redis.call('HKEYS', key('lines'))) do
    for _, lane in ipairs(LANES) do
      table.insert(streams, key('lane', lane, line))
    end
  end
  for _, stream in ipairs(streams) do
    left = left - lapse_all(stream, left)
  end
  for _, line in ipairs(redis.call('HKEYS', key('lines'))) do
    tidy(line)
  end
  local silent = oldest('workers', '(' .. stamp(NOW - TERMS.silence_ms / 1000), left)
  for _, worker in ipairs(silent) do
    dismiss(worker, streams)
  end
  left = left - #silent
  local past = stamp(NOW - TERMS.retention_ms / 1000)
  local unfinished = oldest('opened', past, left)
  for _, id in ipairs(unfinished) do
    if redis.call('EXISTS', key('job', id)) == 1 then
      finish(id, 'cancelled')
    end
    close(id)
    erase(id)
  end
  left = left - #unfinished
  local ended = oldest('ended', past, left)
  for _, id in ipairs(ended) do
    erase(id)
  end
  if left - #ended <= 0 then
    redis.call('DEL', key('swept'))
  end
end

