package caddydiscovery

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// echo answers with a header field of the request.
func echo(t *testing.T, field string) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.Header.Get(field))
	}))
	t.Cleanup(s.Close)
	return s
}

func TestNodePlaceholders(t *testing.T) {
	const placeholders = "{rp.upstream.node.id}|{rp.upstream.node.metadata.zone}|{rp.upstream.node.metadata.none}|{rp.upstream.node.load}"
	const want = "a|eu-1||0"
	for name, lines := range map[string]string{
		"to the node":   "header_up X-Node \"" + placeholders + "\"",
		"to the client": "header_down X-Node \"" + placeholders + "\"",
		"around":        "}\nheader >X-Node \"" + placeholders + "\"\nhandle_errors {\n",
	} {
		t.Run(name, func(t *testing.T) {
			registry, m := newMemory(t)
			list(t, m, "a", echo(t, "X-Node").URL, "zone", "eu-1")
			port := freeport.String(t)
			load(t, `http://127.0.0.1:`+port+` {
				reverse_proxy {
					dynamic discovery {
						registry memory `+strconv.Quote(registry)+`
						pick 2
					}
					`+lines+`
				}
			}`)
			resp, err := http.Get("http://127.0.0.1:" + port)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			if got := resp.Header.Get("X-Node") + string(body); got != want {
				t.Errorf("status %d, got %q, want %q", resp.StatusCode, got, want)
			}
		})
	}
}

// TestNodePlaceholdersFollowTheRequest has a first node that refuses connections,
// and a static upstream after it.
func TestNodePlaceholdersFollowTheRequest(t *testing.T) {
	registry, m := newMemory(t)
	list(t, m, "dead", "http://127.0.0.1:"+freeport.String(t))
	list(t, m, "live", echo(t, "X-Node").URL)
	port := freeport.String(t)
	load(t, `http://127.0.0.1:`+port+` {
		reverse_proxy `+echo(t, "X-Node").URL+` {
			dynamic discovery {
				registry memory `+registry+` {
					loss_guard off
				}
			}
			lb_policy first
			lb_retries 2
			header_up X-Node "<{rp.upstream.node.id}>"
		}
	}`)
	url := "http://127.0.0.1:" + port
	if _, body := get(t, url); body != "<live>" {
		t.Errorf("the node was told %q, want its own id after the retry", body)
	}
	m.Expire("dead")
	m.Expire("live")
	eventually(t, "the static upstream is no node", func() bool { _, body := get(t, url); return body == "<>" })
}

// TestNodePlaceholdersInResponses has the node be named by what handles a response, and
// nowhere else, and by no other handler than the one that used it.
func TestNodePlaceholdersInResponses(t *testing.T) {
	const id = "{http.reverse_proxy.upstream.node.id}"
	for _, test := range []struct{ what, site, want string }{
		{"handle_response", "reverse_proxy {\n@ok status 2xx\nhandle_response @ok {\nrespond " + id + "\n}\nNODES\n}", "a"},
		{"intercept", "intercept {\n@ok status 2xx\nhandle_response @ok {\nrespond " + id + "\n}\n}\nreverse_proxy {\nNODES\n}", "a"},
		{"forward_auth", "forward_auth {\nuri /\nNODES\n}\nreverse_proxy STATIC {\nheader_up X-Node \"<" + id + ">\"\n}", "<>"},
	} {
		t.Run(test.what, func(t *testing.T) {
			name, m := newMemory(t)
			list(t, m, "a", service(t, "x").URL)
			port := freeport.String(t)
			load(t, "http://127.0.0.1:"+port+" {\n"+strings.NewReplacer("NODES", "dynamic discovery {\nregistry memory "+name+"\n}",
				"STATIC", echo(t, "X-Node").URL).Replace(test.site)+"\n}")
			if status, body := get(t, "http://127.0.0.1:"+port); body != test.want {
				t.Errorf("status %d, %q, want %q", status, body, test.want)
			}
		})
	}
}

