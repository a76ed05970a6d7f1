-- Tells the time of the server that keeps the key.
-- KEYS: overrides
return redis.call('TIME')
