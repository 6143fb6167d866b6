-- Returns the open jobs, oldest first.
sweep()
return redis.call('ZRANGE', key('opened'), 0, -1)
