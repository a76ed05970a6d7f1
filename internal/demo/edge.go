package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/net/websocket"
)

// edgeConfig is what the last step runs, as it stands.
const edgeConfig = "examples/edge/Caddyfile"

// An edge is a Caddy whose sites are those that services announce. It starts while other
// things are shown.
type edge struct {
	dir     string
	fleet   *fleet
	started chan struct{} // closed when what follows is known

	proxy *proxy
	err   error
}

func startEdge(ctx context.Context, binary, dir string) *edge {
	e := &edge{dir: dir, started: make(chan struct{})}
	go func() {
		defer close(e.started)
		if e.err = os.MkdirAll(dir, 0o700); e.err != nil {
			return
		}
		// Not those of the other Caddy, which may be looking for them now.
		e.proxy, e.err = startProxy(ctx, binary, edgeConfig, dir, map[string]string{portHTTP: "8081", portHTTPS: "8443", portNATS: "4223", portAdmin: "2020"})
		if e.err == nil {
			e.fleet = &fleet{registry: e.proxy.registry}
		}
	}()
	return e
}

// stop ends the services and Caddy, if they were started.
func (e *edge) stop() {
	<-e.started
	if e.err == nil {
		e.fleet.stop()
		e.proxy.stop()
	}
}

// dial opens a TLS connection to a host at Caddy. Its certificate must be one of Caddy's
// own authority.
func (e *edge) dial(ctx context.Context, host string) (net.Conn, error) {
	root, err := os.ReadFile(filepath.Join(e.dir, "caddy", "pki", "authorities", "local", "root.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(root) {
		return nil, errors.New("the root certificate of Caddy cannot be read")
	}
	d := tls.Dialer{NetDialer: &net.Dialer{Timeout: 5 * time.Second}, Config: &tls.Config{ServerName: host, RootCAs: roots, MinVersion: tls.VersionTLS12}}
	return d.DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", e.proxy.ports[portHTTPS]))
}

// ask makes one request by HTTPS for a host, on a connection of its own.
func (e *edge) ask(ctx context.Context, host string) (string, error) {
	transport := &http.Transport{DisableKeepAlives: true, DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return e.dial(ctx, host) }}
	return ask(ctx, &http.Client{Transport: transport}, "https://"+host+"/")
}

// socket opens a WebSocket through a host.
func (e *edge) socket(ctx context.Context, host string) (*websocket.Conn, error) {
	config, err := websocket.NewConfig("wss://"+host+socketPath, "https://"+host)
	if err != nil {
		return nil, err
	}
	conn, err := e.dial(ctx, host)
	if err != nil {
		return nil, err
	}
	ws, err := websocket.NewClient(config, conn)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return ws, nil
}

// echo sends a message and waits until it comes back.
func echo(ws *websocket.Conn, message string) error {
	if err := ws.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if err := websocket.Message.Send(ws, message); err != nil {
		return err
	}
	var back string
	if err := websocket.Message.Receive(ws, &back); err != nil {
		return err
	}
	if back != message {
		return fmt.Errorf("%q came back as %q", message, back)
	}
	return nil
}

const (
	chatHost = "chat.apps.localhost"
	shopHost = "shop.apps.localhost"
)

// hosts has a service join with a host of its own, while a WebSocket through another one
// stays open.
func (s *show) hosts(ctx context.Context) error {
	e := s.edge
	<-e.started
	if e.err != nil {
		return fmt.Errorf("starting Caddy with %s: %w", edgeConfig, e.err)
	}
	chat, err := e.fleet.add("chat-1", "--service", "chat", "--hosts", chatHost)
	if err != nil {
		return err
	}
	if err := chat.await(ctx, up); err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var ws *websocket.Conn
	if e := until(wait, func() bool { ws, err = e.socket(wait, chatHost); return err == nil }); e != nil {
		return fmt.Errorf("no WebSocket through %s: %w", chatHost, errors.Join(err, e))
	}
	defer ws.Close()
	s.screen.event(quiet, "another Caddy, with %s as it stands: chat-1 announces %s, a WebSocket is open through it", edgeConfig, chatHost)

	shop, err := e.fleet.add("shop-1", "--service", "shop", "--hosts", shopHost)
	if err != nil {
		return err
	}
	if err := shop.await(ctx, up); err != nil {
		return err
	}
	messages := 0
	if e := until(wait, func() bool {
		_, err = e.ask(wait, shopHost)
		messages++
		return err == nil || echo(ws, fmt.Sprint(messages)) != nil
	}); e != nil || err != nil {
		return fmt.Errorf("shop-1 announces %s and is not served by HTTPS: %w", shopHost, errors.Join(err, e))
	}
	_, registered, _ := shop.now()
	s.screen.event(good, "shop-1 joins with a host of its own: its first answer by HTTPS, certificate included, comes %v later", time.Since(registered).Round(time.Millisecond))
	if err := echo(ws, "still here"); err != nil {
		return fmt.Errorf("the WebSocket through %s did not stay open: %w", chatHost, err)
	}
	s.screen.event(good, "the WebSocket is still open; curl -k https://%s:%s/", shopHost, e.proxy.ports[portHTTPS])
	return nil
}
