"""How fast are training, loading and analysis?  No limits, machines differ.

  python tests/bench.py step      a training step of each objective against the same
                                  step written plainly, and the cost of micro-batches
  python tests/bench.py loader    the input pipeline on JPEGs against torchvision's
                                  MoCo v3 pipeline, per core
  python tests/bench.py analyze   all metrics of one layer against a forward pass

`step --model base --objective simmim --rounds 2 --quick` is one row, ours alone.
All that is compared takes turns in one process; numbers are medians of the rounds. With
one thread on a CPU (OMP_NUM_THREADS=1) the clock is the CPU time, else wall time.
"""

import argparse
import functools
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# before torch, as it sets how threads wait for each other
import sslvit
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, default_collate

OBJECTIVES = {"moco": 1.0, "simmim": 0.0, "hybrid": 0.2}  # λ of each
# ViT-B/16 at ImageNet's 224 px, or stimuli of 32 px
LARGE = {"image_size": 224, "patch_size": 16, "mask_patch_size": 32}
LARGE |= {"proj_hidden": 4096, "hue_shift": 0.1, "crop_min": 0.08, "blur": 2.0}
RECIPES = {"micro": {}, "base": LARGE}
BATCH = {"micro": 64, "base": 8}  # on a GPU 8 times that
PARTS = 4  # micro-batches


def seconds_of(work, rounds, device="cpu"):
    """{name: function} -> {name: median seconds}; the first round warms up."""

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


# ---- step: losses, backward, clip, AdamW, average of the keys ----


class PlainViT(nn.Module):
    """A Vision Transformer of torch's own layers."""

    def __init__(self, image_size, patch_size, embed_dim, depth, num_heads):
        super().__init__()
        self.embed = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.cls = nn.Parameter(torch.zeros(1, 1, embed_dim))
        tokens = 1 + (image_size // patch_size) ** 2
        self.register_buffer("positions", torch.randn(1, tokens, embed_dim))
        how = {"dropout": 0.0, "activation": "gelu", "batch_first": True}
        sizes = (embed_dim, num_heads, 4 * embed_dim)
        block = nn.TransformerEncoderLayer(*sizes, norm_first=True, **how)
        norm = nn.LayerNorm(embed_dim)
        self.blocks = nn.TransformerEncoder(block, depth, norm, False)

    def forward(self, x, mask=None, mask_token=None):
        x = self.embed(x).flatten(2).transpose(1, 2)
        if mask is not None:
            x = torch.where(mask[..., None], mask_token, x)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.blocks(x)


def plain_head(*widths):
    layers = []
    for wide, narrow in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(wide, narrow), nn.BatchNorm1d(narrow), nn.ReLU()]
    return nn.Sequential(*layers)


