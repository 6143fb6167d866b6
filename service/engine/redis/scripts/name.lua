-- Gives the job ARGV[3] the alias ARGV[4], for the rest of the job's life.
sweep()
local left, alias = redis.call('PTTL', key('job', ARGV[3])), key('alias', ARGV[4])
if left > 0 then
  redis.call('ZADD', alias, stamp(NOW), ARGV[3])
  stay(math.max(left, redis.call('PTTL', alias)), alias)
end
