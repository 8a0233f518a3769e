#!/usr/bin/env bash
# The whole way on a cluster: a real Slurm of two virtual nodes on this machine → digits → a training job that is cut
# short, queued again and resumed → its evaluation, by dependency.
#
# Works in the current directory, on shards/digits and runs/slurm-demo, which it begins anew. Needs root, Slurm's
# programs (installed by apt-get where they are missing), and `ditmoe` on the PATH: `make slurm-demo` sees to that.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
shards=shards/digits
run=runs/slurm-demo
steps=600
least=0.8 # share of the drawn digits that an independent classifier must recognise
limit=560 # seconds that all of it may take
packages=(slurmctld slurmd slurm-client munge)

fail() {
    echo "error: $*" >&2
    exit 2
}
command -v ditmoe >/dev/null || fail "no ditmoe on the PATH; expected \`make slurm-demo\`"
[ "$(id -u)" = 0 ] || fail "a virtual cluster needs root"
export PATH="$PATH:/usr/sbin"
export OMP_NUM_THREADS=1 # the virtual nodes share the machine's processors
if ! type -P slurmctld slurmd munged sbatch >/dev/null; then
    command -v apt-get >/dev/null || fail "no Slurm found; expected its programs, or apt-get to install ${packages[*]}"
    echo "installing ${packages[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
fi

cluster() { (cd "$here" && python -m tests.slurm.cluster "$@"); }
folder=$(mktemp -d)
trap 'cluster down "$folder"; rm -rf "$folder"' EXIT
cluster up "$folder"
eval "$(cluster env "$folder")"

waited() { # waited WHAT COMMAND…: wait until a command succeeds; with the run's state where it takes too long
    local what=$1
    shift
    until "$@" >/dev/null 2>&1; do
        if ((SECONDS > limit)); then
            ditmoe status "$run" || true
            ditmoe logs "$run" || true
            fail "$what did not happen within $limit s"
        fi
        sleep 1
    done
}
ended() { [ -z "$(squeue --noheader)" ]; }

[ -e "$shards/index.json" ] || ditmoe data pack digits "$shards"
rm -rf "$run"
printf '\n== submit\n'
ditmoe submit train "$here/configs/demo.yaml" run.dir="$run" train.steps=$steps train.checkpoint_every=100 \
    launch.processes=1 preview.every=null optim.decay_steps=200 ema.decay=0.99 \
    --nodes 2 --tasks-per-node 1 --time 30 --evaluate '--steps 25 --cfg-scale 1.25 --count 300'

printf '\n== cut short after the first checkpoint\n'
waited "a checkpoint" test -e "$run/checkpoints/step-00000100/checkpoint.json"
ditmoe status "$run"
job=$(squeue --noheader --states=RUNNING --format=%i)
scancel --batch --signal=USR2 "$job" # as Slurm does before the time limit

printf '\n== the end of all jobs\n'
waited "the end of all jobs" ended
ditmoe status "$run"

python - "$run" "$least" "$SECONDS" <<'PYTHON'
import json
import sys
from pathlib import Path

run, least, seconds = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
state = json.loads((run / "state.json").read_text(encoding="utf-8"))
events = [json.loads(line) for line in (run / "slurm/train/attempts.jsonl").read_text(encoding="utf-8").splitlines()]
outcomes = [event["outcome"] for event in events if event["event"] == "end"]
metrics = sorted(run.glob("evaluations/*/metrics.json"))
if state["state"] != "complete" or outcomes != ["stopped", "complete"] or len(metrics) != 1:
    sys.exit(
        f"error: the run is {state['state']}, its attempts ended {outcomes}, and {len(metrics)} evaluations are there;"
        " expected complete, ['stopped', 'complete'] and 1"
    )
result = json.loads(metrics[0].read_text(encoding="utf-8"))["results"]["classifier"]
accuracy = result["recogniser"]["accuracy"]
print(f"\nThe demo on Slurm took {seconds} s.")
print(f"  attempts      {', '.join(outcomes)}")
print(f"  FID           {result['fid']:.3g}, and {result['fid_floor']:.3g} between two halves of the real images")
print(f"  recognised    {accuracy:.1%} as the digit asked for")
if accuracy < least:
    sys.exit(f"error: {accuracy:.1%} recognised; expected at least {least:.0%}")
PYTHON
