#!/usr/bin/env bash
# What only a GPU can tell, in at most ten minutes: run it on a machine that has one,
# with clipfx, its dependencies and absl-py installed. `on_gpu.sh small` tries the script
# itself on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=3 PYTHONPATH=.

step() { printf '\n== %s (%dm%02ds)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }
run() { timeout "$1" python3 -m "${@:2}" || echo "ended with status $?"; }

less=() examples=() sums=()
trees=25x1000000,1x25000000
if [ "${1:-}" = small ]; then
  less=(--width=64 --turns=1 --steps=1)
  trees=2x1000
  examples=(--shape=2,64,32,4,128 --turns=1 --steps=1)
  sums=(--trees=2x1000 --turns=1 --steps=1)
fi

step "versions"
command -v nvidia-smi >/dev/null &&
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
python3 -c "import jax, optax; print(jax.__version__, optax.__version__, jax.devices())"

step "steps of training, and what the host waits for in a loop"
run 120 benchmarks.accelerators --models=mlp --as=,cpu \
  --methods=optax,none,floor,global,layer "${less[@]}"
run 100 benchmarks.accelerators --models=decoder --dtypes=bfloat16 \
  --methods=optax,none,global,layer "${less[@]}"

step "every method"
run 90 benchmarks.accelerators --models=mlp --dtypes=bfloat16 "${less[@]}"

step "singular values, beside Muon"
run 50 benchmarks.accelerators --models=mlp --dtypes=float32 \
  "--methods=optax,muon,spectrum rescale,spectrum soft,spectrum hard" "${less[@]}"

step "a clip in front of AdamW"
run 60 benchmarks.batch --trees="$trees" --leaves=10 --dtypes=float32 --steps=20

step "per-example clipping of a decoder"
run 110 benchmarks.per_example_programs --groups=global,weight "${examples[@]}"

step "sums of squares alone"
run 40 benchmarks.reductions "${sums[@]}"

step "norms and laws, as on a GPU"
JAX_PLATFORMS=cuda XLA_FLAGS=--xla_backend_optimization_level=3 run 60 pytest -q -n0 -x tests/core/test_norms.py -p no:cacheprovider \
  -k "others_get_wrong or powers or different_magnitude"
step "done"
