package benchmarks

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

const (
	// newHosts is how many hosts are announced one after the other, and asked for.
	newHosts = 200

	beginHosts = "<!-- make bench-hosts: begin -->"
	endHosts   = "<!-- make bench-hosts: end -->"
)

// hostFigures are what sites cost that services bring along, with so many there already.
type hostFigures struct {
	hosts        int
	first, again []time.Duration // an answer by HTTPS, the first one with a new certificate
	memory       int64           // of Caddy, in bytes
}

// BenchmarkNewHost times, on the real binary and a real registry, how long it takes from
// the writing of a record with a host that nobody had to the first answer by HTTPS for it,
// with a certificate of Caddy's own authority, and a second handshake beside it.
func BenchmarkNewHost(b *testing.B) {
	for b.Loop() {
		var all []hostFigures
		for _, hosts := range []int{10, 1_000, 10_000} {
			f := measureNewHosts(b, hosts)
			all = append(all, f)
			for name, d := range map[string][]time.Duration{"first": f.first, "again": f.again} {
				for _, p := range []int{50, 99} {
					b.ReportMetric(float64(percentile(d, p).Microseconds()), fmt.Sprintf("µs-%s-p%d-of-%d", name, p, hosts))
				}
			}
			b.ReportMetric(float64(f.memory>>20), fmt.Sprintf("MiB-of-%d", hosts))
		}
		if *report != "" {
			if err := writeSection(*report, hostsSection(all), beginHosts, endHosts); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(0, "ns/op")
}

func measureNewHosts(b *testing.B, hosts int) hostFigures {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	server := natstest.Start(b)
	bucket := server.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes", History: 1, Storage: jetstream.MemoryStorage})
	backend := newBackend(b)
	put := func(host string) {
		record := fmt.Sprintf(`{"nodeId":%q,"endpoint":"http://%s","load":0,"metadata":{"service":%q,"hosts":"%s.apps.example.com"}}`, host, backend, host, host)
		if _, err := bucket.PutString(ctx, "node."+host, record); err != nil {
			b.Fatal(err)
		}
	}
	for i := range hosts {
		put(fmt.Sprint("old", i))
	}
	port := freeport.String(b)
	caddy := startConfig(b, `admin off
		local_certs
		skip_install_trust
		discovery {
			registry main `+server.URL()+` {
				hosts *.apps.example.com
			}
		}
		on_demand_tls {
			permission discovery
		}`, `https://:`+port+` {
			tls {
				on_demand
			}
			@served discovered
			handle @served {
				reverse_proxy {
					dynamic discovery {
						route
					}
				}
			}
			handle {
				respond 404
			}
		}`)
	ask := func(host string) error { return askTLS("127.0.0.1:"+port, host+".apps.example.com") }
	for ask("old0") != nil {
		time.Sleep(10 * time.Millisecond)
	}
	f := hostFigures{hosts: hosts, memory: caddy.memory(b)}
	for i := range newHosts {
		host := fmt.Sprint("new", i)
		time.Sleep(50 * time.Millisecond) // one change at a time: a storm is another thing
		began := time.Now()
		put(host)
		for ask(host) != nil {
		}
		f.first = append(f.first, time.Since(began))
		began = time.Now()
		if err := ask(host); err != nil {
			b.Fatal(err)
		}
		f.again = append(f.again, time.Since(began))
	}
	return f
}

// askTLS asks for a host on a connection of its own.
func askTLS(address, host string) error {
	c, err := tls.Dial("tcp", address, &tls.Config{ServerName: host, InsecureSkipVerify: true}) // what is measured does not depend on it
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", host); err != nil {
		return err
	}
	answer, err := io.ReadAll(c)
	if err == nil && !strings.HasPrefix(string(answer), "HTTP/1.1 200 ") {
		err = fmt.Errorf("%.40q", answer)
	}
	return err
}

func hostsSection(all []hostFigures) string {
	var b strings.Builder
	b.WriteString(beginHosts + "\n## Hosts\n\n" + machine() + "\n\n" +
		"Services bring their sites along (`make bench-hosts`): " + fmt.Sprint(newHosts) + " of them join one after the other, each with a host that nobody had. " +
		"*First answer* is from the writing of the record to the first answer by HTTPS for the host, with a certificate that Caddy's own authority issues meanwhile; " +
		"a handshake that comes too early is refused, and the next one begins at once. *Again* is another connection and request for it.\n\n" +
		"| hosts there already | first answer, p50 | p99 | again, p50 | p99 | memory of Caddy |\n|---|---|---|---|---|---|\n")
	ms := func(d []time.Duration, p int) string {
		return fmt.Sprintf("%.1f ms", float64(percentile(d, p).Microseconds())/1000)
	}
	for _, f := range all {
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", humanize.Comma(int64(f.hosts)), ms(f.first, 50), ms(f.first, 99), ms(f.again, 50), ms(f.again, 99), humanize.IBytes(uint64(f.memory)))
	}
	b.WriteString(endHosts + "\n")
	return b.String()
}
