#!/usr/bin/env bash
# Draws everything in figures/ anew, from training on.
#
#   figures/regenerate.sh CIFAR10 CUE_CONFLICT
#
# CIFAR10 is a folder made by tests/cifar10.py, CUE_CONFLICT one with the images of its
# classes from https://github.com/rgeirhos/texture-vs-shape, scaled to 32 px. A day and
# a half on two cores; seeds 0 to 2 of what is shipped were trained on a GPU.
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
  mim="python sslvit.py --objective simmim --steps 1833 --seed $seed"
  cl="python sslvit.py --objective moco --steps 344 --seed $seed"
  $mim --out runs/short-simmim-$seed &
  $cl --out runs/short-moco-$seed &
  # claim 2: a smaller size, and a larger one
  $mim --model nano --out runs/short-nano-simmim-$seed &
  $cl --model nano --out runs/short-nano-moco-$seed &
  wait
  $mim --model tiny --out runs/short-tiny-simmim-$seed &
  $cl --model tiny --out runs/short-tiny-moco-$seed &
  wait
  # claim 11: a decoder, and as deep without one
  $mim --decoder-depth 2 --out runs/short-decoder-$seed &
  $mim --model micro8 --out runs/short-micro8-$seed &
  # claim 9: do crops that cut the outline cost CL its shape bias?
  $cl --model nano --crop-min 0.6 --out runs/short-crops-$seed &
  wait
  # claim 12: beside the row of README's table, which is of the full length
  for lam in 0.05 0.1 0.2 0.5 0.8; do
    python sslvit.py --lam $lam --steps 500 --seed $seed --out runs/short-$lam-$seed
  done
done
# Were learning rates good ones? Half, once and twice the recipe's, on a seed that no
# verdict uses. Judged by validation images, the mean of probe and fine-tuning: what
# is below two standard deviations of figures/sweep's seeds is no difference.
rate() { # objective, steps, learning rate
  python sslvit.py --objective $1 --steps $2 --lr $3 --seed 9 --out runs/rate-$1-$3
}
for factor in 0.5 1 2; do
  rate moco 344 $(python -c "print(0.004 * $factor)") &
  rate simmim 1833 $(python -c "print(0.012 * $factor)") &
  rate hybrid 500 $(python -c "print(0.012 * $factor)") &
  wait
done
# On that seed half was better for the hybrid alone: by 0.052, three times the bar. So a
# quarter, too, and claim 12 again with the hybrid at half, as a table of its own: the
# row of README's keeps the recipe that was fixed before.
rate hybrid 500 0.003
for seed in 0 1 2; do
  python sslvit.py --lam 0.2 --steps 500 --lr 0.006 --seed $seed --out runs/short-hybrid-half-$seed
done
for objective in moco simmim hybrid; do
  python figures/ship.py runs/stimuli-$objective-0/ckpt.pt figures/checkpoints/micro-$objective.pt
  python figures/ship.py runs/cifar10-$objective-0/ckpt.pt figures/checkpoints/cifar10/small32-$objective.pt
done

unset OMP_NUM_THREADS
python analyze.py runs/stimuli-{moco,simmim,hybrid}-{0,1,2,3,4}/ckpt.pt --alone --out figures
python analyze.py runs/cifar10-{moco,simmim,hybrid}-{0,1,2}/ckpt.pt --alone \
  --data "$data" --cue-conflict "$cues" --out figures/cifar10
seeds=(0 1 2)
short() { # kinds of short runs -> their files
  for kind in "$@"; do printf "runs/short-$kind-%s/ckpt.pt " "${seeds[@]}"; done
}
python analyze.py $(short simmim moco nano-simmim nano-moco tiny-simmim tiny-moco) --alone \
  --only scaling --out figures/sizes
python analyze.py $(short simmim decoder micro8) --alone --only decoder --out figures/decoder
python analyze.py $(short nano-moco crops nano-simmim) --alone --only bias --out figures/crops
# claim 4: do MIM's last layers look far after a third of the training?
python analyze.py $(short simmim moco) --alone --only distance --out figures/length
python analyze.py $(short simmim 0.05 0.1 0.2 0.5 0.8 moco) --alone --only sweep --out figures/sweep
python analyze.py runs/rate-moco-{0.004,0.002,0.008}/ckpt.pt \
  runs/rate-simmim-{0.012,0.006,0.024}/ckpt.pt \
  runs/rate-hybrid-{0.012,0.006,0.024,0.003}/ckpt.pt --alone --only accuracy --out figures/rates
python analyze.py $(short simmim hybrid-half moco) --alone --only sweep --out figures/half
rm figures/*/*.png  # reports show them
rm figures/rates/report.html  # is a log: its samples hold the validation accuracies
cp runs/stimuli-hybrid-0/reconstruction.png figures/
python figures/diagrams.py
python figures/poster.py figures/results.json figures/cifar10/results.json --out figures/poster.png
# what README compares and no claim does
python figures/compare.py figures/crops "shape bias" \
  "CL (MoCo v3), crops from 0.6" "CL (MoCo v3), crops from 0.2"
python figures/compare.py figures/sweep "probe: best λ - better" \
  "hybrid, λ = 0.2" "MIM (SimMIM)"
python figures/compare.py figures/half "probe: best λ - better" \
  "hybrid, λ = 0.2" "MIM (SimMIM)"
