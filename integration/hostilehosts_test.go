package integration

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// TestHostileHosts lists a node that announces what is not its own: sites of the Caddyfile,
// hosts of other services, what is no host name, and far too many. It gets what nobody else
// has and the registry's hosts name, and takes nothing from anybody.
func TestHostileHosts(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		plain, secure := freeport.String(t), freeport.String(t)
		served := "@served discovered main\nhandle @served {\nreverse_proxy {\ndynamic discovery main {\nroute\n}\n}\n}\nhandle {\nrespond \"no such site\" 404\n}\n"
		p := start(t, "skip_install_trust\nlocal_certs\nlog {\nlevel INFO\n}\ndiscovery {\n"+
			strings.Replace(r.block("ttl 1h\nhosts *.apps.example.com shop.example.com\nclaim billing* pay.example.com"), "registry ", "registry main ", 1)+
			"\n}\non_demand_tls {\npermission discovery\n}",
			"http://own.apps.example.com:"+plain+" {\nrespond own\n}\nhttp://:"+plain+" {\n"+served+"}\nhttps://:"+secure+" {\ntls {\non_demand\n}\n"+served+"}")
		reaches := func(host, want, when string) {
			t.Helper()
			eventually(t, when+": "+host+" is answered by "+want, func() bool {
				answer, err := askHost(plain, host, "/")
				return err == nil && answer == want
			})
		}
		shop, billing, evil := newService(t, "shop"), newService(t, "billing"), newService(t, "evil")
		r.put("shop-1", camel("shop-1", "http://"+shop.address, `"service":"shop","hosts":"Shop.Example.com."`))
		reaches("shop.example.com", "shop", "at first")

		const lookAlike = "shор.apps.example.com" // with Cyrillic о and р
		wanted := []string{
			"shop.example.com", "own.apps.example.com", "pay.example.com", "evil.example.org", lookAlike, "127.0.0.1", "[::1]",
			p.admin, "localhost", "0x7f000001", "*.example.com", "*", "mine.apps.example.com:443", "https://mine.apps.example.com", "mine.apps.example.com",
		}
		var many []string
		for i := range 1000 {
			many = append(many, fmt.Sprintf("h%d.apps.example.com", i))
		}
		r.put("evil-1", camel("evil-1", "http://"+evil.address, `"service":"evil","hosts":"`+strings.Join(append(wanted, many...), " ")+`"`))
		r.put("evil-2", camel("evil-2", "http://"+evil.address, `"service":"evil","hosts":"shop.example.com","paths":"/login"`))
		reaches("mine.apps.example.com", "evil", "a host of its own")
		reaches("h0.apps.example.com", "evil", "a host of its own")
		for host, want := range map[string]string{
			"shop.example.com":                "shop",
			"own.apps.example.com":            "own",
			"pay.example.com":                 "404",
			"evil.example.org":                "404",
			"xn--sh-fmc8b.apps.example.com":   "404",
			"127.0.0.1":                       "404",
			"localhost":                       "404",
			"any.example.com":                 "404",
			"h999.apps.example.com":           "404", // beyond what one record may announce
			"a.h0.apps.example.com":           "404",
			strings.Repeat("x", 4000):         "404",
			"mine.apps.example.com.evil.org":  "404",
			"MINE.apps.example.com.:" + plain: "evil",
		} {
			reaches(host, want, "beside the hostile node")
		}
		if answer, err := askHost(plain, "shop.example.com", "/login"); err != nil || answer != "shop" {
			t.Errorf("a path of somebody else's host is answered by %q, %v", answer, err)
		}
		r.put("billing-1", camel("billing-1", "http://"+billing.address, `"service":"billing-eu","hosts":"pay.example.com"`))
		reaches("pay.example.com", "billing", "claimed")

		expectRefused(t, p, "evil-1", []string{"own.apps.example.com", "evil.example.org", "pay.example.com", "127.0.0.1", "*.example.com"})
		answer, err := ask("http://" + p.admin + "/discovery/hosts")
		if err != nil || !strings.Contains(answer, `"evil"`) {
			t.Errorf("the conflict is not shown: %v\n%.2000s", err, answer)
		}

		// Only what is announced and named has a certificate.
		for name, want := range map[string]bool{
			"shop.example.com": true, "mine.apps.example.com": true, "pay.example.com": true,
			"evil.example.org": false, "xn--sh-fmc8b.apps.example.com": false, "h999.apps.example.com": false, "localhost": false, "": false,
		} {
			if _, err := tlsName(secure, name); (err == nil) != want {
				t.Errorf("a certificate for %q: %v, want one: %v", name, err, want)
			}
		}
		floodNames(t, p, secure)
		reaches("shop.example.com", "shop", "after a flood of made up names")
	})
}

// askHost asks a proxy for a path of a host, and returns the body, or the status if it is not
// 200.
func askHost(port, host, path string) (string, error) {
	req, err := http.NewRequest(http.MethodGet, "http://127.0.0.1:"+port+path, nil)
	if err != nil {
		return "", err
	}
	req.Host = host
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		return fmt.Sprint(resp.StatusCode), nil
	}
	return string(body), err
}

// floodNames asks for certificates of very many names that nobody has. The log stays short.
func floodNames(t *testing.T, p *proxy, port string) {
	t.Helper()
	before := strings.Count(p.log.String(), "\n")
	var asking sync.WaitGroup
	for worker := range 8 {
		asking.Go(func() {
			for i := range 100 {
				_, _ = tlsName(port, fmt.Sprintf("made-up-%d-%d.apps.example.com", worker, i))
			}
		})
	}
	asking.Wait()
	if lines := strings.Count(p.log.String(), "\n") - before; lines > 100 {
		t.Errorf("800 handshakes of made up names write %d lines into the log", lines)
	}
	if denied := certificateAnswers(t, p, "denied"); denied < 800 {
		t.Errorf("%v denials are counted, want 800 or more", denied)
	}
}

// tlsName returns what the certificate for a name says, whoever has issued it.
func tlsName(port, name string) (*tls.ConnectionState, error) {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", "127.0.0.1:"+port, &tls.Config{
		ServerName: name, InsecureSkipVerify: true, // by an authority of the proxy's own
	})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	state := conn.ConnectionState()
	return &state, state.PeerCertificates[0].VerifyHostname(name)
}

// expectRefused checks that a node is listed, and that the admin API says of each host in
// the words of the record that it was refused.
func expectRefused(t *testing.T, p *proxy, id string, hosts []string) {
	t.Helper()
	answer, err := ask("http://" + p.admin + "/discovery/nodes")
	if err != nil {
		t.Fatal(err)
	}
	var nodes []struct {
		ID      string `json:"id"`
		State   string `json:"state"`
		Refused []any  `json:"refused_hosts"`
	}
	if err := json.Unmarshal([]byte(answer), &nodes); err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		if n.ID != id {
			continue
		}
		shown := fmt.Sprint(n.Refused)
		for _, host := range hosts {
			if !strings.Contains(shown, host) {
				t.Errorf("%s is not shown as refused:\n%s", host, shown)
			}
		}
		if n.State != "up" {
			t.Errorf("%s is %s, want it to stay", id, n.State)
		}
		return
	}
	t.Errorf("%s is not listed", id)
}
