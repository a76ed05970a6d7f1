package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/net/websocket"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
)

const (
	bucket = natskv.DefaultBucket
	// lease is short, so that a crash is seen to be noticed within the demo.
	lease     = 3 * time.Second
	heartbeat = time.Second
	// drain is how long a node that is about to leave says so before it does.
	drain = 500 * time.Millisecond
	// linger is how long it goes on answering after that: nobody should ask
	// any more, and if somebody does, the demo wants to see it.
	linger = 500 * time.Millisecond
)

// socketPath is where a service has a WebSocket that says what it is told.
const socketPath = "/socket"

// What a service tells the demo, a line each on its standard output.
const (
	saysRegistered = "registered"
	saysDraining   = "draining"
	saysLeft       = "left"
)

// service is one node of the fleet, in a process of its own so that it can
// crash: it answers with its id, and lists itself in the registry until it is
// terminated.
func service(args []string) error {
	flags := flag.NewFlagSet("demo service", flag.ExitOnError)
	id := flags.String("id", "orders-1", "the node's `id`")
	registry := flags.String("registry", "nats://127.0.0.1:4222", "the NATS `url` to register at")
	name := flags.String("service", "orders", "what the node `serves`")
	hosts := flags.String("hosts", "", "the `hosts` that it announces")
	if err := flags.Parse(args); err != nil {
		return err
	}
	// An interrupt at the terminal reaches the whole family; it is the demo that
	// says what happens then.
	signal.Ignore(os.Interrupt, syscall.SIGHUP)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	go func() {
		// Standard input ends with the demo, however that ends.
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Node", *id)
		fmt.Fprintf(w, "served by %s\n", *id)
	})
	mux.Handle(socketPath, websocket.Server{Handler: func(conn *websocket.Conn) { _, _ = io.Copy(conn, conn) }})
	server := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: mux}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()

	endpoint, err := discovery.ParseEndpoint("http://" + listener.Addr().String())
	if err != nil {
		return err
	}
	metadata := map[string]string{discovery.KeyService: *name}
	if *hosts != "" {
		metadata[discovery.KeyHosts] = *hosts
	}
	err = register(ctx, *registry, discovery.Node{ID: *id, Endpoint: endpoint, Metadata: metadata}, func(what string) { fmt.Println(what) })

	time.Sleep(linger)
	shut, cancel := context.WithTimeout(context.Background(), linger)
	defer cancel()
	if server.Shutdown(shut) != nil {
		// A connection that was opened and never used counts as busy for 5 s.
		err = errors.Join(err, server.Close())
	}
	if e := <-served; !errors.Is(e, http.ErrServerClosed) {
		err = errors.Join(err, e)
	}
	return err
}

// register keeps the node listed until ctx ends; then the node drains, and its
// record goes. It tells each of these things when the registry has it.
func register(ctx context.Context, url string, n discovery.Node, tell func(string)) (err error) {
	registry, err := natskv.Open(natskv.Config{
		URLs:   []string{url},
		Bucket: bucket,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	registrar, err := discovery.NewRegistrar(&witness{Announcer: registry, tell: tell}, n, discovery.RegistrarOptions{
		Heartbeat: heartbeat,
		TTL:       lease,
		Drain:     new(drain),
	})
	if err != nil {
		return err
	}
	return registrar.Run(ctx)
}

// A witness tells what an Announcer has done.
type witness struct {
	discovery.Announcer
	tell func(string)
	// registered is used by the registrar's goroutine alone.
	registered bool
}

// Announce implements discovery.Announcer.
func (w *witness) Announce(ctx context.Context, n discovery.Node) error {
	if err := w.Announcer.Announce(ctx, n); err != nil {
		return err
	}
	if !w.registered {
		w.registered = true
		w.tell(saysRegistered)
	}
	return nil
}

// Drain implements discovery.Announcer.
func (w *witness) Drain(ctx context.Context, n discovery.Node) (own bool, err error) {
	if own, err = w.Announcer.Drain(ctx, n); own {
		w.tell(saysDraining)
	}
	return own, err
}

// Withdraw implements discovery.Announcer.
func (w *witness) Withdraw(ctx context.Context, n discovery.Node) error {
	if err := w.Announcer.Withdraw(ctx, n); err != nil {
		return err
	}
	w.tell(saysLeft)
	return nil
}
