#!/usr/bin/env bash
# What a release has to pass, in a fresh clone and a fresh virtual environment (an hour on 2 cores):
# every command of the README that needs neither the hub nor a GPU; kill -9 at random moments of
# each program, with the same result as an undisturbed run; and a disk that is full.
#
#   bash extras/release_check.sh [rounds]      kills of the chain and of the sweep, default 10 each
set -euo pipefail

rounds=${1:-10}
work=$(mktemp -d)
trap 'rm -rf "$work"; if [ -n "${mounted:-}" ]; then umount "$mounted"; fi' EXIT
git clone --quiet "$(git rev-parse --show-toplevel)" "$work/dfc"
cd "$work/dfc"
python3 -m venv .venv
. .venv/bin/activate
pip install --quiet -r requirements.txt

echo "== every command of the README"
sed -n 's/^    \(.*\)$/\1/p' README.md | sed 's/  *#.*//' | grep -E '^(python|bash)' |
  grep -v -E 'preset paper|outputs.jsonl|sweep|--layers 36' > commands.txt
while read -r command; do
  echo "-- $command"
  bash -c "$command" < /dev/null > out.txt 2> err.txt || { tail -n 5 err.txt; exit 1; }
done < commands.txt

# Kill a command at random moments, again and again, then let it end: "$1" is what it has to leave.
killed() {
  local result=$1 undisturbed=$2 round
  shift 2
  for round in $(seq "$rounds"); do
    setsid "$@" > /dev/null 2>&1 &      # a group of its own: what it started dies with it
    sleep "$((RANDOM % 20)).$((RANDOM % 10))"
    kill -9 -- -$! 2> /dev/null || true
    wait $! 2> /dev/null || true
  done
  "$@" > /dev/null 2>&1
  python - "$result" "$undisturbed" <<'PY'
import json, sys
def plain(x):
    """Results without what differs from run to run: seconds and paths."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items() if k not in ("seconds", "out", "run", "resume",
                                                               "postfix", "crosscoder")}
    return [plain(v) for v in x] if isinstance(x, list) else x
a, b = (plain(json.load(open(f))) for f in sys.argv[1:])
sys.exit(0 if a == b else f"{sys.argv[1]} differs from {sys.argv[2]}")
PY
  echo "-- survived $rounds kills: $*"
}

echo "== kill -9"
python dfc.py --out runs/calm/run > /dev/null 2>&1
python eval_toolcall.py --rows 60 runs/calm/run > /dev/null 2>&1
python steer.py --grid --rows 10 runs/calm/run > /dev/null 2>&1
killed runs/wild/run/metrics.json runs/calm/run/metrics.json bash -c '
  set -e; exec 2> /dev/null
  python dfc.py --out runs/wild/run --resume
  python eval_toolcall.py --rows 60 runs/wild/run
  python steer.py --grid --rows 10 runs/wild/run'
sweep=(env ROWS=20 DICTS=512 KS=8 bash run_sweep.sh --steps 100 --n-texts 200)
OUT=runs/calm-sweep "${sweep[@]}" > /dev/null 2>&1
OUT=runs/wild-sweep killed runs/wild-sweep/seed0/cc-D512-k8/metrics.json \
  runs/calm-sweep/seed0/cc-D512-k8/metrics.json "${sweep[@]}"

echo "== a full disk"
mounted=$work/small
mkdir "$mounted"
if mount -t tmpfs -o size=3m tmpfs "$mounted" 2> /dev/null; then
  status=0
  python dfc.py --out "$mounted/run" > /dev/null 2> err.txt || status=$?
  [ "$status" = 2 ] || { echo "full disk: exit status $status"; exit 1; }
  tail -n 1 err.txt
  [ -z "$(find "$mounted" -name '*.part*')" ] || { echo "half-written files stayed"; exit 1; }
else
  mounted=
  echo "-- left out: no right to mount a small disk"
fi
echo "release check passed"
