#!/usr/bin/env bash
# The experiment: {fc+layer4, fc+layer3+layer4} x {10, 50} epochs, then the table. The rates are
# constant, so the first ten epochs of fifty are the run of ten: two trainings leave four runs.
#
#     bash run_all.sh                                    # CIFAR-10, ImageNet weights
#     bash run_all.sh --demo                             # drawn pictures, no download, 2 minutes
#     bash run_all.sh --data-dir /data --batch-size 256  # what train.py takes goes to every run
#     bash run_all.sh --out /tmp/results                 # default: results, or results/demo
#     bash run_all.sh                                    # the same again: goes on where it stopped
#     SEEDS="0 1 2" WITH_FC=1 bash run_all.sh            # three seeds, and the fc-only baseline
set -euo pipefail

refuse() {
    echo "run_all.sh: error: $1" >&2
    exit 2
}

out= preset=() extra=()
while [ $# -gt 0 ]; do
    case "$1" in
        --demo)
            preset=(--dataset synthetic --weights none --image-size 32)
            preset+=(--train-size 100 --batch-size 50) ;;
        --out) out=${2:-}; [ -n "$out" ] || refuse "--out needs a folder"; shift ;;
        --out=*) out=${1#--out=} ;;
        --unfreeze* | --epochs* | --seed*)
            refuse "the runs set ${1%%=*}; for one run use train.py, for seeds SEEDS=\"0 1 2\"" ;;
        -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "$0"; exit ;;
        *) extra+=("$1") ;;
    esac
    shift
done
out=${out:-results${preset:+/demo}}

. "$(dirname "$0")/setup.sh"

# Started beside this script: who ends the script ends what it runs, and waits for its last words.
started() {
    "$@" &
    wait $!
}
stop() {
    trap "" INT TERM
    kill -TERM $! 2>/dev/null || true
    wait $! || true
    exit "$1"
}
trap "stop 130" INT
trap "stop 143" TERM

[ "${WITH_FC:-0}" = 0 ] || with_fc=yes
for seed in ${SEEDS:-0}; do
    for stages in ${with_fc:+""} layer4 "layer3 layer4"; do
        # shellcheck disable=SC2086  # the stages are separate words
        started "$python" "$here/train.py" --unfreeze $stages --epochs 10 50 --seed "$seed" \
            --out "$out" --resume ${preset[@]+"${preset[@]}"} ${extra[@]+"${extra[@]}"}
        echo
    done
done
started "$python" "$here/compare.py" "$out"/*/epoch*.pt --csv "$out/summary.csv"
echo "table: $out/summary.csv, learning curves: $out/*/history.csv"
