package redis

import (
	"context"
	"crypto/rand"
	"fmt"
	"maps"
	"strconv"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	goredis "github.com/redis/go-redis/v9"
)

// maxOverride is the longest override that is read; ours have a hundred bytes.
const maxOverride = 4 << 10

// overridesKey is the hash of the operator's overrides, by the node's id. The
// channel on which a change of it is announced has the same name.
func (r *Registry) overridesKey() string { return r.config.side("overrides") }

// formerOverrides names the hash that versions before wrote, if that is another one.
func (r *Registry) formerOverrides() []string {
	if former, ok := r.config.formerSide("overrides"); ok {
		return []string{former}
	}
	return nil
}

// Overrides returns all overrides by the node's id. Its error is one of those of
// Announce.
func (r *Registry) Overrides(ctx context.Context) (map[string]discovery.Override, error) {
	records, err := r.readOverrides(ctx)
	if err != nil {
		return nil, err
	}
	return r.clock.Locally(parseOverrides(records)), nil
}

// readOverrides reads their records, and the clock by which they end.
func (r *Registry) readOverrides(ctx context.Context) (map[string]string, error) {
	var answer any
	err := r.do(ctx, func(ctx context.Context) (err error) {
		asked := time.Now()
		answer, err = overridesScript.run(ctx, r.commands, append(r.formerOverrides(), r.overridesKey()),
			discovery.MaxID, maxOverride, discovery.MaxNodes)
		if parts, _ := answer.([]any); err == nil && len(parts) == 2 {
			r.clock.Observe(timeOf(parts[0]), asked, time.Now())
			answer = parts[1]
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading the overrides: %w", err)
	}
	flat := listOf(answer)
	records := make(map[string]string, len(flat)/2)
	for i := 0; i+1 < len(flat); i += 2 {
		records[flat[i]] = flat[i+1]
	}
	return records, nil
}

// parseOverrides leaves out what cannot be read: it decides nothing.
func parseOverrides(records map[string]string) map[string]discovery.Override {
	all := make(map[string]discovery.Override, len(records))
	for id, record := range records {
		if o, err := discovery.ParseOverride([]byte(record)); err == nil && discovery.ValidateID(id) == nil {
			all[id] = o
		}
	}
	return all
}

// readClock reads the clock of the server that keeps the overrides. One that may not
// be read counts as like ours.
func (r *Registry) readClock(ctx context.Context) error {
	_, err := offered(r.do(ctx, func(ctx context.Context) error {
		asked := time.Now()
		answer, err := clockScript.run(ctx, r.commands, []string{r.overridesKey()})
		if err == nil {
			r.clock.Observe(timeOf(answer), asked, time.Now())
		}
		return err
	}))
	return err
}

// timeOf returns the time that TIME answered, the zero time if it did not.
func timeOf(answer any) time.Time {
	parts := listOf(answer)
	if len(parts) != 2 {
		return time.Time{}
	}
	seconds, err := strconv.ParseInt(parts[0], 10, 64)
	if err != nil {
		return time.Time{}
	}
	micros, err := strconv.ParseInt(parts[1], 10, 64)
	if err != nil {
		return time.Time{}
	}
	return time.Unix(seconds, micros*1e3)
}

// SetOverride replaces the node's override. Its error is one of those of Announce.
func (r *Registry) SetOverride(ctx context.Context, id string, o discovery.Override) error {
	err := o.Validate()
	if err == nil {
		err = discovery.ValidateID(id)
	}
	if err == nil && !o.Until.IsZero() {
		err = r.readClock(ctx)
	}
	var record []byte
	if err == nil {
		record, err = discovery.AppendOverride(nil, r.clock.ByRegistry(o))
	}
	if err == nil {
		err = r.override(ctx, id, string(record))
	}
	if err != nil {
		return fmt.Errorf("overriding node %q: %w", id, err)
	}
	return nil
}

// ClearOverride removes the node's override. One that is not there is no error.
func (r *Registry) ClearOverride(ctx context.Context, id string) error {
	if err := r.override(ctx, id, ""); err != nil {
		return fmt.Errorf("clearing the override of node %q: %w", id, err)
	}
	return nil
}

func (r *Registry) override(ctx context.Context, id, record string) error {
	return r.do(ctx, func(ctx context.Context) error {
		if r.config.Layout != LayoutKeys {
			_, err := overrideScript.run(ctx, r.commands,
				[]string{r.overridesKey(), r.config.side("changes"), r.config.side("meta")}, id, record, rand.Text())
			return err
		}
		var err error
		if record == "" {
			err = r.commands.HDel(ctx, r.overridesKey(), id).Err()
		} else {
			err = r.commands.HSet(ctx, r.overridesKey(), id, record).Err()
		}
		for _, former := range r.formerOverrides() {
			// It may be a node's record, which is no hash.
			if e := r.commands.HDel(ctx, former, id).Err(); err == nil && record == "" && !harmless(e) {
				err = e
			}
		}
		if err == nil {
			// Who may not publish is found out by the poll.
			_ = r.commands.Publish(ctx, r.overridesKey(), id).Err()
		}
		return err
	})
}

// harmless reports whether nothing of an override can be left under its former name.
func harmless(err error) bool { return err == nil || wrongType(err) }

// overrides is what the loop of a watch knows of the overrides. They are read
// whole: operators decide about few nodes.
type overrides struct {
	w       *watch
	known   map[string]string // their records; nil before they are read
	ahead   time.Duration     // how far the server's clock was when they were emitted
	denied  bool              // the user may not read them
	due     bool              // they may have changed
	reading bool
	found   chan overridesRead
}

type overridesRead struct {
	records map[string]string
	err     error
}

// list emits the overrides that there are, before the listing of the nodes, and
// begins to listen for changes where the layout's own channel does not tell of them.
func (o *overrides) list(ctx context.Context) error {
	if o.w.r.config.Layout == LayoutKeys && !o.w.told {
		if _, err := offered(o.w.subscribe(ctx, o.w.r.commands, false, o.w.r.overridesKey())); err != nil {
			return err
		}
	}
	records, err := o.w.r.readOverrides(ctx)
	ok, err := offered(err)
	if err != nil {
		return err
	}
	if o.denied = !ok; ok {
		o.take(records)
	}
	// What changes before the listing is read is not told of after it.
	o.due = true
	return nil
}

// take emits the overrides if they differ from what is known, or one of the clocks
// was set, and they end at another time than they seemed to.
func (o *overrides) take(records map[string]string) {
	ahead := o.w.r.clock.Ahead()
	if o.known != nil && maps.Equal(records, o.known) && ahead == o.ahead {
		return
	}
	o.known, o.ahead = records, ahead
	o.w.emit(discovery.Event{Type: discovery.Overridden, Overrides: o.w.r.clock.Locally(parseOverrides(records))})
}

// read starts to read the overrides, if that is due.
func (o *overrides) read(ctx context.Context) {
	if o.denied || !o.due || o.reading {
		return
	}
	o.due, o.reading = false, true
	o.w.group.Go(func() {
		records, err := o.w.r.readOverrides(ctx)
		o.found <- overridesRead{records, err}
	})
}

// apply takes up what was read. A failure is left to the look that follows: it
// breaks the watch if the server is ill.
func (o *overrides) apply(read overridesRead) {
	o.reading = false
	if read.err == nil {
		o.take(read.records)
	}
}

// tells reports whether a notification is about the overrides.
func (o *overrides) tells(m *goredis.Message) bool { return m.Channel == o.w.r.overridesKey() }
