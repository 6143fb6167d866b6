-- Puts the leases of ARGV[3..] back uncounted.
each_held(function(_, id, shard, _, stream, entry)
  put_back(stream, entry, id, shard)
end)
