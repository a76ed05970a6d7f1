package integration

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/internal/chrometest"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

var screenshot = flag.Bool("screenshot", false, "write docs/status.png anew")

// statusSite is a site with the status page and a source.
func statusSite(port string, r registry, source string) string {
	return "http://127.0.0.1:" + port + " {\ndiscovery_status /status\nreverse_proxy {\ndynamic discovery {\n" + r.block("ttl 1h") + "\n" + source + "\n}\n}\n}\n"
}

// shows is an expression that tells whether a row of the fleet shows all the texts.
func shows(texts ...string) string {
	conditions := make([]string, len(texts))
	for i, text := range texts {
		conditions[i] = fmt.Sprintf("r.innerText.includes(%q)", text)
	}
	return `[...document.querySelectorAll("#nodes tr.node")].some(r => ` + strings.Join(conditions, " && ") + `)`
}

// TestStatusPage watches a fleet in a real browser.
func TestStatusPage(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		const markup = `<img src=x onerror="document.title='harm'">`
		r.put("orders-1", camel("orders-1", "http://127.0.0.1:80", `"service":"orders","zone":"eu-1","hosts":"shop.example.com"`))
		r.put("orders-2", camel("orders-2", "http://127.0.0.2:80", `"service":"orders","zone":"eu-2","weight":"2"`))
		r.put("pay-1", camel("pay-1", "http://127.0.0.3:80", fmt.Sprintf(`"service":"pay","state":"draining","note":%q,"__proto__":"x","hosts":"shop.example.com pay.example.com","paths":"/pay/*"`, markup)))
		r.put("bad", camel("bad", "http://127.0.0.4/<b>path</b>", `"service":"pay"`))
		port := freeport.String(t)
		sites := statusSite(port, r, "service orders\noutlier {\nerrors 2\neject 1h\n}") +
			"http://:" + port + " {\n@served discovered {\n" + r.block("ttl 1h") + "\n}\nrespond @served served\n}\n"
		p := start(t, "", sites)

		page := chrometest.Open(t)
		page.Size(1280, 800, false)
		page.Go("http://127.0.0.1:" + port + "/status")
		page.Eval("window.mark = 1") // gone after any reload of the page
		page.Wait("the fleet", shows("orders-1", "up", "http://127.0.0.1:80", "zone=eu-1"))
		page.Wait("another state", shows("pay-1", "draining"))
		page.Wait("markup as text", shows("pay-1", markup))
		page.Wait("a rejected record", shows("bad", "rejected", "<b>path</b>"))
		page.Wait("the registry", `document.querySelector("#registries").innerText.includes("watched")`)
		page.Wait("groups", `document.querySelector("#nodes").innerText.includes("orders2 nodes") || /orders\s*2 nodes/.test(document.querySelector("#nodes").innerText)`)
		host := func(name string, texts ...string) string {
			return strings.NewReplacer("#nodes tr.node", "#hosts tbody tr", "r.innerText", "r.textContent").Replace(shows(append(texts, name)...))
		}
		page.Wait("hosts", `!document.querySelector("#sites").hidden && `+host("pay.example.com", "pay", "/pay/*"))
		page.Wait("whose a host is that two want", host("shop.example.com", "orders", "/*", "refused", "pay", "1 node since"))
		page.Wait("the journal", `document.querySelector("#journal").innerText.includes("orders-2")`)
		if n := page.Eval(`document.querySelectorAll("main img, main b, main script").length`); n != 0.0 {
			t.Errorf("%v elements were made of what a record says", n)
		}

		r.put("orders-3", camel("orders-3", "http://127.0.0.5:80", `"service":"orders","zone":"eu-1"`))
		page.Wait("a node that joins", shows("orders-3"))
		page.Wait("its line in the journal", `/seen\s*orders-3/.test(document.querySelector("#journal li").innerText)`)
		r.put("orders-3", camel("orders-3", "http://127.0.0.6:80", `"service":"orders","zone":"eu-9"`))
		page.Wait("a node that moves", shows("orders-3", "http://127.0.0.6:80", "zone=eu-9"))
		r.put("orders-2", strings.Replace(camel("orders-2", "http://127.0.0.2:80", `"service":"orders","zone":"eu-2","weight":"2","hosts":"new.example.com"`), "0.35", "0.91", 1))
		page.Wait("a heartbeat's load", shows("orders-2", "0.91"))
		page.Wait("a host that comes", host("new.example.com", "orders"))
		r.put("orders-2", camel("orders-2", "http://127.0.0.2:80", `"service":"orders","zone":"eu-2","weight":"2"`))
		page.Wait("a host that has left", "!("+host("new.example.com")+")")
		r.remove("orders-3")
		page.Wait("a node that leaves", "!("+shows("orders-3")+")")

		page.Eval(`document.activeElement.blur()`)
		page.Type("/")
		if page.Eval(`document.activeElement.id`) != "filter" {
			t.Error("the key / does not lead to the filter")
		}
		page.Type("zone=eu-1 ord")
		page.Wait("the filter", `document.querySelectorAll("#nodes tr.node").length === 1 && `+shows("orders-1"))
		page.Wait("the count", `document.querySelector("#count").textContent === "1 of 4 nodes"`)
		page.Eval(`document.querySelector("#filter").value = ""; document.querySelector("#state").value = "rejected"; document.querySelector("#state").dispatchEvent(new Event("change"))`)
		page.Wait("the filter by state", `document.querySelectorAll("#nodes tr.node").length === 1 && `+shows("bad"))
		page.Eval(`document.querySelector("#state").value = ""; document.querySelector("#state").dispatchEvent(new Event("change"))`)

		r.put("orders-2", camel("orders-2", "http://127.0.0.1:"+freeport.String(t), `"service":"orders","zone":"eu-2","weight":"2"`))
		page.Wait("where a node is that nobody listens at", "!("+shows("127.0.0.2")+")")
		for range 20 {
			_, _ = ask("http://127.0.0.1:" + port)
		}
		page.Wait("a node that is ejected, by what and until when", shows("orders-", "unhealthy", "ejected until ", "2 errors in a row, the last one: no connection"))
		page.Wait("that in the journal", `/ejected\s*orders-/.test(document.querySelector("#journal").innerText)`)

		ground := `getComputedStyle(document.body).backgroundColor`
		page.Dark(false)
		light := page.Eval(ground)
		page.Dark(true)
		dark := page.Eval(ground)
		if light == dark {
			t.Errorf("the ground is %v, light and dark", light)
		}
		page.Eval(`document.querySelector("#theme").click()`)
		if page.Eval(ground) != light || page.Eval(`document.querySelector("#theme").getAttribute("aria-pressed")`) != "false" {
			t.Error("the button does not make it light")
		}
		for _, width := range []int{360, 768, 1280} {
			page.Size(width, 740, width < 700)
			if over := page.Eval(`document.documentElement.scrollWidth - innerWidth`); over.(float64) > 0 {
				t.Errorf("the page is %v pixels wider than a window of %d", over, width)
			}
		}
		// Whatever can be used can be reached, and has a name.
		if n := page.Eval(`[...document.querySelectorAll("button, input, select")].filter(e => !(e.labels?.length || e.textContent.trim())).length`); n != 0.0 {
			t.Errorf("%v controls have no name", n)
		}

		p.reload("", sites+"http://127.0.0.1:"+port+"/x {\n}\n")
		r.put("orders-4", camel("orders-4", "http://127.0.0.7:80", `"service":"orders"`))
		page.Wait("what comes after a reload of Caddy", shows("orders-4"))
		r.stop()
		page.Wait("that the registry is lost", `document.querySelector("#registries").innerText.includes("lost") && document.querySelector("#live").textContent.includes("1 of 1 registries lost")`)
		page.Wait("the fleet all the same", shows("orders-1"))
		r.restart()
		page.Wait("that the registry is back", `document.querySelector("#live").textContent === "live"`)
		if page.Eval("window.mark") != 1.0 {
			t.Error("the page was loaded again")
		}
		if title := page.Eval("document.title"); title != "Discovery" {
			t.Errorf("what a record says was run: the title is %v", title)
		}
		if problems := page.Problems(); len(problems) > 0 {
			t.Errorf("the browser complains: %q", problems)
		}
	})
}

