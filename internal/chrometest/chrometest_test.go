package chrometest_test

import (
	"bytes"
	"image/png"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/internal/chrometest"
)

func TestPage(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Security-Policy", "script-src 'none'")
		_, _ = w.Write([]byte(`<!doctype html><link rel=icon href="data:,"><input autofocus><p onclick="x()">hello</p><script>y()</script>`))
	}))
	t.Cleanup(s.Close)
	p := chrometest.Open(t)
	p.Size(400, 300, false)
	p.Go(s.URL)
	p.Wait("the page", `document.querySelector("p")?.textContent === "hello"`)
	p.Eval(`document.querySelector("input").focus()`)
	p.Type("abc")
	if v := p.Eval(`Promise.resolve(document.querySelector("input").value)`); v != "abc" {
		t.Errorf("typed %v", v)
	}
	p.Dark(true)
	if p.Eval(`matchMedia("(prefers-color-scheme: dark)").matches`) != true {
		t.Error("it is not dark")
	}
	image, err := png.Decode(bytes.NewReader(p.Screenshot()))
	if err != nil || image.Bounds().Dx() != 400 {
		t.Errorf("the screenshot: %v", err)
	}
	if problems := p.Problems(); len(problems) == 0 || !strings.Contains(problems[0], "Content Security Policy") {
		t.Errorf("what the policy forbids is not told: %q", problems)
	}
}
