#!/usr/bin/env bash
# pipeline.sh NAME SEED: train, fuse, verify, publish. Whatever goes wrong ends it there, with nothing published.
set -euo pipefail
here=$(dirname "$0")

python "$here/short_run.py" "runs/$1/model.safetensors" "$2"
make --no-print-directory -f "$here/release.mk" "release/$1.safetensors"
