package health

import (
	"context"
	"fmt"
	"io"
	"net/http"
)

// maxURLBody is how much is read of the answer to the check of a URL.
const maxURLBody = 64 << 10

// URL returns a check that a service makes of itself: it passes while the URL answers
// with 2xx. Redirects are not followed.
func URL(target string) func(context.Context) error {
	// A client of its own, so that connections to a service that is being
	// watched are not shared with anything.
	client := &http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxURLBody))
		if resp.StatusCode < 200 || resp.StatusCode > 299 {
			return fmt.Errorf("health_url answered %s, want 2xx", resp.Status)
		}
		return nil
	}
}
