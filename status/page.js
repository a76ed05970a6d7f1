"use strict";
// Everything that comes from a registry was written by strangers: it reaches the
// page as text (textContent) and never as markup.
(() => {
  const byId = (id) => document.getElementById(id);
  const rowsAtOnce = 100, journalSize = 300;
  const kinds = { up: "good", draining: "warn", maintenance: "warn", held: "warn", restored: "warn", unhealthy: "bad", rejected: "bad",
    seen: "good", connected: "good", updated: "", left: "", lapsed: "bad", ejected: "bad", disconnected: "bad" };

  const nodes = new Map();  // key → node
  let order = [];           // nodes by group and id
  let unordered = false, dirty = false, shown = rowsAtOnce, first = true;
  let rows = new Map();     // key → row, of what is shown
  let registries = [];
  const hosts = new Map();  // registry and name → host
  let shownHosts = rowsAtOnce;

  const element = (name, className, text) => {
    const e = document.createElement(name);
    if (className) e.className = className;
    if (text !== undefined) e.textContent = text;
    return e;
  };
  const badge = (text) => element("span", "badge " + (kinds[text] ?? ""), text);
  const duration = (s) => s < 10 ? s.toFixed(1) + " s" : s < 600 ? Math.round(s) + " s" : s < 7200 ? Math.round(s / 60) + " min" : Math.round(s / 3600) + " h";
  const clock = (t) => new Date(t).toLocaleTimeString([], { hour12: false });
  const seconds = () => performance.now() / 1000;

  // ---- the fleet
  function keyOf(r, id, rejected) { return r + (rejected ? "!" : ":") + id; }

  function upsert(n) {
    n.key = keyOf(n.r, n.id, n.state === "rejected");
    // Services by name, what has none behind them, and what is rejected last.
    n.group = n.state === "rejected" ? "2" : n.service ? "0" + n.service : "1";
    n.ends = seconds() + n.lease_left;
    n.pairs = Object.keys(n.metadata).sort().filter((k) => !["service", "weight", "state", "lease", "instance"].includes(k)).map((k) => k + "=" + n.metadata[k]);
    n.hay = [n.id, n.service, n.endpoint, n.state, n.reason, n.registry, ...n.pairs].join("\n").toLowerCase();
    const old = nodes.get(n.key);
    n.isNew = !old && !first;
    if (!old || old.group !== n.group) unordered = true;
    // The same object goes on, so that the order of the others stands.
    if (old) Object.assign(old, n); else nodes.set(n.key, n);
    rows.delete(n.key);
  }

  function remove(key) { if (nodes.delete(key)) { unordered = true; rows.delete(key); } }

  function reorder() {
    order = [...nodes.values()].sort((a, b) =>
      a.group < b.group ? -1 : a.group > b.group ? 1 : a.id < b.id ? -1 : a.id > b.id ? 1 : a.key < b.key ? -1 : 1);
    unordered = false;
  }

  function rowOf(n) {
    const row = element("tr", n.isNew ? "node new" : "node");
    n.isNew = false;
    const cell = (label, className) => { const c = element("td", className); c.dataset.label = label; row.append(c); return c; };
    const id = element("th", "id", n.id); id.scope = "row"; row.append(id);
    if (registries.length > 1) id.append(element("span", "why", n.registry));
    const state = cell("State"); state.append(badge(n.state));
    const obstacles = [...new Set(n.sources.map((s) => s.reason))].filter((reason) => reason !== n.state);
    const why = n.reason || (obstacles.length && n.sources.every((s) => !s.eligible) ? "used by no source: " + obstacles.join(", ") : "");
    if (why) state.append(element("span", "why", why));
    cell("Endpoint").append(element("span", "endpoint", n.endpoint));
    const lease = cell("Lease", "lease");
    if (n.state !== "rejected") {
      const bar = element("progress"); bar.max = n.lease; bar.setAttribute("aria-hidden", "true");
      lease.append(bar, element("span"));
    }
    cell("Load", "load");
    cell("Weight").textContent = n.state === "rejected" ? "" : n.weight;
    const metadata = cell("Metadata");
    for (const p of n.pairs) metadata.append(element("span", "pair", p));
    return row;
  }

  function showLiveness(n, row, now) {
    if (n.state === "rejected") return;
    const left = Math.max(n.ends - now, 0);
    const bar = row.querySelector("progress"), text = bar.nextSibling;
    bar.value = left;
    const words = duration(left), load = n.load.toPrecision(2).replace(/\.?0+$/, "");
    if (text.textContent !== words) text.textContent = words;
    const cell = row.querySelector(".load");
    if (cell.textContent !== load) cell.textContent = load;
  }

  function render() {
    dirty = false;
    if (unordered) reorder();
    const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean), state = byId("state").value;
    const found = order.filter((n) => (!state || n.state === state) && words.every((w) => n.hay.includes(w)));
    const perService = new Map();
    for (const n of found) perService.set(n.group, (perService.get(n.group) || 0) + 1);
    const body = document.createDocumentFragment(), kept = new Map(), now = seconds();
    let service = null; // of the row above
    for (const n of found.slice(0, shown)) {
      if (n.group !== service) {
        service = n.group;
        const head = element("tr", "service"), title = element("th", "", service[0] === "2" ? "Rejected records" : service.slice(1) || "without a service");
        title.colSpan = 7; title.scope = "rowgroup";
        const count = perService.get(service);
        title.append(element("span", "", count + (count === 1 ? " node" : " nodes")));
        head.append(title); body.append(head);
      }
      const row = rows.get(n.key) || rowOf(n);
      showLiveness(n, row, now);
      kept.set(n.key, row); body.append(row);
    }
    rows = kept;
    document.querySelector("#nodes tbody").replaceChildren(body);
    byId("more").hidden = found.length <= shown;
    byId("more").textContent = "Show more (" + (found.length - shown) + " left)";
    const text = found.length === nodes.size ? nodes.size + " nodes" : found.length + " of " + nodes.size + " nodes";
    if (byId("count").textContent !== text) byId("count").textContent = text;
    renderHosts(words);
  }

  // ---- hosts
  function hostRow(h) {
    const row = element("tr"), name = element("th", "id", h.host); name.scope = "row";
    if (registries.length > 1) name.append(element("span", "why", h.registry));
    row.append(name);
    const cell = (label, text) => { const c = element("td", "", text); c.dataset.label = label; row.append(c); return c; };
    cell("Service", h.services.map((s) => s || "without a service").join(", "));
    const paths = cell("Paths");
    for (const p of h.paths) paths.append(element("span", "pair", p));
    cell("Nodes", h.left ? "left " + clock(h.left) : h.count);
    cell("Since", new Date(h.since).toLocaleString([], { hour12: false }));
    cell("Certificate", !h.certificate ? "" : h.certificate.until ? "until " + new Date(h.certificate.until).toLocaleString([], { hour12: false }) : "allowed");
    const conflicts = cell("Conflicts");
    for (const c of h.conflicts) {
      conflicts.append(element("span", "badge bad", "refused"), " " + (c.service || "without a service"));
      conflicts.append(element("span", "why", c.nodes + (c.nodes === 1 ? " node" : " nodes") + " since " + clock(c.since)));
    }
    return row;
  }

  function renderHosts(words) {
    byId("sites").hidden = hosts.size === 0;
    const found = [...hosts.values()].filter((h) => words.every((w) => h.hay.includes(w)))
      .sort((a, b) => b.conflicts.length - a.conflicts.length || (a.host < b.host ? -1 : a.host > b.host ? 1 : a.r - b.r));
    const body = document.createDocumentFragment();
    for (const h of found.slice(0, shownHosts)) body.append(h.row ??= hostRow(h));
    document.querySelector("#hosts tbody").replaceChildren(body);
    byId("more-hosts").hidden = found.length <= shownHosts;
    byId("more-hosts").textContent = "Show more (" + (found.length - shownHosts) + " left)";
  }

  // A storm of changes is drawn five times a second, a key press at once.
  let last = 0;
  function draw() {
    if (dirty) return;
    dirty = true;
    setTimeout(() => requestAnimationFrame(() => { last = performance.now(); render(); }), Math.max(0, last + 200 - performance.now()));
  }

  // ---- registries and journal
  function drawRegistries() {
    const body = document.createDocumentFragment();
    for (const r of registries) {
      const row = element("tr"), name = element("th", "id", r.registry); name.scope = "row";
      const health = element("td"), ok = r.connected && r.synced;
      health.append(element("span", "badge " + (ok ? "good" : r.connected || r.synced ? "warn" : "bad"), ok ? "watched" : r.connected ? "listing" : "lost"));
      if (!r.connected) health.append(element("span", "why", "for " + duration(r.stale_for) + (r.restored ? ", nodes restored" : "; the last known nodes stay in use")));
      const error = element("td", "", r.connected ? "" : r.last_error);
      row.append(name, health, element("td", "", r.nodes), element("td", "", r.last_event ? clock(r.last_event) : "never"), error);
      body.append(row);
    }
    document.querySelector("#registries tbody").replaceChildren(body);
  }

  function journal(changes) {
    const log = byId("journal");
    for (const c of changes.slice(-journalSize)) {
      const item = element("li"), time = element("time", "", clock(c.time));
      time.dateTime = c.time;
      item.append(time, badge(c.type));
      if (c.id) item.append(element("span", "id", c.id)); else item.append(element("span", "id", c.registry));
      item.append(element("span", "why", c.reason));
      log.prepend(item);
    }
    while (log.childElementCount > journalSize) log.lastElementChild.remove();
  }

  // ---- the stream
  const live = (text) => { if (byId("live").textContent !== text) byId("live").textContent = text; };
  const stream = new EventSource(location.pathname + "?stream");
  const on = (name, f) => stream.addEventListener(name, (e) => f(JSON.parse(e.data)));
  on("hello", () => { first = true; nodes.clear(); rows.clear(); order = []; registries = []; hosts.clear(); unordered = true; byId("journal").replaceChildren(); });
  on("nodes", (list) => { for (const n of list) upsert(n); draw(); });
  on("gone", (list) => { for (const g of list) remove(keyOf(g.r, g.id, false)); draw(); });
  on("rejected", (m) => {
    for (const key of [...nodes.keys()]) if (key.startsWith(m.r + "!")) remove(key);
    for (const n of m.nodes) upsert(n);
    draw();
  });
  on("hosts", (list) => {
    for (const h of list) {
      h.hay = [h.host, h.registry, ...h.services, ...h.paths, ...h.conflicts.map((c) => c.service)].join("\n").toLowerCase();
      hosts.set(h.r + ":" + h.host, h);
    }
    draw();
  });
  on("hosts_gone", (list) => { for (const g of list) hosts.delete(g.r + ":" + g.host); draw(); });
  on("liveness", (list) => {
    const now = seconds();
    for (const v of list) {
      const n = nodes.get(keyOf(v.r, v.id, false));
      if (!n) continue;
      if (n.state !== v.state || n.reason !== v.reason) {
        upsert({ ...n, load: v.load, lease_left: v.lease_left, state: v.state, reason: v.reason, sources: v.sources });
        draw();
        continue;
      }
      n.load = v.load; n.ends = now + v.lease_left;
      const row = rows.get(n.key);
      if (row) showLiveness(n, row, now);
    }
  });
  on("registries", (list) => {
    registries = list; drawRegistries();
    const lost = list.filter((r) => !r.connected).length;
    live(lost ? "live, " + lost + " of " + list.length + " registries lost" : "live");
  });
  on("journal", journal);
  on("ready", () => { first = false; draw(); });
  stream.onerror = () => live("connection lost, retrying");

  setInterval(() => { const now = seconds(); for (const [key, row] of rows) { const n = nodes.get(key); if (n) showLiveness(n, row, now); } }, 1000);

  // ---- what the reader does
  for (const s of ["up", "draining", "maintenance", "unhealthy", "held", "restored", "rejected"]) byId("state").append(element("option", "", s));
  const again = () => { shown = shownHosts = rowsAtOnce; render(); };
  byId("filter").addEventListener("input", again);
  byId("state").addEventListener("change", again);
  byId("filters").addEventListener("submit", (e) => e.preventDefault());
  byId("more").addEventListener("click", () => { shown += rowsAtOnce; render(); });
  byId("more-hosts").addEventListener("click", () => { shownHosts += rowsAtOnce; render(); });
  addEventListener("keydown", (e) => {
    if (e.key === "/" && !e.ctrlKey && !e.metaKey && !/INPUT|SELECT|TEXTAREA/.test(document.activeElement.tagName)) { e.preventDefault(); byId("filter").focus(); }
    if (e.key === "Escape" && document.activeElement === byId("filter")) { byId("filter").value = ""; again(); }
  });
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = () => { const d = document.documentElement.dataset.theme; return d ? d === "dark" : dark.matches; };
  const showTheme = () => byId("theme").setAttribute("aria-pressed", String(theme()));
  byId("theme").addEventListener("click", () => { document.documentElement.dataset.theme = theme() ? "light" : "dark"; showTheme(); });
  dark.addEventListener("change", showTheme);
  showTheme();
})();
