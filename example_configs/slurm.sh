#!/bin/bash
# A run on two nodes of eight GPUs that resumes after preemption or its time limit:
#   sbatch example_configs/slurm.sh example_configs/llama-3.1-70b-zero3-multinode.yml
# The YAML file needs `auto_resume_from_checkpoints: true` and an output_dir on a disk that both nodes share. Without a
# shared disk, the log lists the files of the last checkpoint to copy to each node.
#SBATCH --job-name=axolotl-layersel
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
config=${1:?which YAML file?}

# Slurm signals only this shell, two minutes before it kills the job. A step and a checkpoint must take less time.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ended=
trap 'ended=yes; kill -TERM "$run"' TERM

# srun passes the signal on to torchrun on every node, whose processes then write a checkpoint and exit.
srun --kill-on-bad-exit=0 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$SLURM_GPUS_ON_NODE" \
  --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID-$SLURM_RESTART_COUNT" --rdzv_endpoint "$host:29500" \
  -m axolotl.cli.train "$config" &
run=$!
wait "$run"
code=$?
if [ -n "$ended" ]; then
  wait "$run" # the signal ended the first wait
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
