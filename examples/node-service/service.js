// An HTTP service that lists itself in a registry and leaves in good order: on SIGTERM
// it is first announced as draining, then its record goes, then its listener closes.
//
//   node service.js --registry nats://127.0.0.1:4222 --id orders-1 --service orders
import { createServer } from "node:http";
import { once } from "node:events";
import { loadavg, availableParallelism } from "node:os";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";
import { open } from "./registry.js";

const { values: options } = parseArgs({
  options: {
    registry: { type: "string", default: "nats://127.0.0.1:4222" }, // or redis://127.0.0.1:6379
    listen: { type: "string", default: "127.0.0.1:0" }, // which is also the endpoint that is announced
    id: { type: "string", default: "orders-1" }, // unique in the fleet
    service: { type: "string", default: "orders" },
    heartbeat: { type: "string", default: "10" }, // seconds; the lease is three of them
    drain: { type: "string", default: "2" }, // seconds for which it still answers after SIGTERM
  },
});
const heartbeat = Number(options.heartbeat) * 1000;
const lease = 3 * heartbeat;

const server = createServer((_, response) => {
  response.setHeader("X-Node", options.id);
  response.end(`hello from ${options.id}\n`);
});
const at = options.listen.lastIndexOf(":");
server.listen(Number(options.listen.slice(at + 1)), options.listen.slice(0, at));
await once(server, "listening"); // what cannot be reached must not be listed
const endpoint = `http://${options.listen.slice(0, at)}:${server.address().port}`;

const record = (state) => JSON.stringify({
  nodeId: options.id,
  endpoint,
  lastSeen: new Date().toISOString(), // for people: liveness comes from the registry's clock
  load: loadavg()[0] / availableParallelism(),
  metadata: { service: options.service, lease: `${lease}ms`, state },
  isOnline: true,
});

const stop = new AbortController();
process.once("SIGTERM", () => stop.abort());
process.once("SIGINT", () => stop.abort());

// A registry that is away costs heartbeats and nothing else: the proxies keep the list
// that they know, and the next heartbeat that succeeds writes the record anew.
async function attempt(what, work) {
  try {
    await work();
    return true;
  } catch (error) {
    console.error(`${what}: ${error.message}`);
    return false;
  }
}

const leave = () => process.exit(); // nothing was announced yet
stop.signal.addEventListener("abort", leave);
const registry = await open(options.registry, lease);
stop.signal.removeEventListener("abort", leave);
console.log(`${options.id} serves ${endpoint}`);
while (!stop.signal.aborted) {
  const written = await attempt("heartbeat", () => registry.put(options.id, record("up")));
  await sleep(written ? heartbeat : Math.min(heartbeat, 1000), undefined, { signal: stop.signal }).catch(() => {});
}

await attempt("draining", () => registry.put(options.id, record("draining")));
await sleep(Number(options.drain) * 1000); // no proxy sends anything new by now
await attempt("leaving", () => registry.remove(options.id));
server.close(); // what is under way may end
server.closeIdleConnections();
await registry.close();