// TestStatusPageOfAGreatFleet measures how long the page keeps its reader waiting.
func TestStatusPageOfAGreatFleet(t *testing.T) {
	const many = 10_000
	r := newKV(t)
	put := func(i, load int) {
		id := fmt.Sprintf("node-%05d", i)
		r.put(id, strings.Replace(camel(id, fmt.Sprintf("http://127.0.%d.%d:80", i/200, i%200+1), fmt.Sprintf(`"service":"service-%02d","zone":"eu-%d","version":"1.2.3"`, i%40, i%3)), "0.35", fmt.Sprintf("0.%d", load), 1))
	}
	for i := range many {
		put(i, 35)
	}
	port := freeport.String(t)
	start(t, "", statusSite(port, r, ""))
	page := chrometest.Open(t)
	page.Size(1280, 800, false)
	began := time.Now()
	page.Go("http://127.0.0.1:" + port + "/status")
	page.Wait("all of them", fmt.Sprintf(`document.querySelector("#count")?.textContent === "%d nodes"`, many))
	t.Logf("a page of %d nodes is complete after %v", many, time.Since(began).Round(time.Millisecond))

	// Up to a thousand heartbeats a second come in while someone types.
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		beat := time.NewTicker(time.Millisecond)
		defer beat.Stop()
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-beat.C:
				put(i%many, i%60+10)
			}
		}
	}()
	defer func() { close(stop); <-stopped }()
	took := page.Eval(`(async () => {
		const filter = document.querySelector("#filter"), times = [];
		for (let i = 0; i < 200; i++) {
			const text = ["n", "no", "node-0", "node-07", "zone=eu-1", "service-12 eu-2", "nobody", ""][i % 8];
			await new Promise(requestAnimationFrame);
			const began = performance.now();
			filter.value = text;
			filter.dispatchEvent(new Event("input"));
			document.body.offsetHeight; // lay it out
			times.push(performance.now() - began);
		}
		times.sort((a, b) => a - b);
		return times[100].toFixed(1) + " ms at the median, " + times[197].toFixed(1) + " ms at the 99th percentile";
	})()`)
	t.Logf("a key press in the filter takes %v while heartbeats come in", took)
	page.Wait("what the filter finds", `(() => { const f = document.querySelector("#filter"); f.value = "node-07777"; f.dispatchEvent(new Event("input")); return true })() && document.querySelector("#count").textContent === "1 of 10000 nodes"`)
	if rows := page.Eval(`document.querySelector("#filter").value = "", document.querySelector("#filter").dispatchEvent(new Event("input")), document.querySelectorAll("#nodes tr.node").length`); rows != 100.0 {
		t.Errorf("the page has %v rows at once, want 100", rows)
	}
	page.Eval(`document.querySelector("#more").click()`)
	page.Wait("more of them", `document.querySelectorAll("#nodes tr.node").length === 200`)
}

