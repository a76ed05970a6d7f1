package integration

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/internal/certtest"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// secretVariable is where some of the secrets are, for {env.…}.
const secretVariable = "CADDY_DISCOVERY_TEST_SECRET"

// secretCase is a way into a registry. Each %s of a line, flag or URL stands for
// the server, and what is secret is in secrets.
type secretCase struct {
	name    string
	secrets []string
	right   string   // the registry line and block of a Caddyfile
	wrong   string   // the same with credentials that the server refuses
	nobody  string   // the same at an address where nobody is
	flags   []string // of caddy discovery, with the right credentials
	bad     []string // with the wrong ones, or at the wrong place
}

// lines returns what is secret in a file: its lines but for those that frame them.
func secretLines(t *testing.T, file string) []string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var secrets []string
	for line := range strings.Lines(string(data)) {
		if line = strings.TrimSpace(line); len(line) > 30 && !strings.HasPrefix(line, "-") && !strings.HasPrefix(line, "*") && !strings.Contains(line, " ") {
			secrets = append(secrets, line)
		}
	}
	if len(secrets) == 0 {
		t.Fatalf("%s holds nothing secret", file)
	}
	return secrets
}

func secretFile(t *testing.T, content string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// secretCases are the ways in, each to a server of its own.
func secretCases(t *testing.T, secret, other string) []secretCase {
	// Characters that must be encoded in a URL are around each secret.
	password, wrong := "p@"+secret+"/x", "p@"+other+"/x"
	nobody := "127.0.0.1:" + freeport.String(t)
	t.Setenv(secretVariable, password)
	block := func(backend, url string, lines ...string) string {
		return "registry " + backend + " " + url + " {\n" + strings.Join(lines, "\n") + "\n}"
	}
	var all []secretCase
	for _, backend := range []string{"nats_kv", "nats"} {
		scheme := map[string]string{"nats_kv": "nats", "nats": "nats+pubsub"}[backend]
		users := natstest.Start(t, natstest.Users(natstest.User{Name: "proxy", Password: password}))
		at := func(user *url.Userinfo, address string) string {
			return (&url.URL{Scheme: scheme, User: user, Host: address}).String()
		}
		all = append(all, secretCase{
			name: backend + " password", secrets: []string{secret, other},
			right:  block(backend, users.URL(), "user proxy {env."+secretVariable+"}"),
			wrong:  block(backend, users.URL(), "user proxy {file."+secretFile(t, wrong)+"}"),
			nobody: block(backend, "nats://"+nobody, "user proxy "+password),
			flags:  []string{"-r", at(nil, users.Addr()), "--user", "proxy", "--password-env", secretVariable},
			bad:    []string{"-r", at(nil, users.Addr()), "-o", "user proxy " + wrong},
		}, secretCase{
			name: backend + " URL", secrets: []string{secret, other},
			right:  block(backend, at(url.UserPassword("proxy", password), users.Addr())),
			wrong:  block(backend, at(url.UserPassword("proxy", wrong), users.Addr())),
			nobody: block(backend, at(url.UserPassword("proxy", password), nobody)),
			flags:  []string{"-r", at(url.UserPassword("proxy", password), users.Addr())},
			bad:    []string{"-r", at(url.UserPassword("proxy", wrong), users.Addr())},
		})
		tokens := natstest.Start(t, natstest.Token(secret))
		all = append(all, secretCase{
			name: backend + " token", secrets: []string{secret, other},
			right:  block(backend, at(url.User(secret), tokens.Addr())),
			wrong:  block(backend, tokens.URL(), "token "+other),
			nobody: block(backend, at(url.User(secret), nobody)),
			flags:  []string{"-r", at(nil, tokens.Addr()), "--token-file", secretFile(t, secret)},
			bad:    []string{"-r", at(url.User(other), tokens.Addr())},
		})
		keys, stranger := natstest.Start(t, natstest.NKey()), natstest.Start(t, natstest.NKey())
		all = append(all, secretCase{
			name: backend + " nkey", secrets: append(secretLines(t, keys.Seed), secretLines(t, stranger.Seed)...),
			right:  block(backend, keys.URL(), "nkey "+keys.Seed),
			wrong:  block(backend, keys.URL(), "nkey "+stranger.Seed),
			nobody: block(backend, "nats://"+nobody, "nkey "+keys.Seed),
			flags:  []string{"-r", at(nil, keys.Addr()), "--nkey", keys.Seed},
			bad:    []string{"-r", at(nil, keys.Addr()), "--nkey", stranger.Seed},
		})
		operator, foreign := natstest.Start(t, natstest.Operator()), natstest.Start(t, natstest.Operator())
		all = append(all, secretCase{
			name: backend + " credentials", secrets: append(secretLines(t, operator.Creds), secretLines(t, foreign.Creds)...),
			right:  block(backend, operator.URL(), "credentials "+operator.Creds),
			wrong:  block(backend, operator.URL(), "credentials "+foreign.Creds),
			nobody: block(backend, "nats://"+nobody, "credentials "+operator.Creds),
			flags:  []string{"-r", at(nil, operator.Addr()), "--credentials", operator.Creds},
			bad:    []string{"-r", at(nil, operator.Addr()), "--credentials", foreign.Creds},
		})
		mutual, alien := natstest.Start(t, natstest.MutualTLS()), certtest.New(t)
		pair := func(c certtest.Certificates) string { return "tls_client_auth " + c.ClientCert + " " + c.ClientKey }
		all = append(all, secretCase{
			name: backend + " TLS", secrets: append(secretLines(t, mutual.TLS.ClientKey), secretLines(t, alien.ClientKey)...),
			right:  block(backend, mutual.URL(), "tls_ca "+mutual.TLS.CA, pair(mutual.TLS)),
			wrong:  block(backend, mutual.URL(), "tls_ca "+mutual.TLS.CA, pair(alien)),
			nobody: block(backend, mutual.URL(), "tls_ca "+mutual.TLS.CA, "tls_client_auth "+mutual.TLS.ClientCert+" "+alien.ClientKey),
			flags:  []string{"-r", at(nil, mutual.Addr()), "--tls-ca", mutual.TLS.CA, "--tls-cert", mutual.TLS.ClientCert, "--tls-key", mutual.TLS.ClientKey},
			bad:    []string{"-r", at(nil, mutual.Addr()), "--tls-ca", mutual.TLS.CA, "--tls-cert", alien.ClientCert, "--tls-key", alien.ClientKey},
		})
	}
	for _, layout := range []string{"sorted_set", "keys"} {
		server := redistest.Start(t, redistest.Password(secret), redistest.User("proxy", "on >"+password+" ~* &* +@all"))
		at := func(user *url.Userinfo, address string) string {
			return (&url.URL{Scheme: "redis", User: user, Host: address}).String()
		}
		all = append(all, secretCase{
			name: "redis " + layout + " ACL", secrets: []string{secret, other},
			right:  block("redis", at(nil, server.Addr()), "layout "+layout, "username proxy", "password {env."+secretVariable+"}"),
			wrong:  block("redis", at(nil, server.Addr()), "layout "+layout, "username proxy", "password {file."+secretFile(t, wrong)+"}"),
			nobody: block("redis", at(nil, nobody), "layout "+layout, "username proxy", "password "+password),
			flags:  []string{"-r", at(nil, server.Addr()), "-o", "layout " + layout, "--user", "proxy", "--password-file", secretFile(t, password)},
			bad:    []string{"-r", at(nil, server.Addr()), "-o", "layout " + layout, "--user", "proxy", "-o", "password " + wrong},
		}, secretCase{
			name: "redis " + layout + " URL", secrets: []string{secret, other},
			right:  block("redis", at(url.UserPassword("proxy", password), server.Addr()), "layout "+layout),
			wrong:  block("redis", at(url.UserPassword("", other), server.Addr()), "layout "+layout),
			nobody: block("redis", at(url.UserPassword("proxy", password), nobody), "layout "+layout),
			flags:  []string{"-r", at(url.UserPassword("", secret), server.Addr()), "-o", "layout " + layout},
			bad:    []string{"-r", at(url.UserPassword("proxy", wrong), nobody), "-o", "layout " + layout},
		})
	}
	certificates, alien := certtest.New(t), certtest.New(t)
	mutual := redistest.Start(t, redistest.TLS(certificates, true))
	pair := func(c certtest.Certificates) string { return "tls_client_auth " + c.ClientCert + " " + c.ClientKey }
	all = append(all, secretCase{
		name: "redis TLS", secrets: append(secretLines(t, certificates.ClientKey), secretLines(t, alien.ClientKey)...),
		right:  block("redis", "rediss://"+mutual.Addr(), "tls_ca "+certificates.CA, pair(certificates)),
		wrong:  block("redis", "rediss://"+mutual.Addr(), "tls_ca "+certificates.CA, pair(alien)),
		nobody: block("redis", "rediss://"+nobody, "tls_ca "+certificates.CA, pair(certificates)),
		flags:  []string{"-r", "rediss://" + mutual.Addr(), "--tls-ca", certificates.CA, "--tls-cert", certificates.ClientCert, "--tls-key", certificates.ClientKey},
		bad:    []string{"-r", "rediss://" + mutual.Addr(), "--tls-ca", certificates.CA, "--tls-cert", certificates.ClientCert, "--tls-key", alien.ClientKey},
	})
	sentinel := redistest.StartSentinel(t, 0, secret+"-sentinel", redistest.Password(secret))
	guarded := func(password string) string {
		return block("redis", sentinel.URLs()[0], "sentinel_master "+redistest.SentinelMaster, "password "+secret, "sentinel_password "+password)
	}
	return append(all, secretCase{
		name: "redis Sentinel", secrets: []string{secret, other},
		right:  guarded(secret + "-sentinel"),
		wrong:  guarded(other),
		nobody: block("redis", "redis+sentinel://"+nobody, "password "+secret, "sentinel_password "+other),
		flags:  []string{"-r", sentinel.URLs()[0], "-o", "sentinel_master " + redistest.SentinelMaster, "-o", "password " + secret, "-o", "sentinel_password " + secret + "-sentinel"},
		bad:    []string{"-r", sentinel.URLs()[0], "-o", "sentinel_master " + redistest.SentinelMaster, "-o", "password " + other, "-o", "sentinel_password " + secret + "-sentinel"},
	})
}

// TestSecrets greps all that a Caddy says of a registry, at the level debug and with
// the stacks of all its goroutines at the end, for the credentials: those that are
// right, those that are refused, and those for a server that is not there.
func TestSecrets(t *testing.T) {
	secret, other := "S3cr3t"+rand.Text(), "0ther"+rand.Text()
	for _, c := range secretCases(t, secret, other) {
		t.Run(c.name, func(t *testing.T) {
			clean := func(where, text string) {
				t.Helper()
				for _, s := range c.secrets {
					if i := strings.Index(text, s); i >= 0 {
						t.Errorf("%s tells a secret: …%s…", where, text[max(0, i-200):min(len(text), i+len(s)+50)])
						return
					}
				}
			}
			options := "debug\nmetrics\n"
			sites := ""
			port := freeport.String(t)
			for i, registry := range []string{c.right, c.wrong, c.nobody} {
				options += fmt.Sprintf("registrar {\n%s\nnode_id proxy-%d\nendpoint http://127.0.0.1:9\nheartbeat 200ms\ndrain 0s\n}\n", registry, i)
				sites += site(freeport.String(t), registry, "")
			}
			sites += "http://127.0.0.1:" + port + " {\ndiscovery_status\n}\n"
			p := start(t, options, sites)
			ask := func(path string) string {
				t.Helper()
				body, err := ask(path)
				if err != nil {
					t.Fatalf("%s: %v", path, err)
				}
				clean(path, body)
				return body
			}
			eventually(t, "one registry is listed, and the others are told why not", func() bool {
				body := ask("http://" + p.admin + "/discovery/registries")
				return strings.Count(body, `"synced":true`) == 1 && strings.Count(body, `"last_error":"`) >= 2 &&
					strings.Contains(ask("http://"+p.admin+"/discovery/nodes"), `"proxy-0"`)
			})
			eventually(t, "the registrars tell why they cannot announce", func() bool {
				return strings.Count(p.log.String(), "cannot announce") >= 2
			})
			for _, path := range []string{"/discovery/journal", "/metrics", "/debug/vars", "/debug/pprof/goroutine?debug=2", "/debug/pprof/cmdline"} {
				ask("http://" + p.admin + path)
			}
			ask("http://127.0.0.1:" + port + "/")
			clean("the stream of the status page", stream(t, "http://127.0.0.1:"+port+"/"))

			run := func(well bool, args ...string) {
				t.Helper()
				stdout, stderr, code := runCommand(t, nil, args...)
				clean(strings.Join(args[:1], " "), stdout+stderr)
				if well != (code == 0) {
					t.Errorf("%s: exit code %d: %s", strings.Join(args[:1], " "), code, stderr)
				}
			}
			run(false, "status", "--address", p.admin)
			run(true, append([]string{"nodes"}, c.flags...)...)
			for _, command := range [][]string{{"nodes", "--timeout", "1s"}, {"drain", "x", "--timeout", "1s"}, {"history", "x", "--timeout", "1s"}, {"watch", "--timeout", "1s", "--nonsense"}, {"register", "x", "http://127.0.0.1:9/path"}} {
				run(false, append(command, c.bad...)...)
			}

			// Its last words are where every goroutine was.
			_ = p.cmd.Process.Signal(syscall.SIGABRT)
			<-p.done
			log := p.log.String()
			if !strings.Contains(log, "goroutine ") || !strings.Contains(log, "SIGABRT") {
				t.Error("Caddy has left no stacks")
			}
			clean("the log", log)
		})
	}
}

// stream returns what the status page's stream of events says first.
func stream(t *testing.T, page string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, page, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "text/event-stream")
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body) // until the time is over
	return string(body)
}

