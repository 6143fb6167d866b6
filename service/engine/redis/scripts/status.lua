-- Returns every field of the job ARGV[3], after the sweep.
sweep()
return redis.call('HGETALL', key('job', ARGV[3]))
