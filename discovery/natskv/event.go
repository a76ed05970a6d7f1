package natskv

import (
	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

const (
	headerOperation = "KV-Operation"
	markerMaxAge    = "MaxAge"
)

// removal returns Left or Expired if the message removes its key, else Put.
func (m *message) removal() discovery.EventType {
	switch m.header.Get(headerOperation) {
	case "DEL", "PURGE":
		return discovery.Left
	}
	switch m.header.Get(jetstream.MarkerReasonHeader) {
	case "":
	case markerMaxAge:
		return discovery.Expired
	default: // Remove, Purge: somebody asked for it
		return discovery.Left
	}
	if len(m.data) == 0 {
		// Some clients deliver the end of a key as a put of nothing.
		return discovery.Left
	}
	return discovery.Put
}

// event translates a message. Age is left to the caller.
func (c *Config) event(m *message, records *discovery.Parser) discovery.Event {
	e := discovery.Event{Type: m.removal(), ID: c.idOf(m.key), Key: m.key, Revision: m.sequence}
	if e.Type != discovery.Put {
		return e
	}
	node, err := records.Parse(m.data)
	if err == nil && !c.names(m.key, node.ID) {
		err = discovery.Forbid(discovery.Invalidf(discovery.FaultKey, "record: the key names another node, %q", discovery.Clip(c.idOf(m.key))))
	}
	if err != nil {
		e.Type, e.Err = discovery.Rejected, err
		return e
	}
	e.ID, e.Node = node.ID, node
	return e
}
