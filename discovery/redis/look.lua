-- Reads the members written since a score, and where in the sequence of changes
-- that is, in one step. Not every user may read the side keys: without them the
-- stream cannot be followed, and its last entry is ''.
--
-- A member that is too long for a record stays here: in its place stand its length,
-- a digest and how it begins. So does every member that is longer than usual, once
-- those that were read are too much altogether.
--
-- KEYS: set, and unless the user is restricted to that: changes, meta
-- ARGV: the lowest score, whether to look for the last entry of the stream ('1'),
--   the longest record, how much may be read altogether, the longest record beyond
--   that, how many members may be read; and what is known of members that are too
--   long, in order: a score and how many members have it, all of them too long
local longest, enough, usual, most = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local step = 500
local pages, size = {}, 0

local function keep(page)
  for i = 1, #page, 2 do
    local member = page[i]
    local length = #member
    if length > longest or size > enough and length > usual then
      page[i] = { length, redis.sha1hex(string.sub(member, 1, 1024) .. string.sub(member, -1024)), string.sub(member, 1, 256) }
    else
      size = size + length
    end
  end
  pages[#pages + 1] = page
end

-- Pages follow each other by score, past those members of the last one that were read.
local function read(min, max)
  local past = 0
  while true do
    local page = redis.call('ZRANGEBYSCORE', KEYS[1], min, max, 'WITHSCORES', 'LIMIT', past, step)
    local last, same = page[#page], 1
    if #page > 0 then
      keep(page)
    end
    if #page < 2 * step then
      return
    end
    for i = #page - 2, 2, -2 do
      if page[i] ~= last then
        break
      end
      same = same + 1
    end
    if last == min then
      past = past + same
    else
      min, past = last, same
    end
  end
end

local count = redis.call('ZCARD', KEYS[1])
local min = ARGV[1]
if count > most and min == '-inf' then
  -- The oldest are left out. Not every user may ask for their rank.
  local first = redis.pcall('ZRANGE', KEYS[1], -most, -most, 'WITHSCORES')
  min = first[2] or min
end

-- What is known to be too long is not looked at again.
local skipped = {}
for i = 7, #ARGV, 2 do
  local same = redis.pcall('ZCOUNT', KEYS[1], ARGV[i], ARGV[i])
  local skip = same == tonumber(ARGV[i + 1])
  if skip then
    read(min, '(' .. ARGV[i])
    min = '(' .. ARGV[i]
  end
  skipped[#skipped + 1] = skip and 1 or 0
end
read(min, '+inf')

local meta, last, at = {}, {}, ''
if KEYS[2] then
  meta = redis.pcall('HMGET', KEYS[3], 'epoch', 'seq')
  if ARGV[2] == '1' then
    last = redis.pcall('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
  end
end
if meta.err or last.err then
  meta = {}
elseif KEYS[2] then
  at = last[1] and last[1][1] or '0-0'
end
return {
  redis.call('TIME'),
  meta[1] or '',
  meta[2] or '0',
  at,
  count,
  pages,
  skipped,
}
