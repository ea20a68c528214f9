"""How fast are training, loading and analysis?  Three commands, each prints a table; no limits, machines differ.

  python tests/bench.py step      a training step of each objective against the same step written plainly
  python tests/bench.py loader    the input pipeline on JPEGs against torchvision's MoCo v3 pipeline, per core
  python tests/bench.py analyze   all training-free metrics against a plain forward pass and plain NumPy

`--help` after a command shows how to measure one row alone (step --model base --objective simmim --rounds 2;
with --no-memory in half the time).
Everything compared runs in one process and takes turns, so that a busy machine disturbs all alike; numbers are
medians of the rounds, ratios are ratios of medians. With one thread on a CPU (OMP_NUM_THREADS=1) the clock is the
process's CPU time, which other programs disturb least, otherwise wall time. The plain forms are written here anew
and use nothing of the files they are compared with.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, default_collate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sslvit

OBJECTIVES = {"moco": 1.0, "simmim": 0.0, "hybrid": 0.2}  # λ of each
LARGE = dict(image_size=224, patch_size=16, mask_unit=32, proj_hidden=4096, hue=0.1, crop_min=0.08, blur=2.0)
RECIPES = {"micro": {}, "base": LARGE}  # stimuli of 32 px, or ViT-B/16 at ImageNet's 224 px


def seconds_of(work, rounds, device="cpu"):
    """{name: function} -> {name: median seconds}. Each round runs every function once; the first warms up."""

    def clock():
        if device != "cpu":
            torch.cuda.synchronize()
        one_thread = device == "cpu" and torch.get_num_threads() == 1
        return time.process_time() if one_thread else time.perf_counter()

    seconds = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, function in work.items():
            began = clock()
            function()
            seconds[name].append(clock() - began)
    return {name: median(values[1:]) for name, values in seconds.items()}


# ---- step: losses, backward, clip, AdamW, average of the keys -------------------------------------------------
class PlainViT(nn.Module):
    """A Vision Transformer as one would write it down, with explicit softmax attention."""

    def __init__(self, image_size, patch, width, depth, heads):
        super().__init__()
        self.heads = heads
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", torch.randn(1, 1 + (image_size // patch) ** 2, width))
        layers = dict(norm1=(width, width), qkv=(width, 3 * width), proj=(width, width), norm2=(width, width),
                      fc1=(width, 4 * width), fc2=(4 * width, width))  # fmt: skip
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {n: nn.LayerNorm(i) if "norm" in n else nn.Linear(i, o) for n, (i, o) in layers.items()}
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x, mask=None, mask_token=None):
        x = self.embed(x).flatten(2).transpose(1, 2)
        if mask is not None:
            x = torch.where(mask[..., None], mask_token, x)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            qkv = block["qkv"](block["norm1"](x)).unflatten(2, (3, self.heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, 1+N, d) each
            attention = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1)
            x = x + block["proj"]((attention @ v).transpose(1, 2).flatten(2))
            x = x + block["fc2"](F.gelu(block["fc1"](block["norm2"](x))))
        return self.norm(x)


def plain_step(cfg, views, mask):
    """-> a function that trains one step in fp32, view by view, with the optimiser and the average in loops."""

    def head(*widths):
        pairs = zip(widths, widths[1:])
        return nn.Sequential(
            *(nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairs)
        )

    device, lam, patch, hidden = cfg.device, cfg.lam, cfg.patch_size, cfg.proj_hidden
    size = sslvit.SIZES[cfg.model]
    encoder, keys = (PlainViT(cfg.image_size, patch, **size).to(device) for _ in "qk")
    projector, key_projector = (head(size["width"], hidden, hidden, 256).to(device) for _ in "qk")
    predictor, decoder = head(256, hidden, 256).to(device), nn.Linear(size["width"], 3 * patch**2).to(device)
    mask_token = nn.Parameter(torch.zeros(1, 1, size["width"], device=device))
    parts = [encoder]
    if lam > 0:
        parts += [projector, predictor]
    if lam < 1:
        parts += [decoder]
    trained = [p for part in parts for p in part.parameters()] + [mask_token] * (lam < 1)
    if lam == 1:  # MoCo v3 freezes the patch embedding
        encoder.embed.requires_grad_(False)
        trained = [p for p in trained if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05, foreach=False)

    def info_nce(q, k):
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / cfg.temperature
        return 2 * cfg.temperature * F.cross_entropy(logits, torch.arange(len(q), device=device))

    def step():
        loss = 0.0
        if lam > 0:
            q1, q2 = (predictor(projector(encoder(view)[:, 0])) for view in views[:2])
            with torch.no_grad():
                k1, k2 = (key_projector(keys(view)[:, 0]) for view in views[:2])
            loss = lam * (info_nce(q1, k2) + info_nce(q2, k1))
        if lam < 1:
            pixels = decoder(encoder(views[2], mask, mask_token))[:, 1:]
            target = F.unfold(views[2], patch, stride=patch).transpose(1, 2)
            loss = loss + (1 - lam) * (pixels - target).abs()[mask].mean()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for key, query in ((keys, encoder), (key_projector, projector)) if lam > 0 else ():
                for a, b in zip(key.parameters(), query.parameters()):
                    a.mul_(0.99).add_(b, alpha=0.01)

    return step


def our_step(cfg, views, mask):
    """-> the same as sslvit.train() does it: bf16 autocast, both contrastive views in one pass, fused AdamW."""
    model = sslvit.SSL(cfg).to(cfg.device)
    optimizer = sslvit.make_optimizer(model, cfg)

    def step():
        with torch.autocast(torch.device(cfg.device).type, torch.bfloat16):
            losses = model(*views, mask)
        ((1 - cfg.lam) * losses["mim"] + cfg.lam * losses["cl"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_average(0.99)

    return step


def flops_per_image(cfg):
    """FLOPs of a training step by formula, a multiplication and an addition counted apart.

    A block, for each of the T = 1+N tokens: linear layers 24·D² (Q, K, V 6, projection 2, MLP 16) and attention
    4·T·D (queries by keys 2, weights by values 2). A pass that is trained counts 3 times (forward, gradients of
    activations, gradients of weights), a key pass once. A contrastive pass needs nothing but CLS from its last
    block, whose other tokens count 6·D² only, as sslvit.py computes no more. Patch embedding, heads, decoder and
    norms (together 1 or 2 %) are left out, so the rates are slightly too low.
    """
    width, depth = sslvit.SIZES[cfg.model]["width"], sslvit.SIZES[cfg.model]["depth"]
    tokens = 1 + (cfg.image_size // cfg.patch_size) ** 2
    token = 24 * width**2 + 4 * tokens * width
    whole = depth * tokens * token
    only_cls = (depth - 1) * tokens * token + (tokens - 1) * 6 * width**2 + token
    return (cfg.lam > 0) * (2 * 3 + 2 * 1) * only_cls + (cfg.lam < 1) * 3 * whole


def peak_mib(device):
    """Peak memory of this process: allocated on a GPU, resident on a CPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    with suppress(OSError):  # Linux; ru_maxrss would include what the parent had at the fork
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def count_operators(function, device):
    """-> operators (also those called by operators), dtype casts and copies, and waits: on a GPU synchronisations
    of its stream, on a CPU the operators that would be ones there (a value read, the shape of nonzero). AdamW's
    fused form reads its step counts on a CPU only, which is left out."""
    with torch.profiler.profile() as profile:
        function()
    names = [event.name for event in profile.events()]
    optimizers = [event for event in profile.events() if event.name == "aten::_fused_adamw_"]
    reads = ("aten::_local_scalar_dense", "aten::nonzero") if device == "cpu" else ("cudaStreamSynchronize",)
    waits = sum(name in reads for name in names)
    waits -= sum(child.name == "aten::item" for event in optimizers for child in event.cpu_children)
    return sum(name.startswith("aten::") for name in names), names.count("aten::_to_copy"), waits


