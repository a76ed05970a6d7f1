package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"go.uber.org/zap"
)

func init() { caddy.RegisterModule(Run{}) }

// Run is a handler of events that runs a command and waits for it. There is no
// shell: each argument stays one argument, whatever a placeholder in it comes to.
// That matters, because what a node's record says is written by strangers.
//
// The command may reload Caddy. That ends the config which called it, and gives it
// two seconds more.
type Run struct {
	// The command and its arguments. Placeholders of the event are expanded in
	// the arguments: {event.name}, {event.data.id} and the like.
	Command []string `json:"command,omitempty"`

	// How long the command may take. Default: 1m
	Timeout caddy.Duration `json:"timeout,omitempty"`

	log *zap.Logger
}

// CaddyModule returns the Caddy module information.
func (Run) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "events.handlers.run", New: func() caddy.Module { return new(Run) }}
}

// Provision sets up the handler.
func (r *Run) Provision(ctx caddy.Context) error {
	r.log = ctx.Logger()
	if len(r.Command) == 0 {
		return errors.New("run: the command is missing")
	}
	if r.Timeout <= 0 {
		r.Timeout = caddy.Duration(time.Minute)
	}
	return nil
}

// UnmarshalCaddyfile sets up the handler from Caddyfile tokens. Syntax:
//
//	run <command> [<argument>...]
func (r *Run) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the name
	if r.Command = d.RemainingArgs(); len(r.Command) == 0 {
		return d.ArgErr()
	}
	return nil
}

// outputDelay is how long the output is waited for after the command ended: a child
// that goes on has it open, maybe for ever.
const outputDelay = time.Second

// Handle runs the command. The plugin calls it off the path of requests, one event
// at a time.
func (r *Run) Handle(ctx context.Context, e caddy.Event) error {
	repl, ok := ctx.Value(caddy.ReplacerCtxKey).(*caddy.Replacer)
	if !ok {
		return errors.New("run: the event has no replacer")
	}
	args := make([]string, len(r.Command)-1)
	for i, arg := range r.Command[1:] {
		args[i] = repl.ReplaceAll(arg, "")
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(r.Timeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, r.Command[0], args...)
	cmd.WaitDelay = outputDelay
	out, err := cmd.CombinedOutput()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // the command succeeded and left a child behind
	}
	if err != nil {
		return fmt.Errorf("running %s at %s: %w", r.Command[0], e.Name(), err)
	}
	r.log.Info("ran", zap.String("command", r.Command[0]), zap.String("event", e.Name()), zap.ByteString("output", out))
	return nil
}

// Interface guards
var (
	_ caddy.Provisioner     = (*Run)(nil)
	_ caddyfile.Unmarshaler = (*Run)(nil)
	_ caddyevents.Handler   = (*Run)(nil)
)
