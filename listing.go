package caddydiscovery

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	views "github.com/caddy-discovery/caddy-discovery/internal/view"
)

// completeStates offers the states of nodes where a flag wants one.
func completeStates(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return views.States, cobra.ShellCompDirectiveNoFileComp
}

func nodesCommand() *cobra.Command {
	var (
		flags          registryFlags
		asJSON         bool
		service, state string
	)
	cmd := &cobra.Command{
		Use:   "nodes [--service <name>] [--state <state>] [--json]",
		Short: "Lists the nodes of a registry",
		Long: `
Lists the nodes that count as alive by their records, and the records that are
rejected, with the reason. Nobody is dialled: where most leases have run out, the
nodes are shown as held, and each proxy finds out whether they still serve. --json
prints what the admin API does.`,
		Example: `  $ caddy discovery nodes
  $ caddy discovery nodes --service orders --state draining
  $ caddy discovery nodes --json | jq -r '.[] | select(.load > 0.8) | .id'`,
		Args: cobra.NoArgs,
	}
	flags.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().StringVar(&service, "service", "", "only nodes of this `service`")
	cmd.Flags().StringVar(&state, "state", "", "only nodes in this `state`")
	_ = cmd.RegisterFlagCompletionFunc("state", completeStates)
	return command(cmd, func(ctx context.Context, cmd *cobra.Command, _ []string) error {
		if state != "" && !slices.Contains(views.States, state) {
			return fmt.Errorf("--state: unknown state %q, want one of %s", state, strings.Join(views.States, ", "))
		}
		return flags.follow(ctx, func(_ context.Context, registry discovery.Registry, d *discovery.Directory) error {
			out := bufio.NewWriter(cmd.OutOrStdout())
			defer out.Flush()
			var nodes []views.Node
			for _, e := range d.Snapshot().Nodes() {
				if service == "" || e.Node.Service() == service {
					v := views.OfNode(registry.String(), e, nil)
					if v.State == string(discovery.StateHeld) {
						v.Reason = "its lease ran out with that of many others; proxies ask it whether it still accepts connections"
					}
					if e.Named() {
						v.Address = e.Node.Endpoint.Address() // nobody looks it up
					}
					nodes = append(nodes, v)
				}
			}
			if service == "" {
				for _, r := range d.Status().Rejections {
					nodes = append(nodes, views.OfRejection(registry.String(), r))
				}
			}
			nodes = slices.DeleteFunc(nodes, func(v views.Node) bool { return state != "" && v.State != state })
			if asJSON {
				a := views.NewArray(out)
				for _, v := range nodes {
					a.Add(v)
				}
				a.End()
				return nil
			}
			printNodes(out, nodes)
			return nil
		})
	})
}

func printNodes(w io.Writer, nodes []views.Node) {
	t := newTable(w, "ID", "SERVICE", "ENDPOINT", "STATE", "WEIGHT", "LOAD", "LEASE", "HEARD", "MORE")
	defer t.flush()
	for _, n := range nodes {
		if n.State == views.StateRejected {
			t.row(n.ID, "", "", n.State, "", "", "", "", n.Reason)
			continue
		}
		more := n.Reason
		if more == "" {
			more = otherMetadata(n.Metadata)
		}
		t.row(n.ID, n.Service, n.Endpoint, n.State, strconv.FormatFloat(n.Weight, 'g', 3, 64), strconv.FormatFloat(n.Load, 'g', 3, 64),
			age(views.Duration(n.LeaseLeft)), age(time.Since(n.LastHeard))+" ago", more)
	}
}

// otherMetadata returns the metadata that have no column of their own.
func otherMetadata(metadata map[string]string) string {
	var pairs []string
	for _, k := range slices.Sorted(maps.Keys(metadata)) {
		switch k {
		case discovery.KeyService, discovery.KeyWeight, discovery.KeyState, discovery.KeyInstance, discovery.KeyLease:
		default:
			pairs = append(pairs, k+"="+metadata[k])
		}
	}
	return strings.Join(pairs, " ")
}

// age is how people read a duration that passes.
func age(d time.Duration) string {
	switch {
	case d < 10*time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d < 10*time.Minute:
		return d.Round(time.Second).String()
	default:
		return strings.TrimSuffix(d.Round(time.Minute).String(), "0s")
	}
}

