#!/usr/bin/env bash
# Start training on this node under torchrun: examples/launch.sh CONFIG.yaml [key=value ...]
#
#   NNODES          nodes in the run (default 1)
#   NODE_RANK       this node's index, 0 .. NNODES-1 (must be set with more than one node)
#   MASTER_ADDR     name of node 0, where the others meet (must be set with more than one node)
#   MASTER_PORT     free port on node 0 (default 29500)
#   GPUS_PER_NODE   processes to start here (default 8)
#   MAX_RESTARTS    times torchrun starts the processes again after a failure; each resumes (default 3)
#   DRY_RUN         1: print the line instead of running it
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: $0 CONFIG.yaml [key=value ...]" >&2
  exit 2
fi

nodes="${NNODES:-1}"
command=(torchrun "--nnodes=${nodes}" "--nproc_per_node=${GPUS_PER_NODE:-8}" "--max_restarts=${MAX_RESTARTS:-3}")
if [[ "${nodes}" == 1 ]]; then
  command+=(--standalone)
else
  : "${NODE_RANK:?is not set: the index of this node, from 0}"
  : "${MASTER_ADDR:?is not set: the name of node 0}"
  # Of torchrun's meeting points only c10d restarts the processes of all nodes when those of one fail.
  command+=(
    --rdzv_backend=c10d
    "--rdzv_endpoint=${MASTER_ADDR}:${MASTER_PORT:-29500}"
    --rdzv_id=megatron-mopd
    "--rdzv_conf=is_host=$((NODE_RANK == 0))"
  )
fi
command+=(-m megatron_mopd.train "$@")

# One queue keeps mcore's order of communication before computation under sequence parallelism.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

if [[ "${DRY_RUN:-0}" == 1 ]]; then
  line="$(printf '%q ' "${command[@]}")"
  printf '%s\n' "${line% }"
else
  exec "${command[@]}"
fi
