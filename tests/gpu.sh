#!/usr/bin/env bash
# What somebody who has a GPU for 15 minutes can find out:   tests/gpu.sh DATA OUT
#
#   DATA   CIFAR-10 as class folders in train/ and test/
#   OUT    at most eight small files: report.txt, bench.txt, log-*.jsonl, encoder-*.pt,
#          and results.tar.gz with the figures
#
# In this order: the CUDA tests, the share of a large matrix product's rate that ViT-B
# reaches, a resumed run, then CIFAR-10 with the hybrid, MoCo v3 and SimMIM side by side,
# as small networks leave most of a GPU idle, and their analysis. MINUTES is the time
# there is (15), EPOCHS the length of the hybrid's run (6; the others do equal work),
# MODEL its size (micro), PYTHON the interpreter. QUICK=1 goes through everything in three minutes on a
# CPU, with tiny runs whose numbers mean nothing.
set -uo pipefail
if [ $# != 2 ]; then
    sed -n '2,13s/^# \{0,1\}//p' "$0"
    exit 2
fi
data=$(realpath "$1")
mkdir -p "$2"
out=$(realpath "$2")
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
quick=${QUICK:-0}
began=$SECONDS
end=$((began + 60 * ${MINUTES:-15}))
runs=$(mktemp -d)
trap 'rm -rf "$runs"' EXIT
export MPLBACKEND=agg

# ---- What is run, and what QUICK=1 makes of it ----

bench="--model base --rounds ${ROUNDS:-10}"
resumed="--objective hybrid --preset small32 --model tiny --steps 60 --save-every 30"
train="--preset small32 --model ${MODEL:-micro} --workers 4 --save-every 100000"
epochs=${EPOCHS:-6}
analysis="--images 2000"
if [ "$quick" = 1 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    tiny="--model nano --batch-size 16 --knn-images 100 --proj-hidden 16"
    bench="--model micro --batch 8 --rounds 1 --no-memory --objective hybrid"
    resumed="$resumed $tiny --steps 6 --save-every 3"
    train="--preset small32 $tiny --workers 0"
    epochs=0.003
    analysis="--images 40"
fi

# ---- Small tools ----

say() {
    echo "$(printf '%4d s  ' $((SECONDS - began)))$*" | tee -a "$out/report.txt"
}

left() { # seconds
    echo $((end - SECONDS))
}

# Runs a command for at most as long as is left, less what shall remain; SIGTERM makes
# sslvit.py save and stop. Its last lines go to the report if it fails.
within() {
    local spare=$1
    shift
    local seconds=$(($(left) - spare))
    if [ $seconds -lt 5 ]; then
        say "no time left for: $*"
        return 124
    fi
    local console=${CONSOLE:-$runs/console.txt}
    timeout -s TERM -k 60 "$seconds" "$@" >"$console" 2>&1
    local status=$?
    if [ $status != 0 ] && [ $status != 124 ]; then
        say "status $status: $*"
        tail -n 5 "$console" | tee -a "$out/report.txt"
    fi
    return $status
}

# ---- 1. Is everything there, and does it work? ----

: >"$out/report.txt"
"$python" - <<'PYTHON' | tee -a "$out/report.txt"
import os

import torch

device = f"CPU, {os.cpu_count()} cores"
if torch.cuda.is_available():
    device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
print(f"torch {torch.__version__}, {device}")
PYTHON

say "CUDA tests"
# side by side where pytest-xdist is there: much of their time is compiling
beside=""
if "$python" -c "import xdist" 2>/dev/null; then
    beside="-n 6"
fi
# shellcheck disable=SC2086
within 0 "$python" -m pytest -q $beside -k cuda tests/test_sslvit.py
cp "$runs/console.txt" "$out/tests.txt"
tail -n 1 "$runs/console.txt" | tee -a "$out/report.txt"

# ---- 2. How fast? ----

: >"$out/bench.txt"
for compile in "" "--compile --no-memory"; do
    if [ "$quick" = 1 ] && [ -n "$compile" ]; then
        say "without --compile, which takes a CPU some minutes"
        continue
    fi
    say "bench.py step $bench $compile"
    # shellcheck disable=SC2086
    if within $(($(left) / 2)) "$python" tests/bench.py step $bench $compile ||
        [ "$quick" = 1 ]; then
        grep -vE '^(USDT|ERROR|W[0-9])' "$runs/console.txt" >>"$out/bench.txt"
    fi
done
cat "$out/bench.txt"

# ---- 3. Does a run that was cut go on as if nothing had happened? ----

say "a resumed run: sslvit.py $resumed"
# shellcheck disable=SC2086
within 0 "$python" sslvit.py --data "$data" $resumed --log-every 1 --out "$runs/whole"
# cut by SIGTERM as soon as it has saved once
# shellcheck disable=SC2086
"$python" sslvit.py --data "$data" $resumed --log-every 1 --out "$runs/cut" \
    >"$runs/console.txt" 2>&1 &
cut=$!
while kill -0 $cut 2>/dev/null && [ ! -e "$runs/cut/ckpt.pt" ]; do
    sleep 0.05
done
kill -TERM $cut 2>/dev/null
wait $cut
say "stopped with status $? (143: by the signal)"
within 0 "$python" sslvit.py --out "$runs/cut" --resume
"$python" - "$runs" <<'PYTHON' | tee -a "$out/report.txt"
import json
import sys
from pathlib import Path


def losses(name):
    lines = Path(sys.argv[1], name, "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


whole = losses("whole")
cut = losses("cut")
assert whole.keys() == cut.keys()
largest = max(abs(whole[step] - cut[step]) for step in whole)
print(f"{len(whole)} losses, whole and resumed differ by at most {largest:.2g}")
PYTHON

# ---- 4. CIFAR-10 ----

# epochs in which the encoder works as much as the hybrid's: 11 passes an image, not 8, 3
equal_work() { # objective
    local passes=11
    case $1 in
    moco) passes=8 ;;
    simmim) passes=3 ;;
    esac
    awk "BEGIN { print $epochs * 11 / $passes }"
}

# three minutes for the analysis and what follows
spare=180
if [ "$quick" = 1 ]; then
    spare=5
fi
for objective in hybrid moco simmim; do
    words="--objective $objective $train --epochs $(equal_work $objective)"
    say "sslvit.py $words"
    # shellcheck disable=SC2086
    CONSOLE=$runs/$objective.txt OMP_NUM_THREADS=1 within $spare \
        "$python" sslvit.py --data "$data" $words --out "$runs/$objective" &
done
wait
trained=()
for objective in hybrid moco simmim; do
    run="$runs/$objective"
    if [ -e "$run/ckpt.pt" ]; then
        tail -n 1 "$run/log.jsonl" | tee -a "$out/report.txt"
        "$python" figures/ship.py "$run/ckpt.pt" "$out/encoder-$objective.pt"
        trained+=("$run/ckpt.pt")
    fi
done
say "analyze.py $analysis"
# shellcheck disable=SC2086
if ! within 0 "$python" analyze.py "${trained[@]}" --data "$data" $analysis \
    --out "$runs/figures"; then
    say "the analysis failed or was cut; the runs are kept"
fi

# ---- 5. What is kept ----

kept=()
for path in "$runs"/*/log.jsonl "$runs"/*/*.png "$runs"/figures; do
    if [ -e "$path" ]; then
        kept+=("${path#"$runs"/}")
    fi
done
tar -C "$runs" -czf "$out/results.tar.gz" "${kept[@]}"
find "$out" -size +16M -printf '%f is over 16 MB\n' | tee -a "$out/report.txt"
say "done; everything worth keeping is in $out:"
ls -l "$out"
