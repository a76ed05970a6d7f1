package caddydiscovery

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
	"github.com/caddy-discovery/caddy-discovery/internal/traffic"
	"github.com/caddy-discovery/caddy-discovery/internal/window"
)

// RetryBudget bounds how many of a handler's requests are tried again, so that retries do
// not bring down what is left of a fleet that fails: where every request fails, three
// retries of each are four times the load. A request that would be one too many ends with
// the error, or the response, that it has.
type RetryBudget struct {
	// How many retries there may be in ten seconds, in percent of the requests. Required.
	Percent int `json:"percent,omitempty"`

	// How many there may be beyond that, for when there are few requests. Default: 10
	Beyond *int `json:"beyond,omitempty"`
}

const maxRetriesBeyond = 100_000

// check completes what was configured, or refuses it.
func (b *RetryBudget) check() error {
	b.Beyond = cmp.Or(b.Beyond, new(10))
	if b.Percent < 1 || b.Percent > 100 {
		return fmt.Errorf("retry_budget: invalid share %d, want 1 to 100 percent", b.Percent)
	}
	if *b.Beyond < 0 || *b.Beyond > maxRetriesBeyond {
		return fmt.Errorf("retry_budget: invalid number %d, want 0 to %d", *b.Beyond, maxRetriesBeyond)
	}
	return nil
}

// retryBudget is the option 'retry_budget <percent> [<n>]'.
func retryBudgetOption(to **RetryBudget) caddyblock.Option {
	return caddyblock.Option{Usage: "<percent> [<n>]", Min: 1, Max: 2, Set: func(args []string) (err error) {
		b := new(RetryBudget)
		*to = b
		if b.Percent, err = percentage(args[0]); err != nil {
			return err
		}
		if len(args) > 1 {
			n, err := strconv.Atoi(args[1])
			if err != nil || n < 0 || n > maxRetriesBeyond {
				return fmt.Errorf("invalid number %q, want 0 to %d", args[1], maxRetriesBeyond)
			}
			b.Beyond = &n
		}
		return nil
	}}
}

// provisionRetryBudget has the handler keep to the budget.
//
// Caddy decides about a retry when an attempt has failed (LoadBalancing.tryAgain), by its
// limits and by lb_retry_match, of which the default is any GET; a dial error is retried
// whatever that says. The budget is one more condition of lb_retry_match, and what it
// refuses is no dial error any more, so that the request ends there and then, with what it
// has, rather than look for a node until lb_try_duration is over.
func (u *Upstreams) provisionRetryBudget(ctx caddy.Context) error {
	lb := u.handler.LoadBalancing
	if lb.Retries == 0 && lb.TryDuration == 0 {
		return errors.New("retry_budget has no effect where nothing is tried again; want lb_retries or lb_try_duration in the same reverse_proxy")
	}
	w := wrapPolicy(u.handler, u.logger)
	if w.budget != nil {
		return errors.New("retry_budget: another source of the same reverse_proxy has one, want it once: it counts all requests of the handler")
	}
	b := &retryBudget{
		percent: u.RetryBudget.Percent, beyond: *u.RetryBudget.Beyond, most: lb.Retries,
		refused: func() { u.directory.stats.retriesRefused.Add(1) },
		lines:   rate.Sometimes{Interval: time.Minute}, logger: u.logger,
	}
	w.budget, w.tracks = b, true
	u.wrapper = w
	if err := watchTransport(ctx, u.handler); err != nil {
		return err
	}
	u.handler.Transport.(*traffic.Transport).Failed = b.failed

	// The handler loads the matchers after its sources, and adds them to what is there.
	sets, err := ctx.LoadModule(lb, "RetryMatchRaw")
	if err != nil {
		return fmt.Errorf("lb_retry_match: %w", err)
	}
	lb.RetryMatchRaw = nil
	if err := lb.RetryMatch.FromInterface(sets); err != nil {
		return fmt.Errorf("lb_retry_match: %w", err)
	}
	if len(lb.RetryMatch) == 0 {
		lb.RetryMatch = caddyhttp.MatcherSets{{caddyhttp.MatchMethod{http.MethodGet}}}
	}
	for i := range lb.RetryMatch {
		lb.RetryMatch[i] = append(lb.RetryMatch[i], budgetMatcher{b})
	}
	return nil
}

