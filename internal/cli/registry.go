package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/registries"
)

// registryFlags are the flags that say which registry, and how to enter it.
type registryFlags struct {
	stderr  func() io.Writer
	warned  bool
	urls    []string
	options []string
	config  string
	adapter string
	timeout time.Duration

	user, passwordEnv, passwordFile, tokenEnv, tokenFile string
	credentials, nkey                                    string
	tlsCA, tlsCert, tlsKey, tlsServerName                string
}

const (
	registryVariable = "CADDY_DISCOVERY_REGISTRY"
	defaultRegistry  = "nats://127.0.0.1:4222"
)

func (f *registryFlags) add(cmd *cobra.Command) {
	f.stderr = cmd.ErrOrStderr
	flags := cmd.Flags()
	flags.StringArrayVarP(&f.urls, "registry", "r", nil, "the registry's `URL`; several for several servers of one (default $"+registryVariable+", or "+defaultRegistry+"); with --config the name that a registry has there")
	flags.StringVarP(&f.config, "config", "c", "", "a configuration `file` of Caddy in which --registry is declared; where it is the only one, --registry may be left out")
	flags.StringVar(&f.adapter, "adapter", "", "the `name` of the adapter of that file (default as for caddy run)")
	flags.StringArrayVarP(&f.options, "option", "o", nil, "an `option` of the backend as in a Caddyfile, such as 'key_prefix node.'")
	flags.DurationVar(&f.timeout, "timeout", 10*time.Second, "how long to try")
	flags.StringVar(&f.user, "user", "", "the `name` to log in with")
	flags.StringVar(&f.passwordEnv, "password-env", "", "the environment `variable` that holds the password")
	flags.StringVar(&f.passwordFile, "password-file", "", "the `file` that holds the password")
	flags.StringVar(&f.tokenEnv, "token-env", "", "the environment `variable` that holds the token")
	flags.StringVar(&f.tokenFile, "token-file", "", "the `file` that holds the token")
	flags.StringVar(&f.credentials, "credentials", "", "a NATS credentials `file`")
	flags.StringVar(&f.nkey, "nkey", "", "a `file` with the seed of an NKey")
	flags.StringVar(&f.tlsCA, "tls-ca", "", "a PEM `file` with the certificate authorities of the server")
	flags.StringVar(&f.tlsCert, "tls-cert", "", "a PEM `file` with the certificate to show to the server")
	flags.StringVar(&f.tlsKey, "tls-key", "", "a PEM `file` with the key to that certificate")
	flags.StringVar(&f.tlsServerName, "tls-server-name", "", "the `name` that the server's certificate must be for")
	cmd.MarkFlagsMutuallyExclusive("password-env", "password-file")
	cmd.MarkFlagsMutuallyExclusive("token-env", "token-file")
	cmd.MarkFlagsRequiredTogether("tls-cert", "tls-key")
	for _, name := range []string{"password-file", "token-file", "credentials", "nkey", "tls-ca", "tls-cert", "tls-key"} {
		_ = cmd.MarkFlagFilename(name)
	}
	var beginnings []string
	for _, scheme := range registries.Schemes() {
		beginnings = append(beginnings, scheme+"://")
	}
	_ = cmd.MarkFlagFilename("config")
	_ = cmd.RegisterFlagCompletionFunc("registry", cobra.FixedCompletions(beginnings, cobra.ShellCompDirectiveNoSpace))
}

// lines returns the flags as the lines of a registry block in a Caddyfile. Secrets
// are placeholders in it, which the backend expands.
func (f *registryFlags) lines(backend string) ([][]string, error) {
	var lines [][]string
	for _, o := range f.options {
		tokens, err := caddyfile.Tokenize([]byte(o), "--option")
		if err != nil {
			return nil, fmt.Errorf("--option: %w", err)
		}
		var line []string
		for _, t := range tokens {
			line = append(line, t.Text)
		}
		lines = append(lines, line)
	}
	secret := func(variable, file string) string {
		switch {
		case variable != "":
			return "{env." + variable + "}"
		case file != "":
			return "{file." + file + "}"
		}
		return ""
	}
	password := secret(f.passwordEnv, f.passwordFile)
	login := [][]string{{"username", f.user}, {"password", password}}
	if strings.HasPrefix(backend, "nats") {
		if (f.user == "") != (password == "") {
			return nil, errors.New("want both --user and one of --password-env and --password-file")
		}
		login = [][]string{{"user", f.user, password}}
	}
	for _, option := range append(login, [][]string{
		{"token", secret(f.tokenEnv, f.tokenFile)}, {"credentials", f.credentials}, {"nkey", f.nkey},
		{"tls_ca", f.tlsCA}, {"tls_client_auth", f.tlsCert, f.tlsKey}, {"tls_server_name", f.tlsServerName},
	}...) {
		if option[1] != "" {
			lines = append(lines, option)
		}
	}
	return lines, nil
}

