package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// overrideFlags are the flags of the commands that decide about a node.
type overrideFlags struct {
	registryFlags
	force    bool
	duration time.Duration
}

// overrideCommand completes a command that changes the override of the node that its
// first argument names, and, where it is timed, may say for how long. The change is
// what parse makes of the arguments.
func overrideCommand(cmd *cobra.Command, timed bool, parse func(args []string) (change func(*discovery.Override), err error)) *cobra.Command {
	var flags overrideFlags
	flags.addTo(cmd, timed)
	return command(cmd, func(ctx context.Context, cmd *cobra.Command, args []string) error {
		change, err := parse(args)
		if err != nil {
			return err
		}
		_, err = flags.decide(ctx, cmd.OutOrStdout(), args[0], change)
		return err
	})
}

func (f *overrideFlags) addTo(cmd *cobra.Command, timed bool) {
	f.add(cmd)
	cmd.Flags().BoolVar(&f.force, "force", false, "also for a node that is not listed now")
	if timed {
		cmd.Flags().DurationVar(&f.duration, "for", 0, "how long it is to hold, by the registry's clock (default until it is taken back)")
	}
}

// overrides returns what operators have decided, by the node's id.
func (f *fleet) overrides(ctx context.Context) (map[string]discovery.Override, error) {
	overrider, ok := discovery.As[discovery.Overrider](f.registry)
	if !ok {
		return nil, fmt.Errorf("%s keeps no overrides: %w", f.registry, discovery.ErrUnsupported)
	}
	return overrider.Overrides(ctx)
}

// decide changes the override of a node, and returns when that shows in the
// registry's own view of the node; and the registry's name.
func (f *overrideFlags) decide(ctx context.Context, w io.Writer, id string, change func(*discovery.Override)) (registry string, err error) {
	if f.duration < 0 {
		return "", fmt.Errorf("--for: invalid duration %v, want one above 0", f.duration)
	}
	err = f.follow(ctx, func(ctx context.Context, nodes *fleet) error {
		registry = nodes.registry.String()
		ctx, cancel := context.WithTimeout(ctx, f.timeout)
		defer cancel()
		all, err := nodes.overrides(ctx)
		if err != nil {
			return err
		}
		o, stands := all[id]
		if o.Ended(time.Now()) {
			o = discovery.Override{}
		}
		if _, err := nodes.node(id); err != nil && !stands && !f.force {
			return err
		}
		change(&o)
		if f.duration > 0 {
			o.Until = time.Now().Add(f.duration)
		}
		began := time.Now()
		if !o.IsZero() || stands {
			if err := f.write(ctx, id, o); err != nil {
				return err
			}
		}
		return nodes.tellOverride(ctx, w, id, o, began)
	})
	return registry, err
}

// write sets the override of a node, or clears one that decides nothing. The registry
// keeps overrides, as they were read from it; the place for them may be created now, by
// the first one that is written.
func (f *overrideFlags) write(ctx context.Context, id string, o discovery.Override) error {
	c, err := f.open(ctx, true)
	if err != nil {
		return err
	}
	defer c.close()
	overrider, _ := discovery.As[discovery.Overrider](c.registry)
	if o.IsZero() {
		return overrider.ClearOverride(ctx, id)
	}
	return overrider.SetOverride(ctx, id, o)
}

// tellOverride says what has become of a node once the override shows.
func (f *fleet) tellOverride(ctx context.Context, w io.Writer, id string, o discovery.Override, began time.Time) error {
	var e *discovery.Entry
	err := f.await(ctx, func(s *discovery.Snapshot) bool {
		if e = s.Node(id); e == nil {
			return true
		}
		is := e.Override()
		is.Until = o.Until // to the precision of the registry
		return is.Equal(o)
	})
	switch {
	case err != nil:
		return errors.New("the override is written, and the watch of the registry does not show it: does another one stand there?")
	case e == nil:
		fmt.Fprintf(w, "%s is not listed now; when it is: %s\n", discovery.PrintableLine(id), o)
	default:
		fmt.Fprintf(w, "%s is %s with weight %v, seen after %v; operator: %s\n", discovery.PrintableLine(id), e.State(), e.Weight(),
			time.Since(began).Round(100*time.Microsecond), o)
	}
	return nil
}

