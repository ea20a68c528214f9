"""How fast is a training step, and how much memory does it take?   python tests/bench.py [--device cuda] [--rounds 5]

One step (losses, backward, clip, AdamW, average) of each objective, ViT-micro and ViT-B/16, in two forms:
  ours   what sslvit.py does: bf16 autocast, both contrastive views in one pass, its attention, fused AdamW
  plain  the same step written plainly: fp32, one pass for each view, explicit softmax attention, AdamW in a loop
Both take turns in one process; a row gives the median of the rounds. No limits are tested: machines differ.
Memory is the peak of a process that runs nothing else (resident set on a CPU, allocated on a GPU).
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import sslvit

BATCH = {"micro": 64, "base": 8}


def make(model, objective, form, device):
    """-> a function that runs one training step."""
    lam = {"moco": 1.0, "simmim": 0.0, "hybrid": 0.2}[objective]
    size = dict(image_size=224, patch_size=16, mask_unit=32, proj_hidden=4096) if model == "base" else {}
    cfg = sslvit.Config(objective=objective, lam=lam, model=model, device=device, accum=1, **size)
    net = sslvit.SSL(cfg).to(device)
    plain, batch = form == "plain", BATCH[model] * (8 if device != "cpu" else 1)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = (
        torch.optim.AdamW(trained, lr=1e-4, foreach=False) if plain else sslvit.make_optimizer(net, cfg)
    )
    views = [torch.randn(batch, 3, cfg.image_size, cfg.image_size, device=device) for _ in range(3)]
    mask = sslvit.random_mask(batch, cfg.image_size, cfg.patch_size, cfg.mask_unit, 0.6).to(device)

    def tokens(encoder, *args, **kwargs):
        return encoder(*args, record=True, **kwargs)[0]

    def plain_losses():
        loss = 0.0
        if lam > 0:
            q1, q2 = (net.predictor(net.projector(tokens(net.encoder, x)[:, 0])) for x in views[:2])
            with torch.no_grad():
                k1, k2 = (net.key_projector(tokens(net.key_encoder, x)[:, 0]) for x in views[:2])
            loss = lam * (sslvit.contrastive_loss(q1, k2, 0.2) + sslvit.contrastive_loss(q2, k1, 0.2))
        if lam < 1:
            pixels = net.decoder(tokens(net.encoder, views[2], mask, mask_token=net.mask_token))[:, 1:]
            loss += (1 - lam) * sslvit.masked_l1(pixels, sslvit.patchify(views[2], cfg.patch_size), mask)
        return loss

    def step():
        if plain:
            loss = plain_losses()
        else:
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                losses = net(*views, mask)
            loss = (1 - lam) * losses["mim"] + lam * losses["cl"]
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        net.update_average(0.99)
        return batch if device == "cpu" else (torch.cuda.synchronize(), batch)[1]

    return step


def peak_mib(device):
    """Peak memory of this process alone; ru_maxrss would include what its parent had at the fork."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    high = (
        [line.split()[1] for line in status.read_text().splitlines() if "VmHWM" in line]
        if status.exists()
        else []
    )
    return int(high[0] if high else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["micro", "base"], choices=BATCH)
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        step = make(*args.memory_of, args.device)
        step(), step()
        print(peak_mib(args.device))
        return
    print(
        f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, median of {args.rounds} rounds"
    )
    print(
        f"{'model':6} {'objective':9} {'batch':>5} {'ours img/s':>10} {'plain img/s':>11} {'ratio':>6} {'ours MiB':>9} {'plain MiB':>9}"
    )
    for model in args.models:
        for objective in ("moco", "simmim", "hybrid"):
            steps = {form: make(model, objective, form, args.device) for form in ("ours", "plain")}
            speeds = {form: [] for form in steps}
            for round_ in range(args.rounds + 1):
                for form, step in steps.items():
                    began = time.perf_counter()
                    images = step()
                    if round_:  # the first warms up
                        speeds[form].append(images / (time.perf_counter() - began))
            memory = {}
            for form in steps:
                command = [
                    sys.executable,
                    __file__,
                    "--device",
                    args.device,
                    "--memory-of",
                    model,
                    objective,
                    form,
                ]
                memory[form] = float(
                    subprocess.run(command, capture_output=True, text=True, check=True).stdout
                )
            ratio = median(a / b for a, b in zip(speeds["ours"], speeds["plain"]))
            print(f"{model:6} {objective:9} {images:5} {median(speeds['ours']):10.2f} {median(speeds['plain']):11.2f} "
                  f"{ratio:6.2f} {memory['ours']:9.0f} {memory['plain']:9.0f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
