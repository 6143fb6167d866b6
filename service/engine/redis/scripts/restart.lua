-- Begins the open job ARGV[3] anew: ARGV[4] is the job as JSON under another digest and key, [5] its
-- line there, then the shards: index, domain, start, stop of each. 1 where it did; 0 where the job has
-- ended or is in that line already.
sweep()
local id, text, line = unpack(ARGV, 3, 5)
local job = key('job', id)
local state, before, submitted, done = unpack(redis.call('HMGET', job, 'state', 'line', 'submitted',
  'rows_done'))
if not OPEN[state] or before == line then
  return 0
end
withdraw(id)
settle(id, -tonumber(done))
local outdated = {'started'}
for _, field in ipairs(redis.call('HKEYS', job)) do
  -- Votes of a class; a shard's start and failures. Deaths stay: they speak of the rows.
  if string.find(field, ':', 1, true) and not string.find(field, '^d:') then
    table.insert(outdated, field)
  end
end
in_lots(outdated, function(...)
  redis.call('HDEL', job, ...)
end)
local asked = cjson.decode(text)
local stream = key('lane', lane_of(asked), line)
redis.call('HSET', job, 'job', text, 'state', 'queued', 'rows_done', 0, 'counted', 0, 'line', line,
  'stream', stream)

redis.call('HSETNX', key('lines'), line, 0)
redis.pcall('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
local fields = labels(asked, submitted)
for at = 6, #ARGV, 4 do
  enqueue(id, stream, fields, unpack(ARGV, at, at + 3))
end
redis.call('PEXPIREAT', key('entries', id), redis.call('PEXPIRETIME', job))
stay(TERMS.open_ms, stream, key('lines'), key('backlog'))
redis.call('PUBLISH', key('changed', id), '')
tell_workers()
return 1