func drainCommand() *cobra.Command {
	var waits waitFlags
	cmd := &cobra.Command{
		Use:   "drain <id> [--for <duration>] [--wait <duration>]",
		Short: "Takes a node out of service on every proxy",
		Long: `
Takes a node out of service: every proxy sends it no new requests, whatever its
record says, until it is undrained. That is written beside the record, where neither
heartbeats nor a restart of the node undo it.

With 'sticky' a node keeps the sessions that it has. --wait returns when the proxies
that --address names, or the local one, have had no request in flight to the node, and
seen no session of it, for as long as --idle says, and fails with exit code 1 when
its time is over; it says meanwhile how much is left. A node that is gone is idle, and a
proxy that does not answer is waited for.`,
		Example: `  $ caddy discovery drain orders-3
  $ caddy discovery drain orders-3 --for 10m
  $ caddy discovery drain orders-3 --wait 10m --idle 1m --address edge-1:2019 --address edge-2:2019`,
		Args: cobra.ExactArgs(1),
	}
	waits.add(cmd)
	var flags overrideFlags
	flags.addTo(cmd, true)
	return command(cmd, func(ctx context.Context, cmd *cobra.Command, args []string) error {
		if err := waits.check(cmd); err != nil {
			return err
		}
		registry, err := flags.decide(ctx, cmd.OutOrStdout(), args[0], func(o *discovery.Override) {
			o.State, o.Until = discovery.StateDraining, time.Time{}
		})
		if err != nil || waits.wait == 0 {
			return err
		}
		return waits.await(ctx, cmd.OutOrStdout(), args[0], registry)
	})
}

func undrainCommand() *cobra.Command {
	return overrideCommand(&cobra.Command{
		Use:     "undrain <id>",
		Short:   "Lets a node take requests again",
		Long:    "\nTakes back what drain did: the node's own record says again whether it serves.",
		Example: "  $ caddy discovery undrain orders-3",
		Args:    cobra.ExactArgs(1),
	}, false, func([]string) (func(*discovery.Override), error) {
		return func(o *discovery.Override) { o.State = "" }, nil
	})
}

func weightCommand() *cobra.Command {
	return overrideCommand(&cobra.Command{
		Use:   "weight <id> <factor> [--for <duration>]",
		Short: "Gives a node more or less of the requests",
		Long: `
Multiplies the weight of a node on every proxy, whatever its record says: 0.1 for a
canary, 0 for no new requests, 1 to take it back. Weights count under the policies
random, random_choose, round_robin, least_conn, least_load and least_latency, and where
the source has 'pick'; elsewhere every weight but 0 is the same.`,
		Example: `  $ caddy discovery weight orders-9 0.1
  $ caddy discovery weight orders-9 1`,
		Args: cobra.ExactArgs(2),
	}, true, func(args []string) (func(*discovery.Override), error) {
		factor, err := strconv.ParseFloat(args[1], 64)
		if err != nil || !(factor >= 0 && factor <= discovery.MaxWeight) {
			return nil, fmt.Errorf("invalid factor %q, want a number from 0 to %v", args[1], float64(discovery.MaxWeight))
		}
		return func(o *discovery.Override) {
			o.Weight, o.Until = &factor, time.Time{}
			if factor == 1 {
				o.Weight = nil
			}
		}, nil
	})
}

// overrideView is an override as the CLI shows it.
type overrideView struct {
	ID     string     `json:"id"`
	State  string     `json:"state,omitempty"`
	Weight *float64   `json:"weight,omitempty"`
	Until  *time.Time `json:"until,omitempty"`
	Listed bool       `json:"listed"`
}

func overridesCommand() *cobra.Command {
	var flags registryFlags
	cmd := &cobra.Command{
		Use:     "overrides [--json]",
		Short:   "Lists what operators have decided",
		Long:    "\nLists the overrides that drain and weight left behind, also of nodes that are gone.",
		Example: "  $ caddy discovery overrides",
		Args:    cobra.NoArgs,
	}
	flags.add(cmd)
	asJSON := cmd.Flags().Bool("json", false, "print JSON")
	return command(cmd, func(ctx context.Context, cmd *cobra.Command, _ []string) error {
		return flags.follow(ctx, func(ctx context.Context, f *fleet) error {
			ctx, cancel := context.WithTimeout(ctx, flags.timeout)
			defer cancel()
			all, err := f.overrides(ctx)
			if err != nil {
				return err
			}
			views := make([]overrideView, 0, len(all))
			for _, id := range slices.Sorted(maps.Keys(all)) {
				o := all[id]
				if o.Ended(time.Now()) {
					continue
				}
				v := overrideView{ID: id, State: string(o.State), Weight: o.Weight, Listed: f.Snapshot().Node(id) != nil}
				if !o.Until.IsZero() {
					v.Until = &o.Until
				}
				views = append(views, v)
			}
			return printAll(cmd.OutOrStdout(), *asJSON, views, []string{"ID", "STATE", "WEIGHT", "UNTIL", "LISTED"}, overrideView.row)
		})
	})
}

func (v overrideView) row() []string {
	weight, until, listed := "", "", "no"
	if v.Weight != nil {
		weight = "× " + strconv.FormatFloat(*v.Weight, 'g', -1, 64)
	}
	if v.Until != nil {
		until = "for " + age(time.Until(*v.Until))
	}
	if v.Listed {
		listed = "yes"
	}
	return []string{v.ID, v.State, weight, until, listed}
}
