-- The lines with work that have gone unserved too long, while other workers were heard from; ARGV[3..]
-- are those that live workers serve, one at least. The time begins as a line is first seen unserved,
-- and anew where a worker pulls for it, or where for three leases nobody looked.
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