// TestSecretsInMistakes has Caddy refuse what holds a secret, and not repeat it.
func TestSecretsInMistakes(t *testing.T) {
	t.Parallel()
	const secret = "hunter2hunter2"
	proxy := func(lines string) string { return site("9", lines, "") }
	short := func(args string) string {
		return "http://:9 {\nreverse_proxy {\ndynamic discovery " + args + "\n}\n}\n"
	}
	registrar := func(lines string) string {
		return "{\nregistrar nats://127.0.0.1:1 {\n" + lines + "\n}\n}\nhttp://:9 {\n}\n"
	}
	dir := t.TempDir()
	for name, text := range map[string]string{
		"scheme":                      short("http://u:" + secret + "@h"),
		"scheme and token":            short("http://" + secret + "@h"),
		"no scheme":                   short("u:" + secret + "@h"),
		"unencoded slash":             short("nats://u:" + secret + "/x@h"),
		"unencoded hash":              short("redis://u:" + secret + "#x@h"),
		"unencoded percent":           short("redis://u:" + secret + "%zz@h"),
		"unencoded at":                short("foo://u:x@" + secret + "@h"),
		"unencoded brackets":          short("nats://u:[" + secret + "]@h:x"),
		"two backends":                short("nats://u:" + secret + "@h redis://u:" + secret + "@h"),
		"path of a bucket":            short("nats://u:" + secret + "@h/a.b"),
		"path of a database":          short("redis://u:" + secret + "@h/x"),
		"query":                       short("redis://h?password=" + secret),
		"port":                        short("nats+pubsub://u:" + secret + "@h:99999"),
		"URLs that disagree":          short("redis+sentinel://u:" + secret + "@h redis+sentinel://u:x@h"),
		"two URLs of one":             short("redis://u:" + secret + "@h redis://u:" + secret + "@i"),
		"placeholder that is missing": short("redis://u:" + secret + "@{env.DISCOVERY_NOT_SET}"),
		"backend's place":             proxy("registry nats://u:" + secret + "@h"),
		"option's place":              proxy("nats://u:" + secret + "@h"),
		"two logins":                  proxy("registry nats_kv nats://u:" + secret + "@h {\ntoken " + secret + "\n}"),
		"password without user":       proxy("registry nats_kv {\nuser " + secret + "\n}"),
		"three words":                 proxy("registry nats_kv {\nuser u " + secret + " x\n}"),
		"token twice":                 proxy("registry nats_kv {\ntoken " + secret + "\ntoken " + secret + "\n}"),
		"token with a block":          proxy("registry nats_kv {\ntoken " + secret + " {\nx\n}\n}"),
		"password twice":              proxy("registry redis redis://u:" + secret + "@h {\npassword " + secret + "x\n}"),
		"sentinel without":            proxy("registry redis redis://h {\nsentinel_password " + secret + "\n}"),
		"endpoint with a password":    registrar("endpoint http://u:" + secret + "@h"),
		"health_url":                  registrar("health_url ftp://u:" + secret + "@h/"),
		"odd health_url":              registrar("health_url http://u:" + secret + "%zz@h/"),
		"health_url without a host":   registrar("health_url http://u:" + secret + "@/"),
		"JSON without a backend":      `{"apps":{"registrar":{"nodes":[{"registry":{"urls":["redis://u:` + secret + `@h"],"password":"` + secret + `"}}]}}}`,
		"JSON of another type":        `{"apps":{"registrar":{"nodes":[{"registry":{"backend":"redis","password":["` + secret + `"]}}]}}}`,
		"JSON of an unknown backend":  `{"apps":{"registrar":{"nodes":[{"registry":{"backend":"x","password":"` + secret + `"}}]}}}`,
		"JSON with an unknown field":  `{"apps":{"registrar":{"nodes":[{"registry":{"backend":"redis","pasword":"` + secret + `"}}]}}}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			commands, adapter := []string{"adapt", "validate"}, "caddyfile"
			if strings.HasPrefix(text, `{"`) {
				commands, adapter = []string{"validate"}, ""
			}
			file := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			refused := false
			for _, command := range commands {
				cmd := exec.Command(binary, command, "--config", file, "--adapter", adapter)
				cmd.Env = append(os.Environ(), "XDG_DATA_HOME="+dir+"/data", "XDG_CONFIG_HOME="+dir+"/config")
				out, err := cmd.CombinedOutput()
				if err == nil {
					continue // what Caddy adapts, it prints
				}
				refused = true
				if strings.Contains(string(out), secret) {
					t.Errorf("caddy %s tells the secret: %s", command, out)
				}
			}
			if !refused {
				t.Error("it was accepted")
			}
		})
	}
}
