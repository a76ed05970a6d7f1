package benchmarks

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// envNodes is set in the processes that are nodes.
const envNodes = "BENCHMARK_NODES"

// Every address in 127.0.0.0/8 is this machine, so that one listener is as many
// nodes as there are addresses. A few processes share it, because a dozen proxies
// with ten thousand connections each are more files than one may have open.
const (
	nodeProcesses = 8
	nodeConns     = 15_000 // of each process
)

// startNodes starts the nodes and returns their port.
func startNodes(b *testing.B) int {
	b.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{})
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	file, err := l.File()
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	for range nodeProcesses {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), envNodes+"=1")
		cmd.ExtraFiles = []*os.File{file}
		cmd.Stderr = os.Stderr
		startProgram(b, cmd, syscall.SIGKILL)
	}
	return l.Addr().(*net.TCPAddr).Port
}

// nodesChild serves and returns true if this process is one of those of
// [startNodes].
func nodesChild() bool {
	if os.Getenv(envNodes) == "" {
		return false
	}
	l, err := net.FileListener(os.NewFile(3, "listener"))
	if err != nil {
		fmt.Fprintln(os.Stderr, "nodes:", err)
		os.Exit(1)
	}
	for range nodeConns {
		c, err := l.Accept()
		if err != nil {
			fmt.Fprintln(os.Stderr, "nodes:", err)
			os.Exit(1)
		}
		if !c.LocalAddr().(*net.TCPAddr).IP.IsLoopback() {
			_ = c.Close() // no business of another machine
			continue
		}
		go answer(c)
	}
	select {} // the other processes take the rest
}

// answer says "ok" to whatever is asked, as cheaply as possible.
func answer(c net.Conn) {
	defer c.Close()
	response := []byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok")
	request, filled := make([]byte, 1<<10), 0
	for {
		n, err := c.Read(request[filled:])
		if filled += n; bytes.HasSuffix(request[:filled], []byte("\r\n\r\n")) {
			if _, err := c.Write(response); err != nil {
				return
			}
			filled = 0
		}
		if err != nil || filled == len(request) {
			return
		}
	}
}

// nodeIP is the address of a node.
func nodeIP(i int) net.IP {
	const third = 250
	return net.IPv4(127, byte(1+i/third/third), byte(i/third%third), byte(1+i%third)).To4()
}

// static returns the upstreams of a fleet as a Caddyfile has them.
func static(nodes, port int) string {
	addresses := make([]string, nodes)
	for i := range addresses {
		addresses[i] = fmt.Sprintf("%s:%d", nodeIP(i), port)
	}
	return strings.Join(addresses, " ")
}

// maxAnswer is how many addresses fit into a DNS message, which has at most 64 KiB.
const maxAnswer = 4_000

// startDNS answers for host names such as 10.fleet.test with so many addresses,
// and returns where it listens. It listens on TCP, since the answers are large.
func startDNS(b *testing.B) string {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	server := &dns.Server{Listener: l, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, query *dns.Msg) {
		reply := new(dns.Msg).SetReply(query)
		reply.Compress = true
		nodes := 0
		if q := query.Question[0]; q.Qtype == dns.TypeA {
			if _, err := fmt.Sscanf(q.Name, "%d.fleet.test.", &nodes); err != nil || nodes > maxAnswer {
				reply.Rcode = dns.RcodeNameError
			}
			for i := range nodes {
				reply.Answer = append(reply.Answer, &dns.A{
					Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 3600}, A: nodeIP(i),
				})
			}
		}
		_ = w.WriteMsg(reply)
	})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.ActivateAndServe()
	}()
	b.Cleanup(func() {
		_ = l.Close()
		<-done
	})
	return l.Addr().String()
}

// A fleet is nodes that list themselves in a bucket of their own.
type fleet struct {
	b      *testing.B
	js     jetstream.JetStream
	url    string // names the bucket
	bucket string
	port   int

	addresses int // how many the nodes share; 0: each has its own
}

// newFleet makes an empty one.
func newFleet(b *testing.B, server *natstest.Process, bucket string, port int) *fleet {
	b.Helper()
	conn, err := nats.Connect(server.URL())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(conn.Close)
	js, err := jetstream.New(conn, jetstream.WithPublishAsyncMaxPending(4096))
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := js.CreateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: bucket, History: 1, Storage: jetstream.FileStorage}); err != nil {
		b.Fatal(err)
	}
	return &fleet{b: b, js: js, url: server.URL() + "/" + bucket, bucket: bucket, port: port}
}

// announce lists a node, or sends its heartbeat. The lease is longer than any
// benchmark, so that heartbeats come when it suits.
func (f *fleet) announce(i int, load float64) {
	at := i
	if f.addresses > 0 {
		at = i % f.addresses
	}
	f.publish(i, nats.Header{}, fmt.Appendf(nil,
		`{"nodeId":"orders-%d","endpoint":"http://%s:%d","load":%g,"metadata":{"service":"orders","zone":"eu-1","lease":"2h"}}`,
		i, nodeIP(at), f.port, load))
}

// withdraw takes a node out.
func (f *fleet) withdraw(i int) {
	f.publish(i, nats.Header{"KV-Operation": {"DEL"}}, nil)
}

func (f *fleet) publish(i int, header nats.Header, data []byte) {
	m := &nats.Msg{Subject: fmt.Sprintf("$KV.%s.node.orders-%d", f.bucket, i), Header: header, Data: data}
	if _, err := f.js.PublishMsgAsync(m, jetstream.WithStallWait(time.Minute)); err != nil {
		f.b.Errorf("announcing: %v", err)
	}
}

// settle waits until the registry has acknowledged everything.
func (f *fleet) settle() {
	f.b.Helper()
	select {
	case <-f.js.PublishAsyncComplete():
	case <-time.After(time.Minute):
		f.b.Fatal("the registry does not acknowledge records")
	}
}
