#!/usr/bin/env bash
# The whole way on real images: handwritten digits → shards → training → pictures → scores.
#
# Works in the current directory, on shards/digits and runs/demo; repeated, it goes on from where it stopped.
# Needs `ditmoe` on the PATH: `make demo` sees to that.
set -euo pipefail

config="$(dirname "$0")/configs/demo.yaml"
shards=shards/digits
run=runs/demo
least=0.95 # share of the drawn digits that an independent classifier must recognise
sampling=(--steps 50 --cfg-scale 1.25)
scoring=(--count 1800 --processes 2)

command -v ditmoe >/dev/null || {
    echo "error: no ditmoe on the PATH; expected \`make demo\`, or an activated environment that has it" >&2
    exit 2
}

interrupted=no
trap 'interrupted=yes' INT # whatever exit code the step has then, nothing must follow it
output=$(mktemp)
trap 'rm -f "$output"' EXIT

kept() { "$@" | tee -i "$output"; } # keep what is printed: it says where things were put

step() { # step NAME COMMAND…: say what runs, and keep its seconds
    local name=$1 start=$SECONDS
    shift
    local command="$*"
    printf '\n== %s: %s\n' "$name" "${command#kept }"
    "$@"
    [ $interrupted = no ] || exit 130
    seconds+=("$name $((SECONDS - start)) s")
}

seconds=()
if [ -e "$shards/index.json" ]; then
    seconds+=("pack done before")
else
    step pack ditmoe data pack digits "$shards"
fi
step train ditmoe train "$config" run.dir="$run"
step sample kept ditmoe sample "$run" "${sampling[@]}"
picture=$(head -n 1 "$output")
picture=${picture#"$PWD/"}
step evaluate kept ditmoe evaluate "$run" "${sampling[@]}" "${scoring[@]}" --cache "$run/cache"
metrics=$(sed -n 's/^  metrics  //p' "$output")
tensorboard=$(command -v tensorboard)
tensorboard=${tensorboard#"$PWD/"}

echo
python - "$metrics" "$picture" "$shards" "$run" "$least" "$tensorboard" "$SECONDS" "${seconds[@]}" <<'PYTHON'
import json
import sys
from pathlib import Path

metrics, picture, shards, run, least, tensorboard, total, *seconds = sys.argv[1:]
result = json.loads(Path(metrics).read_text(encoding="utf-8"))["results"]["classifier"]
judge = result["recogniser"]
print(f"The demo took {total} s: {', '.join(seconds)}.")
print(f"  real images   {shards}/preview.png")
print(f"  drawn images  {picture}")
print(f"  all of them   {Path(metrics).parent}/gallery/index.html")
print(f"  curves        {tensorboard} --logdir {run}/tensorboard")
print(f"  FID           {result['fid']:.3g}, and {result['fid_floor']:.3g} between two halves of the real images")
print(f"  recognised    {judge['accuracy']:.1%} as the digit asked for, by a classifier that has no part in the FID")
print(f"                and recognises {judge['held_out_accuracy']:.1%} of real digits that it was not trained on")
if judge["accuracy"] < float(least):
    sys.exit(f"error: {judge['accuracy']:.1%} recognised; expected at least {float(least):.0%}")
PYTHON
