// Package natspubsub keeps a registry on subjects of core NATS: nodes say that
// they join, that they live and that they leave, and whoever listens then knows.
// The servers keep nothing.
//
//	<prefix>.join       a record
//	<prefix>.heartbeat  {"nodeId","load","timestamp"}, or a record
//	<prefix>.leave      {"NodeId"}; ours name the instance as well
//	<prefix>.query      a request; each node answers with its record
//
// Our own heartbeats carry the record, and our own nodes answer queries, so that
// whoever starts late learns of them within milliseconds. Writers that do
// neither are learnt of when they join; see [Registry.Watch].
//
// To watch takes the right to subscribe to join, heartbeat, leave and
// _INBOX.> or the inbox prefix that is configured, and to publish to query; to
// announce, that to publish to join, heartbeat and leave. To answer queries takes
// the right to subscribe to query and to publish to the inboxes of those who ask,
// which begin with _INBOX or with our own inbox prefix; without it a node is listed all the same, and
// late listeners learn of it by its next heartbeat.
package natspubsub

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
)

const (
	// operationTimeout bounds one call, the dialling included.
	operationTimeout = 5 * time.Second
	// roundTrip is how long a server may take to answer a ping, and lastRoundTrip
	// how long a second one, before the connection counts as dead.
	roundTrip     = 2 * time.Second
	lastRoundTrip = time.Second
	// maxQueries is how many queries may wait to be answered. Who asks in vain
	// listens instead.
	maxQueries = 1024
	// maxQueryBytes is how much of what they say may wait, of which nothing is read.
	maxQueryBytes = 1 << 20
	// answerChunk is how many records of ours answer a query before the server
	// has to have taken them, so that announcing never waits behind thousands.
	answerChunk = 256
)

// A Registry is one subject prefix behind one connection. It implements
// [discovery.Registry] and [discovery.Verifier]. It is no [discovery.Historian]:
// nobody keeps the past.
type Registry struct {
	config Config // resolved
	conn   *natslink.Conn

	// turn is held while our own records change and while they are published, so
	// that no answer to a query follows the goodbye of its node. It is a channel
	// and not a mutex, so that nobody waits longer than his context.
	turn    chan struct{}
	answers sync.WaitGroup

	mu      sync.Mutex // guards what follows; no I/O happens under it
	closed  bool
	session *session // of the last connection
	watch   *watch   // the one that is synced
	records map[string]*record
}

// A session is what stands on one connection.
type session struct {
	link *natslink.Link

	// Guarded by the Registry's mu.
	joined  map[string]bool // the ids that were announced here
	answers bool            // queries are answered
}

// A record is one of our own, as it was announced last.
type record struct {
	instance string
	data     []byte
	until    time.Time // when its lease runs out
}

// Open returns the registry that config names. It does not connect: the first
// call that needs the connection does. The error is that of [Config.Resolve].
func Open(config Config) (*Registry, error) {
	config, err := config.Resolve()
	if err != nil {
		return nil, err
	}
	conn, err := natslink.New(config.conn())
	if err != nil {
		return nil, err
	}
	return &Registry{
		config:  config,
		conn:    conn,
		turn:    make(chan struct{}, 1),
		records: make(map[string]*record),
	}, nil
}

// String names the prefix and the servers, and no secret.
func (r *Registry) String() string { return r.config.String() }

// Close closes the connection, which ends every call that is under way, and
// stops answering.
func (r *Registry) Close() error {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	err := r.conn.Close()
	r.answers.Wait()
	return err
}

// Located returns the servers that the cluster has told of beside those
// configured, as host:port.
func (r *Registry) Located() []string { return r.conn.Located() }

// Announce says that the node has joined, the first time on a connection, and
// then that it lives, with its record each time. It returns when the server has
// taken the message; whether anybody hears it, nobody knows. From then on the
// Registry answers queries with the record until the node is withdrawn or its
// lease runs out, also on later connections. It fails with ErrInvalid,
// ErrUnreachable, ErrCredentials or ErrPermission of package discovery.
func (r *Registry) Announce(ctx context.Context, n discovery.Node) error {
	what := fmt.Sprintf("announcing node %q", n.ID)
	now := time.Now()
	data, err := discovery.AppendRecord(nil, n, now)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	// Who does not renew a record does not stand for it any more.
	announced := &record{instance: n.Instance(), data: data, until: now.Add(n.LeaseOr(discovery.DefaultTTL))}
	return r.do(ctx, what, func(ctx context.Context, s *session) error {
		subject, message := r.config.join(), data
		if r.hasJoined(s, n.ID) {
			subject, message = r.config.heartbeat(), appendHeartbeat(nil, data, now)
		}
		return r.say(ctx, s, n.ID, announced, subject, message, false)
	})
}

