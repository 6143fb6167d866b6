-- Cancels the job ARGV[3] and erases it; 1 where it was there.
sweep()
local state = redis.call('HGET', key('job', ARGV[3]), 'state')
if OPEN[state] then
  finish(ARGV[3], 'cancelled')
end
erase(ARGV[3])
return state and 1 or 0