def bench_step(args):
    on_gpu = args.device != "cpu"
    side = 8192 if on_gpu else 1024
    a, b = (torch.randn(side, side, device=args.device).bfloat16() for _ in "ab")
    if not args.memory_of:
        print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {args.rounds} rounds; "
              f"ours: bf16; plain: fp32, one pass per view, loops;\nproduct: bf16 matrices of {side} x {side}\n")  # fmt: skip
        print("model  objective batch | images/s   plain  ratio |   MiB  plain | GFLOP/s  product  share "
              "| operators  casts  waits | augment: share  operators")  # fmt: skip
    for model, objective in ((m, o) for m in args.model for o in args.objective):
        batch = args.batch or dict(micro=64, base=8)[model] * (8 if on_gpu else 1)
        cfg = sslvit.Config(objective=objective, lam=OBJECTIVES[objective], model=model, device=args.device,
                            **RECIPES[model])  # fmt: skip
        source = sslvit.Views(sslvit.Stimuli(batch, cfg.image_size), cfg)
        items = default_collate([source[0, i] for i in range(batch)])
        items = {name: value.pin_memory() if on_gpu else value for name, value in items.items()}

        def augment(items=items, cfg=cfg):
            return sslvit.augment(items, cfg, args.device)

        *views, mask = augment()
        if args.memory_of:
            only = dict(ours=our_step, plain=plain_step)[args.memory_of](cfg, views, mask)
            only(), only()
            return print(peak_mib(args.device))
        work = dict(ours=our_step(cfg, views, mask), plain=plain_step(cfg, views, mask), augment=augment)
        seconds = seconds_of(work | dict(product=lambda: a @ b), args.rounds, args.device)
        memory = [float("nan")] * 2 if args.no_memory else []
        for form in () if args.no_memory else ("ours", "plain"):  # a process each, which runs nothing else
            command = [sys.executable, __file__, "step", "--device", args.device, "--batch", str(batch)]
            command += ["--model", model, "--objective", objective, "--memory-of", form]
            memory.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        speed, plain = batch / seconds["ours"], batch / seconds["plain"]
        rate, product = speed * flops_per_image(cfg) / 1e9, 2 * side**3 / seconds["product"] / 1e9
        operators, casts, waits = count_operators(work["ours"], args.device)
        print(f"{model:6} {objective:9} {batch:5} | {speed:8.2f} {plain:7.2f} {speed / plain:6.2f} "
              f"| {memory[0]:5.0f} {memory[1]:6.0f} | {rate:7.1f} {product:8.1f} {rate / product:6.1%} "
              f"| {operators:9} {casts:6} {waits:6} "
              f"| {seconds['augment'] / (seconds['augment'] + seconds['ours']):14.1%} "
              f"{count_operators(augment, args.device)[0]:10}", flush=True)  # fmt: skip


