# What the scripts for SLURM share: the environment of your cluster, which you set here once, and `run_step`, which starts a
# command on the job's nodes and turns the end of the job's time, or its preemption, into save, requeue and resume.
# Sourced by the *.sbatch files, which SLURM copies elsewhere: submit them from the repository's folder.

# The environment. A .venv made by `make setup` is taken; else what you uncomment, or what was active at sbatch.
# module purge; module load python/3.12 cuda/12.8
# source ~/miniconda3/bin/activate eae
# shellcheck disable=SC1091
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi

# A container: what runs python in it, on every node.
container=()
# container=(apptainer exec --nv --bind "$PWD" eae_dist.sif)
srun_options=()
# srun_options=(--container-image="$PWD/eae_dist.sqsh" --container-mounts="$PWD:$PWD" --container-workdir="$PWD") # pyxis, enroot

# NCCL finds its network by itself; if it does not, name it:
# export NCCL_SOCKET_IFNAME=ib0 NCCL_DEBUG=INFO
# The ranks also send messages by gloo: requests to stop, and without GPUs everything. gloo takes the network to which the name of
# a node resolves. If nodes have several networks, name one that all nodes share:
# export GLOO_SOCKET_IFNAME=ib0

ranks=${NPROC:-${SLURM_GPUS_ON_NODE:-1}} # of a node: a rank for each GPU of the allocation, without any one CPU rank
cores=${SLURM_CPUS_PER_TASK:-1} # of a node; since SLURM 22.05 srun wants to be told again
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
export PYTHONUNBUFFERED=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=90 # seconds that ranks have to save, if torchrun is new enough to read it; else 30

# on_ranks MODULE ARGUMENTS: `python -m MODULE ARGUMENTS` on all ranks of all nodes, in one step that ends as run_step says.
on_ranks() {
  local hosts logs=${LOGS:-logs}/$SLURM_JOB_ID
  mkdir -p "$logs"
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  echo "$SLURM_JOB_NUM_NODES node(s) with $ranks rank(s) each, start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID:" \
    "what the ranks say is in $logs/rank-*.log"
  # The torchruns meet on the first node, where this script runs; MASTER_ADDR may be a better name of it. They number the ranks,
  # so it is a rank's own process that knows which log is its. A requeued job adds to its logs.
  # shellcheck disable=SC2016  # the ranks' own shell expands it
  run_step python -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$ranks" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "${MASTER_ADDR:-${hosts%%$'\n'*}}:${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 15000))}" \
    --no-python bash -c 'exec python -m "${@:2}" >> "$1/rank-$RANK.log" 2>&1' rank "$logs" "$@"
}

# run_step COMMAND: runs it in one task on every node, and ends this script with the command's status. If it was told to stop
# before its end, the job is queued again, and the same command continues.
run_step() {
  local status=0
  stop_asked=
  trap stop_step USR1
  # In the background, or bash would look at USR1 only after the step's end.
  srun --kill-on-bad-exit=1 --ntasks "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 --cpus-per-task "$cores" \
    "${srun_options[@]}" "${container[@]}" "$@" &
  step=$!
  wait "$step" || status=$?
  if [[ $stop_asked ]]; then # the signal ended the `wait` above, not the step
    status=0
    wait "$step" || status=$?
  fi
  if ((status == 0)); then exit; fi
  # torchrun ends with status 1 for ranks that saved and for ranks that failed. Only a step that was told to stop may go on.
  if [[ $stop_asked ]] || was_preempted; then
    echo "stopped before its end; queued again"
    scontrol requeue "$SLURM_JOB_ID"
  else
    echo "error: the step ended with status $status; the reason stands above, or in the logs that are named above" >&2
  fi
  exit "$status"
}

# SLURM sends USR1 to this script alone, by #SBATCH --signal. To the step goes SIGTERM, on which training saves: torchrun
# would die of USR1 and leave its ranks running. Not `kill`: srun would kill its tasks.
stop_step() {
  trap '' USR1
  stop_asked=yes
  echo "told to stop; the step may save first"
  # The step may not have begun, and scancel says nothing of that.
  until scontrol show step "$SLURM_JOB_ID.0" &> /dev/null || ! kill -0 "$step" 2> /dev/null; do sleep 1; done
  scancel --signal=TERM "$SLURM_JOB_ID.0" || true # it may have ended
}

# A step that is preempted with a GraceTime gets SIGTERM from SLURM itself, without a word to this script; one that ends before
# that time is over would not be queued again. Without a GraceTime SLURM does all of it: SIGTERM, KillWait, requeue.
was_preempted() {
  [[ $(scontrol show job "$SLURM_JOB_ID") =~ PreemptTime=[0-9] ]]
}