// errTaken: the id is announced here for another instance.
var errTaken = errors.New("another instance has taken the id")

// Drain says that the node lives and drains, in a heartbeat with its record. Nobody
// keeps records with which that could be compared, so listeners of our kind do it:
// they let it count only if the record that they saw last is of the same instance;
// see [Registry.Watch]. Where this very Registry announces the id for another
// instance, nothing is sent and false is returned. It fails as Announce does.
func (r *Registry) Drain(ctx context.Context, n discovery.Node) (own bool, err error) {
	what := fmt.Sprintf("announcing that node %q drains", n.ID)
	now := time.Now()
	data, err := discovery.AppendRecord(nil, n, now)
	if err != nil {
		return false, fmt.Errorf("%s: %w", what, err)
	}
	if r.takenHere(n.ID, n.Instance()) {
		return false, nil
	}
	announced := &record{instance: n.Instance(), data: data, until: now.Add(n.LeaseOr(discovery.DefaultTTL))}
	err = r.do(ctx, what, func(ctx context.Context, s *session) error {
		// Never a join, with which a node comes rather than goes.
		return r.say(ctx, s, n.ID, announced, r.config.heartbeat(), appendHeartbeat(nil, data, now), true)
	})
	if errors.Is(err, errTaken) {
		return false, nil
	}
	return err == nil, err
}

// say publishes a message about a record of ours, with which queries are answered
// from then on. What is said by ownerOnly fails with errTaken where the id is another
// instance's.
func (r *Registry) say(ctx context.Context, s *session, id string, announced *record, subject string, message []byte, ownerOnly bool) error {
	var before *record
	err := s.ask(ctx, publishing(subject), func(ctx context.Context) error {
		release, err := r.take(ctx)
		if err != nil {
			return err
		}
		defer release()
		if ownerOnly && r.takenHere(id, announced.instance) {
			return errTaken
		}
		before = r.remember(id, announced)
		// First, so that whoever asks too early for this is told by the join.
		if err := r.answer(s); err != nil {
			return err
		}
		return s.link.Publish(subject, message)
	})
	r.settle(s, id, announced, before, err)
	return err
}

// Withdraw says that the node leaves. The message names the instance, and
// listeners of our kind let it count only if the record that they saw last is
// that instance's; others know no instances. Where this very Registry announces
// the id for another instance, nothing is sent. It fails as Announce does.
func (r *Registry) Withdraw(ctx context.Context, n discovery.Node) error {
	what := fmt.Sprintf("withdrawing node %q", n.ID)
	if err := discovery.ValidateID(n.ID); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	// Whether or not anybody can be told: nobody is to be told otherwise.
	if !r.forget(n.ID, n.Instance()) {
		return nil
	}
	message, err := json.Marshal(farewell{NodeID: n.ID, Instance: n.Instance()})
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return r.do(ctx, what, func(ctx context.Context, s *session) error {
		return s.ask(ctx, publishing(r.config.leave()), func(ctx context.Context) error {
			release, err := r.take(ctx)
			if err != nil {
				return err
			}
			defer release()
			// Somebody may have announced the id meanwhile.
			if !r.forget(n.ID, n.Instance()) {
				return nil
			}
			return s.link.Publish(r.config.leave(), message)
		})
	})
}

// publishing is what a guard of one message is concerned with.
func publishing(subject string) func(natslink.Operation, string) bool {
	return func(operation natslink.Operation, refused string) bool {
		return operation == natslink.Publish && refused == subject
	}
}

