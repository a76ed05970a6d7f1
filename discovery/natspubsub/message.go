package natspubsub

import (
	"encoding/json"
	"fmt"
	"math"
	"time"
	"unicode/utf8"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// appendHeartbeat appends a record as a heartbeat carries it: with the timestamp
// that readers of lean heartbeats look for, unless that made it too long.
func appendHeartbeat(b, record []byte, now time.Time) []byte {
	at := `,"timestamp":"` + now.UTC().Format("2006-01-02T15:04:05.0000000Z") + `"}`
	if len(record)-1+len(at) > discovery.MaxRecord {
		return append(b, record...)
	}
	b = append(b, record[:len(record)-1]...)
	return append(b, at...)
}

// parseRecord reads what joins, heartbeats of our own and answers carry.
func parseRecord(data []byte, records *discovery.Parser) discovery.Event {
	n, err := records.Parse(data)
	if err != nil {
		return discovery.Event{Type: discovery.Rejected, ID: n.ID, Err: err}
	}
	return discovery.Event{Type: discovery.Put, ID: n.ID, Node: n}
}

// parseHeartbeat reads a heartbeat, which is a record, or names the node and its
// load and says nothing of where it serves.
func parseHeartbeat(data []byte, records *discovery.Parser) discovery.Event {
	e := parseRecord(data, records)
	if e.Type == discovery.Put || len(data) > discovery.MaxRecord || !utf8.Valid(data) {
		return e
	}
	var lean struct {
		Endpoint json.RawMessage `json:"endpoint"`
		Load     json.RawMessage `json:"load"`
	}
	// The id is read as that of a record is, in every form that writers give it.
	if json.Unmarshal(data, &lean) != nil || discovery.ValidateID(e.ID) != nil {
		return e
	}
	if lean.Endpoint != nil && string(lean.Endpoint) != "null" {
		return e // a record, and a bad one
	}
	beat := discovery.Event{Type: discovery.Beat, ID: e.ID, Load: math.NaN()}
	var load *float64
	if json.Unmarshal(lean.Load, &load) == nil && load != nil {
		beat.Load = *load
	}
	return beat // the node lives, whatever it says of its load; some spell it "NaN"
}

// A leaveMessage says that a node leaves. Others name the node only. Ours name the
// instance too, so that the message of a process that was replaced does not take
// its successor out of service.
type leaveMessage struct {
	NodeID   string `json:"NodeId"` // as the fleet spells it, here and only here
	Instance string `json:"instance,omitempty"`
}

// parseLeave reads a message of a node that leaves.
func parseLeave(data []byte) (leaveMessage, error) {
	var m leaveMessage
	if len(data) > discovery.MaxRecord || !utf8.Valid(data) || json.Unmarshal(data, &m) != nil {
		return leaveMessage{}, fmt.Errorf(`%w leave message: want a JSON object like {"NodeId":"orders-1"}`, discovery.ErrInvalid)
	}
	if err := discovery.ValidateID(m.NodeID); err != nil {
		return leaveMessage{}, fmt.Errorf("leave message: %w", err)
	}
	return m, nil
}
