#!/usr/bin/env bash
# What ten minutes on a GPU tell, in one call:   tests/gpu.sh
#
# First the CUDA tests, an analysis of the shipped networks, then `bench.py step` for
# ViT-B: hybrid, MoCo v3 and SimMIM, each without and with --compile. Every line is
# printed as soon as it is known, so that a limit loses only what comes after it. PYTHON
# is the interpreter, MINUTES the time there is (9), MODEL and BATCH a size that goes
# through everything on a CPU (micro, 8).
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
end=$((SECONDS + 60 * ${MINUTES:-9}))

# Runs a command for at most the seconds given, and for no longer than is left.
within() {
    local limit=$1 left=$((end - SECONDS))
    shift
    if [ "$left" -lt 10 ]; then
        echo "no time left for: $*"
        return
    fi
    timeout -k 10 "$((limit < left ? limit : left))" "$@"
    echo "status $?, after $SECONDS s: $*"
}

"$python" -c 'import torch; print(torch.__version__, torch.version.cuda,
    torch.cuda.is_available() and torch.cuda.get_device_name())'
# side by side where pytest-xdist is there: much of their time is compiling
beside=$("$python" -c "import xdist" 2>/dev/null && echo "-n 6")
# shellcheck disable=SC2086
within 210 "$python" -m pytest -q $beside -k test_cuda tests/test_sslvit.py
if [ "$("$python" -c 'import torch; print(torch.cuda.device_count())')" -gt 1 ]; then
    within 60 "$python" -m torch.distributed.run --nproc_per_node 2 sslvit.py \
        --steps 50 --accum 2 --overwrite --out "$(mktemp -d)" # two ranks, over NCCL
fi
# no line may say "left out", as an analysis does of what it fails to measure; scaling and
# decoder are skipped, for want of their networks
within 90 "$python" analyze.py figures/checkpoints/micro-*.pt --images 100 --epochs 1 \
    --out "$(mktemp -d)" | grep -E "left out|^skipped|tested|^status"
for compile in "" --compile; do
    limit=120
    [ -n "$compile" ] && limit=240
    for objective in hybrid moco simmim; do
        # shellcheck disable=SC2086
        within "$limit" "$python" -u tests/bench.py step --quick \
            --model "${MODEL:-base}" --batch "${BATCH:-0}" --objective $objective $compile
    done
done
