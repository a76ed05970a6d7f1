package redis

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// maxOverride is the longest override that is read; ours have a hundred bytes.
const maxOverride = 4 << 10

var (
	overridesScript = newScript("overrides.lua")
	clockScript     = newScript("clock.lua")
)

// overrides reads the operators' overrides, a hash by the node's id, whole: operators
// decide about few nodes.
type overrides struct {
	client *client
	clock  discovery.RegistryClock // by which they end
}

// overridesKey is the hash. The channel on which a change of it is announced has the
// same name.
func (c Config) overridesKey() string { return c.side("overrides") }

// read reads the overrides' records, and the clock.
func (o *overrides) read(ctx context.Context) (map[string]string, error) {
	c := o.client.config
	flat, err := ask(ctx, o.client, func(ctx context.Context) ([]string, error) {
		asked := time.Now()
		answer, err := overridesScript.run(ctx, o.client.commands, append(c.former("overrides"), c.overridesKey()),
			discovery.MaxID, maxOverride, discovery.MaxNodes)
		parts := listOf[any](answer)
		if err != nil || len(parts) != 2 {
			return nil, err
		}
		o.clock.Observe(timeOf(parts[0]), asked, time.Now())
		return listOf[string](parts[1]), nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading the overrides: %w", err)
	}
	records := make(map[string]string, len(flat)/2)
	for pair := range slices.Chunk(flat[:len(flat)/2*2], 2) {
		records[pair[0]] = pair[1]
	}
	return records, nil
}

// parse returns the overrides by our clock. It leaves out what cannot be read: that
// decides nothing.
func (o *overrides) parse(records map[string]string) map[string]discovery.Override {
	all := make(map[string]discovery.Override, len(records))
	for id, record := range records {
		if o, err := discovery.ParseOverride([]byte(record)); err == nil && discovery.ValidateID(id) == nil {
			all[id] = o
		}
	}
	return o.clock.Locally(all)
}

// readClock reads the clock of the server that keeps the overrides. One that may not
// be read counts as like ours.
func (o *overrides) readClock(ctx context.Context) error {
	_, err := offered(o.client.do(ctx, func(ctx context.Context) error {
		asked := time.Now()
		answer, err := clockScript.run(ctx, o.client.commands, []string{o.client.config.overridesKey()})
		if err == nil {
			o.clock.Observe(timeOf(answer), asked, time.Now())
		}
		return err
	}))
	return err
}

// timeOf returns the time that TIME answered, the zero time if it did not.
func timeOf(answer any) time.Time {
	parts := listOf[string](answer)
	if len(parts) != 2 {
		return time.Time{}
	}
	seconds, err := strconv.ParseInt(parts[0], 10, 64)
	micros, e := strconv.ParseInt(parts[1], 10, 64)
	if err != nil || e != nil {
		return time.Time{}
	}
	return time.Unix(seconds, micros*1e3)
}

// overridesView is what the loop of a watch knows of the overrides.
type overridesView struct {
	*overrides
	feed    *feed
	known   map[string]string // their records; nil before they are read
	ahead   time.Duration     // how far the server's clock was when they were emitted
	denied  bool              // the user may not read them
	reading bool
}

// list emits the overrides that there are, and returns what a watch knows of them.
func (o *overrides) list(ctx context.Context, f *feed) (*overridesView, error) {
	v := &overridesView{overrides: o, feed: f}
	records, err := o.read(ctx)
	ok, err := offered(err)
	if v.denied = !ok; ok {
		v.take(records)
	}
	return v, err
}

// take emits the overrides if they differ from what is known, or one of the clocks
// was set, and they end at another time than they seemed to.
func (v *overridesView) take(records map[string]string) {
	ahead := v.clock.Ahead()
	if v.known != nil && maps.Equal(records, v.known) && ahead == v.ahead {
		return
	}
	v.known, v.ahead = records, ahead
	v.feed.emit(discovery.Event{Type: discovery.Overridden, Overrides: v.parse(records)})
}

// look starts to read the overrides. It reports false while that is under way. A
// failure is left to the looks at the nodes: they break the watch if the server is ill.
func (v *overridesView) look(ctx context.Context) bool {
	if v.denied || v.reading {
		return v.denied
	}
	v.reading = true
	v.feed.group.Go(func() {
		records, err := v.read(ctx)
		v.feed.send(ctx, func() (request, error) {
			v.reading = false
			if err == nil {
				v.take(records)
			}
			return request{}, nil
		})
	})
	return true
}
