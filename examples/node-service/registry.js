// Where the records are kept. Each registry has put(id, record), remove(id) and close().
import { connect } from "@nats-io/transport-node";
import { Kvm } from "@nats-io/kv";
import { Redis } from "ioredis";

// open connects to a registry by its URL. A record that is not written again for a lease,
// in milliseconds, counts as that of a crashed node.
export async function open(url, lease) {
  const { protocol } = new URL(url);
  switch (protocol) {
    case "nats:":
      return openKV(url);
    case "redis:":
    case "rediss:":
      return openRedis(url, lease);
  }
  throw new Error(`${url}: want nats://, redis:// or rediss://`);
}

// openKV uses a bucket of NATS JetStream: a node is the key node.<id>.
async function openKV(url, bucket = "catga_nodes") {
  const connection = await connect({
    servers: url,
    waitOnFirstConnect: true,
    maxReconnectAttempts: -1,
  });
  let opened;
  const nodes = async () => {
    opened ??= await new Kvm(connection).open(bucket)
      .then(async (kv) => (await kv.status(), kv)) // throws if there is no such bucket
      .catch(() => new Kvm(connection).create(bucket, { history: 10, ttl: 5 * 60_000 }));
    return opened;
  };
  const key = (id) => {
    if (!/^[-/_=.a-zA-Z0-9]+$/.test(id)) throw new Error(`${id} cannot be in a key; want letters, digits and - _ = / .`);
    return `node.${id}`;
  };
  return {
    put: async (id, record) => (await nodes()).put(key(id), record),
    remove: async (id) => (await nodes()).delete(key(id)),
    close: () => connection.close(),
  };
}

// openRedis uses one key for each node, which expires with the lease: what the
// Caddyfile calls "layout keys".
async function openRedis(url, lease, prefix = "catga:nodes:") {
  const client = new Redis(url, { maxRetriesPerRequest: 1 });
  client.on("error", (error) => console.error(`registry: ${error.message}`));
  return {
    put: (id, record) => client.set(prefix + id, record, "PX", lease),
    remove: (id) => client.del(prefix + id),
    close: () => client.disconnect(),
  };
}
