-- Reads the members written since a score, and where in the sequence of changes
-- that is, in one step. Not every user may read the side keys: without them the
-- stream cannot be followed, and its last entry is ''.
-- KEYS: set, and unless the user is restricted to that: changes, meta
-- ARGV: the lowest score
local members = redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[1], '+inf', 'WITHSCORES')
local meta, last, at = {}, {}, ''
if KEYS[2] then
  meta = redis.pcall('HMGET', KEYS[3], 'epoch', 'seq')
  last = redis.pcall('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
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
  redis.call('ZCARD', KEYS[1]),
  members,
}
