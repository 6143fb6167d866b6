-- Counts a failed attempt of the lease ARGV[3..5], with the problem ARGV[6] as JSON.
local problem = table.remove(ARGV)
each_held(function(_, id, shard, _, stream, entry)
  if redis.call('HINCRBY', key('job', id), 'f:' .. shard, 1) >= TERMS.failures_allowed then
    bury(id, shard, read(stream, entry), problem)
  else
    put_back(stream, entry, id, shard)
  end
end)
