-- Replaces a node's record, or removes it, if it names the given instance; else it
-- returns -1.
-- KEYS: the node's key
-- ARGV: instance, and to replace it: record, lease in s
-- What is too long for a record is nobody's own.
if redis.call('STRLEN', KEYS[1]) > 65536 or instance(redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then
  return -1
end
if ARGV[2] then
  redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
  return 1
end
return redis.call('DEL', KEYS[1])
