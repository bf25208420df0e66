#!/usr/bin/env bash
# What a release has to pass, in a fresh clone and a fresh virtual environment (an hour on 2 cores):
# every command of the README that needs neither the hub nor a GPU; kill -9 at random moments of
# collecting and training, evaluation, grid and sweep, each time with the same result as an
# undisturbed run; and a full disk in each of them.
#
#   bash extras/release_check.sh [kills]      of each of the four, default 5
set -euo pipefail

kills=${1:-5}
work=$(mktemp -d)
trap 'umount "$work/small" 2> /dev/null || true; rm -rf "$work"' EXIT
git clone --quiet "$(git rev-parse --show-toplevel)" "$work/dfc"
cd "$work/dfc"
python3 -m venv .venv
. .venv/bin/activate
pip install --quiet -r requirements.txt

fail() { tail -n 5 err.txt; echo "release check failed: $1"; exit 1; }

echo "== every command of the README"
sed -n 's/^    \(.*\)$/\1/p' README.md | sed 's/  *#.*//; s/.*&& //' | grep -E '^(python|bash)' |
  grep -v -E 'preset paper|outputs.jsonl|sweep|plot.py|release_check' |
  awk '!seen[$0]++' > commands.txt
while read -r command; do
  SECONDS=0
  bash -c "$command" < /dev/null > out.txt 2> err.txt || fail "$command"
  echo "-- $SECONDS s   $command"
done < commands.txt

# What is killed: the run folder is the argument.
train() { exec python dfc.py --out "$1" --resume; }
evaluate() { exec python eval_toolcall.py --rows 60 "$1"; }
grid() { exec python steer.py --grid --rows 10 "$1"; }
sweep() { ROWS=20 DICTS=512 KS=8 OUT=$1 exec bash run_sweep.sh --steps 100 --n-texts 200; }

# Results of a folder without what differs from run to run: seconds, names and paths; answers too.
results() {
  python - "$1" <<'PY'
import json, pathlib, sys, zlib
def plain(x):
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items() if k not in ("seconds", "out", "run", "resume")}
    return [plain(v) for v in x] if isinstance(x, list) else x
for f in sorted(pathlib.Path(sys.argv[1]).rglob("metrics.json")):
    kept = [zlib.crc32(g.read_bytes()) for name in ("model.safetensors", "eval.jsonl")
            if (g := f.parent / name).exists()]
    print(f.parent.relative_to(sys.argv[1]), kept, plain(json.loads(f.read_text())))
PY
}

echo "== kill -9"
mkdir -p runs/calm
for stage in train evaluate grid sweep; do
  calm=runs/calm/run
  if [ $stage = sweep ]; then calm=runs/calm/sweep; fi
  cp -r runs/calm "runs/before-$stage"
  SECONDS=0
  ("$stage" $calm) > /dev/null 2> err.txt || fail "$stage"
  took=$SECONDS hit=0 expected=$(results $calm)
  [ -n "$expected" ] || fail "$stage: no results"
  for round in $(seq "$kills"); do
    rm -rf runs/wild
    cp -r "runs/before-$stage" runs/wild
    wild=runs/wild/${calm##*/}
    set -m                              # a group of its own: what it started dies with it
    ("$stage" "$wild") > /dev/null 2>&1 &
    set +m
    sleep "$(python -c "import random; print(random.uniform(1, $took))")"
    if kill -9 -- -$! 2> /dev/null; then hit=$((hit + 1)); fi
    wait $! 2> /dev/null || true
    ("$stage" "$wild") > /dev/null 2> err.txt || fail "$stage, again after a kill"
    [ "$(results "$wild")" = "$expected" ] || fail "$stage: another result"
  done
  echo "-- $stage: $kills kills, $hit while it ran (of $took s): the same result each time"
done

echo "== a full disk"
mkdir "$work/small"
for stage in train evaluate grid sweep; do
  if ! mount -t tmpfs -o size=64m tmpfs "$work/small" 2> /dev/null; then
    echo "-- left out: no right to mount a small disk"
    echo "release check passed, but for full disks"
    exit
  fi
  cp -r "runs/before-$stage/." "$work/small"
  dd if=/dev/zero of="$work/small/full" bs=4k 2> /dev/null || true
  before=$(results "$work/small") status=0
  ("$stage" "$work/small/run") > /dev/null 2> err.txt || status=$?
  [ "$status" = 2 ] || fail "$stage on a full disk: exit status $status"
  [ "$before" = "$(results "$work/small")" ] || fail "$stage on a full disk: something was lost"
  [ -z "$(find "$work/small" -name '*.part*')" ] || fail "$stage on a full disk: a part stayed"
  echo "-- $stage: $(tail -n 1 err.txt | tr -d '\r')"
  umount "$work/small"
done
echo "release check passed"
