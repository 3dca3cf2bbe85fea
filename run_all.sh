#!/usr/bin/env bash
# The experiment: {fc+layer4, fc+layer3+layer4} x {10, 50} epochs, the table and the verdict. The
# rates are constant, so the first ten epochs of fifty are the run of ten: two trainings leave four.
#
#     bash run_all.sh                                    # CIFAR-10, ImageNet weights
#     bash run_all.sh --demo                             # drawn pictures, no download, 3 minutes
#     bash run_all.sh --data-dir /data --batch-size 256  # what train.py takes goes to every run
#     bash run_all.sh --out /tmp/results                 # default: results, or results/demo
#     bash run_all.sh --tag smooth                       # your recipe beside the published one
#     bash run_all.sh                                    # the same again: goes on where it stopped
#     SEEDS="0 1 2" WITH_FC=1 bash run_all.sh            # three seeds, and the fc-only baseline
#     GPUS="0 1" SEEDS="0 1 2" bash run_all.sh           # two runs at a time, one on each GPU
#     bash run_all.sh --list                             # print its train.py commands, a line each
set -euo pipefail

refuse() {
    echo "run_all.sh: error: $1" >&2
    exit 2
}

out= demo= list= tag=() preset=() extra=() stages=(layer4 "layer3 layer4") with_fc=${WITH_FC:-0}
while [ $# -gt 0 ]; do
    case "$1" in
        --demo) demo=yes with_fc=1 ;;
        --list) list=yes ;;
        --out) out=${2:-}; [ "$out" ] || refuse "--out needs a folder"; shift ;;
        --tag) tag=(--tag "${2:-}"); [ "${2:-}" ] || refuse "--tag needs a name"; shift ;;
        --out=*) out=${1#--out=} ;;
        --tag=*) tag=(--tag "${1#--tag=}") ;;
        --unfreeze* | --epochs* | --seed*)
            refuse "the runs set ${1%%=*}; for one run use train.py, for seeds SEEDS=\"0 1 2\"" ;;
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
        *) extra+=("$1") ;;
    esac
    shift
done
out=${out:-results${demo:+/demo}}
[ "$with_fc" = 0 ] || stages=("" "${stages[@]}")
[ -z "$demo" ] || [ -z "$list" ] || refuse "--demo needs its pretraining first: no --list of it"

# Slurm runs a copy of this script, out of a folder of its own.
here=$(dirname "$0")
[ -e "$here/setup.sh" ] || here=${SLURM_SUBMIT_DIR:-$here}
[ -e "$here/setup.sh" ] || refuse "it needs the files beside it, and Slurm runs a copy: submit it \
from its own folder, or with sbatch --wrap 'bash FOLDER/run_all.sh'; --list is for job arrays"
. "$here/setup.sh" numpy matplotlib

# Everything runs in the background, so that a signal to this script is handled at once: what runs
# gets a SIGTERM, and its last words are waited for.
started() {
    "$@" &
    wait $!
}
stop() {
    trap "" INT TERM
    for job in $(jobs -p); do
        kill -TERM -- "-$job" 2>/dev/null || kill -TERM "$job" 2>/dev/null || true
    done
    wait || true
    echo "run_all.sh: stopped; the same command goes on" >&2
    exit "$1"
}
trap "stop 130" INT
trap "stop 143" TERM

# The demo's pretrained network: all of a ResNet18 learns ten other classes of drawn pictures.
if [ "$demo" ]; then
    preset=(--dataset synthetic --weights "$out/pretrained.pt" --image-size 32)
    preset+=(--train-size 200 --batch-size 50)
    if [ ! -e "$out/pretrained.pt" ]; then
        started "$python" "$here/train.py" ${extra[@]+"${extra[@]}"} \
            --dataset synthetic-other --weights none --image-size 32 --train-size 2000 \
            --batch-size 50 --unfreeze stem layer{1,2,3,4} --lr {stem,layer{1,2,3,4}}=1e-3 \
            --epochs 5 --out "$out/pretraining" --resume
        cp "$(ls -t "$out"/pretraining/*/epoch5.pt | head -1)" "$out/pretrained.pt"
    fi
