#!/bin/bash
#SBATCH --job-name=bnbfix-fleet --nodes=4 --ntasks-per-node=1 --cpus-per-task=8 --mem=64G --time=12:00:00
# Scans or repairs a fleet on the nodes of a SLURM job, each of which has `pip install 'bnbfix[fleet,repair]'`. Where the
# results are on a shared disk, the same command goes on with a job that ran out of time. Repairs need HF_TOKEN.
#     sbatch examples/fleet_slurm.sh scan --org ORG
#     sbatch examples/fleet_slurm.sh repair --org ORG --vllm 0.32.0 --disk 50GB --scratch /local/scratch
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(getent ahostsv4 "$head" | awk 'NR == 1 {print $1}'):6379
srun ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" --num-cpus "$SLURM_CPUS_PER_TASK" \
  --resources '{"disk": 500}' -- bnbfix fleet "$@" --ray "$address"
