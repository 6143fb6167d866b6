-- Returns the id of a job with the alias ARGV[3] that exists, or nothing.
sweep()
for _, id in ipairs(redis.call('ZREVRANGE', key('alias', ARGV[3]), 0, -1)) do
  if redis.call('EXISTS', key('job', id)) == 1 then
    return id
  end
  redis.call('ZREM', key('alias', ARGV[3]), id)
end
