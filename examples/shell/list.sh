#!/bin/sh
# Lists a service that runs already, until it is interrupted: the record is written again
# and again, then announced as draining, then removed.
#
#   ./list.sh nats://127.0.0.1:4222  orders-1 http://10.0.0.7:5001 orders
#   ./list.sh redis://127.0.0.1:6379 orders-1 http://10.0.0.7:5001 orders
set -eu

[ $# -eq 4 ] || { echo "usage: $0 <nats://…|redis://…> <id> <endpoint> <service>" >&2; exit 2; }
registry=$1 id=$2 endpoint=$3 service=$4
heartbeat=${HEARTBEAT:-10} # seconds; the lease is three of them
drain=${DRAIN:-2}          # seconds for which the service still answers after it has said so
lease=$((3 * heartbeat))

# What stands between quotes in the record must hold none.
case $id$endpoint$service in
*[!-A-Za-z0-9._:/=@%+]*) echo "want letters, digits and - . _ : / = @ % + in id, endpoint and service" >&2; exit 2 ;;
esac

record() { # <state>
	printf '{"nodeId":"%s","endpoint":"%s","lastSeen":"%s","load":0,"metadata":{"service":"%s","lease":"%ss","state":"%s"}}' \
		"$id" "$endpoint" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$service" "$lease" "$1"
}

case $registry in
nats://*) # a bucket of JetStream KV
	put() { nats --server "$registry" kv put catga_nodes "node.$id" "$(record "$1")" >/dev/null; }
	remove() { nats --server "$registry" kv del catga_nodes "node.$id" --force >/dev/null; }
	;;
redis://* | rediss://*) # a key for each node: registry redis { layout keys }
	# redis-cli ends with 0 where the server refuses.
	redis() { answer=$(redis-cli -e -u "$registry" "$@") || { echo "$answer" >&2; return 1; }; }
	put() { redis set "catga:nodes:$id" "$(record "$1")" EX "$lease"; }
	remove() { redis del "catga:nodes:$id"; }
	;;
*)
	echo "$registry: want nats:// or redis://" >&2
	exit 2
	;;
esac

stopped=
trap 'stopped=yes; kill "${sleeping:-}" 2>/dev/null || :' INT TERM

# A registry that is away costs heartbeats and nothing else.
while [ -z "$stopped" ]; do
	pause=$heartbeat
	put up || pause=1
	[ -n "$stopped" ] && break
	sleep "$pause" &
	sleeping=$!
	wait "$sleeping" || :
done

put draining || :
sleep "$drain" # no proxy sends anything new by now
remove || :
