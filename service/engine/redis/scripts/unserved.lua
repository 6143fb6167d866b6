-- Returns the queues with work that no live worker has served for `unserved_ms`. ARGV[3..] are the
-- queues that live workers serve, at least one. The time begins at the first call that finds a queue
-- unserved. It begins again where a worker pulls for the queue, or after three leases without a call.
local noted, served, late = key('unserved'), {}, {}
for at = 3, #ARGV do
  served[ARGV[at]] = true
end
for _, line in ipairs(redis.call('HKEYS', noted)) do
  if served[line] or redis.call('HEXISTS', key('lines'), line) == 0 then
    redis.call('HDEL', noted, line)
  end
end
for _, line in ipairs(redis.call('HKEYS', key('lines'))) do
  if not served[line] then
    redis.call('HSETNX', noted, line, stamp(NOW))
    if NOW - tonumber(redis.call('HGET', noted, line)) >= TERMS.unserved_ms / 1000 then
      table.insert(late, line)
    end
  end
end
stay(3 * TERMS.lease_ms, noted)
return late
