package discovery_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

var threeDays = discovery.CertificatePolicy{Linger: 72 * time.Hour}

func expectCertificate(t *testing.T, d *discovery.Directory, name string, p discovery.CertificatePolicy, want discovery.CertificateAnswer, when string) {
	t.Helper()
	synctest.Wait()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	got, err := d.AllowCertificate(ctx, name, p)
	if got != want || (err == nil) != want.Allows() {
		t.Errorf("%s: a certificate for %s: %s, %v, want %s", when, name, got, err, want)
	}
}

func TestCertificates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, m := sites(t, discovery.HostOptions{
			Names:  []string{"*.apps.example.com", "shop.example.com", "other.example.com"},
			Claims: []discovery.HostClaim{{Service: "billing", Hosts: []string{"pay.example.com"}}},
			Sites:  []string{"own.apps.example.com"},
		},
			site("s1", "shop", "shop.example.com a.apps.example.com evil.org own.apps.example.com"),
			site("t1", "thief", "shop.example.com pay.example.com"),
			site("b1", "billing", "pay.example.com"))
		for name, want := range map[string]discovery.CertificateAnswer{
			"shop.example.com":                   discovery.CertificateListed,
			"a.apps.example.com":                 discovery.CertificateListed,
			"pay.example.com":                    discovery.CertificateListed,
			"other.example.com":                  discovery.CertificateDenied, // nobody announces it
			"b.apps.example.com":                 discovery.CertificateDenied,
			"evil.org":                           discovery.CertificateDenied, // hosts does not name it
			"own.apps.example.com":               discovery.CertificateDenied,
			"*.apps.example.com":                 discovery.CertificateDenied,
			"x.a.apps.example.com":               discovery.CertificateDenied,
			"10.0.0.7":                           discovery.CertificateDenied,
			"":                                   discovery.CertificateDenied,
			".apps.example.com":                  discovery.CertificateDenied,
			"SHOP.example.com":                   discovery.CertificateDenied, // it is asked for in lower case
			"shop.example.com.":                  discovery.CertificateDenied,
			string(make([]byte, 1<<16)) + ".com": discovery.CertificateDenied,
		} {
			expectCertificate(t, d, name, threeDays, want, "listed")
		}

		// By a wildcard each name has one of its own, if it is a name.
		write(m, site("w1", "all", "*.apps.example.com"))
		time.Sleep(coalesced)
		expectCertificate(t, d, "b.apps.example.com", threeDays, discovery.CertificateListed, "by a wildcard")
		expectCertificate(t, d, "a b.apps.example.com", threeDays, discovery.CertificateDenied, "by a wildcard")
		expectCertificate(t, d, "{x}.apps.example.com", threeDays, discovery.CertificateDenied, "by a wildcard")
		expectCertificate(t, d, "own.apps.example.com", threeDays, discovery.CertificateDenied, "by a wildcard")
		expectCertificate(t, d, ".apps.example.com", threeDays, discovery.CertificateDenied, "by a wildcard")

		// It is allowed for a while after the last node has left.
		leave(t, m, "s1")
		leave(t, m, "w1")
		time.Sleep(71 * time.Hour)
		for _, name := range []string{"a.apps.example.com", "b.apps.example.com", "never.asked.for.apps.example.com"} {
			want := discovery.CertificateLingering
			if name[0] == 'n' {
				want = discovery.CertificateDenied
			}
			expectCertificate(t, d, name, threeDays, want, "left less than linger ago")
		}
		time.Sleep(2 * time.Hour)
		expectCertificate(t, d, "a.apps.example.com", threeDays, discovery.CertificateDenied, "left long ago")
		expectCertificate(t, d, "b.apps.example.com", threeDays, discovery.CertificateDenied, "left long ago")

		// Other rules count at once, before there is a snapshot by them.
		write(m, site("s2", "shop", "new.example.org"))
		time.Sleep(coalesced)
		expectCertificate(t, d, "new.example.org", threeDays, discovery.CertificateDenied, "not named yet")
		d.SetHostRules(hostRules(t, discovery.HostOptions{Names: []string{"new.example.org"}}))
		if answer, err := d.AllowCertificate(t.Context(), "new.example.org", threeDays); answer != discovery.CertificateListed {
			t.Errorf("a name that hosts names from now on: %s, %v", answer, err)
		}

		// Never one for what hosts does not name by now, or without any.
		d.SetHostRules(hostRules(t, discovery.HostOptions{Names: []string{"pay.example.com"}}))
		expectCertificate(t, d, "shop.example.com", threeDays, discovery.CertificateDenied, "not named any more")
		d.SetHostRules(hostRules(t, discovery.HostOptions{}))
		expectCertificate(t, d, "pay.example.com", threeDays, discovery.CertificateDenied, "without hosts")
		d.SetHostRules(nil)
		expectCertificate(t, d, "pay.example.com", threeDays, discovery.CertificateDenied, "without rules")
	})
}

func TestCertificateLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		all := site("w1", "all", "*.example.com")
		d, m := sites(t, discovery.HostOptions{Names: []string{"*.example.com"}}, all)
		p := discovery.CertificatePolicy{Linger: time.Hour, Limit: 3, Period: 24 * time.Hour}
		for i := range 3 {
			expectCertificate(t, d, fmt.Sprintf("h%d.example.com", i), p, discovery.CertificateListed, "within the limit")
			time.Sleep(time.Hour)
		}
		expectCertificate(t, d, "h3.example.com", p, discovery.CertificateLimited, "beyond the limit")
		expectCertificate(t, d, "h0.example.com", p, discovery.CertificateListed, "not new")
		write(m, all)
		time.Sleep(21*time.Hour - time.Minute)
		expectCertificate(t, d, "h3.example.com", p, discovery.CertificateLimited, "just before there is one again")
		time.Sleep(2 * time.Minute)
		expectCertificate(t, d, "h3.example.com", p, discovery.CertificateListed, "when there is one again")
		expectCertificate(t, d, "h4.example.com", p, discovery.CertificateLimited, "beyond the limit again")
		p.Limit = 0
		expectCertificate(t, d, "h4.example.com", p, discovery.CertificateListed, "without a limit")
		p.Limit = 3
		p.Has = func(name string) bool { return name == "h5.example.com" }
		expectCertificate(t, d, "h5.example.com", p, discovery.CertificateListed, "that has one already")
		expectCertificate(t, d, "h6.example.com", p, discovery.CertificateLimited, "that has none")
		time.Sleep(23 * time.Hour)
		write(m, all)
		time.Sleep(2 * time.Hour)
		for i := range 3 { // h5 did not count
			expectCertificate(t, d, fmt.Sprintf("h%d.example.com", 6+i), p, discovery.CertificateListed, "a day later")
		}
		expectCertificate(t, d, "h9.example.com", p, discovery.CertificateLimited, "a day later")

		if got, want := d.CertificateAnswers(), (map[discovery.CertificateAnswer]uint64{
			discovery.CertificateListed: 10, discovery.CertificateLingering: 0, discovery.CertificateRemembered: 0,
			discovery.CertificateDenied: 0, discovery.CertificateLimited: 5, discovery.CertificateUnclear: 0,
		}); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("the answers were %v, want %v", got, want)
		}
		if c, ok := d.Certificate("h1.example.com"); !ok || time.Since(c.First) < 46*time.Hour {
			t.Errorf("what is known of the certificate of h1 is %+v, %v", c, ok)
		}
		told := d.Journal().Newest(0, func(c *discovery.Change) bool { return c.Type == discovery.ChangeCertificate })
		if len(told) != 9 || told[8].ID != "w1" || told[8].Reason != "a certificate is allowed for host h0.example.com" {
			t.Errorf("the journal has %d certificates, the first one %+v; want 9", len(told), told[len(told)-1])
		}
	})
}

