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
--   that, how many members may be read; how many ranges of scores follow, and of each
--   where it ends, and how many members it had: they follow each other, and those that
--   have another number of members now are read as well, if they are few; and what is
--   known of members that are too long, in order: a score and how many members have it,
--   all of them too long
local longest, enough, usual, most = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local step, room = 500, 16 * 1024 * 1024
local pages, size, kept = {}, 0, 0

-- Keeps a page, and returns how many bytes its members have.
local function keep(page)
  local all = 0
  for i = 1, #page, 2 do
    local member = page[i]
    local length = #member
    all = all + length
    if length > longest or size > enough and length > usual then
      page[i] = { length, redis.sha1hex(string.sub(member, 1, 1024) .. string.sub(member, -1024)), string.sub(member, 1, 256) }
    else
      size = size + length
    end
  end
  kept = kept + #page / 2
  pages[#pages + 1] = page
  return all
end

-- Pages follow each other by score, past those members of the last one that were read.
-- The server walks past them each time, so a page grows with their number, as long
-- as it is no more to copy than some MiB.
local function read(min, max, past)
  local limit = step
  while kept < most do
    limit = math.min(limit, most - kept)
    local page = redis.call('ZRANGEBYSCORE', KEYS[1], min, max, 'WITHSCORES', 'LIMIT', past, limit)
    local n = #page / 2
    if n == 0 then
      return
    end
    local average = keep(page) / n
    if n < limit then
      return
    end
    local last, same = page[#page], 1
    while same < n and page[#page - 2 * same] == last do
      same = same + 1
    end
    if same < n then
      min, past = last, same
    else
      past = past + n
    end
    limit = math.max(step, math.min(past, math.floor(room / math.max(average, 1))))
  end
end

-- The oldest are left out if there are too many: the first that is read is the one
-- of this score past those.
local count = redis.call('ZCARD', KEYS[1])
local min, past = ARGV[1], 0
local from = tonumber(min)
if count > most then
  local first = redis.pcall('ZRANGE', KEYS[1], -most, -most, 'WITHSCORES')
  local older = first[2] and redis.pcall('ZCOUNT', KEYS[1], '-inf', '(' .. first[2])
  if type(older) ~= 'number' then
    -- Not every user may ask for ranks.
    if min == '-inf' then
      past, from = count - most, math.huge
    end
  elseif tonumber(first[2]) >= from then
    min, past, from = first[2], count - most - older, tonumber(first[2])
  end
end

-- What is known to be too long is not looked at again.
local skipped = {}
local ranges = tonumber(ARGV[7])
for i = 8 + 2 * ranges, #ARGV, 2 do
  local score, same = tonumber(ARGV[i]), tonumber(ARGV[i + 1])
  local skip = (score > from or score == from and past == 0) and redis.pcall('ZCOUNT', KEYS[1], ARGV[i], ARGV[i]) == same
  if skip then
    read(min, '(' .. ARGV[i], past)
    min, past = ARGV[i], 0
    skip = kept + same <= most
    if skip then
      kept, min = kept + same, '(' .. ARGV[i]
    end
  end
  skipped[#skipped + 1] = skip and 1 or 0
end
read(min, '+inf', past)

local differ, lower = {}, '-inf'
for i = 8, 6 + 2 * ranges, 2 do
  local upper = '(' .. ARGV[i]
  if redis.pcall('ZCOUNT', KEYS[1], lower, upper) ~= tonumber(ARGV[i + 1]) then -- nor may every user count
    differ[#differ + 1] = { (i - 8) / 2, lower, upper }
  end
  lower = ARGV[i]
end
local compared = {}
if #differ <= ranges / 8 then
  for _, range in ipairs(differ) do
    read(range[2], range[3], 0)
    compared[#compared + 1] = range[1]
  end
end

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
  #differ,
  compared,
}
