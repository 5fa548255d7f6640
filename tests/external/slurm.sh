#!/bin/bash
# A real Slurm on this host, two nodes of it, and a job in it that is preempted: make test-slurm (as root, on Debian).
#
# Installs slurm-wlm and munge where they are missing, starts one controller and two slurmd with ports and folders of
# their own, submits a job as cluster_configs/slurm.sbatch does, kills the step on one node, asks the job to stop by USR1,
# waits until it was requeued and is done, compares, and stops everything that it started.
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
bin=${BIN:-$here/.venv/bin}
bin=$(cd "$bin" && pwd)
work=$(mktemp -d /tmp/holdfast-slurm-XXXXXX)
pids=()

stop() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  sleep 1
  for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
  [ -n "${KEEP:-}" ] || rm -rf "$work"
}
trap stop EXIT

if ! command -v slurmd >/dev/null || ! command -v munged >/dev/null; then
  echo "installing slurm-wlm and munge"
  if [ ! -e /usr/sbin/policy-rc.d ]; then # no service is started by the installation: this script starts its own
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
    policy=/usr/sbin/policy-rc.d
  fi
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge \
    >"$work/apt.log" 2>&1 || { tail "$work/apt.log"; rm -f ${policy:+"$policy"}; exit 1; }
  rm -f ${policy:+"$policy"}
fi

host=$(hostname -s)
mkdir -p "$work"/{state,n1,n2,munge}
dd if=/dev/urandom of="$work/munge/key" bs=1024 count=1 status=none
chmod 600 "$work/munge/key"
munged --foreground --force --key-file "$work/munge/key" --socket "$work/munge/socket" \
  --pid-file "$work/munge/pid" --log-file "$work/munge/log" --seed-file "$work/munge/seed" &
pids+=($!)

cat >"$work/slurm.conf" <<END
ClusterName=holdfast
SlurmctldHost=$host
SlurmctldPort=16817
SlurmctldPidFile=$work/slurmctld.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdPidFile=$work/%n/slurmd.pid
SlurmdLogFile=$work/%n/slurmd.log
SlurmdSpoolDir=$work/%n
StateSaveLocation=$work/state
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=5,sched_interval=5
ReturnToService=2
RebootProgram=/bin/true
JobRequeue=1
MinJobAge=600
NodeName=n1 NodeHostname=$host Port=17001 CPUs=1 RealMemory=500
NodeName=n2 NodeHostname=$host Port=17002 CPUs=1 RealMemory=500
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
END
export SLURM_CONF=$work/slurm.conf
slurmctld -D -i >"$work/slurmctld.out" 2>&1 & pids+=($!)
slurmd -D -N n1 >"$work/n1.out" 2>&1 & pids+=($!)
slurmd -D -N n2 >"$work/n2.out" 2>&1 & pids+=($!)

until_true() { # SECONDS WHAT COMMAND…
  local limit=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    if [ "$SECONDS" -ge "$limit" ]; then echo "not within the limit: $what"; tail -n 30 "$work"/*.log "$work"/job*.out 2>/dev/null; exit 1; fi
    sleep 0.5
  done
}
two_idle() { [ "$(sinfo -h -N -t idle -o %N | wc -l)" -eq 2 ]; }
until_true 60 "two idle nodes" two_idle
echo "two nodes: $(sinfo -h -o '%D %T')"

cat >"$work/job.sbatch" <<END
#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append --output=$work/job.out
set -uo pipefail
srun --kill-on-bad-exit=0 --export=ALL \
  $bin/holdfast run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id slurm-\$SLURM_JOB_ID \
  --rdzv-endpoint 127.0.0.1:29477 --hold-job slurm-\$SLURM_JOB_ID --hold-run-dir $work/run --hold-grace 60s \
  --hold-requeue-code 75 $here/tests/support/train.py --parallel ddp --steps 150 --step-seconds 0.2 \
  --checkpoints $work/checkpoints --out $work/out &
step=\$!
trap 'kill -USR1 "\$step" 2>/dev/null' USR1
code=75
while kill -0 "\$step" 2>/dev/null; do wait "\$step"; code=\$?; done
[ "\$code" -ne 75 ] || scontrol requeue "\$SLURM_JOB_ID"
exit "\$code"
END
export OMP_NUM_THREADS=1 PYTHONPATH=${PYTHONPATH:-$here/src}
job=$(sbatch --parsable "$work/job.sbatch")
echo "job $job"
until_true 120 "versions in memory" grep -q "memory tier" "$work/job.out"
sleep 3

victim=$(pgrep -f "holdfast run .*slurm-$job" | sort -n | tail -1)
worker=$(pgrep -P "$victim" -f train.py | head -1)
kill -9 "$worker"
echo "killed worker $worker of one node's step"
until_true 120 "recovery" grep -q '"kind":"recovery"' "$work/run/events.jsonl"

scancel --signal=USR1 --full "$job"
echo "asked for a stop by USR1"
requeued() { scontrol show job "$job" | grep -q "Restarts=1"; }
until_true 120 "the requeue" requeued
echo "requeued: $(ls "$work/checkpoints")"
scontrol update JobId="$job" StartTime=now 2>/dev/null || true
scontrol release "$job" 2>/dev/null || true
finished() { scontrol show job "$job" | grep -qE "JobState=(COMPLETED|FAILED|CANCELLED|TIMEOUT)"; }
until_true 400 "the end" finished
scontrol show job "$job" | grep -q "JobState=COMPLETED" || { scontrol show job "$job"; tail -50 "$work/job.out"; exit 1; }
grep -q "RESTORED tier=storage" "$work/job.out" || { echo "the second start did not resume"; tail -50 "$work/job.out"; exit 1; }
ls "$work/out"/rank-0.json "$work/out"/rank-1.json >/dev/null
echo "ok: killed, recovered, stopped by USR1, requeued, resumed, done"
