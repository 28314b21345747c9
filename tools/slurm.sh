#!/usr/bin/env bash
# Train on several machines under Slurm: torchrun on each, one rank per GPU. From the repository's root:
#
#   sbatch --nodes 4 --gpus-per-node 8 --cpus-per-task 64 --time 24:00:00 tools/slurm.sh CONFIG.yaml [section.key=value ...]
#
# The environment of sbatch is that of the job: activate the one that moetrain is installed in. The repository, the data
# cache and run.output_dir must be on a file system that all machines share. See that it is right in the job's output:
# the table of the start names the number of ranks, and system/tokens_per_second should grow with them.
#
# Three minutes before the time limit, or when the job is preempted, all ranks save after the same step (torchrun gives
# them 30 s) and the job is queued again. So is a job whose machine is lost. It continues from the newest checkpoint.
# A rank that dies restarts the ranks of all machines, up to RESTARTS times, from the newest checkpoint.
#
#   RANKS_PER_NODE=2   ranks on each machine (default: its GPUs, or 1)
#   RESTARTS=3         restarts within a job (default 3)
#SBATCH --job-name=moetrain
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "tools/slurm.sh: not in a Slurm job: submit it with sbatch --nodes N tools/slurm.sh CONFIG.yaml; without Slurm" \
        "start torchrun on each machine (README.md, On several machines)" >&2
    exit 2
fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
status=0
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else ranks that start again may wait for lost ones
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc_per_node "${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}" \
    --max-restarts "${RESTARTS:-3}" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 20000))" \
    moetrain/train.py "$@" || status=$?
# torchrun ends by the signal where the ranks saved and left: as 128 + 15 or 1, depending on who noticed first.
end=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*EndTime=\([^ ]*\).*/\1/p')
if ((status != 0)) && [[ $end != Unknown ]] && (($(date -d "$end" +%s) - $(date +%s) <= 200)); then
    echo "stopped shortly before the time limit: queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
