package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

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
		c, err := flags.open(ctx, false)
		if err != nil {
			return err
		}
		defer c.close()
		ctx, cancel := context.WithTimeout(ctx, flags.timeout)
		defer cancel()
		historian, ok := discovery.As[discovery.Historian](c.registry)
		if !ok {
			return fmt.Errorf("%s keeps no history: %w", c.registry, discovery.ErrUnsupported)
		}
		revisions, err := historian.History(ctx, args[0], limit)
		if err != nil {
			return err
		}
		if len(revisions) == 0 {
			return fmt.Errorf("%w: %s has never heard of %q", errNoSuchNode, c.registry, args[0])
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
		printRevisions(cmd.OutOrStdout(), views)
		return nil
	})
}

func printRevisions(w io.Writer, revisions []revisionView) {
	t := newTable(w, "REVISION", "TIME", "TYPE", "ENDPOINT", "LOAD", "MORE")
	defer t.flush()
	for _, v := range revisions {
		load := ""
		if v.Endpoint != "" {
			load = strconv.FormatFloat(v.Load, 'g', 3, 64)
		}
		t.row(strconv.FormatUint(v.Revision, 10), v.Time.Local().Format("2006-01-02 15:04:05.000"), v.Type, v.Endpoint, load,
			cmp.Or(v.Reason, pairs(v.Metadata, discovery.KeyInstance)))
	}
}
