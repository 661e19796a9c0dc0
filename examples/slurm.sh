#!/usr/bin/env bash
# Train on SLURM for as long as it takes: saves before the time is up or the nodes are taken away,
# and queues itself again until training is finished.
#
#     sbatch examples/slurm.sh configs/imagenet.yaml
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
# SIGTERM comes to the training processes 600 seconds before the end, and at preemption where the
# cluster grants a GraceTime. They finish their step, save, and exit with status 75.
set -u
config=${1:?usage: sbatch examples/slurm.sh CONFIG}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # below those that the system gives away by itself
export MASTER_ADDR MASTER_PORT

# One task a GPU, without torchrun between SLURM and training: torchrun passes SIGTERM on, but kills
# after 30 seconds, which is short for the checkpoint of a large model. srun does not take over the
# cores per task. A process that leaves must not have the others killed: all leave at about the same
# time, and rank 0 is the last to log; whoever is left after a minute hangs.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=60 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec python train.py --config "$1"' train "$config"
status=$?
if [ "$status" = 75 ]; then # after a preemption SLURM has already done it, and says so
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
