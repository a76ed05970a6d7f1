-- Removes a node's record if our writers put it for the given instance; without
-- an instance, also the records of writers that know nothing of instances.
-- KEYS: set, members, leases, changes, meta
-- ARGV: id, instance
local old, removed = redis.call('HGET', KEYS[2], ARGV[1]), 0
if old then
  local member = string.sub(old, 18)
  if (instance(member) or '') ~= ARGV[2] then
    return 0
  end
  redis.call('HDEL', KEYS[2], ARGV[1])
  redis.call('ZREM', KEYS[3], ARGV[1])
  removed = redis.call('ZREM', KEYS[1], member)
elseif ARGV[2] == '' then
  for _, member in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    local ok, record = pcall(cjson.decode, member)
    if ok and type(record) == 'table' and (record['nodeId'] or record['NodeId']) == ARGV[1] and instance(member) == '' then
      removed = removed + redis.call('ZREM', KEYS[1], member)
    end
  end
end
if removed > 0 then
  local seq = redis.call('HINCRBY', KEYS[5], 'seq', 1)
  redis.call('XADD', KEYS[4], '*', 'seq', seq, 'type', 'left', 'id', ARGV[1])
end
return removed
