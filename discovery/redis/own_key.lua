-- Replaces a node's record, or removes it, if it names the given instance; else it
-- returns -1.
-- KEYS: the node's key
-- ARGV: instance, and to replace it: record, lease in s
-- What is too long for a record is nobody's own.
local value = redis.call('STRLEN', KEYS[1]) <= 65536 and redis.call('GET', KEYS[1])
if not value then
  return -1
end
local ok, record = pcall(cjson.decode, value)
if not ok or type(record) ~= 'table' then
  return -1
end
local instance = ''
local metadata = record['metadata'] or record['Metadata']
if type(metadata) == 'table' then
  instance = metadata['instance'] or ''
end
if instance ~= ARGV[1] then
  return -1
end
if ARGV[2] then
  redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
  return 1
end
return redis.call('DEL', KEYS[1])