fi

# The runs, a command each, quoted as bash would have them.
commands=()
for seed in ${SEEDS:-0}; do
    for names in "${stages[@]}"; do
        # shellcheck disable=SC2086  # the stages are separate words
        commands+=("$(printf '%q ' "$python" "$here/train.py" --unfreeze $names --epochs 10 50 \
            --seed "$seed" --out "$out" --resume \
            ${tag[@]+"${tag[@]}"} ${preset[@]+"${preset[@]}"} ${extra[@]+"${extra[@]}"})")
    done
done
if [ "$list" ]; then
    printf '%s\n' "${commands[@]}"
    exit
fi

# For each of GPUS a worker, which takes the next run that none has taken.
worker() {
    set +m               # what it starts belongs to its group of processes
    trap "exit 143" TERM # bash does this when the run has ended
    for i in "${!commands[@]}"; do
        mkdir "$claims/$i" 2>/dev/null || continue
        echo "run $i, on GPU $1: ${commands[i]}"
        export RUNS_ON_GPU=$(tr ' ' '\n' <<<"$GPUS" | grep -cx -- "$1") # which share it
        CUDA_VISIBLE_DEVICES=$1 bash -c "exec ${commands[i]}" 2>&1 | log "$i" ||
            printf 'failed: see %s\n    %s\n' "$out/run$i.log: ${commands[i]}" \
                "$(tail -n 1 "$out/run$i.log")" >>"$claims/failed"
    done
}
# Every line goes to a file and, with the run's number, to the terminal, a stopped run's last too.
log() (
    trap "" INT TERM
    tee "$out/run$1.log" | awk -v run="run $1:" '{ print run, $0; fflush() }'
)

# One GPU that has room for two runs trains two at a time: the features of both take 33 GB.
if [ ! "${GPUS+set}" ] && [ ! "$demo" ] && [[ " ${extra[*]-} " != *" --device"* ]]; then
    gpu=${CUDA_VISIBLE_DEVICES-0} gpu=${gpu%%,*} # none, if it is set to nothing
    ask="--query-gpu=memory.free --format=csv,noheader,nounits"
    # shellcheck disable=SC2086
    free=$(nvidia-smi -i "$gpu" $ask 2>/dev/null) || free=0
    if [[ $free =~ ^[0-9]+$ ]] && [ "$free" -ge 50000 ]; then # MB
        GPUS="$gpu $gpu"
        echo "two runs at a time, for which GPU $gpu has room (one at a time: GPUS=$gpu)"
    fi
fi
if [ "${GPUS:-}" ]; then
    export CUDA_DEVICE_ORDER=${CUDA_DEVICE_ORDER:-PCI_BUS_ID} # as nvidia-smi counts them
    mkdir -p "$out"
    claims=$(mktemp -d)
    trap 'rm -r "$claims"' EXIT
    export LOCAL_WORLD_SIZE=$(wc -w <<<"$GPUS") # which share the host's memory
    set -m # a group of processes for each worker, so that they can be stopped together
    for gpu in $GPUS; do
        worker "$gpu" &
    done
    set +m
    wait
    if [ -e "$claims/failed" ]; then
        cat "$claims/failed" >&2
        exit 1
    fi
else
    for command in "${commands[@]}"; do
        eval "started $command"
        echo
    done
fi
started "$python" "$here/compare.py" "$out"/*/epoch*.pt --csv "$out/summary.csv"
started "$python" "$here/plot.py" "$out"
echo "table: $out/summary.csv, learning curves: $out/*/history.csv and $out/curves.png"
[ ! "$demo" ] || echo "Drawn pictures show how it works, and prove nothing about photographs."
