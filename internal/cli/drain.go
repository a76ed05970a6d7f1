package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/view"
)

// waitFlags say whether, and on whom, a command waits until a node has drained.
type waitFlags struct {
	wait, idle time.Duration
	addresses  []string
}

func (f *waitFlags) add(cmd *cobra.Command) {
	cmd.Flags().DurationVar(&f.wait, "wait", 0, "wait until the node is idle, for this `duration` at most")
	cmd.Flags().DurationVar(&f.idle, "idle", 30*time.Second, "with --wait: for how long there must be no request and no session of it")
	cmd.Flags().StringArrayVar(&f.addresses, "address", nil, "with --wait: the `address` of the admin API of a proxy that is asked; repeatable (default localhost:2019, or $CADDY_ADMIN)")
}

// check refuses what makes no sense together.
func (f *waitFlags) check(cmd *cobra.Command) error {
	switch {
	case f.wait < 0 || cmd.Flags().Changed("wait") && f.wait == 0:
		return fmt.Errorf("--wait: invalid duration %v, want one above 0", f.wait)
	case f.wait == 0 && (cmd.Flags().Changed("idle") || len(f.addresses) > 0):
		return errors.New("--idle and --address say what to wait for; want --wait <duration> with them")
	case f.wait == 0:
		return nil
	case f.idle <= 0:
		return fmt.Errorf("--idle: invalid duration %v, want one above 0", f.idle)
	case f.idle > f.wait:
		return fmt.Errorf("--wait: a node that has to be idle for %v cannot be so within %v; want a longer --wait or a shorter --idle", f.idle, f.wait)
	}
	return nil
}

// A drainingProxy is what one proxy has said of a node that drains.
type drainingProxy struct {
	address string

	since       time.Time // from when it is known to have had nothing for the node; the zero time while it has
	lastSession time.Time // by the clock of the proxy
	gone        bool      // it does not know the node, or not any more
	says        string    // what there is to wait for
}

// heard takes in what the proxy says of the nodes with the id at a time, or why it says
// nothing. The registry is the one that the command knows.
func (p *drainingProxy) heard(nodes []view.Node, err error, registry string, now time.Time) {
	p.gone = false
	// Another registry may list the same id. The same registry may have another name there.
	if same := slices.DeleteFunc(slices.Clone(nodes), func(n view.Node) bool { return n.Registry != registry }); len(same) > 0 {
		nodes = same
	}
	inFlight, counts, serves := 0, true, ""
	session := p.lastSession
	for _, n := range nodes {
		if n.State != string(discovery.StateDraining) && n.State != string(discovery.StateMaintenance) {
			serves = n.State
		}
		if n.InFlight != nil {
			inFlight = max(inFlight, *n.InFlight)
		} else {
			counts = false
		}
		if n.LastSession != nil && n.LastSession.After(session) {
			session = *n.LastSession
		}
	}
	switch {
	case err != nil:
		p.since, p.says = time.Time{}, err.Error()
	case len(nodes) == 0:
		p.gone, p.says = true, "it is gone"
	case !counts:
		p.since, p.says = time.Time{}, "it does not tell what is in flight; its plugin may be of an earlier version"
	case serves != "":
		p.since, p.says = time.Time{}, "it is "+serves+" there"
	case inFlight > 0:
		p.since, p.says = time.Time{}, fmt.Sprintf("%d in flight", inFlight)
	case p.since.IsZero(), !session.Equal(p.lastSession):
		p.since, p.says = now, "idle" // from this look on: what was before it nobody knows
		if !session.Equal(p.lastSession) {
			p.says = "none in flight, sessions still come"
		}
	}
	p.lastSession = session
}

// idle reports whether the proxy has had nothing for the node for a time.
func (p *drainingProxy) idle(forAtLeast time.Duration, now time.Time) bool {
	return p.gone || !p.since.IsZero() && now.Sub(p.since) >= forAtLeast
}

// askTimeout is how long a proxy may take to answer, askEvery how often it is asked.
const (
	askTimeout = 5 * time.Second
	askEvery   = 500 * time.Millisecond
)

// await returns when all proxies have had nothing for the node for as long as they must,
// and says meanwhile how much is left, whenever that is another thing.
func (f *waitFlags) await(ctx context.Context, w io.Writer, id, registry string) error {
	proxies := make([]*drainingProxy, 0, max(len(f.addresses), 1))
	for _, given := range append(f.addresses, "")[:max(len(f.addresses), 1)] {
		address, err := caddycmd.DetermineAdminAPIAddress(given, nil, "", "")
		if err != nil {
			return err
		}
		proxies = append(proxies, &drainingProxy{address: address})
	}
	ctx, cancel := context.WithTimeout(ctx, f.wait)
	defer cancel()
	told := ""
	for {
		answers := make(chan func(), len(proxies))
		for _, p := range proxies {
			go func() {
				nodes, err := askAbout(ctx, p.address, id)
				answers <- func() { p.heard(nodes, err, registry, time.Now()) }
			}()
		}
		for range proxies {
			select {
			case take := <-answers:
				take()
			case <-ctx.Done():
				return f.over(ctx, id, proxies)
			}
		}
		if text := describe(proxies); text != told {
			told = text
			fmt.Fprintf(w, "%s: %s\n", discovery.PrintableLine(id), discovery.PrintableLine(text))
		}
		if !slices.ContainsFunc(proxies, func(p *drainingProxy) bool { return !p.idle(f.idle, time.Now()) }) {
			fmt.Fprintf(w, "%s is idle\n", discovery.PrintableLine(id))
			return nil
		}
		select {
		case <-ctx.Done():
			return f.over(ctx, id, proxies)
		case <-time.After(min(askEvery, max(f.idle/4, 10*time.Millisecond))):
		}
	}
}

// over returns why the wait has ended without success.
func (f *waitFlags) over(ctx context.Context, id string, proxies []*drainingProxy) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("%s is drained, and is not idle after %v: %s", id, f.wait, describe(proxies))
	}
	return fmt.Errorf("%s is drained; not waiting any longer: %s", id, describe(proxies))
}

func describe(proxies []*drainingProxy) string {
	parts := make([]string, len(proxies))
	for i, p := range proxies {
		parts[i] = p.address + ": " + cmp.Or(p.says, "no answer yet")
	}
	return strings.Join(parts, "; ")
}

// askAbout asks a proxy for the nodes with an id.
func askAbout(ctx context.Context, admin, id string) ([]view.Node, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	type answer struct {
		nodes []view.Node
		err   error
	}
	answers := make(chan answer, 1)
	go func() { // Caddy's client takes no context
		var a answer
		a.err = askRunning(admin, "/discovery/nodes?id="+url.QueryEscape(id), &a.nodes)
		// An earlier version of the plugin shows all.
		a.nodes = slices.DeleteFunc(a.nodes, func(n view.Node) bool { return n.ID != id || n.State == view.StateRejected })
		answers <- a
	}()
	select {
	case a := <-answers:
		return a.nodes, a.err
	case <-ctx.Done():
		return nil, fmt.Errorf("asking Caddy at %s: no answer within %v", admin, askTimeout)
	}
}