// Neither an outage, nor a restart during one, nor one of a week takes a certificate away
// that is renewed then.
func TestCertificatesOutlastARestart(t *testing.T) {
	for name, away := range map[string]time.Duration{"for a minute": time.Minute, "for a week": 7 * 24 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := warmFile(t)
				start := func(m *discoverytest.Memory, names []string, do func(d *discovery.Directory)) {
					t.Helper()
					d := discovery.NewDirectory(m.Open(), isolate(discovery.Options{WarmStart: w, TTL: discovery.MaxLease}))
					d.SetHostRules(hostRules(t, discovery.HostOptions{Names: names}))
					ctx, cancel := context.WithCancel(context.Background())
					done := make(chan error, 1)
					go func() { done <- d.Run(ctx) }()
					do(d)
					// The end of a config takes its rules along, which says nothing about hosts.
					d.SetHostRules(nil)
					time.Sleep(coalesced)
					cancel()
					<-done
				}
				named := []string{"*.example.com"}
				p := discovery.CertificatePolicy{Linger: 72 * time.Hour, Limit: 2, Period: 24 * 30 * time.Hour}
				m := discoverytest.NewMemory()
				write(m, site("s1", "shop", "shop.example.com gone.example.com never.example.com late.example.com"))
				start(m, named, func(d *discovery.Directory) {
					expectCertificate(t, d, "shop.example.com", p, discovery.CertificateListed, "at first, at once")
					expectCertificate(t, d, "gone.example.com", p, discovery.CertificateListed, "at first")
					write(m, site("s1", "shop", "shop.example.com never.example.com late.example.com"))
					time.Sleep(time.Hour)
					expectCertificate(t, d, "gone.example.com", p, discovery.CertificateLingering, "after it left")
				})

				time.Sleep(away)
				start(unreachable(), named, func(d *discovery.Directory) {
					expectCertificate(t, d, "shop.example.com", p, discovery.CertificateRemembered, "during an outage, at once")
					expectCertificate(t, d, "never.example.com", p, discovery.CertificateLimited, "during an outage")
					want := discovery.CertificateLingering
					if away > p.Linger {
						want = discovery.CertificateUnclear
					}
					expectCertificate(t, d, "gone.example.com", p, want, "during an outage")
					before := time.Now()
					expectCertificate(t, d, "unknown.example.com", p, discovery.CertificateUnclear, "during an outage")
					if waited := time.Since(before); waited != 2*time.Second {
						t.Errorf("it was waited for %v until it is clear, want for as long as it may be", waited)
					}
				})
				start(unreachable(), []string{"other.example.com"}, func(d *discovery.Directory) {
					expectCertificate(t, d, "shop.example.com", p, discovery.CertificateDenied, "that is not named by now")
				})

				// A registry that has lost it all starts the time anew.
				start(discoverytest.NewMemory(), named, func(d *discovery.Directory) {
					time.Sleep(71 * time.Hour)
					expectCertificate(t, d, "shop.example.com", p, discovery.CertificateLingering, "the registry is empty")
					time.Sleep(2 * time.Hour)
					expectCertificate(t, d, "shop.example.com", p, discovery.CertificateDenied, "the registry is empty for long")
				})
				write(m, site("s1", "shop", "shop.example.com never.example.com late.example.com"))
				start(m, named, func(d *discovery.Directory) {
					expectCertificate(t, d, "late.example.com", p, discovery.CertificateLimited, "the registry is back")
					expectCertificate(t, d, "shop.example.com", p, discovery.CertificateListed, "the registry is back")
				})
			})
		})
	}
}

// What clients make up costs the directory nothing.
func BenchmarkCertificateDenied(b *testing.B) {
	m := discoverytest.NewMemory()
	write(m, site("s1", "shop", "shop.example.com"))
	d := discovery.NewDirectory(m.Open(), isolate(discovery.Options{}))
	r, err := discovery.NewHostRules(discovery.HostOptions{Names: []string{"*.example.com"}})
	if err != nil {
		b.Fatal(err)
	}
	d.SetHostRules(r)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx) }()
	<-d.Synced()
	b.ReportAllocs()
	for b.Loop() {
		if answer, _ := d.AllowCertificate(ctx, "made-up.example.com", threeDays); answer != discovery.CertificateDenied {
			b.Fatal(answer)
		}
	}
	cancel()
	<-done
}
