-- Every field of the job ARGV[3], as the sweep left it.
sweep()
return redis.call('HGETALL', key('job', ARGV[3]))
