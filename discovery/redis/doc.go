// Package redis is the backend for fleets that list themselves in Redis: in one
// sorted set, or in one string key a node.
//
// # Sorted set
//
// A member is a node's record, its score when it was written, in Unix
// milliseconds. A heartbeat of the fleets in the wild removes the old member and
// adds a new one, in two steps. Our own writers do more, in one step (a script,
// by the server's clock): they keep, beside the set and in its slot of a
// cluster,
//
//	{<key>}:changes   a stream of what changed, which watchers read as it grows
//	{<key>}:members   a hash: the member that our writers put for an id
//	{<key>}:leases    a sorted set: when a member of ours may be swept up
//	{<key>}:meta      a hash: the epoch of the data, and the sequence of changes
//	{<key>}:overrides a hash: what operators decided, by the node's id
//
// A heartbeat that changes nothing but the time writes no change. Watchers see
// it, like everything that foreign writers do, by looking: once every poll, and
// at once where the server publishes keyspace notifications. A look takes the
// time, the sequence and the members in one step, so that it fits exactly
// between two changes of the stream. Large sets are looked at in part: what was
// written since the last look. Where the number of members says that something else
// happened, the numbers in ranges of scores say where, and those ranges are read as
// well. Everything is looked at only where that does not explain it, and every few
// seconds.
//
// A member whose id cannot be read (no JSON, not UTF-8, too long) counts as the record of
// the node that its beginning names, so that the node stays in use for the rest of its
// lease, if nothing better stands there: no readable record but an old one that nobody
// removed, and no other such member. Else it is shown as rejected and is nobody's.
//
// What is longer than a record may be is not read: the script puts its length in its
// place. Of all other answers of the server no string is read for longer than that
// either.
//
// # Keys
//
// A key holds a record and expires with it; it exists, so the node lives. A look
// asks for the keys that are known, and reads a value only after its length. Where
// the server publishes keyspace notifications changes are seen at once. Elsewhere
// our own writers name a node that joins, changes or leaves on the channel
// {<key>}:announced, and the keys of others are found by passing through the
// database with SCAN, for a twentieth of the time at most; a listing makes one such
// pass at once. Beside the keys are {<key>}:meta and {<key>}:overrides. If the prefix
// has a hash tag of its own they are <key>/meta, <key>/overrides and <key>/announced:
// with a colon they would be nodes. The overrides are read under that name as well,
// since versions before wrote them there.
//
// # What the server must allow
//
// A watcher needs EVAL and EVALSHA, and reads the set and the side keys
// (zrangebyscore, zcard, hmget, xrevrange, time; hkeys, hstrlen, hget; with layout
// keys scan, strlen, get, pttl). It does more where it may: XREAD, CONFIG GET
// notify-keyspace-events and SUBSCRIBE make it learn of changes at once, and
// HSETNX on {<key>}:meta lets it recognise a server that was flushed although
// none of our writers ever wrote there.
//
// A writer needs EVAL and EVALSHA, and with the sorted set time, hget, hset, hsetnx, hdel, hstrlen,
// hincrby, zadd, zrem, zcard, zscore, zrange, zrangebyscore, xadd, pttl and pexpire; with
// keys exists, set, get, strlen, del and hsetnx, and publish if watchers that the server
// tells nothing are to learn of changes at once. Who sets overrides needs time, hset, hdel,
// and hsetnx, hincrby and xadd or publish.
package redis
