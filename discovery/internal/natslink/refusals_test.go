package natslink_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestGuardEndsWhatIsDenied(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.Users(natstest.User{Name: "u", Password: secret, Publish: natstest.Deny("orders.>")}))
	conn := open(t, natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{User: "u", Password: secret}})
	link := mustGet(t, conn)
	orders, cancel := link.Guard(t.Context(), func(_ natslink.Operation, subject string) bool { return strings.HasPrefix(subject, "orders.") })
	defer cancel()
	others, cancel := link.Guard(t.Context(), func(_ natslink.Operation, subject string) bool { return strings.HasPrefix(subject, "others.") })
	defer cancel()
	if err := link.Publish("orders.new", nil); err != nil {
		t.Fatal(err)
	}
	await(t, "the end of the guarded context", orders.Done())
	wantError(t, context.Cause(orders), discovery.ErrPermission, "publish", "orders.new")
	wantError(t, link.Denied(), discovery.ErrPermission, "orders.new")
	if err := context.Cause(others); err != nil {
		t.Errorf("an operation that was not concerned ended with %v", err)
	}
	if err := link.Err(); err != nil {
		t.Errorf("the connection ended with %v", err)
	}
}

// Without the right to hear answers nothing works on a connection.
func TestAnswersDenied(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.Users(natstest.User{Name: "u", Password: secret, Subscribe: natstest.Deny("_INBOX.>")}))
	conn := open(t, natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{User: "u", Password: secret}})
	link := mustGet(t, conn)
	if _, err := link.RequestWithContext(t.Context(), "anything", nil); err == nil {
		t.Error("a request succeeded")
	}
	await(t, "the loss of the connection", link.Lost())
	wantError(t, link.Err(), discovery.ErrPermission, "subscribe", "_INBOX")
}

// An answer that may not be sent, and an inbox of somebody's own, are no reason
// to give up the connection.
func TestOneInboxDenied(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.Users(natstest.User{
		Name: "u", Password: secret, Publish: natstest.Deny("_INBOX.>"), Subscribe: natstest.Deny("_INBOX.>"),
	}))
	link := mustGet(t, open(t, natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{User: "u", Password: secret}}))
	inbox := link.NewInbox()
	for _, operation := range []natslink.Operation{natslink.Publish, natslink.Subscribe} {
		concerned := func(want natslink.Operation) func(natslink.Operation, string) bool {
			return func(o natslink.Operation, subject string) bool { return o == want && subject == inbox }
		}
		guarded, release := link.Guard(t.Context(), concerned(operation))
		other, releaseOther := link.Guard(t.Context(), concerned("neither"))
		if operation == natslink.Publish {
			if err := link.Publish(inbox, nil); err != nil {
				t.Fatal(err)
			}
		} else if _, err := link.SubscribeSync(inbox); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		if err := link.Confirm(ctx); err != nil {
			t.Fatal(err)
		}
		cancel()
		wantError(t, context.Cause(guarded), discovery.ErrPermission, string(operation), inbox)
		if err := context.Cause(other); err != nil {
			t.Errorf("an operation that was not concerned ended with %v", err)
		}
		release()
		releaseOther()
	}
	if err := link.Err(); err != nil {
		t.Errorf("the connection ended with %v", err)
	}
}

// Whoever confirms knows of every refusal that came before, also where others
// are refused something at the same time.
func TestConfirmWaitsForRefusals(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.Users(natstest.User{Name: "u", Password: secret, Publish: natstest.Deny("orders.>")}))
	link := mustGet(t, open(t, natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{User: "u", Password: secret}}))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			subject := fmt.Sprintf("orders.%d", i)
			for range 100 {
				guarded, release := link.Guard(ctx, func(_ natslink.Operation, s string) bool { return s == subject })
				if err := link.Publish(subject, nil); err != nil {
					t.Error(err)
				}
				if err := link.Confirm(ctx); err != nil {
					t.Error(err)
				}
				if err := context.Cause(guarded); !errors.Is(err, discovery.ErrPermission) {
					t.Errorf("after Confirm the guard of %s says %v", subject, err)
				}
				release()
			}
		})
	}
	group.Wait()
	if err := link.Confirm(ctx); err != nil {
		t.Errorf("with nothing new: %v", err)
	}
	ended, cancel := context.WithTimeout(t.Context(), 0)
	defer cancel()
	if err := link.Confirm(ended); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with an ended context: %v", err)
	}
	if link.Err() != nil {
		t.Errorf("Confirm dropped the link: %v", link.Err())
	}
}

// Users may be allowed to hear answers on subjects of their own only, which keeps
// them from hearing those of others.
func TestInboxPrefix(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.Users(natstest.User{
		Name: "u", Password: secret, Subscribe: natstest.Allow("_INBOX_proxy.>", "echo"),
	}))
	config := natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{User: "u", Password: secret}}
	link := mustGet(t, open(t, config))
	if _, err := link.RequestWithContext(t.Context(), "echo", nil); err == nil {
		t.Error("a request succeeded without an inbox")
	}
	await(t, "the loss of the connection", link.Lost())
	wantError(t, link.Err(), discovery.ErrPermission, "subscribe", "_INBOX", "inbox_prefix")

	for _, prefix := range []string{"_INBOX_proxy", "_INBOX_proxy.eu"} {
		config.InboxPrefix = prefix
		link = mustGet(t, open(t, config))
		queries, err := link.SubscribeSync("echo")
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			if m, err := queries.NextMsgWithContext(t.Context()); err == nil {
				_ = m.Respond([]byte("yes")) // the request fails without it
			}
		}()
		if m, err := link.RequestWithContext(t.Context(), "echo", nil); err != nil || string(m.Data) != "yes" {
			t.Errorf("with the prefix %s: %v", prefix, err)
		}
	}

	for _, prefix := range []string{"_INBOX.>", "a..b", ".", "a b", "$SYS", "a*", "é"} {
		_, err := natslink.New(natslink.Config{Options: natsconn.Options{InboxPrefix: prefix}})
		wantError(t, err, discovery.ErrInvalid, "inbox prefix", "_INBOX_proxy")
	}
}