// do runs f on the connection, for five seconds at most.
func (r *Registry) do(ctx context.Context, what string, f func(context.Context, *session) error) error {
	bounded, cancel := context.WithTimeout(ctx, operationTimeout)
	defer cancel()
	s, err := r.connect(bounded)
	if err == nil {
		err = f(bounded, s)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// connect returns the session of the connection that stands.
func (r *Registry) connect(ctx context.Context) (*session, error) {
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	link, err := r.conn.Get(ctx)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	if r.session == nil || r.session.link != link {
		r.session = &session{link: link, joined: make(map[string]bool)}
	}
	s, records := r.session, len(r.records)
	r.mu.Unlock()
	if records == 0 {
		return s, nil
	}
	// What was announced on the connection before still stands.
	if err := r.answer(s); err != nil {
		return nil, explain(ctx, ctx, link, err)
	}
	return s, nil
}

// ask runs f, which publishes and subscribes, and returns when the server has
// taken it, or why it refused what the caller is concerned with.
func (s *session) ask(ctx context.Context, concerns func(natslink.Operation, string) bool, f func(context.Context) error) error {
	guarded, release := s.link.GuardOperation(ctx, concerns)
	defer release()
	err := f(guarded)
	if err == nil {
		err = confirm(guarded, s.link)
	}
	if err == nil && guarded.Err() != nil {
		err = context.Cause(guarded)
	}
	if err != nil {
		return explain(ctx, guarded, s.link, err)
	}
	return nil
}

// confirm makes a round trip. A connection on which nothing comes back is
// dropped, so that the next call dials instead of waiting as well.
func confirm(ctx context.Context, link *natslink.Link) error {
	first, cancel := context.WithTimeout(ctx, roundTrip)
	defer cancel()
	err := link.Confirm(first)
	if !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
		return err
	}
	second, cancel := context.WithTimeout(ctx, lastRoundTrip)
	defer cancel()
	if err := link.Probe(second); err != nil {
		return err
	}
	return link.Confirm(ctx)
}

// take waits for the turn.
func (r *Registry) take(ctx context.Context) (release func(), err error) {
	select {
	case r.turn <- struct{}{}:
		return func() { <-r.turn }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (r *Registry) hasJoined(s *session, id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return s.joined[id]
}

// remember puts a record and returns the one before it, nil if there was none.
func (r *Registry) remember(id string, announced *record) (before *record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	before = r.records[id]
	r.records[id] = announced
	return before
}

// settle notes how announcing went. What was refused does not stand; what stood
// before it does.
func (r *Registry) settle(s *session, id string, announced, before *record, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.records[id] != announced: // withdrawn, or announced again, meanwhile
	case err == nil:
		s.joined[id] = true
	case before != nil:
		r.records[id] = before
	default:
		delete(r.records, id)
	}
}

// takenHere reports whether we announce the id for another instance.
func (r *Registry) takenHere(id, instance string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.taken(id, instance)
}

// taken is takenHere for those who hold mu.
func (r *Registry) taken(id, instance string) bool {
	own := r.records[id]
	return own != nil && own.instance != instance && time.Now().Before(own.until)
}

// forget drops our record of the id, and reports false if it is another
// instance's.
func (r *Registry) forget(id, instance string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.taken(id, instance) {
		return false
	}
	delete(r.records, id)
	if r.session != nil {
		delete(r.session.joined, id)
	}
	return true
}

// answer sees to it that queries on the session's connection are answered, until
// it is lost. It is called before anything else is published there.
func (r *Registry) answer(s *session) error {
	r.mu.Lock()
	if r.closed || s.answers {
		r.mu.Unlock()
		return nil
	}
	s.answers = true
	r.answers.Add(1) // under the lock, so that Close waits for it
	r.mu.Unlock()

	queries, err := s.link.SubscribeSync(r.config.query())
	if err == nil {
		err = queries.SetPendingLimits(maxQueries, maxQueryBytes)
	}
	if err != nil {
		r.answers.Done()
		return err
	}
	go func() {
		defer r.answers.Done()
		for {
			// It ends with the connection.
			m, err := queries.NextMsgWithContext(context.Background())
			switch {
			case err == nil:
				r.reply(s, m.Reply)
			case !errors.Is(err, nats.ErrSlowConsumer): // which is told once for all that were dropped
				return
			}
		}
	}()
	return nil
}

// reply answers one query with every record of ours that stands, a message each.
// Who has none, any more, answers with nothing, so that nobody waits for him.
func (r *Registry) reply(s *session, to string) {
	// Whoever may ask could otherwise make us publish, with our own rights, to
	// whatever he likes.
	if !s.link.IsInbox(to) {
		return
	}
	sent := 0
	for ids := range slices.Chunk(r.standing(), answerChunk) {
		select {
		case r.turn <- struct{}{}:
		case <-s.link.Lost():
			return
		}
		for _, id := range ids {
			// It may have been withdrawn since.
			if data := r.data(id); data != nil && s.link.Publish(to, data) == nil {
				sent++
			}
		}
		<-r.turn
		if s.link.FlushTimeout(roundTrip) != nil {
			return
		}
	}
	if sent == 0 {
		_ = s.link.Publish(to, nil) // a lost connection ends the loop above
	}
}

// standing returns the ids of our records that stand, sorted, and drops those
// whose lease ran out.
func (r *Registry) standing() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(r.records, func(_ string, own *record) bool { return !now.Before(own.until) })
	return slices.Sorted(maps.Keys(r.records))
}

func (r *Registry) data(id string) []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	if own := r.records[id]; own != nil {
		return own.data
	}
	return nil
}

var (
	_ discovery.Registry = (*Registry)(nil)
	_ discovery.Verifier = (*Registry)(nil)
	_ discovery.Locator  = (*Registry)(nil)
)
