-- What waits for a worker: ARGV[3] its id, [4] its announcement as JSON, then its lines. Returns
-- {place of the line, 1 where a `hi` shard is next, seconds for which that has gone unserved}.
sweep()
local worker, announcement = ARGV[3], ARGV[4]
local digest = redis.sha1hex(announcement)
redis.call('ZADD', key('workers'), stamp(NOW), worker)
redis.call('HSET', key('announced'), worker, digest)
redis.call('SET', key('announcement', digest), announcement, 'PX', TERMS.silence_ms)
heard(worker)

local function head(stream)
  local first = pending(stream, '-', '+', 1, FREE)[1]
  if first then
    return read(stream, first[1])
  end
  local groups = redis.pcall('XINFO', 'GROUPS', stream)
  if groups.err then
    return nil
  end
  local last = '0-0'
  for at = 1, #groups[1], 2 do
    last = groups[1][at] == 'last-delivered-id' and groups[1][at + 1] or last
  end
  local entry = redis.call('XRANGE', stream, '(' .. last, '+', 'COUNT', 1)[1]
  return entry and message(entry)
end

local offers = {}
for at = 5, #ARGV do
  local served = redis.call('HGET', key('lines'), ARGV[at])
  if served then
    local fast = head(key('lane', 'hi', ARGV[at]))
    local next_one = fast or head(key('lane', 'lo', ARGV[at]))
    if next_one then
      local since = math.max(tonumber(served), tonumber(next_one.submitted))
      table.insert(offers, {at - 5, fast and 1 or 0, stamp(NOW - since)})
    end
  end
end
return offers
