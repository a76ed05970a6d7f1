package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/caddy-discovery/caddy-discovery/internal/view"
)

func hostsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "hosts [--service <name>] [--all] [--address <admin>] [--json]",
		Short: "Lists the hosts that nodes announce to a running Caddy",
		Long: `
Asks the admin API of a running Caddy which hosts the nodes of its registries
announce, whose they are, for which there may be a certificate, and who else
announces them and does not get them. It must use 'route', 'discovered' or
'permission discovery': otherwise nobody looks at hosts.`,
		Example: `  $ caddy discovery hosts
  $ caddy discovery hosts --service shop --json
  $ caddy discovery hosts --json | jq -r '.[] | select(.conflicts != []) | .host'`,
		Args: cobra.NoArgs,
	}
	flags := cmd.Flags()
	address := flags.String("address", "", "the `address` of the admin API (default localhost:2019, or $CADDY_ADMIN)")
	service := flags.String("service", "", "only hosts of this `service`")
	all := flags.Bool("all", false, "hosts without a node, too, as far as they are remembered")
	asJSON := flags.Bool("json", false, "print JSON, as the admin API does")
	return command(cmd, func(_ context.Context, cmd *cobra.Command, _ []string) error {
		admin, err := caddycmd.DetermineAdminAPIAddress(*address, nil, "", "")
		if err != nil {
			return err
		}
		path := "/discovery/hosts"
		if *service != "" {
			path += "?" + url.Values{"service": {*service}}.Encode()
		}
		var hosts []view.Host
		if err := askRunning(admin, path, &hosts); err != nil {
			return err
		}
		if !*all {
			hosts = slices.DeleteFunc(hosts, func(h view.Host) bool { return h.Left != nil && len(h.Conflicts) == 0 })
		}
		if *asJSON {
			return json.NewEncoder(cmd.OutOrStdout()).Encode(hosts)
		}
		heads := []string{"HOST", "SERVICE", "PATHS", "NODES", "SINCE", "CERTIFICATE", "CONFLICTS"}
		return printAll(cmd.OutOrStdout(), false, hosts, heads, hostRow)
	})
}

func hostRow(h view.Host) []string {
	nodes := strconv.Itoa(len(h.Nodes))
	if h.Left != nil {
		nodes = "left " + age(time.Since(*h.Left)) + " ago"
	}
	certificate := ""
	switch {
	case h.Allowed != nil && h.Allowed.Until != nil:
		certificate = "until " + h.Allowed.Until.Local().Format(time.DateTime)
	case h.Allowed != nil:
		certificate = "allowed"
	}
	var conflicts []string
	for _, c := range h.Conflicts {
		conflicts = append(conflicts, fmt.Sprintf("%s (%d nodes, since %s)", serviceName(c.Service), c.Nodes, c.Since.Local().Format(time.DateTime)))
	}
	services := make([]string, len(h.Services))
	for i, s := range h.Services {
		services[i] = serviceName(s)
	}
	return []string{h.Host, strings.Join(services, ", "), strings.Join(h.Paths, " "), nodes, h.Since.Local().Format(time.DateTime), certificate, strings.Join(conflicts, ", ")}
}

func serviceName(service string) string { return cmp.Or(service, "(none)") }
