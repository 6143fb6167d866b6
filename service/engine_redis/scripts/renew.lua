-- Renews the leases of ARGV[3..]; returns the places of those still held.
local kept = {}
each_held(function(place, _, _, _, stream, entry, worker)
  redis.call('XCLAIM', stream, GROUP, worker, 0, entry, 'JUSTID')
  table.insert(kept, place)
end)
return kept
