-- Returns the jobs whose look is due, oldest first.
sweep()
return redis.call('ZRANGE', key('due'), 0, -1)
