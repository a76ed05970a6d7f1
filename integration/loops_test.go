package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// ownAddresses are those of this machine besides loopback, as hosts of URLs.
func ownAddresses(t *testing.T) (hosts []string) {
	t.Helper()
	interfaces, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range interfaces {
		if n, ok := i.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			hosts = append(hosts, net.JoinHostPort(n.IP.String(), ""))
		}
	}
	return hosts
}

// TestOwnListener lists the proxy itself as a node, at every address at which it can
// be reached: no request goes round.
func TestOwnListener(t *testing.T) {
	t.Parallel()
	r := newSortedSet(t)
	s := newService(t, "good")
	r.put("good", camel("good", "http://"+s.address, `"service":"orders"`))
	port, other := freeport.String(t), freeport.String(t)
	p := start(t, "", site(port, r.block("ttl 1h"), "lb_policy round_robin")+
		"http://127.0.0.1:"+other+" {\nbind 127.0.0.1\nreverse_proxy 127.0.0.1:"+port+"\n}\n")
	url := "http://127.0.0.1:" + port
	eventually(t, "the good node serves", func() bool { return fmt.Sprint(round(t, 20, url)) == "map[good:20]" })
	l := steady(t, url, time.Millisecond)
	hosts := append(ownAddresses(t), "127.0.0.1:", "127.9.9.9:", "[::1]:", "localhost:")
	for i, host := range hosts {
		id := fmt.Sprint("self-", i)
		r.put(id, camel(id, "http://"+host+port, `"service":"orders"`))
	}
	r.put("detour", camel("detour", "http://127.0.0.1:"+other, `"service":"orders"`))
	r.put("beside", camel("beside", "http://127.0.0.2:"+other, `"service":"orders"`))
	eventually(t, "all of them are refused", func() bool {
		body, err := ask("http://" + p.admin + "/discovery/nodes")
		return err == nil && strings.Count(body, `"denied: this proxy itself"`) == len(hosts)+1
	})
	// Where it does not listen another process may.
	var views []struct {
		ID      string
		Sources []struct{ Eligible bool }
	}
	body, err := ask("http://" + p.admin + "/discovery/nodes")
	if err != nil || json.Unmarshal([]byte(body), &views) != nil {
		t.Fatalf("%s, %v", body, err)
	}
	for _, v := range views {
		if v.ID == "beside" && !v.Sources[0].Eligible {
			t.Errorf("%s:%s is not this proxy: %s", "127.0.0.2", other, body)
		}
	}
	r.remove("beside")
	l.mark()
	eventually(t, "requests go on", func() bool { return l.sinceMark()["good"] > 200 })
	l.cancel()
	l.group.Wait()
	if failed := len(l.failures); failed > 0 && strings.Contains(strings.Join(l.failures, " "), "508") {
		t.Errorf("%d requests went round: %v", failed, l.failures[0])
	}
}

// TestProxiesThatListEachOther sends requests through two proxies of which each is a
// node of the other one: they end soon, and say why.
func TestProxiesThatListEachOther(t *testing.T) {
	t.Parallel()
	r := newSortedSet(t)
	ports := []string{freeport.String(t), freeport.String(t)}
	var proxies []*proxy
	for _, port := range ports {
		r.put("proxy-"+port, camel("proxy-"+port, "http://127.0.0.1:"+port, `"service":"orders"`))
		proxies = append(proxies, start(t, "", site(port, r.block("ttl 1h"), "lb_try_duration 1h\nlb_retry_match path *\nfail_duration 1h")))
	}
	url := "http://127.0.0.1:" + ports[0]
	eventually(t, "each has the other", func() bool {
		for _, port := range ports {
			if got := round(t, 1, "http://127.0.0.1:"+port); got["508"] != 1 {
				return false
			}
		}
		return true
	})
	var workers sync.WaitGroup
	for range 8 {
		workers.Go(func() {
			for i := range 25 {
				req, err := http.NewRequest([]string{http.MethodGet, http.MethodPost}[i%2], url, http.NoBody)
				if err != nil {
					t.Error(err)
					return
				}
				if i%5 == 0 {
					req.Header.Set("Connection", "Upgrade")
					req.Header.Set("Upgrade", "websocket")
				}
				resp, err := client.Do(req)
				if err != nil {
					t.Error(err)
					return
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				if resp.StatusCode != http.StatusLoopDetected {
					t.Errorf("a %s that goes round ends with %s", req.Method, resp.Status)
				}
			}
		})
	}
	workers.Wait()
	said := 0
	for _, p := range proxies {
		said += strings.Count(p.log.String(), "proxies that list each other as nodes")
	}
	if said == 0 {
		t.Error("neither log says why")
	}
	// A tier of proxies in a row is none of that.
	s := newService(t, "good")
	for _, port := range ports {
		r.remove("proxy-" + port)
	}
	r.put("good", camel("good", "http://"+s.address, `"service":"orders"`))
	eventually(t, "no proxy has the other one any more", func() bool {
		for _, p := range proxies {
			nodes, err := ask("http://" + p.admin + "/discovery/nodes")
			if err != nil || strings.Contains(nodes, `"proxy-`) || !strings.Contains(nodes, `"good"`) {
				return false
			}
		}
		return true
	})
	eventually(t, "the node serves", func() bool { return fmt.Sprint(round(t, 1, url)) == "map[good:1]" })
	if answer, err := ask(url, "Via", strings.TrimPrefix(strings.Repeat(", 1.1 Caddy", 9), ", ")); answer != "good" {
		t.Errorf("the tenth proxy in a row: %q, %v", answer, err)
	}
	if answer, err := ask(url, "Via", "1.1 Caddy, 1.0 fred, 1.1 caddy.example.com (Caddy), "+strings.Repeat("2.0 Caddy,", 8)); answer != "good" {
		t.Errorf("with others between them: %q, %v", answer, err)
	}
	if answer, err := ask(url, "Via", strings.Repeat("1.1 Caddy, ", 10)); answer != "508" {
		t.Errorf("an eleventh: %q, %v", answer, err)
	}
}
