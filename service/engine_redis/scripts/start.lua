-- Marks the leases of ARGV[3..] as being computed.
each_held(function(_, id, shard, token)
  redis.call('HSET', key('job', id), 's:' .. shard, token)
  run(id, redis.call('HGET', key('job', id), 'state'))
end)