// exposed returns the flag that has a secret in it, "" if none has.
func (f *registryFlags) exposed() string {
	for _, u := range f.urls {
		_, rest, _ := strings.Cut(u, "://")
		authority, _, _ := strings.Cut(rest, "/")
		at := strings.LastIndexByte(authority, '@')
		if at < 0 {
			continue
		}
		// What has no password is a user, and for NATS a token.
		_, secret, found := strings.Cut(authority[:at], ":")
		if name, _ := registries.Backend(u); !found && strings.HasPrefix(name, "nats") {
			secret = authority[:at]
		}
		if secret != "" && !strings.HasPrefix(secret, "{") {
			return "--registry"
		}
	}
	for _, o := range f.options {
		words := strings.Fields(o)
		if len(words) < 2 || strings.HasPrefix(words[len(words)-1], "{") {
			continue
		}
		switch words[0] {
		case "password", "sentinel_password", "token", "user":
			return "--option"
		}
	}
	return ""
}

// backend returns the backend that the flags name. What only reads does not create
// what is missing: a mistyped name is to be an error.
func (f *registryFlags) backend(ctx caddy.Context, create bool) (backend.Backend, error) {
	if where := f.exposed(); where != "" && !f.warned {
		fmt.Fprintln(f.stderr(), "Warning: a secret in", where, "is shown to every user of this machine by ps; want --password-env, --password-file, --token-env or --token-file, or the URL in the variable", registryVariable)
		f.warned = true // the registry may be opened twice
	}
	urls := f.urls
	if len(urls) == 0 {
		urls = strings.Fields(os.Getenv(registryVariable))
	}
	switch name, err := f.name(urls); {
	case err != nil:
		return nil, err
	case f.config != "":
		return f.declared(ctx, name, create)
	}
	if len(urls) == 0 {
		urls = []string{defaultRegistry}
	}
	name, err := backend.NameOf(urls...)
	if err != nil {
		return nil, fmt.Errorf("--registry: %w", err)
	}
	lines, err := f.lines(name)
	if err != nil {
		return nil, err
	}
	if name == registries.NATSKV && !create && !slices.ContainsFunc(lines, func(l []string) bool { return len(l) > 0 && l[0] == "create" }) {
		lines = append(lines, []string{"create", "off"})
	}
	first := slices.Concat([]string{name}, urls, []string{"{"})
	var tokens []caddyfile.Token
	for i, line := range slices.Concat([][]string{first}, lines, [][]string{{"}"}}) {
		for _, text := range line {
			tokens = append(tokens, caddyfile.Token{File: "flags", Line: i + 1, Text: text})
		}
	}
	d := caddyfile.NewDispenser(tokens)
	d.Next()
	raw, err := backend.Unmarshal(d)
	if err != nil {
		return nil, err
	}
	return load(ctx, raw)
}

// load loads the backend that the JSON is.
func load(ctx caddy.Context, raw json.RawMessage) (backend.Backend, error) {
	holder := struct {
		RegistryRaw json.RawMessage `caddy:"namespace=discovery.registries inline_key=backend"`
	}{raw}
	return backend.LoadDeclared(ctx, &holder, "RegistryRaw", holder.RegistryRaw)
}

// name returns the name of a registry in the configuration that the flags name, "" for the
// only one there.
func (f *registryFlags) name(urls []string) (string, error) {
	named := len(urls) == 1 && !strings.ContainsAny(urls[0], "/{")
	switch {
	case f.config == "" && named:
		return "", fmt.Errorf("--registry: %q is no URL; if it is the name of a registry in a configuration, --config wants its file", discovery.RedactURL(urls[0]))
	case f.config == "" || len(f.urls) == 0 && !named: // a variable is for when nothing is said
		return "", nil
	case !named:
		return "", errors.New("--registry: want the name of a registry in the file of --config, or a URL without --config")
	}
	return urls[0], nil
}

