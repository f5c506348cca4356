#!/usr/bin/env bash
# Run what results.md compares on one model, the runs that say most first: benchmarks/campaign.sh BASE TRAIN TEST OUT.csv
#
# One process with one thread; it can be stopped and started again at any time. A second process may work on another
# part at the same time: `benchmarks/campaign.sh BASE TRAIN TEST OUT.csv few`. Parts: steps (ranks that differ and their
# scaling), others (l1ra, fisher, a limit of time, sensitivity, LoRA+), few (few rows and many epochs), more (other
# regimes).
set -euo pipefail

base=$1 train=$2 test=$3 out=$4
parts=("${@:5}")
[ ${#parts[@]} -gt 0 ] || parts=(steps others few more)
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
general=()
if [[ $train != *.tsv ]]; then # an encoder with a classifier has no loss on texts
    texts=$(dirname "$out")/texts
    [ -e "$texts/english.txt" ] || "$python" "$here/general_text.py" "$texts"
    general=(--general "$texts/python.txt" "$texts/english.txt")
fi

quality() {
    "$python" "$here/quality.py" train "$base" "$train" "$test" "$out" --longest 256 --test-rows 200 --widen 4 --refine \
        --seeds-at best "$@"
}

# The best rate falls with the rank. The grid is widened from here, and refined: a factor of 2 can decide between arms.
low=(8e-3 16e-3) high=(4e-3 8e-3)
scaled=(lora "gradient p0.5" "gradient p0" "gradient p1")

long() { # SEEDS, then arms, at each rank
    local seeds=$1
    shift
    for rank in ${ranks:-16 4 2 8}; do
        local rates=("${high[@]}")
        [ "$rank" -ge 8 ] || rates=("${low[@]}")
        quality --steps "${STEPS:-60}" --held-out 128 --ranks "$rank" --rates "${rates[@]}" --seeds $seeds --arms "$@"
    done
}

run_steps() {
    long "0" "${scaled[@]}"
    long "0 1" "${scaled[@]}"
    long "0 1 2" "${scaled[@]}"
    long "0 1 2 3 4" "${scaled[@]}"
}

run_others() {
    local arms=(l1ra "gradient l1ra p0.5" "gradient l1ra p0" "gradient l1ra p1" "fisher p0.5" "fisher p0" "fisher p1")
    arms+=("gradient time0.75" "gradient p0.5 time0.75" "sensitivity" "sensitivity p0.5")
    arms+=("lora loraplus4" "lora loraplus16" "gradient p0.5 loraplus4" "gradient p0 loraplus4")
    for seeds in "0" "0 1 2" "0 1 2 3 4"; do
        ranks="16 4" long "$seeds" "${arms[@]}"
    done
    for seeds in "0" "0 1 2" "0 1 2 3 4"; do
        ranks="2 8" long "$seeds" "${arms[@]}"
    done
}

halves=(lora "random same rank" "cka same rank" "lora half rank" "random same rank draw2" gradient l1ra)
halves+=("last same rank" "flexora same rank" "fisher same rank" pressure)

short() { # SEEDS ROWS EPOCHS RANK
    quality --seeds $1 --rows "$2" --epochs "$3" --ranks "$4" --evaluations "$3" --held-out 64 --rates "${high[@]}" \
        ${general[@]+"${general[@]}"} --arms "${halves[@]}"
}

run_few() {
    short "0" 100 10 16
    short "0 1" 100 10 16
    short "0 1 2" 100 10 16
    short "0 1 2 3 4" 100 10 16
}

run_more() {
    for seeds in "0" "0 1 2" "0 1 2 3 4"; do
        for regime in "300 3" "100 3" "300 10" "100 1" "1000 1" "300 1" "1000 3" "1000 10"; do
            short "$seeds" $regime 16
        done
        for rank in 4 64; do
            for regime in "100 10" "300 3" "1000 3"; do
                short "$seeds" $regime "$rank"
            done
        done
    done
}

for part in "${parts[@]}"; do
    "run_$part"
done
