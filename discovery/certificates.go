package discovery

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

const (
	// maxCertificates is how many names are remembered for which a certificate was
	// allowed. Those that were asked for last stay.
	maxCertificates = 50_000
	// How long one is remembered that nobody asks for: longer than any certificate that
	// is issued today is valid, so that a name that comes back is not a new one as long
	// as it has one.
	certificateMemory = 400 * 24 * time.Hour
	// When a name is asked for again is noted at most so often.
	certificateEvery = 24 * time.Hour
	// How long it takes at most to read what was saved.
	loadTimeout = 2 * time.Second

	// MaxLinger is the most that [CertificatePolicy].Linger can be: so long a host is
	// remembered that has left.
	MaxLinger = hostMemory
)

// A CertificatePolicy says for which names beside those that nodes announce certificates
// are allowed, and for how many.
type CertificatePolicy struct {
	// Linger is for how long one is allowed for a name after its last node has left.
	Linger time.Duration
	// Limit is for how many new names certificates are allowed within Period; 0: any
	// number. A new name is one for which none was allowed before, as far as is known.
	Limit  int
	Period time.Duration
	// Has reports whether a name has a certificate already: then it is no new one, though
	// nothing may be known of it here, as where certificates are kept in a storage of many
	// proxies. It is asked if there is a limit. Default: none has.
	Has func(name string) bool
}

// A CertificateAnswer says whether a certificate is allowed, and why.
type CertificateAnswer string

// The first three allow a certificate.
const (
	CertificateListed     CertificateAnswer = "listed"     // a node announces the name
	CertificateLingering  CertificateAnswer = "lingering"  // one did not long ago
	CertificateRemembered CertificateAnswer = "remembered" // one did before the start, and the registry cannot be listed yet
	CertificateDenied     CertificateAnswer = "denied"     // none does, or hosts does not name it
	CertificateLimited    CertificateAnswer = "limited"    // too many new names
	CertificateUnclear    CertificateAnswer = "unclear"    // it cannot be known yet who announces what
)

var certificateAnswers = []CertificateAnswer{
	CertificateListed, CertificateLingering, CertificateRemembered, CertificateDenied, CertificateLimited, CertificateUnclear,
}

// CertificateAnswers returns all of them.
func CertificateAnswers() []CertificateAnswer { return slices.Clone(certificateAnswers) }

// Allows reports whether it allows a certificate.
func (a CertificateAnswer) Allows() bool {
	return a == CertificateListed || a == CertificateLingering || a == CertificateRemembered
}

// A Certificate is a name for which a certificate was allowed.
type Certificate struct {
	Name string `json:"certificate"`
	// First is since when, Last when it was asked for last, within a day.
	First time.Time `json:"first,omitzero"`
	Last  time.Time `json:"last,omitzero"`
	// Had says that it was no new name then: see [CertificatePolicy].Has.
	Had bool `json:"had,omitempty"`
}

// AllowCertificate decides whether there may be a certificate for a name. It is allowed for
// what the [HostRules] name and a node of the newest snapshot announces, or has announced
// within the policy's time. An outage of the registry takes nothing away: what was
// announced before the start is, until the registry has been listed. As long as it is
// unclear it waits for that until ctx ends. The error says why it is not allowed; it is
// nil if it is. It may be called from any goroutine, for whatever names clients make up:
// what is not allowed costs less than a microsecond, and is not remembered.
func (d *Directory) AllowCertificate(ctx context.Context, name string, p CertificatePolicy) (CertificateAnswer, error) {
	answer, err := d.awaitCertificate(ctx, name, p)
	d.certificates.answers[slices.Index(certificateAnswers, answer)].Add(1)
	switch answer {
	case CertificateLimited:
		d.certificates.tell(d.options.Logger, slog.LevelWarn, "no certificate is allowed for a new name: too many are new", "host", name, "error", err)
	case CertificateUnclear:
		d.certificates.tell(d.options.Logger, slog.LevelWarn, "no certificate is allowed yet for a name that is not remembered", "host", name, "error", err)
	}
	return answer, err
}

