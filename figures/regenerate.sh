#!/usr/bin/env bash
# Draws everything in figures/ anew, from training on.
#
#   figures/regenerate.sh CIFAR10 CUE_CONFLICT
#
# CIFAR10 is a folder made by tests/cifar10.py, CUE_CONFLICT one with the images of its
# classes from https://github.com/rgeirhos/texture-vs-shape, scaled to 32 px. A day and
# a half on two cores; what is shipped was trained on a GPU, many runs side by side.
set -euo pipefail
data=$(realpath "$1")
cues=$(realpath "$2")
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

# Photographs: 22, 8.25 and 6 epochs are equal work for the encoder (3, 8 and 11 passes
# an image). Short runs, 1,833, 344 and 500 steps, are a third of the stimuli's.
train() { # objective, seed, epochs for photographs
  python sslvit.py --objective $1 --seed $2 --out runs/stimuli-$1-$2
  if [ "$2" -lt 3 ]; then
    python sslvit.py --data "$data" --preset small32 --objective $1 --seed $2 \
      --epochs $3 --out runs/cifar10-$1-$2
  fi
}
for seed in 0 1 2 3 4; do
  train moco $seed 8.25 &
  train simmim $seed 22 &
  train hybrid $seed 6 &
  wait
done
for seed in 0 1 2; do
  python sslvit.py --model nano --objective moco --seed $seed --out runs/nano-moco-$seed &
  python sslvit.py --model nano --objective simmim --seed $seed --out runs/nano-simmim-$seed &
  wait
  # claim 9: do crops that cut the outline cost CL its shape bias?
  python sslvit.py --model nano --objective moco --crop-min 0.6 --seed $seed --out runs/crops-$seed
  short="python sslvit.py --objective simmim --steps 1833 --seed $seed"
  $short --out runs/short-simmim-$seed &
  $short --decoder-depth 2 --out runs/short-decoder-$seed &
  $short --model micro8 --out runs/short-micro8-$seed &
  wait
  for lam in 0.05 0.1 0.2 0.5 0.8; do
    python sslvit.py --lam $lam --steps 500 --seed $seed --out runs/short-$lam-$seed
  done
  python sslvit.py --objective moco --steps 344 --seed $seed --out runs/short-moco-$seed
done
for objective in moco simmim hybrid; do
  python figures/ship.py runs/stimuli-$objective-0/ckpt.pt figures/checkpoints/micro-$objective.pt
  python figures/ship.py runs/cifar10-$objective-0/ckpt.pt figures/checkpoints/cifar10/small32-$objective.pt
done

unset OMP_NUM_THREADS
python analyze.py runs/stimuli-{moco,simmim,hybrid}-{0,1,2,3,4}/ckpt.pt --alone --out figures
python analyze.py runs/cifar10-{moco,simmim,hybrid}-{0,1,2}/ckpt.pt --alone \
  --data "$data" --cue-conflict "$cues" --out figures/cifar10
python analyze.py runs/nano-{moco,simmim}-{0,1,2}/ckpt.pt --alone --only scaling --out runs/nano
python analyze.py --from figures/results.json runs/nano/results.json --only scaling --out figures/sizes
python analyze.py runs/nano-moco-{0,1,2}/ckpt.pt runs/crops-{0,1,2}/ckpt.pt --alone --only bias \
  --out figures/crops
python analyze.py runs/short-{simmim,decoder,micro8}-{0,1,2}/ckpt.pt --alone \
  --only decoder --out figures/decoder
python analyze.py runs/short-{simmim,0.05,0.1,0.2,0.5,0.8,moco}-{0,1,2}/ckpt.pt --alone \
  --only sweep --out figures/sweep
cp runs/stimuli-hybrid-0/reconstruction.png figures/
python figures/diagrams.py
python figures/poster.py figures/results.json figures/cifar10/results.json --out figures/poster.png
