package caddydiscovery

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
	backends "github.com/caddy-discovery/caddy-discovery/discovery/registries"
)

func init() {
	caddycmd.RegisterCommand(caddycmd.Command{
		Name:  "discovery",
		Usage: "<command>",
		Short: "Looks at a registry of nodes, and steers it",
		Long: `
Looks at a registry, straight and without a running Caddy: which nodes it lists,
what becomes of them, what became of one. Takes a node out of service on every
proxy and puts it back, and lists any program from a shell.

The registry is a URL. Its scheme picks the backend, its path names the bucket,
the prefix or the database:

  --registry nats://10.0.0.5:4222/catga_nodes

Without --registry the variable CADDY_DISCOVERY_REGISTRY counts, and without that
nats://127.0.0.1:4222. Secrets are read from files or from variables of the
environment and never shown.

Exit codes: 0 success; 1 failure; 2 the registry's backend cannot do that, such as
to drain a node on pub/sub, which keeps nothing; 3 there is no such node.
`,
		CobraFunc: func(cmd *cobra.Command) {
			cmd.Use = "discovery <command>"
			cmd.Args = cobra.NoArgs
			// Without this an unknown command would show the help and succeed.
			cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
			cmd.Example = `  $ caddy discovery nodes --service orders
  $ caddy discovery drain orders-3 --registry nats://10.0.0.5:4222/catga_nodes
  $ caddy discovery register pay-1 http://10.0.0.9:8080 --metadata service=pay`
			cmd.AddCommand(
				nodesCommand(), watchCommand(), historyCommand(),
				drainCommand(), undrainCommand(), weightCommand(), overridesCommand(),
				registerCommand(), deregisterCommand(), statusCommand(),
			)
		},
	})
}

// The exit codes, for scripts.
const (
	exitFailure     = 1
	exitUnsupported = 2
	exitNoNode      = 3
)

// errNoSuchNode: the registry does not list the node.
var errNoSuchNode = errors.New("no such node")

// exitCode returns the exit code for how a command ended.
func exitCode(err error) int {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, discovery.ErrUnsupported):
		return exitUnsupported
	case errors.Is(err, errNoSuchNode):
		return exitNoNode
	default:
		return exitFailure
	}
}

// command completes a subcommand that run executes. The context ends when the user
// interrupts it.
func command(cmd *cobra.Command, run func(ctx context.Context, cmd *cobra.Command, args []string) error) *cobra.Command {
	cmd.SilenceUsage = true
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		err := run(ctx, cmd, args)
		if err == nil {
			return nil
		}
		cmd.SilenceErrors = true
		fmt.Fprintln(cmd.ErrOrStderr(), "Error:", discovery.PrintableLine(err.Error()))
		if code := exitCode(err); code != exitFailure {
			// Only Caddy itself can make an error with an exit code.
			return caddycmd.WrapCommandFuncForCobra(func(caddycmd.Flags) (int, error) { return code, nil })(cmd, args)
		}
		return err
	}
	return cmd
}

