-- Sets or clears the override of a node, and tells our watchers in the same step.
-- KEYS: overrides, changes, meta
-- ARGV: id, record ('' clears), epoch
if ARGV[2] == '' then
  if redis.call('HDEL', KEYS[1], ARGV[1]) == 0 then
    return 0
  end
else
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
end
redis.call('HSETNX', KEYS[3], 'epoch', ARGV[3])
local seq = redis.call('HINCRBY', KEYS[3], 'seq', 1)
redis.call('XADD', KEYS[2], '*', 'seq', seq, 'type', 'override', 'id', ARGV[1])
return 1
