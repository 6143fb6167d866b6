-- Ends the open job ARGV[3] in the state ARGV[4] with the problem ARGV[5]; returns 1 where it was open.
sweep()
if not OPEN[redis.call('HGET', key('job', ARGV[3]), 'state')] then
  return 0
end
finish(ARGV[3], ARGV[4], ARGV[5])
return 1
