package redis

import (
	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Bounds of what one look reads.
const (
	// maxRead is how many bytes of records are read without a question; a hundred
	// thousand usual ones are a fourth of it.
	maxRead = 128 << 20
	// usualRecord is the longest record that is read when there are more. It bounds
	// the rest without a judgement about who may be listed.
	usualRecord = 1 << 10
	// maxMembers is how many members are read. Those of nodes that come and go
	// twice as often as a directory has room for are among the newest.
	maxMembers = 2 * discovery.MaxNodes
)

// tooLong says why a record of so many bytes was not read.
func tooLong(length int) error {
	if length > discovery.MaxRecord {
		return discovery.Invalidf(discovery.FaultRecord, "record: %d bytes, want at most %d", length, discovery.MaxRecord)
	}
	return discovery.Invalidf(discovery.FaultRecord, "record: %d bytes, and at most %d are read where all records together are more than %d MiB",
		length, usualRecord, maxRead>>20)
}