# ---- loader: from JPEG files to three augmented crops of 224 px -----------------------------------------------
def write_jpegs(folder, count):
    """Smooth random pictures of about 500 x 400 px, 40 to 60 kB: noise of all scales, weaker in colour."""
    random = torch.Generator().manual_seed(0)
    for i in range(count):
        width, height = (torch.randint(-40, 41, (2,), generator=random) + torch.tensor([500, 400])).tolist()
        picture = torch.zeros(1, 3, height, width)
        for scale in (2, 4, 8, 16, 32, 64, 128):
            size = height // scale + 1, width // scale + 1
            noise = torch.randn(1, 1, *size, generator=random) + 0.4 * torch.randn(
                1, 3, *size, generator=random
            )
            picture += 3 * scale**0.5 * F.interpolate(noise, (height, width), mode="bicubic")
        picture = (picture[0] + 128).clamp(0, 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(folder / f"{i}.jpg", quality=90)


def torchvision_pipeline():
    """-> function of an opened image: MoCo v3's two views (with its Pillow blur) and SimMIM's from one decode."""
    import torchvision.transforms as T

    def blur(p):
        radius = T.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0))))
        return T.RandomApply([radius], p)

    end = [T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    start = [T.RandomResizedCrop(224, (0.08, 1)), T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)]
    start += [T.RandomGrayscale(0.2)]
    views = (start + [blur(1.0)] + end, start + [blur(0.1), T.RandomSolarize(128, 0.2)] + end,
             [T.RandomResizedCrop(224, (0.67, 1))] + end)  # fmt: skip
    views = [T.Compose(view) for view in views]

    def three_views(image):
        image = image.convert("RGB")
        return [view(image) for view in views]

    return three_views


def bench_loader(args):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder), args.images)
        cfg, files = sslvit.Config(lam=0.2, model="base", **LARGE), sorted(Path(folder).iterdir())
        dataset = sslvit.Views(sslvit.ImageFolder(folder), cfg)
        batches = DataLoader(dataset, 32, sampler=[(0, i) for i in range(len(files))])
        loaded = list(batches)
        work = {
            "bare decode": lambda: [Image.open(path).convert("RGB") for path in files],
            "sslvit: decode, three crops": lambda: list(batches),
            "sslvit: augment": lambda: [sslvit.augment(batch, cfg, "cpu") for batch in loaded],
            "sslvit: all": lambda: [sslvit.augment(batch, cfg, "cpu") for batch in batches],
        }
        with suppress(ImportError):
            views = torchvision_pipeline()
            work["torchvision: all"] = lambda: default_collate([views(Image.open(path)) for path in files])
        seconds = seconds_of(work, args.rounds)
        kilobytes = median(path.stat().st_size for path in files) / 1000
    print(f"{len(files)} JPEGs of about 500 x 400 px and {kilobytes:.0f} kB, three crops of 224 px, one thread, "
          f"CPU time, {args.rounds} rounds\n")  # fmt: skip
    print(f"{'':28}{'images/s':>9} {'ms/image':>9} {'x decode':>9} {'torchvision / this':>19}")
    last = seconds.get("torchvision: all", float("nan"))
    for name, value in seconds.items():
        print(f"{name:28}{len(files) / value:9.1f} {1000 * value / len(files):9.2f} "
              f"{value / seconds['bare decode']:9.2f} {last / value:19.2f}")  # fmt: skip
    if "torchvision: all" not in seconds:
        print("torchvision is not installed: its pipeline was not measured (pip install torchvision)")


