-- The adaptation jobs that are to be run, an entry each. ARGV[3] is what to do, the rest its arguments.
-- An entry is pending from the moment it is added: with the worker who runs the job, with FREE for
-- anyone to take, or with HELD until a lease has passed, for somebody may still run the job.
local STREAM, RECORD, TURN = key('adapt'), key('adapt', 'record'), key('adapt', 'reconciled')
local VOLUME = key('adapt', 'volume')
local HELD = '(held)'
local WORKERLESS = {[FREE] = true, [HELD] = true}

local function claim(entry, consumer)
  redis.call('XCLAIM', STREAM, GROUP, consumer, 0, entry, 'JUSTID')
end

local function add(task, consumer)
  redis.pcall('XGROUP', 'CREATE', STREAM, GROUP, '0', 'MKSTREAM')
  redis.call('XADD', STREAM, '*', 'task', task)
  redis.call('XREADGROUP', 'GROUP', GROUP, consumer, 'STREAMS', STREAM, '>')
end

-- A group that got lost is made again, and its jobs held.
if redis.call('EXISTS', STREAM) == 1
  and not redis.pcall('XGROUP', 'CREATE', STREAM, GROUP, '0').err then
  redis.call('XREADGROUP', 'GROUP', GROUP, HELD, 'STREAMS', STREAM, '>')
end

-- The task's entry and who has it.
local function find(task)
  for _, entry in ipairs(redis.call('XRANGE', STREAM, '-', '+')) do
    if message(entry).task == task then
      local held = pending(STREAM, entry[1], entry[1], 1)[1]
      return entry[1], held and held[2]
    end
  end
end

local function leave(worker)
  if not WORKERLESS[worker] and #pending(STREAM, '-', '+', 1, worker) == 0 then
    redis.call('XGROUP', 'DELCONSUMER', STREAM, GROUP, worker)
  end
end

local function remove(task, entry, owner)
  drop(STREAM, entry)
  redis.call('HDEL', RECORD, 'losses:' .. task, 'furthest:' .. task)
  if redis.call('XLEN', STREAM) == 0 then
    redis.call('DEL', STREAM)
  elseif owner then
    leave(owner)
  end
end

-- Nothing where the volume is the fleet's; else 1 where the fleet has another, and 0 where no API has
-- told of one. Whoever shares it keeps it known.
local function elsewhere(volume)
  local known = redis.call('GET', VOLUME)
  if known ~= volume then
    return known and 1 or 0
  end
  redis.call('PEXPIRE', VOLUME, TERMS.volume_ms)
end

local verbs = {}

-- The volume is the fleet's from now on, unless there is one.
function verbs.claim(volume)
  redis.call('SET', VOLUME, volume, 'NX', 'PX', TERMS.volume_ms)
  return elsewhere(volume)
end

-- A job to be run, unless it is known; one whose namesake was just removed has to wait.
function verbs.announce(task)
  if not find(task) then
    add(task, redis.call('EXISTS', key('adapt', 'removed', task)) == 1 and HELD or FREE)
  end
end

-- The job is there no more; whoever runs it hears so at the next renewal.
function verbs.retract(task)
  local entry, owner = find(task)
  if entry then
    if not WORKERLESS[owner] then
      redis.call('SET', key('adapt', 'removed', task), '', 'PX', TERMS.lease_ms)
    end
    remove(task, entry, owner)
  end
end

-- Leases the first job that can be had, but for those named, to the worker, who runs none: what it
-- has already is what an answer that got lost gave it. Another's lease that ran out is a loss.
function verbs.take(volume, worker, ...)
  local apart = elsewhere(volume)
  if apart then
    return apart
  end
  local skipped = {}
  for _, task in ipairs({...}) do
    skipped[task] = true
  end
  for _, delivery in ipairs(pending(STREAM, '-', '+', 10000)) do
    local entry, owner, idle = unpack(delivery)
    if owner == FREE or owner == worker or idle >= TERMS.lease_ms then
      local fields = read(STREAM, entry)
      if not fields then
        drop(STREAM, entry)
      elseif not skipped[fields.task] then
        if not WORKERLESS[owner] and owner ~= worker then
          redis.call('HINCRBY', RECORD, 'losses:' .. fields.task, 1)
        end
        claim(entry, worker)
        leave(owner)
        return fields.task
      end
    end
  end
end

-- Extends the worker's lease of a job that is so far; returns how often the lease was lost since the
-- job last got further, or nothing where the lease is lost now. Where nobody else has the job, Redis
-- has forgotten who runs it.
function verbs.renew(task, worker, progress)
  if redis.call('EXISTS', key('adapt', 'removed', task)) == 1 then
    return nil
  end
  local entry, owner = find(task)
  if not entry then
    add(task, worker)
  elseif owner == worker or WORKERLESS[owner] then
    claim(entry, worker)
  else
    return nil
  end
  local furthest = redis.call('HGET', RECORD, 'furthest:' .. task)
  if tonumber(progress) > tonumber(furthest or -1) then
    redis.call('HSET', RECORD, 'furthest:' .. task, progress)
    redis.call('HDEL', RECORD, 'losses:' .. task)
  end
  return tonumber(redis.call('HGET', RECORD, 'losses:' .. task) or 0)
end

-- The worker's lease ends: others may take the job.
function verbs.release(task, worker)
  local entry, owner = find(task)
  if owner == worker then
    claim(entry, FREE)
    leave(worker)
  end
end

-- The worker's job has ended.
function verbs.close(task, worker)
  local entry, owner = find(task)
  if owner == worker then
    remove(task, entry, owner)
  end
end

-- The jobs that have been known for a lease's time; nothing where it is not the caller's turn.
function verbs.survey(volume)
  local apart = elsewhere(volume)
  if apart then
    return apart
  end
  if not redis.call('SET', TURN, '', 'NX', 'PX', TERMS.lease_ms) then
    return nil
  end
  local known = {}
  for _, entry in ipairs(redis.call('XRANGE', STREAM, '-', '+')) do
    if NOW * 1000 - tonumber(string.match(entry[1], '^%d+')) > TERMS.lease_ms then
      table.insert(known, message(entry).task)
    end
  end
  return known
end

-- Adds the jobs that are not known; returns how many.
function verbs.hold(...)
  local added = 0
  for _, task in ipairs({...}) do
    if not find(task) then
      add(task, HELD)
      added = added + 1
    end
  end
  return added
end

function verbs.drop(...)
  for _, task in ipairs({...}) do
    local entry, owner = find(task)
    if entry then
      remove(task, entry, owner)
    end
  end
end

local reply = verbs[ARGV[3]](unpack(ARGV, 4))
stay(TERMS.stay_ms, STREAM, RECORD)
return reply
