// Command go-service is a plain HTTP service that lists itself in a registry and
// leaves in good order: on SIGTERM it is first announced as draining, then its
// record goes, then its listener closes.
//
//	go run ./examples/go-service -registry nats://127.0.0.1:4222 -id orders-1 -service orders
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/registries"
	"github.com/caddy-discovery/caddy-discovery/discovery/systemload"
)

func main() {
	registryURL := flag.String("registry", "nats://127.0.0.1:4222", "URL of the registry: nats://, nats+pubsub:// or redis://; its path may name the bucket, prefix or database")
	listen := flag.String("listen", "127.0.0.1:0", "address to serve on, which is also the endpoint that is announced")
	id := flag.String("id", "orders-1", "id of this node, unique in the fleet")
	service := flag.String("service", "orders", "service that this node belongs to")
	heartbeat := flag.Duration("heartbeat", 10*time.Second, "time between two heartbeats; the lease is three of them")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *registryURL, *listen, *id, *service, *heartbeat); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, registryURL, listen, id, service string, heartbeat time.Duration) error {
	listener, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	server := &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Node", id)
			fmt.Fprintln(w, "hello from", id)
		}),
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	served := make(chan error, 1)
	go func() {
		served <- server.Serve(listener)
		cancel() // a service that does not serve must not be listed
	}()

	// These lines list the service, until ctx ends.
	registry, err := registries.Open(registryURL)
	if err != nil {
		return err
	}
	defer registry.Close()
	endpoint, err := discovery.ParseEndpoint("http://" + listener.Addr().String())
	if err != nil {
		return err
	}
	registrar, err := discovery.NewRegistrar(registry, discovery.Node{
		ID:       id,
		Endpoint: endpoint,
		Metadata: map[string]string{discovery.KeyService: service},
	}, discovery.RegistrarOptions{Heartbeat: heartbeat, Load: systemload.PerCore, Logger: slog.Default()})
	if err != nil {
		return err
	}
	left := registrar.Run(ctx)

	// No proxy sends anything new by now; what is under way may end.
	shutdownCtx, cancelShutdown := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancelShutdown()
	if err := server.Shutdown(shutdownCtx); err != nil {
		return err
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return left
}