// registryFlags are the flags that say which registry, and how to enter it.
type registryFlags struct {
	warn    func(string) // tells the user, once
	urls    []string
	options []string
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
	told := false
	f.warn = func(what string) {
		if !told {
			fmt.Fprintln(cmd.ErrOrStderr(), "Warning:", what)
		}
		told = true
	}
	flags := cmd.Flags()
	flags.StringArrayVarP(&f.urls, "registry", "r", nil, "the registry's `URL`; several for several servers of one (default $"+registryVariable+", or "+defaultRegistry+")")
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
	_ = cmd.RegisterFlagCompletionFunc("registry", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		var completions []string
		for _, scheme := range backends.Schemes() {
			completions = append(completions, scheme+"://")
		}
		return completions, cobra.ShellCompDirectiveNoSpace
	})
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
	option := func(values ...string) {
		if values[1] != "" {
			lines = append(lines, values)
		}
	}
	password := secret(f.passwordEnv, f.passwordFile)
	if strings.HasPrefix(backend, "nats") {
		switch {
		case f.user != "" && password != "":
			option("user", f.user, password)
		case f.user != "" || password != "":
			return nil, errors.New("want both --user and one of --password-env and --password-file")
		}
	} else {
		option("username", f.user)
		option("password", password)
	}
	option("token", secret(f.tokenEnv, f.tokenFile))
	option("credentials", f.credentials)
	option("nkey", f.nkey)
	option("tls_ca", f.tlsCA)
	option("tls_client_auth", f.tlsCert, f.tlsKey)
	option("tls_server_name", f.tlsServerName)
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
		if name, _ := backends.Backend(u); !found && strings.HasPrefix(name, "nats") {
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
	if where := f.exposed(); where != "" {
		f.warn("a secret in " + where + " is shown to every user of this machine by ps; want --password-env, --password-file, --token-env or --token-file, or the URL in the variable " + registryVariable)
	}
	urls := f.urls
	if len(urls) == 0 {
		urls = strings.Fields(os.Getenv(registryVariable))
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
	if name == backends.NATSKV && !create && !slices.ContainsFunc(lines, func(l []string) bool { return len(l) > 0 && l[0] == "create" }) {
		lines = append(lines, []string{"create", "off"})
	}
	tokens := []caddyfile.Token{}
	write := func(line int, texts ...string) {
		for _, text := range texts {
			tokens = append(tokens, caddyfile.Token{File: "flags", Line: line, Text: text})
		}
	}
	write(1, name)
	write(1, urls...)
	write(1, "{")
	for i, line := range lines {
		write(i+2, line...)
	}
	write(len(lines)+2, "}")
	d := caddyfile.NewDispenser(tokens)
	d.Next()
	raw, err := backend.Unmarshal(d)
	if err != nil {
		return nil, err
	}
	holder := struct {
		RegistryRaw json.RawMessage `caddy:"namespace=discovery.registries inline_key=backend"`
	}{raw}
	return backend.Load(ctx, &holder, "RegistryRaw", holder.RegistryRaw)
}

// open returns the registry, and what closes it.
func (f *registryFlags) open(ctx context.Context, create bool) (backend.Backend, discovery.Registry, func(), error) {
	provision, cancel := caddy.NewContext(caddy.Context{Context: ctx})
	b, err := f.backend(provision, create)
	if err != nil {
		cancel()
		return nil, nil, nil, err
	}
	registry, err := b.Open(slog.New(slog.DiscardHandler))
	if err != nil {
		cancel()
		return nil, nil, nil, err
	}
	return b, registry, func() { _ = registry.Close(); cancel() }, nil
}

// follow runs a directory of the registry for as long as f takes, which is called
// when the first listing is complete.
func (f *registryFlags) follow(ctx context.Context, do func(context.Context, discovery.Registry, *discovery.Directory) error) error {
	b, registry, closeAll, err := f.open(ctx, false)
	if err != nil {
		return err
	}
	defer closeAll()
	d := discovery.NewDirectory(registry, discovery.Options{
		TTL: time.Duration(b.Common().TTL),
		// Records are strangers', and the machine of an operator reaches more than a
		// proxy may.
		RecordsOnly: true,
	})
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = d.Run(ctx)
	}()
	defer func() { cancel(); <-ended }()
	if err := awaitListing(ctx, registry, d, f.timeout); err != nil {
		return err
	}
	return do(ctx, registry, d)
}

// awaitListing waits for the first listing. The first failure is final: whoever
// sits before a terminal is told at once, and a script can try again.
func awaitListing(ctx context.Context, registry discovery.Registry, d *discovery.Directory, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for {
		select {
		case <-d.Synced():
			return nil
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return fmt.Errorf("%s: not listed within %v", registry, timeout)
			}
			return ctx.Err()
		case <-ticker.C:
			if err := d.Status().LastError; err != nil {
				return fmt.Errorf("%s: %w", registry, err)
			}
		}
	}
}

// once calls do with a registry that is not followed.
func (f *registryFlags) once(ctx context.Context, create bool, do func(context.Context, discovery.Registry) error) error {
	_, registry, closeAll, err := f.open(ctx, create)
	if err != nil {
		return err
	}
	defer closeAll()
	ctx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	return do(ctx, registry)
}

// table writes aligned columns.
type table struct{ w *tabwriter.Writer }

func newTable(w io.Writer, heads ...string) *table {
	t := &table{tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)}
	t.row(heads...)
	return t
}

func (t *table) row(cells ...string) {
	for i, c := range cells {
		cells[i] = discovery.PrintableLine(c)
		if cells[i] == "" && i < len(cells)-1 {
			cells[i] = "-"
		}
	}
	fmt.Fprintln(t.w, strings.Join(cells, "\t"))
}

func (t *table) flush() { _ = t.w.Flush() }
