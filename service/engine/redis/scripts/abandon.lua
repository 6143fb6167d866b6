-- Fails the open job ARGV[3] with the problem ARGV[4], unless its queue is served again.
-- Returns 1 where the job failed.
local state, line = unpack(redis.call('HMGET', key('job', ARGV[3]), 'state', 'line'))
if not OPEN[state] or redis.call('HEXISTS', key('unserved'), line) == 0 then
  return 0
end
stay(3 * TERMS.lease_ms, key('unserved'))
finish(ARGV[3], 'failed', ARGV[4])
return 1
