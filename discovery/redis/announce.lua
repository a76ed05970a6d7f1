-- Puts a node's record in one step with what our watchers read; with an instance
-- only in place of one that names it, else it returns -1.
-- KEYS: set, members, leases, changes, meta
-- ARGV: id, digest (16 characters), record, lease in ms, history, epoch, and maybe
-- the instance
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ms = string.format('%.0f', now)
local keep = ARGV[4] * 10

-- What is removed comes first: a server out of memory lets a script that has
-- written go on, so that a node that is listed can still renew its record.
local old = redis.call('HGET', KEYS[2], ARGV[1])
if ARGV[7] then
  local member = old and string.sub(old, 18) or ''
  if instance(member) ~= ARGV[7] or not redis.call('ZSCORE', KEYS[1], member) then
    return -1
  end
end
local changed = true
if old then
  local there = redis.call('ZREM', KEYS[1], string.sub(old, 18))
  changed = there == 0 or string.sub(old, 1, 16) ~= ARGV[2]
end
if changed then
  redis.call('HSETNX', KEYS[5], 'epoch', ARGV[6])
  local seq = redis.call('HINCRBY', KEYS[5], 'seq', 1)
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[5] * (redis.call('ZCARD', KEYS[1]) + 1), '*',
    'seq', seq, 'type', 'put', 'id', ARGV[1], 'score', ms, 'record', ARGV[3])
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2] .. ' ' .. ARGV[3])
redis.call('ZADD', KEYS[3], string.format('%.0f', now + keep), ARGV[1])
redis.call('ZADD', KEYS[1], ms, ARGV[3])

-- Writers in the wild let the whole set expire after ten of their leases.
local ttl = redis.call('PTTL', KEYS[1])
if ttl >= 0 and ttl < keep then
  redis.call('PEXPIRE', KEYS[1], string.format('%.0f', keep))
end

-- Sweep up records of our own that nobody renewed for ten leases.
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', ms, 'LIMIT', 0, 4)) do
  local stale = redis.call('HGET', KEYS[2], id)
  redis.call('ZREM', KEYS[3], id)
  redis.call('HDEL', KEYS[2], id)
  if stale and redis.call('ZREM', KEYS[1], string.sub(stale, 18)) == 1 then
    local seq = redis.call('HINCRBY', KEYS[5], 'seq', 1)
    redis.call('XADD', KEYS[4], '*', 'seq', seq, 'type', 'expired', 'id', id)
  end
end
return changed and 1 or 0
