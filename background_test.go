package caddydiscovery

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

func TestBackground(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b background
		runs := 0
		run := func(ctx context.Context) {
			runs++
			<-ctx.Done()
			time.Sleep(time.Second)
		}
		b.start(run)
		b.start(run)
		synctest.Wait()
		began := time.Now()
		b.end()
		if took := time.Since(began); runs != 1 || took != time.Second {
			t.Errorf("%d runs, ended after %v, want one, awaited", runs, took)
		}
		b.start(run)
		var never background
		never.end()
		never.start(run)
		synctest.Wait()
		if runs != 1 {
			t.Errorf("%d runs, want none after the end", runs)
		}
	})
}
