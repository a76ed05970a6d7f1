-- Reads the overrides, but for what is too long to be one, and the server's time, which
-- not everybody may ask for. Later keys count for more.
-- Those before the last are not missed where they hold something else, or may not be
-- read.
-- KEYS: overrides, more than one if they had other names
-- ARGV: the longest id, the longest override, how many may be read of each
local time = redis.pcall('TIME')
local found = {}
for k, key in ipairs(KEYS) do
  local ids = k == #KEYS and redis.call('HKEYS', key) or redis.pcall('HKEYS', key)
  local read = 0
  for _, id in ipairs(ids.err and {} or ids) do
    if #id <= tonumber(ARGV[1]) and redis.call('HSTRLEN', key, id) <= tonumber(ARGV[2]) then
      found[#found + 1] = id
      found[#found + 1] = redis.call('HGET', key, id)
      read = read + 1
      if read == tonumber(ARGV[3]) then
        break
      end
    end
  end
end
return {time.err and {} or time, found}
