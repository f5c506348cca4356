#!/usr/bin/env bash
# Checks and times the package on the GPUs of this machine, and writes a table and a JSON file:
#
#     benchmarks/gpu.sh --json gpu.json
#
# It starts a process on each GPU (PROCESSES says another number), needs no download, and takes some minutes. Options
# are those of gpu.py, which also runs on a CPU (--device cpu with a small size).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
processes=${PROCESSES:-$(python3 -c "import torch; print(max(1, torch.cuda.device_count()))")}
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python3 -m torch.distributed.run --standalone --nproc-per-node "$processes" "$here/gpu.py" "$@"
