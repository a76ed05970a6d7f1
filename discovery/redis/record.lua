-- Reads what stands for a node in a hash, '' if that is too long.
-- KEYS: the hash
-- ARGV: id, the longest value
if redis.call('HSTRLEN', KEYS[1], ARGV[1]) > tonumber(ARGV[2]) then
  return ''
end
return redis.call('HGET', KEYS[1], ARGV[1]) or ''
