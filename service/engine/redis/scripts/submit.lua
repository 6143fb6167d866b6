-- Queues a job: ARGV[3] is the job as JSON, [4] its image, [5] the caller's key or '', [6] the
-- fingerprint, [7] its queue, [8] the limit in rows of one job, then the shards of the first round:
-- index, domain, start, stop of each. Returns {outcome, figures...}.
sweep()
local text, image, caller, fingerprint, line, most_rows = unpack(ARGV, 3, 8)
local job = cjson.decode(text)
local owner = job.owner ~= cjson.null and job.owner or nil
local id, rows, charge = job.id, rows_of(job), charge_of(job)
if caller ~= '' then
  local earlier = redis.call('GET', key('caller', caller))
  local asked = earlier and redis.call('HGET', key('job', earlier), 'fingerprint')
  if asked then
    return asked == fingerprint and {'known', earlier} or {'mismatch'}
  end
end
if redis.call('EXISTS', key('job', id)) == 1 then
  return {'known', id}
end
if rows > tonumber(most_rows) then
  return {'large'}
end
local served = false
for _, announcement in ipairs(announcements()) do
  served = served or cjson.decode(announcement[1]).bundles[job.task] == job.bundle
end
if not served then
  return {'unserved'}
end
if owner and TERMS.max_queue_rows_per_key ~= cjson.null then
  local of_owner = open_rows(owner)
  if of_owner + charge > TERMS.max_queue_rows_per_key then
    return {'quota', of_owner, TERMS.max_queue_rows_per_key, speed()}
  end
end
local waiting = backlog()
if waiting + charge > TERMS.max_queue_rows then
  return {'full', waiting, speed()}
end

if waiting == 0 then
  redis.call('DEL', key('backlog')) -- An older release may have left stale figures.
  redis.call('HSET', key('speed'), 'since', stamp(NOW))
  stay(TERMS.retention_ms, key('speed'))
end
local lane = lane_of(job)
local stream = key('lane', lane, line)
redis.call('HSET', key('job', id), 'job', text, 'state', 'queued', 'submitted', stamp(NOW),
  'rows_done', 0, 'counted', 0, 'shards', (#ARGV - 8) / 4, 'line', line, 'stream', stream,
  'caller', caller, 'fingerprint', fingerprint, 'shard_rows', TERMS.shard_rows)
if job.looks[1] then
  redis.call('HSET', key('job', id), 'look', job.looks[1])
end
redis.call('SET', key('image', id), image, 'PX', TERMS.open_ms)
if caller ~= '' then
  redis.call('SET', key('caller', caller), id, 'PX', TERMS.open_ms)
end
-- Where a shard of the queue waits already, no worker that serves the queue is idle.
local awaited = not next_of(line, LANES)
open(id, owner, charge, lane)
redis.call('ZADD', key('opened'), stamp(NOW), id)
redis.call('HSETNX', key('lines'), line, 0)
local fields = labels(job, stamp(NOW))
redis.pcall('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
for at = 9, #ARGV, 4 do
  enqueue(id, stream, fields, unpack(ARGV, at, at + 3))
end
stay(TERMS.open_ms, key('job', id), key('entries', id), key('backlog'), key('opened'),
  key('lines'), stream)
if awaited then
  tell_workers()
end
return {'queued', id}
