#!/bin/bash
# Three seeds as a Slurm array, each task preemptible and resumed, then a table with mean and spread.
#
#     bash examples/slurm_array.sh --gpus 1 --time 2:00:00 -- experiment=arithmetic batch.num_steps=60
#
# Flags before -- go to `skyrl-tx launch --slurm` (--print shows the batch script and submits nothing); options after
# it to the run. When the array is done: skyrl-tx sweep-table runs
set -euo pipefail
flags=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do flags+=("$1") && shift; done
[ $# -gt 0 ] && shift
exec "${PYTHON:-python}" -m skyrl.cli launch --slurm --array 1-3 --name seeds "${flags[@]}" -- train "$@"