# ---- analyze: the training-free metrics of ViT-B/16 at 224 px -------------------------------------------------
def numpy_metrics(records, projections, grid, patch):
    """The formulas as one would write them down, for the batch's images one after the other."""
    y, x = np.divmod(np.arange(grid * grid), grid)
    far = patch * np.hypot(y[:, None] - y, x[:, None] - x)
    for b in range(len(records[0].mid)):
        before = None
        for record, (weight, bias) in zip(records, projections):
            attn = record.attn[b, :, 1:, 1:]
            attn = attn / attn.sum(-1, keepdims=True)
            p = attn.mean(1, keepdims=True)
            (attn * far).sum(-1).mean(-1)
            information = (attn * np.log(np.maximum(attn, 1e-30) / p)).sum(-1).mean(-1)
            information / np.sqrt(np.log(grid * grid) * -(p * np.log(p)).sum((1, 2)))
            heads = record.heads[b, :, 1:]  # (H, N, d)
            unit = heads / np.linalg.norm(heads, axis=-1, keepdims=True)
            np.einsum("hnd,gnd->hg", unit, unit)
            written = heads.transpose(1, 0, 2).reshape(grid * grid, -1) @ weight.T + bias
            unit = written / np.linalg.norm(written, axis=-1, keepdims=True)
            (unit @ unit.T).mean()
            if before is not None:
                (unit * before).sum(-1).mean()
            before = unit
            for state in (record.mid, record.out):
                tokens = state[b, 1:]
                np.linalg.svd(tokens - tokens.mean(0), compute_uv=False)
                np.log(np.abs(np.fft.fft2(tokens.reshape(grid, grid, -1), axes=(0, 1)))).mean(-1).diagonal()


@torch.no_grad()
def bench_analyze(args):
    import analyze

    torch.manual_seed(0)
    size, patch = LARGE["image_size"], LARGE["patch_size"]
    vit = sslvit.ViT(size, patch, **sslvit.SIZES["base"]).eval().to(args.device)
    batches = [torch.randint(256, (4, 3, size, size), dtype=torch.uint8)] * (args.images // 4)
    projections = [
        [p.cpu().numpy() for p in (b.attn["proj"].weight, b.attn["proj"].bias)] for b in vit.blocks
    ]

    def forward():
        for images in batches:
            vit(analyze.normalise(images, args.device)).sum().item()

    def plain():
        for images in batches:
            records = vit(analyze.normalise(images, args.device), record=True)[1]
            records = [type(record)(*(x.cpu().numpy() for x in record)) for record in records]
            numpy_metrics(records, projections, size // patch, patch)

    work = {
        "one plain forward pass": forward,
        "collect(), every metric": lambda: analyze.collect(vit, batches),
    }
    seconds = seconds_of(work | {"plain NumPy, per image": plain}, args.rounds, args.device)
    print(f"ViT-B/16, {size} px, fp32, {args.device}, {torch.get_num_threads()} threads, {args.images} images, "
          f"{args.rounds} rounds\n\n{'':26}{'s per 1,000 images':>19} {'x forward pass':>15}")  # fmt: skip
    for name, value in seconds.items():
        print(
            f"{name:26}{1000 * value / args.images:19.1f} {value / seconds['one plain forward pass']:15.2f}"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="step|loader|analyze")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, function, rounds in (
        ("step", bench_step, 5),
        ("loader", bench_loader, 5),
        ("analyze", bench_analyze, 3),
    ):
        command = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(function=function)
        command.add_argument("--rounds", type=int, default=rounds, help="one more runs first, to warm up")
        if name != "loader":
            command.add_argument("--device", default=device, choices=["cpu", "cuda"])
        if name == "step":
            command.add_argument("--model", nargs="+", default=[*RECIPES], choices=RECIPES)
            command.add_argument("--objective", nargs="+", default=[*OBJECTIVES], choices=OBJECTIVES)
            command.add_argument(
                "--batch", type=int, default=0, help="0: 64 micro, 8 base; on a GPU 8 times that"
            )
            command.add_argument(
                "--no-memory", action="store_true", help="leave its two processes out: faster"
            )
            command.add_argument("--memory-of", choices=["ours", "plain"], help=argparse.SUPPRESS)
        else:
            command.add_argument("--images", type=int, default=64 if name == "loader" else 8)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
