#!/usr/bin/env bash
# What of the usual advice pays? The published recipe, and beside it one change of it at a time, each
# in a copy of the scripts that the sed file of its name edits, and under its own --tag.
#
#     bash study/advice/run.sh                                     # CIFAR-10, on a GPU
#     bash study/advice/run.sh --image-size 112 --train-size 5000  # on a CPU
#     CHANGES="published cosine" STAGES="layer4" SEEDS="0 1 2" OUT=DIR bash study/advice/run.sh
#
# What train.py takes goes to every run. The same command again goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."
. ./setup.sh numpy
out=${OUT:-results/advice} copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT

train() { # an edit's name, then flags
    local edit=study/advice/$1.sed
    rm -rf "$copy"/*
    cp -r ./*.py plumbing "$copy"
    [ ! -e "$edit" ] || sed -i.before -f "$edit" "$copy/train.py"
    "$python" "$copy/train.py" --resume --out "$out" "${@:2}"
}

all="published cosine warmup smoothing adamw crop mixup batch64 probe"
IFS=, read -ra stages <<<"${STAGES:-layer4,layer3 layer4}"
for seed in ${SEEDS:-0}; do
    for learns in "${stages[@]}"; do
        for change in ${CHANGES:-$all}; do
            # shellcheck disable=SC2086  # the stages are separate words
            flags=("$@" --seed "$seed" --unfreeze $learns)
            case $change in
                published) train published "${flags[@]}" ;;
                batch64) train published "${flags[@]}" --tag batch64 --batch-size 64 ;;
                probe) # fc alone first, then all of it from there (Kumar et al. 2022)
                    train published "$@" --seed "$seed" --out "$out/head$seed"
                    head=$(ls "$out/head$seed"/*/epoch*.pt)
                    train published "${flags[@]}" --tag probe --weights "$head" ;;
                *) train "$change" "${flags[@]}" --tag "$change" ;;
            esac
        done
    done
done
