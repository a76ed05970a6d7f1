#!/usr/bin/env python3
"""An HTTP service that lists itself in Redis and leaves in good order.

On SIGTERM it is first announced as draining, then its record goes, then its
listener closes.

    python3 service.py --registry redis://127.0.0.1:6379 --id orders-1 --service orders
"""

import argparse
import datetime
import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import redis

KEY = "catga:nodes"  # the sorted set; a member is a record, its score when it was written


class Registry:
    """The records of a fleet in a sorted set of Redis."""

    def __init__(self, url: str, node_id: str):
        self.client = redis.Redis.from_url(url, decode_responses=True, socket_timeout=5, socket_connect_timeout=5)
        self.node_id = node_id
        self.ours = None  # the node's members, None while nobody knows

    def put(self, record: str) -> None:
        """Puts the record in the place of whatever stood there for the node."""
        seconds, microseconds = self.client.time()  # the registry's clock: ours may be wrong
        old, self.ours = self.members(), None  # whether this succeeds is not known if it fails
        with self.client.pipeline(transaction=True) as both:
            if old:
                both.zrem(KEY, *old)
            both.zadd(KEY, {record: seconds * 1000 + microseconds // 1000})
            both.execute()
        self.ours = [record]

    def remove(self) -> None:
        if old := self.members():
            self.client.zrem(KEY, *old)

    def members(self) -> list[str]:
        """Returns the node's members: one, or more where an earlier process crashed."""
        if self.ours is None:
            self.ours = [member for member in self.client.zrange(KEY, 0, -1) if self.is_ours(member)]
        return self.ours

    def is_ours(self, member: str) -> bool:
        try:
            return json.loads(member)["nodeId"] == self.node_id
        except (ValueError, TypeError, KeyError):
            return False  # of a writer with another spelling


def serve(node_id: str, listen: str) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            body = f"hello from {node_id}\n".encode()
            self.send_response(200)
            self.send_header("X-Node", node_id)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    host, _, port = listen.rpartition(":")
    server = ThreadingHTTPServer((host, int(port)), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main() -> None:
    parser = argparse.ArgumentParser(description="A service that lists itself in Redis.")
    parser.add_argument("--registry", default="redis://127.0.0.1:6379")
    parser.add_argument("--listen", default="127.0.0.1:0", help="which is also the endpoint that is announced")
    parser.add_argument("--id", default="orders-1", help="unique in the fleet")
    parser.add_argument("--service", default="orders")
    parser.add_argument("--heartbeat", type=float, default=10, help="seconds; the lease is three of them")
    parser.add_argument("--drain", type=float, default=2, help="seconds for which it still answers after SIGTERM")
    options = parser.parse_args()

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    server = serve(options.id, options.listen)  # what cannot be reached must not be listed
    host, port = server.server_address[:2]
    registry = Registry(options.registry, options.id)

    def announce(state: str) -> bool:
        # lastSeen is for people: liveness comes from the registry's clock.
        record = {
            "nodeId": options.id,
            "endpoint": f"http://{host}:{port}",
            "lastSeen": datetime.datetime.now(datetime.timezone.utc).isoformat(),
            "load": os.getloadavg()[0] / (os.cpu_count() or 1),
            "metadata": {"service": options.service, "lease": f"{3 * options.heartbeat}s", "state": state},
            "isOnline": True,
        }
        return attempt(state, lambda: registry.put(json.dumps(record)))

    print(f"{options.id} serves http://{host}:{port}", flush=True)
    # A registry that is away costs heartbeats and nothing else: the proxies keep the
    # list that they know.
    while not stop.is_set():
        stop.wait(options.heartbeat if announce("up") else min(options.heartbeat, 1))

    announce("draining")
    threading.Event().wait(options.drain)  # no proxy sends anything new by now
    attempt("leaving", registry.remove)
    server.shutdown()


def attempt(what: str, work) -> bool:
    try:
        work()
        return True
    except redis.RedisError as error:
        print(f"{what}: {error}", file=sys.stderr, flush=True)
        return False


if __name__ == "__main__":
    main()
