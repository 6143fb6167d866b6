-- Ends the job ARGV[3] with the votes at the look of ARGV[4] estimation rows, where that look is due or
-- the last one that the job was extended past. Returns 1 where the job has succeeded, now or earlier.
sweep()
local id, look = ARGV[3], ARGV[4]
local state, current, before, counted, shards = unpack(redis.call('HMGET', key('job', id), 'state',
  'look', 'before', 'counted', 'shards'))
if not OPEN[state] then
  return state == 'succeeded' and 1 or 0
end
if look ~= before and (look ~= current or counted ~= shards) then
  return 0
end
redis.call('HSET', key('job', id), 'look', look)
finish(id, 'succeeded')
return 1
