// Command demo shows what the plugin does: a fleet of sample services that
// joins, drains and crashes behind a real Caddy, under traffic that is counted.
// `make demo` runs it.
//
// It stays until it is interrupted. With DEMO_FOR=10s in the environment it
// ends by itself, and fails if the fleet was not served as it should have been.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

// shortest is how long a demo takes that shows everything.
const shortest = 10 * time.Second

func main() {
	var err error
	switch {
	case len(os.Args) > 1 && os.Args[1] == "service":
		err = service(os.Args[2:])
	case len(os.Args) > 2 && os.Args[1] == "guard":
		err = guard(os.Args[2:])
	default:
		err = demonstrate(os.Args[1:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// demonstrate runs the demo: Caddy, the fleet, the traffic and the tour.
func demonstrate(args []string) (err error) {
	flags := flag.NewFlagSet("demo", flag.ExitOnError)
	binary := flags.String("caddy", filepath.Join("bin", "caddy"), "the `binary` of Caddy")
	config := flags.String("config", "Caddyfile.example", "the Caddyfile to run it with")
	if err := flags.Parse(args); err != nil {
		return err
	}
	began := time.Now()
	var duration time.Duration
	if s := os.Getenv("DEMO_FOR"); s != "" {
		duration, err = time.ParseDuration(s)
		if err != nil || duration < shortest {
			return fmt.Errorf("DEMO_FOR is %q: want a duration of at least %v", s, shortest)
		}
	}
	// A closed pipe at standard output, as in `make demo | head`, would end the
	// demo at once and leave Caddy behind.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()

	dir, err := os.MkdirTemp("", "caddy-discovery-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	screen := newScreen(os.Stdout)
	// The other Caddy is for the last step, and starts meanwhile.
	edge := startEdge(ctx, *binary, filepath.Join(dir, "edge"))
	defer edge.stop()
	proxy, err := startProxy(ctx, *binary, *config, dir, map[string]string{portHTTP: "8080", portNATS: "4222", portAdmin: "2019"})
	if err != nil {
		return err
	}
	defer proxy.stop()
	screen.title(
		"Caddy", fmt.Sprintf("%s, with %s as it stands", *binary, *config),
		"registry", fmt.Sprintf("%s, bucket %s, run by Caddy itself", proxy.registry, bucket),
		"try", fmt.Sprintf("curl -i %s", proxy.url),
	)

	show := newShow(screen, proxy, edge)
	defer show.fleet.stop()
	gap := 2 * time.Second
	if duration > 0 {
		gap = time.Second
	}
	if err := show.run(ctx, gap, began, duration); err != nil {
		return errors.Join(err, proxy.log())
	}
	return nil
}
