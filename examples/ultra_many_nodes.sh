#!/usr/bin/env bash
# MOPD of the Ultra student; start it on each of 64 nodes with NODE_RANK and MASTER_ADDR set, as launch.sh says.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
NNODES="${NNODES:-64}" exec "${here}/launch.sh" "${here}/ultra_many_nodes.yaml" "$@"
