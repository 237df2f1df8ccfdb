#!/usr/bin/env bash
# The main job on a network that was really trained; `make demo` runs it. Everything it writes is in demo_output/.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -rf demo_output
mkdir demo_output

step() { printf '\n== %s\n' "$1"; }
run() { printf '$ %s\n' "$*"; "$@"; }

step "What is in the checkpoint"
run convtool inspect sample_models/chains.safetensors

step "The matrix of one layer, on the 4 x 4 maps that it sees; scipy opens it"
run convtool toeplitz sample_models/chains.safetensors widen --input-size 16,4,4 --padding 1,2 -o demo_output/widen.npz
run python -c 'import scipy.sparse; print(repr(scipy.sparse.load_npz("demo_output/widen.npz")))'

step "Three convolutions into one: 1x1, then 3x3, then 5x5 with stride 2"
run convtool fuse sample_models/chains.safetensors reduce spread gather --geometry sample_models/chains.toml \
    -o demo_output/fused.safetensors

step "Proof that the fused layer computes the same, for every input of a 14 x 14 image"
run convtool verify sample_models/chains.safetensors demo_output/fused.safetensors --input-size 14,14 --exhaustive

step "The whole network on 400 held-out digits, before and after"
run python sample_models/accuracy.py chains sample_models/chains.safetensors demo_output/fused.safetensors

step "What would not be exact is refused (exit code 4)"
code=0
run convtool fuse sample_models/chains.safetensors blur sharpen --geometry sample_models/chains.toml \
    -o demo_output/refused.safetensors || code=$?
[ "$code" -eq 4 ] || { echo "expected exit code 4, got $code" >&2; exit 1; }

printf '\nDone. The files are in demo_output/.\n'
