-- Counts a shard once; returns 1 where it was counted. ARGV[3] is the job, [4] the shard, [5] the
-- token, [6] the domain, [7] its rows, [8] the problem where the job's record got lost, [9] a result
-- or '', then class and votes of every class with votes.
-- The first commit counts, even on a lost lease: XACK succeeds for a stale worker too.
local id, shard, token, domain, rows, problem, result = unpack(ARGV, 3, 9)
local job, done, entries = key('job', id), key('done', id), key('entries', id)
local state, line, stream, counted, shards, look = unpack(redis.call('HMGET', job, 'state', 'line',
  'stream', 'counted', 'shards', 'look'))
if not state then
  return 0
end
-- The token of an earlier round may name the entry of another shard in the stream of this one.
local delivered = string.match(token, '^[^/]+')
local fields = read(stream, delivered)
if fields and fields.job == id and fields.shard == shard then
  drop(stream, delivered)
end
if not OPEN[state] then
  tidy(line)
  return 0
end
if redis.call('SCARD', done) ~= tonumber(counted) then
  finish(id, 'failed', problem)
  return 0
end
if redis.call('SADD', done, shard) == 0 then
  return 0
end
run(id, state)
for at = 10, #ARGV, 2 do
  redis.call('HINCRBY', job, domain .. ':' .. ARGV[at], ARGV[at + 1])
end
redis.call('HINCRBY', job, 'rows_done', rows)
if result ~= '' then
  redis.call('HSET', job, 'result', result)
  keep_result(id)
end
redis.call('HDEL', job, 's:' .. shard, 'f:' .. shard, 'd:' .. shard)
local entry = redis.call('HGET', entries, shard)
if entry then
  drop(stream, entry)
  redis.call('HDEL', entries, shard)
end
settle(id, rows)

local slot = math.floor(NOW / 10)
local since = tonumber(redis.call('HGET', key('speed'), 'since') or NOW)
redis.call('HSET', key('speed'), 'since', stamp(NOW))
redis.call('HINCRBYFLOAT', key('speed'), 's:' .. slot, stamp(math.max(0, NOW - since)))
if redis.call('HINCRBY', key('speed'), 'r:' .. slot, rows) == tonumber(rows) then
  for _, field in ipairs(redis.call('HKEYS', key('speed'))) do
    if tonumber(string.match(field, ':(%d+)') or slot) < slot - 6 then
      redis.call('HDEL', key('speed'), field)
    end
  end
end
stay(TERMS.retention_ms, key('speed'))

local complete = redis.call('HINCRBY', job, 'counted', 1) == tonumber(shards)
if complete and not look then
  finish(id, 'succeeded')
  return 1
end
redis.call('PEXPIREAT', done, redis.call('PEXPIRETIME', job))
redis.call('PUBLISH', key('changed', id), '')
if complete then
  mark_due(id)
end
return 1
