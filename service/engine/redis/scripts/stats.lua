-- Returns {{state of `hi`, state of `lo`}, {rows, seconds} of the last minute of work, live workers,
-- shards that ended their jobs}. A state is {rows waiting or leased, seconds since the oldest shard
-- without a lease was accepted, or 0}. Costs a few commands per queue with work.
sweep()
local lines = redis.call('HKEYS', key('lines'))

local function oldest_seconds(...)
  local since = NOW
  for _, lane in ipairs({...}) do
    for _, line in ipairs(lines) do
      local next_one = head(key('lane', lane, line))
      since = math.min(since, next_one and tonumber(next_one.submitted) or NOW)
    end
  end
  return stamp(NOW - since)
end

local function dead_letters()
  local told = redis.pcall('XINFO', 'STREAM', key('dead'))
  for at = 1, #told, 2 do
    if told[at] == 'entries-added' then
      return told[at + 1]
    end
  end
  return 0
end

local all, fast = backlog(), tonumber(redis.call('HGET', key('backlog'), 'hi') or 0)
local alive = redis.call('ZCOUNT', key('workers'), stamp(NOW - TERMS.silence_ms / 1000), '+inf')
return {{{fast, oldest_seconds('hi')}, {all - fast, oldest_seconds('later', 'lo')}}, {speed()}, alive,
  dead_letters()}
