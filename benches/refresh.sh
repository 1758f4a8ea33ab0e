#!/bin/sh
# Runs every bench and puts its tables into docs/benchmarks.md. On a machine with nothing else to do: about 40 minutes.
# PEER_PYTHON names a Python that has the peers (default: what benches/peers/install.sh made).
set -eu
cd "$(dirname "$0")/.."
for name in ${1:-ring attach memory lane cache processes20 managers large-model throughput mixed clients16 accuracy peers}; do
    set -- "$name" --into docs/benchmarks.md
    case "$name" in
    processes20 | managers | large-model | throughput | mixed | clients16 | accuracy | peers) [ -z "${PEER_PYTHON:-}" ] || set -- "$@" --python "$PEER_PYTHON" ;;
    esac
    [ "$name" != peers ] || set -- "$@" --chart docs/peers.svg --cpu-paths avx512-vnni,avx512,avx2,portable
    echo "== $name" >&2
    cargo run --quiet --release -p benches -- "$@"
done