func watchCommand() *cobra.Command {
	var (
		flags  registryFlags
		asJSON bool
		id     string
	)
	cmd := &cobra.Command{
		Use:   "watch [--id <id>] [--json]",
		Short: "Shows what becomes of the nodes, as it happens",
		Long: `
Shows one line for each change of a node's standing, as it happens, until it is
interrupted, and one when the registry is lost or found.`,
		Example: `  $ caddy discovery watch
  $ caddy discovery watch --json | jq -r 'select(.type == "lapsed") | .id'`,
		Args: cobra.NoArgs,
	}
	flags.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, one object a line")
	cmd.Flags().StringVar(&id, "id", "", "only this `node`")
	return command(cmd, func(ctx context.Context, cmd *cobra.Command, _ []string) error {
		return flags.follow(ctx, func(ctx context.Context, registry discovery.Registry, d *discovery.Directory) error {
			fmt.Fprintf(cmd.ErrOrStderr(), "watching %s with %d nodes\n", registry, len(d.Snapshot().Nodes()))
			encoder := json.NewEncoder(cmd.OutOrStdout())
			began := false
			for number := uint64(0); ; {
				changes, more := d.Journal().Since(number)
				for _, c := range changes {
					number = c.Number
					if c.Type == discovery.ChangeConnected && !began {
						began = true // the line above says so
						continue
					}
					if c.Listed || (id != "" && c.ID != id && views.AboutNode(c.Type)) {
						continue
					}
					var err error
					if asJSON {
						err = encoder.Encode(views.OfChange(registry.String(), c))
					} else {
						_, err = fmt.Fprintln(cmd.OutOrStdout(), changeLine(c))
					}
					if err != nil {
						return nil //nolint:nilerr // whoever read it has gone, as head does
					}
				}
				select {
				case <-ctx.Done():
					return nil
				case <-more:
				}
			}
		})
	})
}

func changeLine(c discovery.Change) string {
	parts := []string{c.Time.Local().Format("15:04:05.000"), fmt.Sprintf("%-12s", c.Type)}
	if c.ID != "" {
		parts = append(parts, c.ID)
	}
	if c.Entry != nil {
		parts = append(parts, c.Entry.Node.Endpoint.String())
		if s := c.Entry.Node.Service(); s != "" {
			parts = append(parts, "service="+s)
		}
		if s := c.Entry.State(); s != discovery.StateUp {
			parts = append(parts, "state="+string(s))
		}
	}
	if c.Reason != "" {
		parts = append(parts, "("+c.Reason+")")
	}
	return discovery.PrintableLine(strings.Join(parts, "  "))
}

// revisionView is a past record as the CLI shows it.
type revisionView struct {
	Revision uint64            `json:"revision"`
	Time     time.Time         `json:"time"`
	Type     string            `json:"type"`
	Endpoint string            `json:"endpoint,omitempty"`
	Load     float64           `json:"load"`
	Metadata map[string]string `json:"metadata,omitempty"`
	Reason   string            `json:"reason,omitempty"`
}

