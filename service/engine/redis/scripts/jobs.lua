-- Begins every script, after common.lua: job records, the backlog, the ends of jobs.

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
  redis.call('ZREM', key('results'), id)
  redis.call('PUBLISH', key('changed', id), '')
end

-- Lists a job that has a result, and erases the oldest of too many.
local function keep_result(id)
  redis.call('ZADD', key('results'), stamp(NOW), id)
  redis.call('PEXPIRE', key('results'), TERMS.retention_ms)
  if redis.call('ZCARD', key('results')) > TERMS.max_results then
    erase(redis.call('ZRANGE', key('results'), 0, 0)[1])
  end
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

-- Most noise rows of a job, from its decoded JSON: n0 and n of each stage.
local function rows_of(job)
  return (job.n0 + job.n) * math.max(1, #(job.stages or {}))
end

-- Rows that an open job adds to the backlog: its noise rows and setup rows.
local function charge_of(job)
  return rows_of(job) + (job.setup_rows or 0)
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

