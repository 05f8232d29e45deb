#!/usr/bin/env bash
# MOPD of the Nano student on one node of 8 GPUs: examples/nano_one_node.sh [key=value ...]; settings in launch.sh.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
NNODES=1 GPUS_PER_NODE="${GPUS_PER_NODE:-8}" exec "${here}/launch.sh" "${here}/nano_one_node.yaml" "$@"
