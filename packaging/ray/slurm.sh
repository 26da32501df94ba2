#!/usr/bin/env bash
# Compresses a model on all nodes of a SLURM job, in a Ray cluster that lives as long as the job:
#     sbatch slurm.sh MODEL -o DIR --ratio 0.2
# MODEL, DIR and the environment with pgsvd-vllm[ray] lie on a file system that every node has under the same path.
#SBATCH --job-name=pgsvd
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
# With GPUs, one worker each:
##SBATCH --gpus-per-node=2
set -euo pipefail
# Threads of each worker: a node of 32 cores has four workers.
export OMP_NUM_THREADS=8
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${nodes[0]}
on() { srun --overlap --nodes=1 --ntasks=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --nodelist="$1" "${@:2}"; }
address=$(on "$first" hostname --ip-address | awk '{print $1}'):6379
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

on "$first" ray start --head --port=6379 --num-cpus="$SLURM_CPUS_PER_TASK" --disable-usage-stats --block &
until on "$first" ray health-check --address "$address"; do sleep 2; done
for node in "${nodes[@]:1}"; do
    on "$node" ray start --address="$address" --num-cpus="$SLURM_CPUS_PER_TASK" --disable-usage-stats --block &
done
# The workers are counted once, when the first stage begins.
count="import ray, sys; ray.init('$address', logging_level=40); sys.exit(len(ray.nodes()) < ${#nodes[@]})"
until on "$first" python -c "$count"; do sleep 2; done

on "$first" pgsvd-vllm compress "$@" --executor ray --address "$address"