// TestMentionsAreFoundBesideWhatRuns looks through a handler whose upstreams' health
// changes meanwhile, as that of static ones that are checked actively does.
func TestMentionsAreFoundBesideWhatRuns(t *testing.T) {
	type upstream struct{ unhealthy int32 }
	checked := new(upstream)
	handler := &struct {
		Upstreams []*upstream
		Routes    caddyhttp.RouteList
	}{[]*upstream{checked}, caddyhttp.RouteList{{HandlersRaw: []json.RawMessage{[]byte(`"{` + nodePlaceholder + `id}"`)}}}}
	ctx, cancel := context.WithCancel(t.Context())
	var checks sync.WaitGroup
	checks.Go(func() {
		for ctx.Err() == nil {
			atomic.AddInt32(&checked.unhealthy, 1)
		}
	})
	for range 1000 {
		if !routesMention(reflect.ValueOf(handler), configDepth) {
			t.Fatal("the route is not found")
		}
	}
	cancel()
	checks.Wait()
}

// TestPlaceholdersCostNothingUnused holds that a source of which nobody wants to
// know more leaves the handler's policy alone.
func TestPlaceholdersCostNothingUnused(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", "http://10.0.0.1:80")
	if u := source(t, "registry memory "+name+"\npick 2"); u.wrapper != nil {
		t.Error("the policy wrapper tracks requests")
	}
	headers := map[string]any{"request": map[string]any{"set": map[string]any{"X-Node": []string{"{" + nodePlaceholder + "id}"}}}}
	if u := source(t, "registry memory "+name+"\npick 2", "headers", headers); u.wrapper == nil || !u.wrapper.nodes {
		t.Error("the policy wrapper does not track requests although a header asks for the node")
	}
}

// TestTriedNodesAreNamed has the nodes told that a request went to, in their order: where
// one of them answers, where a static upstream does, and where none does.
func TestTriedNodesAreNamed(t *testing.T) {
	const tried = "{http.reverse_proxy.upstream.node.tried}"
	for name, test := range map[string]struct {
		nodes  []string // of which those that begin with "live" serve
		static bool
		want   string
	}{
		"the first answers":        {[]string{"live"}, false, "live"},
		"the last answers":         {[]string{"dead-1", "dead-2", "live"}, false, "dead-1,dead-2,live"},
		"nobody answers":           {[]string{"dead-1", "dead-2"}, false, "dead-1,dead-2,dead-1,dead-1"},
		"there is none":            {nil, false, ""},
		"a static upstream serves": {nil, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			registry, m := newMemory(t)
			for _, id := range test.nodes {
				endpoint := "http://127.0.0.1:" + freeport.String(t)
				if strings.HasPrefix(id, "live") {
					endpoint = service(t, id).URL
				}
				list(t, m, id, endpoint)
			}
			to := ""
			if test.static {
				to = service(t, "static").URL
			}
			site := "http://127.0.0.1:" + freeport.String(t)
			load(t, site+" {\nheader >X-Tried \""+tried+"\"\nreverse_proxy "+to+" {\ndynamic discovery {\nregistry memory "+registry+
				"\n}\nlb_policy first\nlb_retries 3\n}\nhandle_errors {\nheader X-Tried \""+tried+"\"\nrespond 502\n}\n}")
			resp, err := http.Get(site)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if got := resp.Header.Get("X-Tried"); got != test.want {
				t.Errorf("status %d, tried %q, want %q", resp.StatusCode, got, test.want)
			}
		})
	}
}

// TestTriedNodesAreBounded has a request be tried again for long.
func TestTriedNodesAreBounded(t *testing.T) {
	registry, m := newMemory(t)
	list(t, m, "a", "http://127.0.0.1:"+freeport.String(t))
	site := "http://127.0.0.1:" + freeport.String(t)
	load(t, site+" {\nreverse_proxy {\ndynamic discovery {\nregistry memory "+registry+"\n}\nlb_retries 200\n}\nhandle_errors {\nrespond \"{http.reverse_proxy.upstream.node.tried}\"\n}\n}")
	if _, body := get(t, site); body != strings.Repeat("a,", maxTried)+"…" {
		t.Errorf("tried %q", body)
	}
}
