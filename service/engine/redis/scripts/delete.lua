-- Cancels the job ARGV[3] and erases it; returns 1 where it existed.
sweep()
local state = redis.call('HGET', key('job', ARGV[3]), 'state')
if OPEN[state] then
  finish(ARGV[3], 'cancelled')
end
erase(ARGV[3])
return state and 1 or 0
