#!/usr/bin/env bash
# Draws everything in figures/ anew, from training on: about an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."

for objective in moco simmim hybrid; do
  OMP_NUM_THREADS=1 python sslvit.py --objective $objective &
done
wait
for objective in moco simmim hybrid; do
  python figures/ship.py runs/micro-$objective/ckpt.pt figures/checkpoints/micro-$objective.pt
done
python analyze.py runs/micro-{moco,simmim,hybrid}/ckpt.pt --out figures
cp runs/micro-hybrid/reconstruction.png figures/
python figures/diagrams.py
python figures/poster.py figures/results.json --out figures/poster.png
