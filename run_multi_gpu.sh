#!/usr/bin/env bash
# Trains on all GPUs of this machine, or of several. All arguments go to cppo.py. If a process dies, all start again
# from the last checkpoint, MAX_RESTARTS times (3), also after a user's mistake: torchrun knows no exit status that would
# need no restart. So they do if the same command is given again.
#
#   ./run_multi_gpu.sh --pruning_rate 0.75                  this machine, one process per GPU
#   NPROC=4 ./run_multi_gpu.sh                              four of them
#
# Several machines: the same command on each, with its own NODE_RANK (0, 1, ...), and an --output_dir that they share:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 ./run_multi_gpu.sh
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
NPROC=${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
if [[ ${NNODES:-1} == 1 ]]; then
    where=(--standalone)
else
    [[ ${NODE_RANK:-0} == 0 ]] && host=true || host=false
    where=(--nnodes "$NNODES" --rdzv_backend c10d --rdzv_id cppo --rdzv_conf "is_host=$host,read_timeout=600"
        --rdzv_endpoint "${MASTER_ADDR:?the address of machine 0}:${MASTER_PORT:-29500}")
fi
# Else those who start again find the addresses that the dead left in torchrun's store, and wait for them for ever.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun "${where[@]}" --nproc_per_node "$NPROC" --max_restarts "${MAX_RESTARTS:-3}" "$here/cppo.py" --resume "$@"