class PlainSSL(nn.Module):
    """Both losses in fp32, view by view."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        sizes = sslvit.SIZES[cfg.model]
        widths = (sizes["embed_dim"], cfg.proj_hidden, cfg.proj_hidden, 256)
        self.encoder = PlainViT(cfg.image_size, cfg.patch_size, **sizes)
        self.projector = plain_head(*widths)
        self.predictor = plain_head(256, cfg.proj_hidden, 256)
        self.keys = PlainViT(cfg.image_size, cfg.patch_size, **sizes)
        self.key_projector = plain_head(*widths)
        self.keys.requires_grad_(False)
        self.key_projector.requires_grad_(False)
        self.averaged = []
        if cfg.lam > 0:
            self.averaged.append((self.keys, self.encoder))
            self.averaged.append((self.key_projector, self.projector))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, sizes["embed_dim"]))
        self.decoder = nn.Linear(sizes["embed_dim"], 3 * cfg.patch_size**2)
        # MoCo v3 freezes the patch embedding
        self.encoder.embed.requires_grad_(cfg.lam < 1)

    def info_nce(self, q, k):
        tau = self.cfg.temperature
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / tau
        return 2 * tau * F.cross_entropy(logits, torch.arange(len(q)).to(q.device))

    def forward(self, view1, view2, view_mim, mask):
        lam = self.cfg.lam
        loss = 0.0
        if lam > 0:
            q1 = self.predictor(self.projector(self.encoder(view1)[:, 0]))
            q2 = self.predictor(self.projector(self.encoder(view2)[:, 0]))
            with torch.no_grad():
                k1 = self.key_projector(self.keys(view1)[:, 0])
                k2 = self.key_projector(self.keys(view2)[:, 0])
            loss = lam * (self.info_nce(q1, k2) + self.info_nce(q2, k1))
        if lam < 1:
            pixels = self.decoder(self.encoder(view_mim, mask, self.mask_token))[:, 1:]
            p = self.cfg.patch_size
            target = F.unfold(view_mim, p, stride=p).transpose(1, 2)
            loss = loss + (1 - lam) * (pixels - target).abs()[mask].mean()
        return loss


def plain_step(cfg, views):
    """-> function of a step in fp32, with the optimiser and the average in loops."""
    model = PlainSSL(cfg).to(cfg.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)

    def step():
        model(*views).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for key, query in model.averaged:
                for a, b in zip(key.parameters(), query.parameters(), strict=True):
                    a.mul_(0.99).add_(b, alpha=0.01)

    return step


def our_steps(cfg, views, micro_batches):
    """-> functions of a step as in sslvit.train(): whole, and with views in parts."""
    torch.compiler.reset()  # after eight versions of a function it compiles no more
    model = sslvit.SSL(cfg).to(cfg.device)
    optimizer = sslvit.make_optimizer(model, cfg)
    scaler = torch.amp.GradScaler(enabled=False)
    if cfg.compile:
        model.encoder.compile(dynamic=False)
        if cfg.lam > 0:
            model.momentum_encoder.compile(dynamic=False)

    def finish():
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.update_average(0.99)

    def whole():
        sslvit.backward_in_parts(model, [views], cfg, scaler)
        finish()

    def in_parts():
        parts = [sslvit.augment(batch, cfg) for batch in micro_batches]
        sslvit.backward_in_parts(model, parts, cfg, scaler)
        finish()

    return whole, in_parts


def step_row(args, model, objective, product):
    """Measures one model with one objective -> its line of the table."""
    on_gpu = args.device != "cpu"
    batch = args.batch or BATCH[model] * (8 if on_gpu else 1)
    how = {"device": args.device, "dtype": "bf16", "compile": args.compile}
    lam = OBJECTIVES[objective]
    if args.quick and (model, objective) == ("base", "simmim"):  # `plain` cannot
        how["positions"] = "relative"
    cfg = sslvit.Config(model=model, lam=lam, **how, **RECIPES[model])
    source = sslvit.TrainingViews(sslvit.Stimuli(batch, cfg.image_size), cfg)
    items = [source[0, i] for i in range(batch)]
    parts = min(PARTS, batch)
    loaded = [items, *(items[part::parts] for part in range(parts))]
    whole_batch, *micro_batches = [default_collate(part) for part in loaded]
    augment = functools.partial(sslvit.augment, whole_batch, cfg)
    views = augment()
    whole, in_parts = our_steps(cfg, views, micro_batches)
    gib = float("nan")
    if on_gpu:
        whole()  # the first step makes AdamW's averages
        torch.cuda.reset_peak_memory_stats()
        whole()
        gib = torch.cuda.max_memory_allocated() / 2**30
    work = {"ours": whole, "augment": augment, "product": product}
    if not args.quick:
        work["in parts"] = in_parts
        work["plain"] = plain_step(cfg, views)
    seconds = {"plain": float("nan"), "in parts": float("nan")}
    seconds |= seconds_of(work, args.rounds, args.device)
    speed = batch / seconds["ours"]
    plain = batch / seconds["plain"]
    rate = speed * sslvit.flops_per_image(cfg) / 1e9
    product_rate = args.product_flops / seconds["product"] / 1e9
    with_views = seconds["ours"] + seconds["augment"]
    return (
        f"{model:6} {objective:9} {batch:5} "
        f"| {speed:8.2f} {plain:7.2f} {speed / plain:6.2f} | {gib:5.1f} "
        f"| {rate:8.1f} {product_rate:9.1f} {rate / product_rate:6.1%} "
        f"| {seconds['augment'] / with_views:7.1%} "
        f"| {seconds['in parts'] / with_views:7.2f}"
    )


def bench_step(args):
    side = 8192 if args.device != "cpu" else 1024
    a = torch.randn(side, side, device=args.device).bfloat16()
    b = torch.randn(side, side, device=args.device).bfloat16()
    args.product_flops = 2 * side**3
    product = functools.partial(torch.matmul, a, b)
    print(
        f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} "
        f"threads; ours: bf16, {args.compile=}; plain: fp32, torch's layers;\n"
        f"product: bf16 matrices; {PARTS} parts: time in micro-batches, whole = 1\n\n"
        "model  objective batch | images/s   plain  ratio |   GiB "
        "|  GFLOP/s   product  share | augment | 4 parts",
        flush=True,
    )
    for model in args.model:
        for objective in args.objective:
            print(step_row(args, model, objective, product), flush=True)


# ---- loader: from JPEG files to three augmented crops of 224 px ----


def write_jpegs(folder, count):
    """Smooth random pictures of 500 x 400 px, about 50 kB: noise of all scales."""
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        picture = torch.full((1, 3, 400, 500), 128.0)
        for scale in (2, 4, 8, 16, 32, 64, 128):
            size = (400 // scale + 1, 500 // scale + 1)
            grey = torch.randn(1, 1, *size, generator=generator)
            noise = grey + 0.4 * torch.randn(1, 3, *size, generator=generator)
            noise = F.interpolate(noise, (400, 500), mode="bicubic")
            picture += 3 * scale**0.5 * noise
        pixels = picture[0].clamp(0, 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)


def torchvision_pipeline():
    """-> function of an opened image: MoCo v3's two views and SimMIM's, one decode."""
    import torchvision.transforms as T

    def blur(share):
        def once(image):
            return image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2)))

        return T.RandomApply([T.Lambda(once)], share)

    normalise = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    end = [T.RandomHorizontalFlip(), T.ToTensor(), normalise]
    start = [
        T.RandomResizedCrop(224, (0.08, 1)),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
        T.RandomGrayscale(0.2),
    ]
    view1 = T.Compose([*start, blur(1.0), *end])
    view2 = T.Compose([*start, blur(0.1), T.RandomSolarize(128, 0.2), *end])
    view_mim = T.Compose([T.RandomResizedCrop(224, (0.67, 1)), *end])
    return lambda image: [
        view(image.convert("RGB")) for view in (view1, view2, view_mim)
    ]


def bench_loader(args):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder), args.images)
        cfg = sslvit.Config(lam=0.2, model="base", device="cpu", **LARGE)
        files = sorted(Path(folder).iterdir())
        dataset = sslvit.TrainingViews(sslvit.ImageFolder(folder), cfg)
        batches = DataLoader(dataset, 32, sampler=[(0, i) for i in range(len(files))])
        loaded = list(batches)

        def augment(batches):
            for batch in batches:
                sslvit.augment(batch, cfg)

        work = {
            "bare decode": lambda: [Image.open(f).convert("RGB") for f in files],
            "sslvit: decode, three crops": lambda: list(batches),
            "sslvit: augment": functools.partial(augment, loaded),
            "sslvit: all": functools.partial(augment, batches),
        }
        with suppress(ImportError):
            views = torchvision_pipeline()
            work["torchvision: all"] = lambda: default_collate(
                [views(Image.open(path)) for path in files]
            )
        seconds = seconds_of(work, args.rounds)
    print(f"{len(files)} JPEGs, one thread, CPU time, {args.rounds} rounds\n")
    print(f"{'':28}{'images/s':>9} {'x decode':>9} {'torchvision / this':>19}")
    last = seconds.get("torchvision: all", float("nan"))
    for name, value in seconds.items():
        decodes = value / seconds["bare decode"]
        print(f"{name:28}{len(files) / value:9.1f} {decodes:9.2f} {last / value:19.2f}")


# ---- analyze: the training-free metrics of ViT-B/16 at 224 px ------------------------


@torch.no_grad()
def bench_analyze(args):
    import analyze

    torch.manual_seed(0)
    size, patch = LARGE["image_size"], LARGE["patch_size"]
    vit = sslvit.ViT(size, patch, **sslvit.SIZES["base"]).eval().to(args.device)
    batches = torch.randn(args.images // 4, 4, 3, size, size).to(args.device)

    def forward():
        for images in batches:
            vit(images).sum().item()

    measures = analyze.unique(analyze.FIGURES.values(), "measure")

    def every_metric():
        for images in batches:
            _, batch = analyze.look_inside(vit, images)
            values = [measure(batch) for measure in measures]
            values[-1].popitem()[1].sum().item()  # waits for a GPU

    work = {
        "one plain forward pass": forward,
        "analyze.py, every metric": every_metric,
    }
    seconds = seconds_of(work, args.rounds, args.device)
    print(f"ViT-B/16, {size} px, fp32, {args.device}, {args.images} images\n")
    print(f"{'':26}{'s per 1,000 images':>19} {'x forward pass':>15}")
    for name, value in seconds.items():
        ratio = value / seconds["one plain forward pass"]
        print(f"{name:26}{1000 * value / args.images:19.1f} {ratio:15.2f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="step|loader|analyze")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    functions = {"step": bench_step, "loader": bench_loader, "analyze": bench_analyze}
    for name, function in functions.items():
        command = commands.add_parser(
            name, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.set_defaults(function=function)
        command.add_argument("--rounds", type=int, default=5, help="after a warm-up")
        if name != "loader":
            command.add_argument("--device", default=device, choices=["cpu", "cuda"])
        if name != "step":
            images = 64 if name == "loader" else 8
            command.add_argument("--images", type=int, default=images)
            continue
        command.add_argument("--model", nargs="+", default=[*RECIPES])
        command.add_argument("--objective", nargs="+", default=[*OBJECTIVES])
        command.add_argument("--batch", type=int, default=0, help="0: as BATCH says")
        command.add_argument("--quick", action="store_true", help="ours alone")
        command.add_argument("--compile", action="store_true", help="our encoders")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