// declared returns a registry of the configuration.
func (f *registryFlags) declared(ctx caddy.Context, name string, create bool) (backend.Backend, error) {
	if lines, err := f.lines(""); err != nil || len(lines) > 0 {
		return nil, errors.New("--config: the registry has its options and its login in the configuration; want no flags for them")
	}
	raw, _, _, err := caddycmd.LoadConfig(f.config, f.adapter)
	if err != nil {
		return nil, fmt.Errorf("--config: %w", err)
	}
	var config struct {
		Apps struct {
			Discovery struct {
				Registries map[string]struct {
					Registry map[string]json.RawMessage `json:"registry"`
				} `json:"registries"`
			} `json:"discovery"`
		} `json:"apps"`
	}
	if err := json.Unmarshal(raw, &config); err != nil {
		return nil, fmt.Errorf("--config: %w", err)
	}
	found, err := backend.Find(config.Apps.Discovery.Registries, name)
	if err != nil {
		return nil, fmt.Errorf("--config %s: %w", f.config, err)
	}
	settings := found.Registry
	if string(settings["backend"]) == strconv.Quote(registries.NATSKV) && !create && settings["create"] == nil {
		settings["create"] = json.RawMessage("false")
	}
	if raw, err = json.Marshal(settings); err != nil {
		return nil, err
	}
	return load(ctx, raw)
}

// connection is a registry that a command has opened.
type connection struct {
	registry discovery.Registry
	ttl      time.Duration // see [backend.Options]
	cancel   context.CancelFunc
}

func (c *connection) close() {
	_ = c.registry.Close()
	c.cancel()
}

// open opens the registry that the flags name.
func (f *registryFlags) open(ctx context.Context, create bool) (*connection, error) {
	provision, cancel := caddy.NewContext(caddy.Context{Context: ctx})
	b, err := f.backend(provision, create)
	if err == nil {
		var registry discovery.Registry
		if registry, err = b.Open(slog.New(slog.DiscardHandler)); err == nil {
			return &connection{registry, time.Duration(b.Common().TTL), cancel}, nil
		}
	}
	cancel()
	return nil, err
}

// fleet is a registry and what it lists right now.
type fleet struct {
	*discovery.Directory
	registry discovery.Registry
}

// follow calls do once the registry is listed, and keeps the list up to date until do
// returns. That the registry cannot be listed at the first attempt is final: whoever
// sits before a terminal is told at once, and a script can try again.
func (f *registryFlags) follow(ctx context.Context, do func(context.Context, *fleet) error) error {
	c, err := f.open(ctx, false)
	if err != nil {
		return err
	}
	defer c.close()
	// Records are strangers', and the machine of an operator reaches more than a
	// proxy may.
	d := discovery.NewDirectory(c.registry, discovery.Options{TTL: c.ttl, RecordsOnly: true})
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { _ = d.Run(ctx) }) // it returns only when ctx ends
	defer running.Wait()
	defer cancel()
	within, giveUp := context.WithTimeout(ctx, f.timeout)
	defer giveUp()
	switch err := d.AwaitListing(within); {
	case err == nil:
		return do(ctx, &fleet{d, c.registry})
	case ctx.Err() != nil:
		return ctx.Err()
	case within.Err() != nil:
		return fmt.Errorf("%s: not listed within %v", c.registry, f.timeout)
	default:
		return fmt.Errorf("%s: %w", c.registry, err)
	}
}

// node returns a node that is listed.
func (f *fleet) node(id string) (*discovery.Entry, error) {
	if e := f.Snapshot().Node(id); e != nil {
		return e, nil
	}
	for _, r := range f.Status().Rejections {
		if r.ID == id {
			return nil, fmt.Errorf("%w: the record of %q in %s is rejected: %w", errNoSuchNode, id, f.registry, r.Err)
		}
	}
	return nil, fmt.Errorf("%w: %s does not list %q", errNoSuchNode, f.registry, id)
}

// await returns when a snapshot is as done says, or the error of the context.
func (f *fleet) await(ctx context.Context, done func(*discovery.Snapshot) bool) error {
	for {
		s := f.Snapshot()
		if done(s) {
			return nil
		}
		select {
		case <-s.Superseded():
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
