#!/usr/bin/env bash
# The paper's 48 settings by our recipe: 2 dictionaries x 3 k x { plain crosscoder with and without
# L1; DFC with an exclusive share of 3, 5, 10 % x exclusive latents penalised or free }. All are
# trained, on activations collected once, then all evaluated, with models loaded once.
#
#   bash run_sweep.sh                        the same grid scaled to the embedded pair, 2 CPU cores
#   PRESET=paper bash run_sweep.sh           the paper's sizes and names on the real pair (a GPU)
#   SEEDS="0 1 2" bash run_sweep.sh          every setting again with other seeds
#   bash run_sweep.sh --list                 only print a line for each: it trains and evaluates
#   OUT=runs/published bash run_sweep.sh --recipe paper    what follows goes to every dfc.py
#
# Stop it anywhere: what is whole is skipped next time, what is not is continued. The table of what
# is evaluated, at any time:  python extras/table.py runs/sweep-tiny/*/*
set -euo pipefail

PRESET=${PRESET:-tiny}
SEEDS=${SEEDS:-0}
OUT=${OUT:-runs/sweep-$PRESET}
ROWS=${ROWS:-200}          # test rows an evaluation draws; the paper's has 100
PYTHON=${PYTHON:-python}
case $PRESET in
  tiny)  DICTS=${DICTS:-"512 1024"}   KS=${KS:-"4 8 16"} ;;
  paper) DICTS=${DICTS:-"8192 16384"} KS=${KS:-"45 90 160"} ;;
  *) echo "run_sweep.sh: no sweep for PRESET=$PRESET: tiny or paper" >&2; exit 2 ;;
esac

list=no
if [ "${1:-}" = --list ]; then list=yes; shift; fi

# One line a setting: its published name, then what sets it apart.
settings() {
  local dict k share size flags
  for dict in $DICTS; do
    size=D$dict
    if [ "$dict" -ge 8192 ]; then size=D$((dict / 1024))k; fi
    for k in $KS; do
      echo "cc-$size-k$k --dict $dict --k $k --excl 0"
      echo "cc-$size-nol1-k$k --dict $dict --k $k --excl 0 --l1-shared 0"
      for share in 3 5 10; do
        flags="--dict $dict --k $k --excl $(printf .%02d "$share")"
        echo "dfc-$size-excl$share-k$k $flags"
        echo "dfc-$size-excl$share-freeexcl-k$k $flags --l1-excl 0"
      done
    done
  done
}

# One line a run: its folder, then the command that trains it.
commands() {
  local seed name flags run
  for seed in $SEEDS; do
    while read -r name flags; do
      run=$OUT/seed$seed/$name
      echo "$run $PYTHON dfc.py --preset $PRESET $flags --seed $seed --out $run --resume $*"
    done < <(settings)
  done
}

cd "$(dirname "$0")"
if [ $list = yes ]; then
  commands "$@" | while read -r run command; do
    echo "$command && $PYTHON eval_toolcall.py --rows $ROWS $run"
  done
  exit
fi
while read -r _ command; do $command < /dev/null; done < <(commands "$@")
for seed in $SEEDS; do
  runs=$(settings | while read -r name _; do echo "$OUT/seed$seed/$name"; done)
  $PYTHON eval_toolcall.py --rows "$ROWS" $runs > "$OUT/seed$seed/tables.txt"
done
$PYTHON extras/table.py "$OUT"/seed*/*
