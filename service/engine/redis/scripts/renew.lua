-- Renews the leases of ARGV[4..]; returns the places of those still held. Where ARGV[3] is 'start',
-- marks them as being computed.
local start = table.remove(ARGV, 3) == 'start'
local kept = {}
each_held(function(place, id, shard, token, stream, entry, worker)
  redis.call('XCLAIM', stream, GROUP, worker, 0, entry, 'JUSTID')
  if start then
    redis.call('HSET', key('job', id), 's:' .. shard, token)
    run(id, redis.call('HGET', key('job', id), 'state'))
  end
  table.insert(kept, place)
end)
return kept