func (d *Directory) awaitCertificate(ctx context.Context, name string, p CertificatePolicy) (CertificateAnswer, error) {
	for {
		superseded := d.Snapshot().Superseded() // first: what comes later is seen in the next turn
		answer, err := d.mayHaveCertificate(name, p.Linger)
		switch {
		case answer.Allows():
			return d.giveCertificate(answer, name, p)
		case answer != CertificateUnclear:
			return answer, err
		}
		select {
		case <-superseded:
		case <-d.synced:
		case <-ctx.Done():
			return answer, err
		}
	}
}

// giveCertificate allows a certificate unless the name is one new one too many.
func (d *Directory) giveCertificate(answer CertificateAnswer, name string, p CertificatePolicy) (CertificateAnswer, error) {
	if loaded := d.certificates.notLoaded(); loaded != nil {
		select {
		case <-loaded: // before that a name may be taken for a new one
		case <-time.After(loadTimeout):
		}
	}
	had := p.Limit > 0 && p.Has != nil && !d.certificates.has(name) && p.Has(name)
	fresh, ok := d.certificates.allow(name, had, p, time.Now())
	if !ok {
		return CertificateLimited, fmt.Errorf("%d new names within %v is the limit", p.Limit, p.Period)
	}
	if fresh {
		c := Change{Type: ChangeCertificate, Reason: "a certificate is allowed for host " + name}
		if h := d.Snapshot().Hosts().Find(name); h != nil {
			c.Entry, c.ID = h.nodes[0], h.nodes[0].Node.ID
		}
		d.journal.Add(c)
		d.certificates.tell(d.options.Logger, slog.LevelInfo, "a certificate is allowed", "host", name, "node", c.ID, "because", string(answer))
	}
	return answer, nil
}

var (
	errNotNamed  = errors.New("the registry's hosts do not name it")
	errNotListed = errors.New("no node announces it")
	errUnclear   = errors.New("the registry has not been listed yet")
	errRenewed   = errors.New("the hosts are being looked at by other rules") // for a moment
)

// mayHaveCertificate is AllowCertificate without waiting, and without the limit.
func (d *Directory) mayHaveCertificate(name string, linger time.Duration) (CertificateAnswer, error) {
	rules := d.hostRules.Load()
	if !rules.Names(name) {
		return CertificateDenied, errNotNamed
	}
	s := d.Snapshot()
	hosts := s.Hosts()
	switch {
	case hosts == nil && !s.Synced:
		return CertificateUnclear, errUnclear
	case hosts == nil, hosts.rules != rules:
		return CertificateUnclear, errRenewed
	}
	answer := CertificateListed
	if hosts.Find(name) == nil {
		answer = cmp.Or(hosts.Known(name).lingers(linger), hosts.Known(wildcardOf(name)).lingers(linger))
		switch {
		case answer != "":
		case s.Synced:
			return CertificateDenied, errNotListed
		default:
			return CertificateUnclear, errUnclear
		}
	}
	// A wildcard stands for whatever a client calls a name.
	if normal, err := parseHost(name); err != nil || normal != name || strings.HasPrefix(name, wildcard) {
		return CertificateDenied, errors.New("it is no host name")
	}
	return answer, nil
}

// lingers returns why a certificate is allowed for a host without a node, "" if it is not.
func (h *Host) lingers(linger time.Duration) CertificateAnswer {
	switch {
	case h == nil:
		return ""
	case h.Left.IsZero():
		return CertificateRemembered
	case time.Since(h.Left) < linger:
		return CertificateLingering
	}
	return ""
}

// Certificate returns what is known of a certificate for a name, if one was allowed.
func (d *Directory) Certificate(name string) (Certificate, bool) { return d.certificates.of(name) }

// certificates are the names for which certificates were allowed. Its methods may be
// called from any goroutine.
type certificates struct {
	changed chan struct{} // holds a token when there is something to save
	answers [6]atomic.Uint64
	lines   map[slog.Level]*rate.Limiter

	mu     sync.Mutex // held for moments only
	byName map[string]Certificate
	firsts []time.Time   // of the new names, sorted: a limit that is reached is asked for often
	loaded chan struct{} // closed when what was saved before is in; nil after that
}

func newCertificates() *certificates {
	return &certificates{
		changed: make(chan struct{}, 1), byName: make(map[string]Certificate), loaded: make(chan struct{}),
		lines: map[slog.Level]*rate.Limiter{
			slog.LevelInfo: rate.NewLimiter(logRate, logRate),
			// What is refused anybody can ask for again and again.
			slog.LevelWarn: rate.NewLimiter(rate.Every(10*time.Second), 5),
		},
	}
}

