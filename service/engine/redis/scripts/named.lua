-- Returns the id of the job with the alias ARGV[3], while the job exists.
sweep()
local id = redis.call('GET', key('alias', ARGV[3]))
return id and redis.call('EXISTS', key('job', id)) == 1 and id
