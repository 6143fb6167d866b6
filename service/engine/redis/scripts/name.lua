-- Gives the job ARGV[3] the alias ARGV[4], for the rest of the job's life.
sweep()
local left = redis.call('PTTL', key('job', ARGV[3]))
if left > 0 then
  redis.call('SET', key('alias', ARGV[4]), ARGV[3], 'PX', left)
end
