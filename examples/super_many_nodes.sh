#!/usr/bin/env bash
# MOPD of the Super student; start it on each of 8 nodes with NODE_RANK and MASTER_ADDR set, as launch.sh says.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
NNODES="${NNODES:-8}" exec "${here}/launch.sh" "${here}/super_many_nodes.yaml" "$@"
