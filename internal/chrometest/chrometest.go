// Package chrometest drives a real headless Chromium inside a test, by the DevTools
// protocol over a pipe. It knows the few commands that the tests of a page need,
// which is why it is not one of the libraries that know them all.
package chrometest

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"
)

// patience bounds every wait, far beyond what anything needs.
const patience = 60 * time.Second

// A Page is one page of a browser of its own. Its methods belong to the goroutine
// of the test that opened it.
type Page struct {
	t       testing.TB
	cmd     *exec.Cmd
	to      *os.File
	session string

	mu       sync.Mutex
	answers  map[int]chan message
	last     int
	ended    bool
	problems []string
}

type message struct {
	ID     int             `json:"id,omitempty"`
	Method string          `json:"method,omitempty"`
	Params json.RawMessage `json:"params,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
	Error  *struct {
		Message string `json:"message"`
	} `json:"error,omitempty"`
	Session string `json:"sessionId,omitempty"`
}

// names are what Chromium is called on various systems.
var names = []string{"chromium", "chromium-browser", "google-chrome", "google-chrome-stable"}

// Open starts a browser with an empty page, and ends it with the test. A browser
// that is missing fails the test.
func Open(t testing.TB) *Page {
	t.Helper()
	var path string
	for _, name := range names {
		if found, err := exec.LookPath(name); err == nil {
			path = found
			break
		}
	}
	if path == "" {
		t.Fatalf("no Chromium is installed, looked for %v; scripts/need-chromium installs it", names)
	}
	toRead, to, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	from, fromWrite, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p := &Page{t: t, to: to, answers: make(map[int]chan message)}
	p.cmd = exec.Command(path, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
		"--hide-scrollbars", "--disable-extensions", "--disable-background-networking", "--remote-debugging-pipe",
		"--user-data-dir="+t.TempDir(), "about:blank")
	p.cmd.ExtraFiles = []*os.File{toRead, fromWrite} // 3 and 4
	var log bytes.Buffer
	p.cmd.Stderr = &log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	toRead.Close()
	fromWrite.Close()
	var reading sync.WaitGroup
	reading.Go(func() { p.read(from) })
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("Chromium said:\n%s", log.Bytes())
		}
	})
	t.Cleanup(func() {
		// A browser that is asked to close leaves its profile in peace.
		_, _ = p.call("", "Browser.close", nil)
		to.Close()
		killer := time.AfterFunc(patience, func() { _ = p.cmd.Process.Kill() })
		_ = p.cmd.Wait()
		killer.Stop()
		reading.Wait()
		from.Close()
	})

	var target struct{ TargetID string }
	p.must("", "Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	p.must("", "Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	p.session = attached.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log"} {
		p.must(p.session, domain+".enable", nil, nil)
	}
	return p
}

// read takes what the browser says: JSON, each message with a zero byte behind it.
func (p *Page) read(from *os.File) {
	r := bufio.NewReader(from)
	for {
		data, err := r.ReadBytes(0)
		if err != nil {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.ended = true
			for _, answer := range p.answers {
				close(answer)
			}
			return
		}
		var m message
		if json.Unmarshal(data[:len(data)-1], &m) != nil {
			continue
		}
		p.mu.Lock()
		if answer := p.answers[m.ID]; m.ID != 0 && answer != nil {
			delete(p.answers, m.ID)
			answer <- m
		}
		switch m.Method {
		case "Runtime.exceptionThrown":
			p.problems = append(p.problems, string(m.Params))
		case "Log.entryAdded":
			var e struct {
				Entry struct{ Level, Text, Source string }
			}
			// A connection that ends with a reload is an error to the log alone.
			if json.Unmarshal(m.Params, &e) == nil && e.Entry.Level == "error" && e.Entry.Source != "network" {
				p.problems = append(p.problems, e.Entry.Text)
			}
		}
		p.mu.Unlock()
	}
}

func (p *Page) call(session, method string, params any) (json.RawMessage, error) {
	raw, err := json.Marshal(params)
	if err != nil {
		return nil, err
	}
	if params == nil {
		raw = nil
	}
	p.mu.Lock()
	if p.ended {
		p.mu.Unlock()
		return nil, errors.New("the browser has ended")
	}
	p.last++
	m := message{ID: p.last, Method: method, Params: raw, Session: session}
	answer := make(chan message, 1)
	p.answers[m.ID] = answer
	p.mu.Unlock()
	data, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	if _, err := p.to.Write(append(data, 0)); err != nil {
		return nil, err
	}
	select {
	case a, ok := <-answer:
		if !ok {
			return nil, fmt.Errorf("%s: the browser has ended", method)
		}
		if a.Error != nil {
			return nil, fmt.Errorf("%s: %s", method, a.Error.Message)
		}
		return a.Result, nil
	case <-time.After(patience):
		return nil, fmt.Errorf("%s: no answer within %v", method, patience)
	}
}

func (p *Page) must(session, method string, params, result any) {
	p.t.Helper()
	raw, err := p.call(session, method, params)
	if err == nil && result != nil {
		err = json.Unmarshal(raw, result)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

// Go opens a URL.
func (p *Page) Go(url string) {
	p.t.Helper()
	p.must(p.session, "Page.navigate", map[string]any{"url": url}, nil)
}

// Eval returns the value of an expression of JavaScript, which may be a promise.
func (p *Page) Eval(expression string) any {
	p.t.Helper()
	var result struct {
		Result           struct{ Value any }
		ExceptionDetails *struct {
			Text      string
			Exception struct{ Description string }
		}
	}
	p.must(p.session, "Runtime.evaluate", map[string]any{
		"expression": expression, "returnByValue": true, "awaitPromise": true, "userGesture": true,
	}, &result)
	if e := result.ExceptionDetails; e != nil {
		p.t.Fatalf("%s: %s %s", expression, e.Text, e.Exception.Description)
	}
	return result.Result.Value
}

// Wait waits until an expression is true.
func (p *Page) Wait(what, expression string) {
	p.t.Helper()
	deadline := time.Now().Add(patience)
	for p.Eval("Boolean("+expression+")") != true {
		if time.Now().After(deadline) {
			p.t.Fatalf("waited in vain for: %s\nthe page shows:\n%v", what, p.Eval("document.body.innerText.slice(0, 3000)"))
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// Type presses the keys of a text.
func (p *Page) Type(text string) {
	p.t.Helper()
	for _, r := range text {
		for _, event := range []string{"keyDown", "keyUp"} {
			params := map[string]any{"type": event, "key": string(r)}
			if event == "keyDown" {
				params["text"] = string(r)
			}
			p.must(p.session, "Input.dispatchKeyEvent", params, nil)
		}
	}
}

// Dark makes the page believe that its reader prefers dark colours, or light ones.
func (p *Page) Dark(dark bool) {
	p.t.Helper()
	scheme := "light"
	if dark {
		scheme = "dark"
	}
	p.must(p.session, "Emulation.setEmulatedMedia", map[string]any{
		"features": []map[string]string{{"name": "prefers-color-scheme", "value": scheme}},
	}, nil)
}

// Size sets the size of the window.
func (p *Page) Size(width, height int, mobile bool) {
	p.t.Helper()
	p.must(p.session, "Emulation.setDeviceMetricsOverride", map[string]any{
		"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile,
	}, nil)
}

// Screenshot returns what is to be seen, as a PNG.
func (p *Page) Screenshot() []byte {
	p.t.Helper()
	var shot struct{ Data string }
	p.must(p.session, "Page.captureScreenshot", map[string]any{"format": "png"}, &shot)
	png, err := base64.StdEncoding.DecodeString(shot.Data)
	if err != nil {
		p.t.Fatal(err)
	}
	return png
}

// Problems returns what the browser found wrong with the page so far: exceptions,
// and whatever its policy forbids.
func (p *Page) Problems() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.problems...)
}
