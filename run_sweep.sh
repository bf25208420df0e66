#!/usr/bin/env bash
# The paper's 48 settings: 2 dictionaries x 3 k x { plain crosscoder with and without L1; DFC with an
# exclusive share of 3, 5, 10 % for each model x exclusive latents penalised or free }. All are
# trained, on activations collected once a seed, then evaluated, then put into one table.
#
#   bash run_sweep.sh                       the same grid scaled to the toy pair, 2 CPU cores
#   PRESET=qwen bash run_sweep.sh           the paper's sizes on the paper's models (a GPU)
#   SEEDS="0 1 2" bash run_sweep.sh         with seed noise: an effect means something beside it
#   OUT=runs/published bash run_sweep.sh --recipe paper     what follows goes to every dfc.py
#
# On several GPUs or machines each process takes its share, on a GPU of its own. Whoever ends last
# prints the table; the first command above prints it again.
#
#   torchrun --no-python --nproc-per-node 4 bash run_sweep.sh     or: srun bash run_sweep.sh
#   sbatch --array 0-3 run_sweep.sh
#
# Stop it anywhere: what is done is not done again, and settings of another sweep in the same OUT are
# refused. Others: DICTS, KS, ROWS (test rows of each kind, of what is not evaluated yet).
set -euo pipefail

# the project: where this file lies, or for a copy that SLURM made, where it was submitted
for home in "$(dirname "$0")" "${SLURM_SUBMIT_DIR:-.}"; do
  if [ -f "$home/dfc.py" ]; then cd "$home"; break; fi
done

# this is process `rank` of `world`: of torchrun, or of SLURM's array and tasks
local=${LOCAL_RANK:-${SLURM_LOCALID:-0}}
tasks=${SLURM_NTASKS:-1}
rank=$(( (${SLURM_ARRAY_TASK_ID:-0} - ${SLURM_ARRAY_TASK_MIN:-0}) * tasks + ${SLURM_PROCID:-0} ))
world=$(( ${SLURM_ARRAY_TASK_COUNT:-1} * tasks ))
if [ -n "${RANK:-}" ]; then rank=$RANK world=$WORLD_SIZE; fi
IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd,)}"
if (( ${#gpus[@]} > 1 )); then export CUDA_VISIBLE_DEVICES=${gpus[local % ${#gpus[@]}]}; fi

PRESET=${PRESET:-tiny} SEEDS=${SEEDS:-0} ROWS=${ROWS:-50}
OUT=${OUT:-runs/sweep-$PRESET}
case $PRESET in
  tiny)  DICTS=${DICTS:-"512 1024"}   KS=${KS:-"4 8 16"} ;;
  qwen)  DICTS=${DICTS:-"8192 16384"} KS=${KS:-"45 90 160"} ;;
  *) echo "run_sweep.sh: no sweep for PRESET=$PRESET: tiny or qwen" >&2; exit 2 ;;
esac

runs=() mine=()
train() {  # name, then what sets the setting apart; only this process's share is trained
  local run=$OUT/seed$seed/$1 i=${#runs[@]}; shift
  runs+=("$run")
  (( i % world == rank )) || return 0
  python dfc.py --preset "$PRESET" --dict "$dict" --k "$k" --seed "$seed" --out "$run" "$@"
  mine+=("$run")
}

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

evaluated() { grep -qs '"evaluation"' "$1/metrics.json"; }
todo=()
for run in "${mine[@]}"; do evaluated "$run" || todo+=("$run"); done
if [ ${#todo[@]} -gt 0 ]; then
  python eval_toolcall.py --rows "$ROWS" "${todo[@]}" >> "$OUT/tables-$rank.txt"
fi

# the joint table, by whoever ends last
for run in "${runs[@]}"; do evaluated "$run" || { echo "process $rank of $world is done"; exit 0; }; done
table=$(python extras/table.py "${runs[@]}")
echo "$table" | tee "$OUT/table.txt"
