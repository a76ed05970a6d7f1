-- Removes a node's key if its record names the given instance.
-- KEYS: the node's key
-- ARGV: instance
local value = redis.call('GET', KEYS[1])
if not value then
  return 0
end
local ok, record = pcall(cjson.decode, value)
if not ok or type(record) ~= 'table' then
  return 0
end
local instance = ''
local metadata = record['metadata'] or record['Metadata']
if type(metadata) == 'table' then
  instance = metadata['instance'] or ''
end
if instance ~= ARGV[1] then
  return 0
end
return redis.call('DEL', KEYS[1])
