#!/usr/bin/env bash
# Trains on all GPUs of this machine, or of several. All arguments go to cppo.py.
#
#   ./run_multi_gpu.sh --pruning_rate 0.75                  this machine, one process per GPU
#   NPROC=4 ./run_multi_gpu.sh                              four of them
#
# Several machines: the same command on each, with its own NODE_RANK (0, 1, ...):
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 ./run_multi_gpu.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
NPROC=${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
exec torchrun \
    --nproc_per_node "$NPROC" --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" \
    "$here/cppo.py" "$@"
