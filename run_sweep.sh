#!/usr/bin/env bash
# The paper's 48 settings: 2 dictionaries x 3 k x { plain crosscoder with and without L1; DFC with an
# exclusive share of 3, 5, 10 % for each model x exclusive latents penalised or free }. All are
# trained, on activations collected once a seed, then evaluated, then put into one table.
#
#   bash run_sweep.sh                       the same grid scaled to the embedded pair, 2 CPU cores
#   PRESET=paper bash run_sweep.sh          the paper's sizes on the real pair (a GPU)
#   SEEDS="0 1 2" bash run_sweep.sh         with the seed noise: an effect means something beside it
#   OUT=runs/published bash run_sweep.sh --recipe paper     what follows goes to every dfc.py
#
# Stop it anywhere: what is done is not done again, and settings of another sweep in the same OUT are
# refused. Others: DICTS, KS, ROWS (test rows of each kind, of what is not evaluated yet).
set -euo pipefail
cd "$(dirname "$0")"

PRESET=${PRESET:-tiny} SEEDS=${SEEDS:-0} ROWS=${ROWS:-50}
OUT=${OUT:-runs/sweep-$PRESET}
case $PRESET in
  tiny)  DICTS=${DICTS:-"512 1024"}   KS=${KS:-"4 8 16"} ;;
  paper) DICTS=${DICTS:-"8192 16384"} KS=${KS:-"45 90 160"} ;;
  *) echo "run_sweep.sh: no sweep for PRESET=$PRESET: tiny or paper" >&2; exit 2 ;;
esac

train() {  # name, then what sets the setting apart
  local run=$OUT/seed$seed/$1; shift
  runs+=("$run")
  python dfc.py --preset "$PRESET" --dict "$dict" --k "$k" --seed "$seed" --out "$run" "$@"
}

runs=() todo=()
for seed in $SEEDS; do for dict in $DICTS; do for k in $KS; do
  size=D$dict
  if [ $((dict % 8192)) = 0 ]; then size=D$((dict / 1024))k; fi  # as the paper names them
  train "cc-$size-k$k" --excl 0 --excl-b 0 "$@"
  train "cc-$size-nol1-k$k" --excl 0 --excl-b 0 --l1-shared 0 "$@"
  for share in 3 5 10; do
    excl="--excl $(printf .%02d $share) --excl-b $(printf .%02d $share)"
    train "dfc-$size-excl$share-k$k" $excl "$@"
    train "dfc-$size-excl$share-freeexcl-k$k" $excl --l1-excl 0 "$@"
  done
done; done; done
for run in "${runs[@]}"; do grep -q '"evaluation"' "$run/metrics.json" || todo+=("$run"); done
[ ${#todo[@]} = 0 ] || python eval_toolcall.py --rows "$ROWS" "${todo[@]}" >> "$OUT/tables.txt"
python extras/table.py "${runs[@]}"
