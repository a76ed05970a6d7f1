package natskv

import (
	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/recent"
)

// maxForeign is how many keys are kept that name another node than ours would, and
// maxForeignBytes how much room they take.
const (
	maxForeign      = discovery.MaxNodes
	maxForeignBytes = 32 << 20
)

// foreignKeys are the keys of others whose records name another node than the key
// would, if it were ours. Whoever removes such a key later does not say which node
// that was. Where it is forgotten, because there are too many, the node goes when its
// lease runs out.
type foreignKeys struct{ nodes *recent.Map[string] }

func newForeignKeys() foreignKeys {
	return foreignKeys{recent.NewMap(maxForeign, maxForeignBytes, func(id string) int { return len(id) })}
}

// resolve takes up which node stands under the key of a Put, and corrects the node of
// any other event. ours is the id that the key would have if it were ours.
func (f foreignKeys) resolve(e *discovery.Event, ours string) {
	switch id, known := f.nodes.Get(e.Key); {
	case e.Type == discovery.Put && e.ID != ours:
		f.nodes.Put(e.Key, e.ID)
	case known:
		f.nodes.Delete(e.Key)
		if e.Type != discovery.Put {
			e.ID = id
		}
	}
}