// retryWindow is the time of which requests and retries are counted.
const retryWindow = 10 * time.Second

// A retryBudget counts requests and retries of a handler, and says whether there may be
// another retry.
type retryBudget struct {
	percent, beyond int
	most            int    // retries of one request; 0: any number
	refused         func() // is called for each retry that may not be
	lines           rate.Sometimes
	logger          *zap.Logger

	recent window.Window
	mu     sync.Mutex // held while a retry is granted, for two not to take the last one
}

// request counts a request.
func (b *retryBudget) request() { b.recent.Add(traffic.Now(), retryWindow, 1, 0) }

// grant counts a retry, if there may be another one.
func (b *retryBudget) grant() bool {
	now := traffic.Now()
	b.mu.Lock()
	requests, retries := b.recent.Sum(now, retryWindow)
	granted := retries < requests*b.percent/100+b.beyond
	if granted {
		b.recent.Add(now, retryWindow, 0, 1)
	}
	b.mu.Unlock()
	if !granted {
		b.refused()
		b.lines.Do(func() {
			b.logger.Warn("requests are not tried again, because retry_budget is spent; said once a minute",
				zap.Int("requests", requests), zap.Int("retries", retries), zap.Duration("in", retryWindow))
		})
	}
	return granted
}

// budgeted is what a request has to do with the budget of its handler.
type budgeted struct {
	*retryBudget
	counted bool
	attempt int // that failed last, of which it is known whether another may follow
	granted bool
}

// mayRetry reports whether the budget lets another attempt follow this one, the same each
// time that it is asked. Where the handler does not, that is not for the budget to say.
func (b *budgeted) mayRetry(attempt int) bool {
	if b.most > 0 && attempt > b.most {
		return true
	}
	if b.attempt != attempt {
		b.attempt, b.granted = attempt, b.grant()
	}
	return b.granted
}

// budgetOf returns what a request has to do with the budget; nil if it is none of the
// handler's, or was not sent anywhere. The handler gives its matchers and its transport
// another copy of the request than its sources.
func budgetOf(r *http.Request, b *retryBudget) *attempts {
	vars, _ := r.Context().Value(caddyhttp.VarsCtxKey).(map[string]any)
	if a, ok := vars[attemptsKey].(*attempts); ok && a.budget.retryBudget == b && a.chose > 0 {
		return a
	}
	return nil
}

// begin counts the request, or reports false if it would be tried again and may not. That
// is for what is retried past the matcher and the transport.
func (b *retryBudget) begin(a *attempts) bool {
	a.budget.retryBudget = b
	if !a.budget.counted {
		a.budget.counted = true
		b.request()
	}
	return a.chose == 0 || a.budget.mayRetry(a.chose)
}

// budgetMatcher matches requests that may be tried again.
type budgetMatcher struct{ budget *retryBudget }

// MatchWithError implements caddyhttp.RequestMatcherWithError.
func (m budgetMatcher) MatchWithError(r *http.Request) (bool, error) {
	a := budgetOf(r, m.budget)
	return a == nil || a.budget.mayRetry(a.chose), nil
}

// failed returns what the handler gets in place of an error of its transport: a dial error
// that may not be tried again is none any more.
func (b *retryBudget) failed(r *http.Request, err error) error {
	if !errors.As(err, new(reverseproxy.DialError)) {
		return err
	}
	if a := budgetOf(r, b); a == nil || a.budget.mayRetry(a.chose) {
		return err
	}
	return errors.New(err.Error())
}

// Interface guards
var (
	_ caddyhttp.RequestMatcherWithError = budgetMatcher{}
)
