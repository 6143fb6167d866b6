-- What an operator watches, a few commands a line with work: {{rows waiting or leased, seconds since
-- the oldest shard that nobody holds was accepted, 0 where none waits}, of `hi` and of `lo`}, {rows and
-- seconds of the last minute of work}, live workers, shards that ended their jobs.
sweep()
local lines = redis.call('HKEYS', key('lines'))

local function oldest_seconds(lane)
  local since = NOW
  for _, line in ipairs(lines) do
    local next_one = head(key('lane', lane, line))
    since = math.min(since, next_one and tonumber(next_one.submitted) or NOW)
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
return {{{fast, oldest_seconds('hi')}, {all - fast, oldest_seconds('lo')}}, {speed()}, alive,
  dead_letters()}
