// Package cli is the command caddy discovery, which looks at a registry, and steers
// it, without a running Caddy.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Command returns the command. The logger is told of what a registrar does.
func Command(log *slog.Logger) caddycmd.Command {
	return caddycmd.Command{
		Name:  "discovery",
		Usage: "<command>",
		Short: "Looks at a registry of nodes, and steers it",
		Long: `
Looks at a registry, straight and without a running Caddy: which nodes it lists,
what becomes of them, what became of one. Takes a node out of service on every
proxy and puts it back, and lists any program from a shell.

The registry is a URL. Its scheme picks the backend, its path names the bucket,
the prefix or the database:

  --registry nats://10.0.0.5:4222/catga_nodes

Without --registry the variable CADDY_DISCOVERY_REGISTRY counts, and without that
nats://127.0.0.1:4222. A registry that a configuration of Caddy declares has a name,
and its options and login come from there:

  --config /etc/caddy/Caddyfile --registry main

Secrets are read from files or from variables of the environment and never shown.

Exit codes: 0 success; 1 failure; 2 the registry's backend cannot do that, such as
to drain a node on pub/sub, which keeps nothing; 3 there is no such node.
`,
		CobraFunc: func(cmd *cobra.Command) {
			cmd.Use = "discovery <command>"
			cmd.Args = cobra.NoArgs
			// Without this an unknown command would show the help and succeed.
			cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
			cmd.Example = `  $ caddy discovery nodes --service orders
  $ caddy discovery drain orders-3 --registry nats://10.0.0.5:4222/catga_nodes
  $ caddy discovery register pay-1 http://10.0.0.9:8080 --metadata service=pay`
			cmd.AddCommand(
				nodesCommand(), watchCommand(), historyCommand(),
				drainCommand(), undrainCommand(), weightCommand(), overridesCommand(),
				registerCommand(log), deregisterCommand(), statusCommand(), hostsCommand(),
			)
		},
	}
}

// The exit codes, for scripts.
const (
	exitFailure     = 1
	exitUnsupported = 2
	exitNoNode      = 3
)

// errNoSuchNode: the registry does not list the node.
var errNoSuchNode = errors.New("no such node")

// exitCode returns the exit code of a command that failed.
func exitCode(err error) int {
	switch {
	case errors.Is(err, discovery.ErrUnsupported):
		return exitUnsupported
	case errors.Is(err, errNoSuchNode):
		return exitNoNode
	default:
		return exitFailure
	}
}

// command completes a subcommand that run executes. The context ends when the user
// interrupts it.
func command(cmd *cobra.Command, run func(ctx context.Context, cmd *cobra.Command, args []string) error) *cobra.Command {
	cmd.SilenceUsage = true
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		err := run(ctx, cmd, args)
		if err == nil {
			return nil
		}
		cmd.SilenceErrors = true
		fmt.Fprintln(cmd.ErrOrStderr(), "Error:", discovery.PrintableLine(err.Error()))
		if code := exitCode(err); code != exitFailure {
			// Only Caddy itself can make an error with an exit code.
			return caddycmd.WrapCommandFuncForCobra(func(caddycmd.Flags) (int, error) { return code, nil })(cmd, args)
		}
		return err
	}
	return cmd
}

// table writes aligned columns.
type table struct{ w *tabwriter.Writer }

func newTable(w io.Writer, heads ...string) *table {
	t := &table{tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)}
	t.row(heads...)
	return t
}

// printAll prints elements as JSON, or as the rows of a table.
func printAll[T any](w io.Writer, asJSON bool, elements []T, heads []string, row func(T) []string) error {
	if asJSON {
		return json.NewEncoder(w).Encode(elements)
	}
	t := newTable(w, heads...)
	defer t.flush()
	for _, e := range elements {
		t.row(row(e)...)
	}
	return nil
}

func (t *table) row(cells ...string) {
	for i, c := range cells {
		cells[i] = discovery.PrintableLine(c)
		if cells[i] == "" && i < len(cells)-1 {
			cells[i] = "-"
		}
	}
	fmt.Fprintln(t.w, strings.Join(cells, "\t"))
}

func (t *table) flush() { _ = t.w.Flush() }
