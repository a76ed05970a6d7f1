-- Reads the entries of the stream that are about a node, newest first. Of an entry
-- whose record is too long that is left out.
-- KEYS: changes
-- ARGV: id, the id of the stream to look at what is older than, how many entries to
--   look at, how many to return, the longest record
local page = redis.call('XREVRANGE', KEYS[1], ARGV[2], '-', 'COUNT', ARGV[3])
local found, at = {}, ''
local more = #page == tonumber(ARGV[3]) and 1 or 0
for _, entry in ipairs(page) do
  local fields, about = {}, false
  for i = 1, math.min(#entry[2], 16), 2 do
    local name, value = entry[2][i], entry[2][i + 1]
    about = about or name == 'id' and value == ARGV[1]
    if #name + #value <= tonumber(ARGV[5]) then
      fields[#fields + 1] = name
      fields[#fields + 1] = value
    end
  end
  at = entry[1]
  if about and at ~= ARGV[2] then
    found[#found + 1] = { at, fields }
    if #found == tonumber(ARGV[4]) then
      more = 1
      break
    end
  end
end
return { more, at, found }