func historyCommand() *cobra.Command {
	var (
		flags  registryFlags
		asJSON bool
		limit  int
	)
	cmd := &cobra.Command{
		Use:     "history <id> [--limit <n>] [--json]",
		Short:   "Shows the past records of a node",
		Long:    "\nShows what the registry remembers of a node, newest first.",
		Example: "  $ caddy discovery history orders-3 --limit 5",
		Args:    cobra.ExactArgs(1),
	}
	flags.add(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().IntVar(&limit, "limit", 0, "at most so `many`; 0 means all there are")
	return command(cmd, func(ctx context.Context, cmd *cobra.Command, args []string) error {
		if limit < 0 {
			return fmt.Errorf("--limit: invalid number %d, want 0 or more", limit)
		}
		return flags.once(ctx, false, func(ctx context.Context, registry discovery.Registry) error {
			historian, ok := registry.(discovery.Historian)
			if !ok {
				return fmt.Errorf("%s keeps no history: %w", registry, discovery.ErrUnsupported)
			}
			revisions, err := historian.History(ctx, args[0], limit)
			if err != nil {
				return err
			}
			if len(revisions) == 0 {
				return fmt.Errorf("%w: %s has never heard of %q", errNoSuchNode, registry, args[0])
			}
			views := make([]revisionView, len(revisions))
			for i, r := range revisions {
				views[i] = revisionView{Revision: r.Number, Time: r.Time, Type: r.Type.String()}
				switch {
				case r.Type == discovery.Put:
					views[i].Endpoint, views[i].Load, views[i].Metadata = r.Node.Endpoint.String(), r.Node.Load, r.Node.Metadata
				case r.Err != nil:
					views[i].Reason = r.Err.Error()
				}
			}
			if asJSON {
				return json.NewEncoder(cmd.OutOrStdout()).Encode(views)
			}
			t := newTable(cmd.OutOrStdout(), "REVISION", "TIME", "TYPE", "ENDPOINT", "LOAD", "MORE")
			defer t.flush()
			for _, v := range views {
				more := v.Reason
				var pairs []string
				for _, k := range slices.Sorted(maps.Keys(v.Metadata)) {
					if k != discovery.KeyInstance {
						pairs = append(pairs, k+"="+v.Metadata[k])
					}
				}
				if more == "" {
					more = strings.Join(pairs, " ")
				}
				load := ""
				if v.Endpoint != "" {
					load = strconv.FormatFloat(v.Load, 'g', 3, 64)
				}
				t.row(strconv.FormatUint(v.Revision, 10), v.Time.Local().Format("2006-01-02 15:04:05.000"), v.Type, v.Endpoint, load, more)
			}
			return nil
		})
	})
}

func statusCommand() *cobra.Command {
	var (
		address string
		asJSON  bool
	)
	cmd := &cobra.Command{
		Use:   "status [--address <admin>] [--json]",
		Short: "Shows how a running Caddy and its registries are",
		Long: `
Asks the admin API of a running Caddy how its registries are. It fails with exit
code 1 if one of them is not being watched right now.`,
		Example: `  $ caddy discovery status
  $ caddy discovery status --address localhost:2020 --json`,
		Args: cobra.NoArgs,
	}
	cmd.Flags().StringVar(&address, "address", "", "the `address` of the admin API (default localhost:2019, or $CADDY_ADMIN)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return command(cmd, func(_ context.Context, cmd *cobra.Command, _ []string) error {
		admin, err := caddycmd.DetermineAdminAPIAddress(address, nil, "", "")
		if err != nil {
			return err
		}
		var registries []views.Registry
		if err := askRunning(admin, "/discovery/registries", &registries); err != nil {
			return err
		}
		if asJSON {
			if err := json.NewEncoder(cmd.OutOrStdout()).Encode(registries); err != nil {
				return err
			}
		} else if err := printStatus(cmd.OutOrStdout(), admin, registries); err != nil {
			return err
		}
		for _, r := range registries {
			if !r.Connected {
				return fmt.Errorf("%s has not been watched for %s", r.Registry, age(views.Duration(r.StaleFor)))
			}
		}
		return nil
	})
}

func printStatus(w io.Writer, admin string, registries []views.Registry) error {
	if len(registries) == 0 {
		fmt.Fprintln(w, "the running config watches no registry")
		return nil
	}
	var nodes []struct{ Registry, State string }
	if err := askRunning(admin, "/discovery/nodes", &nodes); err != nil {
		return err
	}
	states := make(map[string]map[string]int)
	for _, n := range nodes {
		if states[n.Registry] == nil {
			states[n.Registry] = make(map[string]int)
		}
		states[n.Registry][n.State]++
	}
	t := newTable(w, "REGISTRY", "BACKEND", "CONNECTED", "SYNCED", "NODES", "STATES", "LAST EVENT", "LAST ERROR")
	defer t.flush()
	for _, r := range registries {
		connected := "yes"
		if !r.Connected {
			connected = "no, for " + age(views.Duration(r.StaleFor))
		}
		synced := "yes"
		switch {
		case r.Restored:
			synced = "restored"
		case !r.Synced:
			synced = "no"
		}
		event := "never"
		if r.LastEvent != nil {
			event = age(time.Since(*r.LastEvent)) + " ago"
		}
		var counts []string
		for _, state := range views.States {
			if n := states[r.Registry][state]; n > 0 {
				counts = append(counts, fmt.Sprintf("%d %s", n, state))
			}
		}
		t.row(r.Registry, r.Backend, connected, synced, strconv.Itoa(r.Nodes), strings.Join(counts, ", "), event, r.LastError)
	}
	return nil
}

// askRunning gets JSON from the admin API of a running Caddy.
func askRunning(admin, path string, to any) error {
	resp, err := caddycmd.AdminAPIRequest(admin, http.MethodGet, path, nil, nil)
	if err != nil {
		return fmt.Errorf("asking Caddy at %s: %w", admin, err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(to); err != nil {
		return fmt.Errorf("reading what Caddy at %s says: %w", admin, err)
	}
	return nil
}
