-- Queues the next round of the job ARGV[3]: [4] is the look that is due, [5] the look at the round's
-- end, both in estimation rows, then the round's shards: index, domain, start, stop of each.
-- Returns 1 where this call or an earlier one queued the round.
sweep()
local id, due, next_look = unpack(ARGV, 3, 5)
local job, entries = key('job', id), key('entries', id)
local state, text, line, stream, submitted, look, counted, shards = unpack(redis.call('HMGET', job,
  'state', 'job', 'line', 'stream', 'submitted', 'look', 'counted', 'shards'))
if not OPEN[state] then
  return 0
end
if tonumber(look) >= tonumber(next_look) then
  return 1
end
if look ~= due or counted ~= shards then
  return 0
end

local asked = cjson.decode(text)
local is_cascade = #(asked.stages or {}) > 0
local votes, record = {}, redis.call('HGETALL', job)
for at = 1, #record, 2 do
  local domain, class = string.match(record[at], '^(%l+):(%d+)$')
  if domain == 'estimation' then
    votes[class] = tonumber(record[at + 1])
  elseif domain == 'selection' and is_cascade then
    redis.call('HDEL', job, record[at]) -- The next stage selects by its own rows.
  end
end
-- A round at the end of `lo` would wait for the whole backlog.
stream = lane_of(asked) == 'lo' and key('lane', 'later', line) or stream
redis.call('HSET', job, 'look:' .. look, cjson.encode(votes), 'before', look, 'look', next_look,
  'stream', stream)
redis.call('HINCRBY', job, 'shards', (#ARGV - 5) / 4)
redis.call('ZREM', key('due'), id)
redis.call('HSETNX', key('lines'), line, stamp(NOW))
redis.pcall('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
local fields = labels(asked, submitted)
for at = 6, #ARGV, 4 do
  enqueue(id, stream, fields, unpack(ARGV, at, at + 3))
end
redis.call('PEXPIREAT', entries, redis.call('PEXPIRETIME', job))
stay(TERMS.open_ms, key('lines'), stream)
tell_workers()
redis.call('PUBLISH', key('changed', id), '')
return 1
