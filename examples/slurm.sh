#!/usr/bin/env bash
# Train on SLURM for as long as it takes: save before the time is up or the nodes are taken away, and
# queue the job again until training is finished. What follows the config goes to train.py.
#
#     sbatch examples/slurm.sh configs/imagenet.yaml
#     sbatch examples/slurm.sh configs/imagenet.yaml --set batch_size=512 --check-data
#
#SBATCH --job-name=soflow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@600
# The training processes get SIGTERM 600 seconds before the end, and at preemption where the cluster
# grants a GraceTime. They finish their step, save, and exit with status 75.
set -u
: "${1:?usage: sbatch examples/slurm.sh CONFIG [OPTION ...]}"
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # below the ports that the system hands out
export MASTER_ADDR MASTER_PORT

# One task per GPU, without torchrun between SLURM and training: torchrun passes SIGTERM on, but kills
# its processes after 30 seconds, which is too short for the checkpoint of a large model. srun does
# not inherit the cores per task. A process that exits must not get the others killed: all exit at
# about the same time, rank 0 last; a process that is still there after a minute hangs.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=60 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec python train.py --config "$@"' train "$@"
status=$?
if [ "$status" = 75 ]; then # after a preemption SLURM has already done this, and says so
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
