#!/usr/bin/env bash
# Train under Slurm, on one or several machines, through any number of preemptions and time limits:
#
#     sbatch launch/slurm.sh --recipe gpt2 --output_dir /shared/runs/gpt2
#
# Slurm sends SIGUSR1 two minutes before it ends the job (gpt2-xl, whose checkpoint has 17 GiB, may take
# longer to save on a slow disk: --signal=USR1@600). The run saves and leaves a file PREEMPTED in its
# directory; this script then puts the job back into the queue, and the same command goes on.
# A SIGTERM comes from `scancel`, or where the job makes room for another. The run saves too, if it is
# given the time, but whether the job comes back is for those to say who sent it.
#SBATCH --job-name=gpt2repro
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

run_dir=$(python - "$@" <<'PYTHON'
import sys
from gpt2repro.recipe import load_recipe
from gpt2repro.system.command_line import run
sys.exit(run("launch/slurm.sh", lambda argv: print(load_recipe(argv).run_dir) or 0, sys.argv[1:]))
PYTHON
)
rm -f "$run_dir/PREEMPTED"
export MAIN_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN_PORT=${MAIN_PORT:-$((20000 + SLURM_JOB_ID % 10000))}  # jobs may share a machine
export GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-8}
export PET_SIGNALS_TO_HANDLE=SIGINT  # of torch's launcher, which would kill the ranks while they save
# After a lost peer end at once, as torch by itself does: its launcher asks to abort NCCL first, which may hang.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}
# Since Slurm 22.05 srun does not take it from sbatch.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# One launcher per machine. It would die of a signal, and with the end of its shell Slurm kills what
# still runs: so the launcher is made deaf, and the shell passes signals on and waits for the save.
trap : TERM  # this shell waits for srun all the same
srun --kill-on-bad-exit=1 bash -c '
    (
        trap "" USR1 TERM
        exec accelerate launch --config_file launch/multi_node.yaml \
            --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * GPUS_PER_NODE)) \
            --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_HOST" \
            --main_process_port "$MAIN_PORT" train_accelerate.py "$@"
    ) &
    launcher=$! first=
    pass_on() {
        first=${first:-$1}
        pkill "-$1" --parent "$launcher"
    }
    trap "pass_on USR1" USR1
    trap "pass_on TERM" TERM
    while true; do
        wait "$launcher" && status=0 || status=$?
        kill -0 "$launcher" 2>/dev/null || break  # else a signal ended the waiting
    done
    [ "$first" != TERM ] || [ "$status" = 0 ] || exit 143
    exit "$status"
' launch "$@" || status=$?

if [ -e "$run_dir/PREEMPTED" ] && [ "${status:-0}" != 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "${status:-0}"
