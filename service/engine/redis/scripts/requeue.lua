-- Queues the shards of the job ARGV[3] again that are neither counted nor in its stream; returns
-- their number. ARGV[4..] are index, domain, start, stop of every shard of the job's rounds so far.
local id = ARGV[3]
local job = key('job', id)
local state, text, line, stream, submitted, done, counted, shards = unpack(redis.call('HMGET', job,
  'state', 'job', 'line', 'stream', 'submitted', 'rows_done', 'counted', 'shards'))
if not OPEN[state] then
  close(id)
  return 0
end
local asked = cjson.decode(text)
if redis.call('HEXISTS', key('backlog'), 'rows:' .. id) == 0 then
  open(id, asked.owner ~= cjson.null and asked.owner or nil, charge_of(asked) - done,
    lane_of(asked))
end
if counted == shards then
  mark_due(id)
  stay(TERMS.open_ms, key('backlog'))
  return 0
end
redis.pcall('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
redis.call('HSETNX', key('lines'), line, 0)

local function follows(one, other)
  local major, minor = string.match(one, '(%d+)-(%d+)')
  local past, least = string.match(other, '(%d+)-(%d+)')
  if tonumber(major) ~= tonumber(past) then
    return tonumber(major) > tonumber(past)
  end
  return tonumber(minor) > tonumber(least)
end

local last = '0-0'
local group = redis.call('XINFO', 'GROUPS', stream)[1]
for at = 1, #group, 2 do
  last = group[at] == 'last-delivered-id' and group[at + 1] or last
end

-- Whether the entry is in the stream, and either undelivered or pending.
local function findable(entry)
  return entry and read(stream, entry)
    and (follows(entry, last) or #pending(stream, entry, entry, 1) == 1)
end

local fields = labels(asked, submitted)
local requeued = 0
for at = 4, #ARGV, 4 do
  local shard = ARGV[at]
  local entry = redis.call('HGET', key('entries', id), shard)
  if redis.call('SISMEMBER', key('done', id), shard) == 0 and not findable(entry) then
    if entry then
      drop(stream, entry)
    end
    enqueue(id, stream, fields, unpack(ARGV, at, at + 3))
    requeued = requeued + 1
  end
end
redis.call('PEXPIREAT', key('entries', id), redis.call('PEXPIRETIME', job))
stay(TERMS.open_ms, stream, key('lines'), key('backlog'))
if requeued > 0 then
  tell_workers()
end
return requeued
