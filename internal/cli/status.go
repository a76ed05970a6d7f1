package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/caddy-discovery/caddy-discovery/internal/view"
)

func statusCommand() *cobra.Command {
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
	address := cmd.Flags().String("address", "", "the `address` of the admin API (default localhost:2019, or $CADDY_ADMIN)")
	asJSON := cmd.Flags().Bool("json", false, "print JSON")
	return command(cmd, func(_ context.Context, cmd *cobra.Command, _ []string) error {
		admin, err := caddycmd.DetermineAdminAPIAddress(*address, nil, "", "")
		if err != nil {
			return err
		}
		var registries []view.Registry
		if err := askRunning(admin, "/discovery/registries", &registries); err != nil {
			return err
		}
		if *asJSON {
			if err := json.NewEncoder(cmd.OutOrStdout()).Encode(registries); err != nil {
				return err
			}
		} else if err := printStatus(cmd.OutOrStdout(), admin, registries); err != nil {
			return err
		}
		for _, r := range registries {
			if !r.Connected {
				return fmt.Errorf("%s has not been watched for %s", r.Registry, age(view.Duration(r.StaleFor)))
			}
		}
		return nil
	})
}

func printStatus(w io.Writer, admin string, registries []view.Registry) error {
	if len(registries) == 0 {
		fmt.Fprintln(w, "the running config watches no registry")
		return nil
	}
	var nodes []struct{ Registry, State string }
	if err := askRunning(admin, "/discovery/nodes", &nodes); err != nil {
		return err
	}
	states := make(map[[2]string]int) // of the nodes, by registry and state
	for _, n := range nodes {
		states[[2]string{n.Registry, n.State}]++
	}
	t := newTable(w, "REGISTRY", "BACKEND", "CONNECTED", "SYNCED", "NODES", "STATES", "LAST EVENT", "LAST ERROR")
	defer t.flush()
	for _, r := range registries {
		connected := "yes"
		if !r.Connected {
			connected = "no, for " + age(view.Duration(r.StaleFor))
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
		for _, state := range view.States {
			if n := states[[2]string{r.Registry, state}]; n > 0 {
				counts = append(counts, fmt.Sprintf("%d %s", n, state))
			}
		}
		t.row(r.Registry, r.Backend, connected, synced, strconv.Itoa(r.Nodes), strings.Join(counts, ", "), event, r.LastError)
	}
	return nil
}

// askRunning gets JSON from the admin API of a running Caddy.
func askRunning(admin, path string, to any) error {
	// Each request has a client of its own, whose connection nobody would close.
	resp, err := caddycmd.AdminAPIRequest(admin, http.MethodGet, path, http.Header{"Connection": {"close"}}, nil)
	if err != nil {
		return fmt.Errorf("asking Caddy at %s: %w", admin, err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(to); err != nil {
		return fmt.Errorf("reading what Caddy at %s says: %w", admin, err)
	}
	return nil
}