// TestScreenshot makes docs/status.png, if it is asked to.
func TestScreenshot(t *testing.T) {
	r := newKV(t)
	for i := range 14 {
		service, more := "orders", ""
		if i > 7 {
			service = "pay"
		}
		switch i {
		case 3:
			more = `,"state":"draining"`
		case 10:
			more = `,"weight":"0.1","version":"2.0.0-rc1"`
		case 12:
			more = `,"state":"maintenance"`
		}
		id := fmt.Sprintf("%s-%d", service, i%8+1)
		r.put(id, strings.Replace(camel(id, fmt.Sprintf("http://127.0.%d.%d:5001", i/8, i%8+10), fmt.Sprintf(`"service":"%s","zone":"eu-%d","lease":"30s"%s`, service, i%2+1, more)), "0.35", fmt.Sprintf("0.%02d", (i*37)%97), 1))
	}
	r.put("search-1", camel("search-1", "http://127.0.2.10:5001/api", `"service":"search"`))
	port := freeport.String(t)
	start(t, "", statusSite(port, r, ""))
	page := chrometest.Open(t)
	page.Size(1440, 980, false)
	page.Dark(false)
	page.Go("http://127.0.0.1:" + port + "/status")
	page.Wait("the fleet", shows("pay-6"))
	r.remove("orders-8")
	r.put("orders-5", camel("orders-5", "http://127.0.0.44:5001", `"service":"orders","zone":"eu-1","lease":"30s"`))
	page.Wait("the journal", `/orders-5/.test(document.querySelector("#journal li").innerText)`)
	page.Wait("what left", "!("+shows("orders-8")+")")
	png := page.Screenshot()
	if *screenshot {
		if err := os.WriteFile("../docs/status.png", png, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