// tell logs a line, unless there are too many of its level.
func (c *certificates) tell(log *slog.Logger, level slog.Level, message string, fields ...any) {
	if c.lines[level].Allow() {
		log.Log(context.Background(), level, message, fields...)
	}
}

// CertificateAnswers returns how often each answer was given.
func (d *Directory) CertificateAnswers() map[CertificateAnswer]uint64 {
	counts := make(map[CertificateAnswer]uint64, len(certificateAnswers))
	for i, answer := range certificateAnswers {
		counts[answer] = d.certificates.answers[i].Load()
	}
	return counts
}

// notLoaded returns what is closed when what was saved before is known, nil if it is.
func (c *certificates) notLoaded() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.loaded
}

// allow notes that a certificate is asked for that may be allowed, and reports whether
// the limit lets it, and whether the name is new.
func (c *certificates) allow(name string, had bool, p CertificatePolicy, at time.Time) (fresh, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	is, known := c.byName[name]
	switch {
	case known && at.Sub(is.Last) < certificateEvery:
		return false, true
	case known:
	case had:
		c.makeRoom(at)
		is = Certificate{Name: name, First: at, Had: true}
	case p.Limit > 0 && c.since(at.Add(-p.Period)) >= p.Limit:
		return true, false
	default:
		c.makeRoom(at)
		is = Certificate{Name: name, First: at}
		i, _ := slices.BinarySearchFunc(c.firsts, at, time.Time.Compare)
		c.firsts = slices.Insert(c.firsts, i, at) // at the end, unless the clock was set back
	}
	is.Last = at
	c.byName[name] = is
	select {
	case c.changed <- struct{}{}:
	default:
	}
	return !known, true
}

// since returns how many names were new after a time.
func (c *certificates) since(t time.Time) int {
	i, _ := slices.BinarySearchFunc(c.firsts, t, func(first, t time.Time) int {
		if first.After(t) {
			return 1
		}
		return -1
	})
	return len(c.firsts) - i
}

// sortFirsts brings the order of the first times in line with the names.
func (c *certificates) sortFirsts() {
	c.firsts = c.firsts[:0]
	for _, is := range c.byName {
		if !is.Had {
			c.firsts = append(c.firsts, is.First)
		}
	}
	slices.SortFunc(c.firsts, time.Time.Compare)
}

// makeRoom forgets names that nobody asks for, and where they are too many a tenth of
// them.
func (c *certificates) makeRoom(at time.Time) {
	if len(c.byName) < maxCertificates {
		return
	}
	var lasts []time.Time
	for _, is := range c.byName {
		lasts = append(lasts, is.Last)
	}
	slices.SortFunc(lasts, time.Time.Compare)
	before := lasts[len(lasts)/10]
	if old := at.Add(-certificateMemory); before.Before(old) {
		before = old
	}
	for name, is := range c.byName {
		if !is.Last.After(before) {
			delete(c.byName, name)
		}
	}
	c.sortFirsts()
}

func (c *certificates) of(name string) (Certificate, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	is, known := c.byName[name]
	return is, known
}

func (c *certificates) has(name string) bool {
	_, known := c.of(name)
	return known
}

// load takes in what was saved before: nothing, where nothing was.
func (c *certificates) load(saved []Certificate) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, was := range saved {
		is, known := c.byName[was.Name]
		if !known && len(c.byName) >= maxCertificates || time.Since(was.Last) > certificateMemory {
			continue
		}
		if !known || was.First.Before(is.First) {
			is.First = was.First
		}
		if was.Last.After(is.Last) {
			is.Last = was.Last
		}
		is.Name, is.Had = was.Name, was.Had
		c.byName[was.Name] = is
	}
	c.sortFirsts()
	if c.loaded != nil {
		close(c.loaded)
		c.loaded = nil
	}
}

// all returns what is to be saved, sorted by name.
func (c *certificates) all() []Certificate {
	c.mu.Lock()
	all := make([]Certificate, 0, len(c.byName))
	for _, is := range c.byName {
		all = append(all, Certificate{is.Name, is.First.UTC(), is.Last.UTC(), is.Had})
	}
	c.mu.Unlock()
	slices.SortFunc(all, func(a, b Certificate) int { return strings.Compare(a.Name, b.Name) })
	return all
}
