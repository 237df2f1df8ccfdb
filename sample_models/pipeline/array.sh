#!/usr/bin/env bash
#SBATCH --array=0-1
# One task of a job array releases one run: sbatch array.sh, or for one by hand SLURM_ARRAY_TASK_ID=1 bash array.sh
set -euo pipefail
runs=(runs/*/)
name=$(basename "${runs[$SLURM_ARRAY_TASK_ID]}")
make --no-print-directory -f "$(dirname "$0")/release.mk" "release/$name.safetensors"
