-- Reads the overrides, but for what is too long to be one.
-- KEYS: overrides
-- ARGV: the longest id, the longest override, how many may be read
local found = {}
for _, id in ipairs(redis.call('HKEYS', KEYS[1])) do
  if #id <= tonumber(ARGV[1]) and redis.call('HSTRLEN', KEYS[1], id) <= tonumber(ARGV[2]) then
    found[#found + 1] = id
    found[#found + 1] = redis.call('HGET', KEYS[1], id)
    if #found == 2 * tonumber(ARGV[3]) then
      break
    end
  end
end
return found
