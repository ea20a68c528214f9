"""What do self-supervised Vision Transformers learn?  This file trains them, analyze.py dissects them.

A Vision Transformer (ViT) can learn from images without labels in two ways. Contrastive learning (CL) asks
'are these two views the same image?', a question about the whole image. Masked image modelling (MIM) asks
'what was under the mask?', a question about each patch. Here are both, and L = (1 - λ)·L_MIM + λ·L_CL.
  python sslvit.py                                        hybrid on built-in stimuli, minutes on two cores
  python sslvit.py --objective moco      (or simmim)      λ = 1: MoCo v3   (λ = 0: SimMIM)
  torchrun --nproc_per_node 8 sslvit.py --data /imagenet  ViT-B/16, 224 px, the papers' recipe, on 8 GPUs
README.md has times and accuracies. Letters: B batch, N patch tokens (1+N with CLS), D width, H heads,
d = D/H, L layers, p patch size in px, C width of the contrastive embedding. Papers on arXiv: [P] Park et al.
2305.00729, [V] ViT 2010.11929, [M] MoCo v3 2104.02057, [S] SimMIM 2111.09886, [B] BYOL 2006.07733."""
import argparse, collections, contextlib, copy, ctypes, inspect, json, math, os, re, signal, sys, time
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
import numpy as np, torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
with contextlib.suppress(OSError, AttributeError):          # glibc: keep large blocks, do not return them
    for option, number in ((-1, 2**30), (-2, 2**26), (-4, 0)):  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX
        ctypes.CDLL("libc.so.6").mallopt(option, number)
class UserError(ValueError):
    """Something the user can mend: main() prints it as one line and returns exit status 2."""
def require(condition, message):
    if not condition:
        raise UserError(message)

# ==== 1. Config: which knobs are there, and why do they stand where they stand? ============================
@dataclass
class Config:
    """Fields are flags, comments their help: first choices or limits, without them ints >= 1, floats >= 0."""
    objective: str = "hybrid"    # moco|simmim|hybrid: contrastive (λ = 1), masked (λ = 0), or both
    lam: float = 0.2             # 0..1: λ of L = (1 - λ) L_MIM + λ L_CL; 0.2 is what the paper analyses
    data: str = ""               # folder of images: train/ and val/, class folders, or flat; empty: stimuli
    preset: str = "micro"        # micro|small32|imagenet: stimuli; 32-px photographs; default with --data
    model: str = "micro"         # nano|micro|tiny|small|base|large|huge: small has [M]'s 12 heads, timm's 6
    image_size: int = 32         # px; every crop is resized to this square
    patch_size: int = 4          # px; one token per patch: 32/4 gives 8 x 8 tokens, 224/16 gives 14 x 14
    positions: str = "sincos"    # sincos|learned|relative: fixed (MoCo v3), or SimMIM's biases and LayerScale
    freeze_patch: str = "auto"   # auto|yes|no: fixed patch embedding: calms MoCo, stops MIM; auto: λ = 1
    decoder_depth: int = 0       # 0..99: Transformer blocks before the pixel head (figure 11); SimMIM: none
    temperature: float = 0.2     # 0.001..99: τ of InfoNCE: smaller looks harder at the nearest negatives
    momentum: float = 0.97       # 0..1: of the key encoder's average, rises from here to 1; 0.99 in MoCo v3
    proj_hidden: int = 512       # hidden width of projector and predictor; 4096 in MoCo v3
    crop_min: float = 0.2        # 0.01..1: smallest contrastive crop as a share of the image; ImageNet: 0.08
    hue: float = 0.5             # 0..0.5: hue jitter; 0.5 is the whole circle: colour must not tell the image
    blur: float = 1.0            # 0..99: largest blur σ in px: always in view 1, one time in ten in view 2
    mask_unit: int = 4           # px, side of what is masked at once: 1/8 of the image, in SimMIM 1/7
    mask_ratio: float = 0.6      # 0.01..1: masked share: high, as copying the neighbour should not be enough
    epochs: float = 0.0          # passes over the training set; 0: --steps counts
    steps: int = 1500            # optimiser steps
    batch_size: int = 64         # images per optimiser step, over all ranks and accumulated parts
    accum: int = 0               # 0..9999: parts per step; 0: as few as keep a rank's part at 128 images
    lr: float = 12e-3            # base learning rate: the peak is lr x batch_size / 256
    weight_decay: float = 0.05   # AdamW's, decoupled from the gradient
    warmup: float = 0.1          # 0..1: share of the steps in which the learning rate rises
    clip: float = 5.0            # largest gradient norm; 0: no clipping
    device: str = "auto"         # cpu, cuda, cuda:1, mps; auto: CUDA where there is one
    dtype: str = "auto"          # auto|bf16|fp16|fp32: auto takes bf16 where there are units for it
    workers: int = -1            # -1..256: loading processes per rank; -1: none on a CPU, up to 8 with a GPU
    compile: bool = False        # torch.compile: a slow start, then faster steps
    checkpointing: bool = False  # recompute activations in the backward pass: large models in less memory
    seed: int = 0                # 0..999999999: of the weights, the stimuli, the order and every crop
    out: str = ""                # run folder; empty: runs/<preset>-<objective>
    resume: bool = False         # go on with the run in --out
    overwrite: bool = False      # start anew although --out holds a run
    on_full: str = "stop"        # stop|go: when a checkpoint cannot be written; the last one stays
    dry_run: bool = False        # print what the run costs (memory, FLOPs, hours on 1, 8, 64 GPUs) and stop
    rate: float = 0.0            # images/s of one device for --dry-run; 0: time three steps on this one
    save_every: int = 500        # steps between checkpoints and k-NN tests
    log_every: int = 25          # steps between console lines
    knn_images: int = 4000       # 0..999999: labelled images in the k-NN bank, tested: a quarter; 0: no k-NN
PRESETS = {  # what a recipe changes: for every objective, then for one
    "micro": {}, "micro-moco": dict(steps=1200, batch_size=128, lr=4e-3), "micro-simmim": dict(steps=4000),
    "small32": dict(hue=0.1, blur=0.3, epochs=100, batch_size=128, lr=4e-3, momentum=0.99),
    "imagenet": dict(model="base", image_size=224, patch_size=16, mask_unit=32, proj_hidden=4096, hue=0.1,
                     crop_min=0.08, blur=2.0, epochs=300, batch_size=4096, lr=1.5e-4, weight_decay=0.1,
                     momentum=0.99, warmup=40/300), "imagenet-moco": dict(clip=0.0), "imagenet-simmim": dict(
        epochs=100, batch_size=2048, lr=0.5e-4, weight_decay=0.05, warmup=0.1, positions="relative")}
SIZES = {n: dict(width=w, depth=d, heads=h) for n, w, d, h in (
    ("nano", 48, 6, 3), ("micro", 96, 6, 3), ("tiny", 192, 12, 3), ("small", 384, 12, 12),
    ("base", 768, 12, 12), ("large", 1024, 24, 16), ("huge", 1280, 32, 16))}

# ==== 2. ViT: how does an image become tokens, and how do tokens talk?   (names and shapes are timm's) =====
Record = collections.namedtuple("Record", "attn heads mid out")     # of a block: see Block.forward
def sincos_positions(width, rows, cols):
    """Fixed positions ([M] section 4): D/4 each for sin x, cos x, sin y, cos y; CLS: zeros -> (1, 1+N, D)."""
    frequency = 10000.0 ** -(torch.arange(width // 4) / (width // 4))                           # (D/4,)
    n = torch.arange(rows * cols)[:, None]                  # patches are numbered row by row
    x, y = n % cols * frequency, n // cols * frequency      # (N, D/4)
    return F.pad(torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1), (0, 0, 1, 0))[None]
def resize_grid(grid, rows, cols):
    """Bicubic interpolation of a map of vectors, (r, c, D) -> (rows, cols, D)."""
    if grid.shape[:2] != (rows, cols):
        grid = F.interpolate(grid.permute(2, 0, 1)[None], (rows, cols), mode="bicubic")[0].permute(1, 2, 0)
    return grid
class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): tokens talk, then each thinks for itself."""
    def __init__(self, width, heads, layer_scale=None):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        gammas = [{"gamma": torch.full((width,), layer_scale)} if layer_scale else {} for _ in "12"]
        self.ls1, self.ls2 = map(nn.ParameterDict, gammas)  # LayerScale: each sub-layer starts small
        # Xavier ([M]). qkv starts as the three matrices it holds; as one (√2 smaller) attention stays uniform
        for name, linear in (*self.attn.items(), *self.mlp.items()):
            nn.init.zeros_(linear.bias)
            for weight in linear.weight.data.chunk(3 if name == "qkv" else 1):
                nn.init.xavier_uniform_(weight)
    def forward(self, x, bias=None, record=False, first=None):
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x, q = x[:, :first], q[:, :, :first]                # q, k, v: (B, H, 1+N, d)
        bias = None if bias is None else bias[:, :first].to(q.dtype)
        if record or q.dtype == torch.bfloat16 and not q.is_cuda:  # on a CPU in bf16: 2 to 7 times as fast
            logits = q @ k.mT * q.shape[-1] ** -0.5         # (B, H, 1+N, 1+N)
            attn = (logits if bias is None else logits + bias).softmax(dim=-1)      # rows sum to 1
            heads = attn @ v                                # (B, H, 1+N, d)
        else:                                           # one kernel, which never writes the weights to memory
            heads = F.scaled_dot_product_attention(q, k, v, bias)
        y = self.attn["proj"](heads.transpose(1, 2).flatten(2))     # heads side by side: (B, 1+N, D)
        mid = x + (y * self.ls1["gamma"] if self.ls1 else y)        # after attention (B, 1+N, D)
        y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(mid))))
        out = mid + (y * self.ls2["gamma"] if self.ls2 else y)      # after the MLP (B, 1+N, D)
        return (out, Record(attn, heads, mid, out)) if record else out
class ViT(nn.Module):
    """[V], pre-norm; sizes in px. positions: sincos (fixed), learned, none; rel_pos_bias: SimMIM's, one for
    all blocks; layer_scale: its start; num_classes: of a linear head; ValueError if sizes do not divide."""
    def __init__(self, image_size, patch_size, width, depth, heads, *, positions="sincos", num_classes=0,
                 rel_pos_bias=False, layer_scale=None):
        super().__init__()
        require(image_size % patch_size == width % heads == width % 4 == 0, "patch or heads do not divide")
        self.patch_size, self.grid, self.checkpointing = patch_size, image_size // patch_size, False
        self.cls_token, self.pos_embed = nn.Parameter(1e-6 * torch.randn(1, 1, width)), None
        if positions != "none":
            learned, start = positions == "learned", sincos_positions(width, self.grid, self.grid)
            self.pos_embed = nn.Parameter(0.02 * torch.randn_like(start) if learned else start, learned)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, patch_size)})
        nn.init.xavier_uniform_(self.patch_embed["proj"].weight.data.flatten(1))   # one linear map of patches
        nn.init.zeros_(self.patch_embed["proj"].bias)
        table = {"relative_position_bias_table": torch.zeros((2 * self.grid - 1) ** 2 + 3, heads)}
        self.rel_pos_bias = nn.ParameterDict(table if rel_pos_bias else {})
        self.blocks = nn.ModuleList(Block(width, heads, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
    def position_bias(self, rows, cols):
        """SimMIM's positions: a number per head and offset query - key, to add to logits -> (H, 1+N, 1+N)."""
        table, side = self.rel_pos_bias["relative_position_bias_table"], 2 * self.grid - 1
        offsets = resize_grid(table[:-3].unflatten(0, (side, side)), 2 * rows - 1, 2 * cols - 1)
        n = torch.arange(rows * cols, device=table.device)
        x, y = n % cols, n // cols
        bias = F.pad(offsets[y[:, None] - y + rows - 1, x[:, None] - x + cols - 1], (0, 0, 1, 0, 1, 0))
        bias[0, 1:], bias[1:, 0], bias[0, 0] = table[-3], table[-2], table[-1]  # to patch, to CLS, CLS to CLS
        return bias.permute(2, 0, 1)
    def forward(self, x, mask=None, record=False, mask_token=None, first=None):
        """x (B, 3, h, w), any size the patch divides -> normed tokens (B, 1+N, D); record: also L Records;
        mask (B, N): True becomes mask_token (1, 1, D; None: zeros); first: so many from the last block."""
        rows, cols = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        x = self.patch_embed["proj"](x).flatten(2).mT       # (B, D, rows, cols) -> (B, N, D)
        if mask is not None:                          # the pixels under the mask end here, their tokens go on
            x = torch.where(mask[..., None], 0.0 if mask_token is None else mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)    # (B, 1+N, D)
        if self.pos_embed is not None:
            grid = resize_grid(self.pos_embed[0, 1:].unflatten(0, (self.grid, self.grid)), rows, cols)
            x = x + torch.cat([self.pos_embed[0, :1], grid.flatten(0, 1)])
        bias, records = self.position_bias(rows, cols) if self.rel_pos_bias else None, []
        for block in self.blocks:
            run = partial(checkpoint, block, use_reentrant=False) if self.checkpointing else block
            x = run(x, bias, record, first if block is self.blocks[-1] else None)
            if record:
                records.append(x[1])
                x = x[0]
        return (self.norm(x), records) if record else self.norm(x)

# ==== 3. Contrastive learning: are these two views the same image?   (MoCo v3) =============================
def mlp_head(*widths):
    """Linear-BN-ReLU as in [M]: BN makes one embedding for all impossible; an affine part could undo it."""
    norm, layers = partial(nn.BatchNorm1d, track_running_stats=False), []       # heads are never evaluated
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Linear(a, b, bias=False), norm(b), nn.ReLU()]
    return nn.Sequential(*layers[:-2], norm(widths[-1], affine=False))
def contrastive_loss(q, k, temperature):
    """InfoNCE, one direction ([M] equation 1): a query must find its own key among those of all ranks. q, k
    (B, C), normalised here -> scalar, 2τ·log(batch) at random. [M]'s 2τ: gradients comparable across τ."""
    with torch.autocast(q.device.type, enabled=False):  # bf16's 3 digits are too few for this softmax
        q, k = (F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1) for x in (q, k))
        labels = torch.arange(len(q), device=q.device)
        if dist.is_initialized():                           # keys carry no gradient, so gathering needs none
            labels, k = labels + len(q) * dist.get_rank(), k.contiguous()
            dist.all_gather(keys := [torch.empty_like(k) for _ in range(dist.get_world_size())], k)
            k = torch.cat(keys)                             # (ranks·B, C)
        return 2 * temperature * F.cross_entropy(q @ k.T / temperature, labels)     # (B, ranks·B) -> scalar
def cosine(start, end, progress):
    """Half a cosine from `start` (progress 0) to `end` (progress 1): the one curve behind every schedule."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
def momentum_at(step, total, base):
    """Momentum of the key average: from `base` to 1, as a late teacher should hold still ([M] section 4)."""
    return cosine(base, 1.0, step / total)

# ==== 4. Masked image modelling: what was under the mask?   (SimMIM) =======================================
def random_mask(batch, image_size, patch_size, unit, ratio, generator=None):
    """-> bool (B, N), True = masked: ceil(ratio × units) units of `unit` px in each image, large enough that
    the next pixel does not tell ([S] section 3.2). ValueError where patch, unit and image do not divide."""
    require(unit % patch_size == image_size % unit == 0,
            f"patch size {patch_size} must divide mask unit {unit}, and that image size {image_size}")
    side, patches = image_size // unit, unit // patch_size
    masked = math.ceil(ratio * side * side - 1e-9)          # 1e-9: 0.28 × 25 is 7, not 7.000000000000001
    order = torch.rand(batch, side * side, generator=generator).argsort(dim=1).argsort(dim=1)
    mask = (order < masked).unflatten(1, (side, side))      # units, then patches
    return mask.repeat_interleave(patches, 1).repeat_interleave(patches, 2).flatten(1)
def patchify(images, patch_size):
    """(B, 3, h, w) -> (B, N, 3p²), each patch's pixels. The way back: F.fold(x.mT, (h, w), p, stride=p)."""
    return F.unfold(images, patch_size, stride=patch_size).mT
def masked_l1(pred, target, mask):
    """Mean |pred - target|, (B, N, 3p²) each, in their unit, where mask, bool (B, N), is True ([S] eq. 1)."""
    return ((pred - target).abs().mean(dim=-1) * mask).sum() / mask.sum()       # (B, N) -> scalar

# ==== 5. The hybrid: both questions, one encoder ===========================================================
class SSL(nn.Module):
    """L = (1 - λ)·L_MIM + λ·L_CL ([P] section 5); λ = 0: SimMIM, 1: MoCo v3; one module for DDP, compile."""
    def __init__(self, cfg):
        super().__init__()
        self.lam, self.patch_size, self.temperature = cfg.lam, cfg.patch_size, cfg.temperature
        size, width = SIZES[cfg.model], SIZES[cfg.model]["width"]
        look = dict(positions="none", rel_pos_bias=True, layer_scale=0.1)       # SimMIM's ViT
        look = look if cfg.positions == "relative" else dict(positions=cfg.positions)
        self.encoder = ViT(cfg.image_size, cfg.patch_size, **size, **look)
        self.encoder.checkpointing = cfg.checkpointing
        self.encoder.patch_embed.requires_grad_(dict(yes=False, no=True, auto=cfg.lam < 1)[cfg.freeze_patch])
        if self.lam > 0:
            self.projector = mlp_head(width, cfg.proj_hidden, cfg.proj_hidden, 256)
            self.predictor = mlp_head(256, cfg.proj_hidden, 256)                # C = 256
            self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
            self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        if self.lam < 1:          # a linear decoder ([S]) makes the encoder's last layers decode; blocks take
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))  # that from them ([P] figure 11)
            blocks = [Block(width, size["heads"]) for _ in range(cfg.decoder_depth)]
            blocks += [nn.LayerNorm(width, eps=1e-6)] if blocks else []
            self.decoder = nn.Sequential(*blocks, nn.Linear(width, 3 * cfg.patch_size**2))
    def contrast(self, view1, view2):
        """MoCo v3's algorithm 1 in its seven steps, 5 to 7 in contrastive_loss -> loss, queries (B, C)."""
        views = torch.cat([view1, view2])                   # 1. two views of each image: (2B, 3, h, w)
        z = self.encoder(views, first=1)[:, 0]              # 2. CLS tokens (2B, D), both views in one pass
        # 3. queries (B, C), each view apart: BatchNorm would leak one view's statistics into the other
        q1, q2 = (self.predictor(self.projector(half)) for half in z.chunk(2))
        with torch.no_grad():                               # 4. keys, from the average (see update_average)
            z = self.key_encoder(views, first=1)[:, 0]
            k1, k2 = (self.key_projector(half) for half in z.chunk(2))
        return contrastive_loss(q1, k2, self.temperature) + contrastive_loss(q2, k1, self.temperature), q1
    def forward(self, view1, view2, view_mim, mask):
        """Views (B, 3, h, w), mask bool (B, N) -> scalars cl, mim (switched off by λ: 0, and its views may be
        None), std: of unit-length features over the batch × √width, 1 spread out, 0 all alike (collapse)."""
        cl = mim = torch.zeros((), device=mask.device)
        if self.lam < 1:                                    # SimMIM: mask, encode ALL tokens, predict pixels
            tokens = self.encoder(view_mim, mask, mask_token=self.mask_token)     # (B, 1+N, D)
            pixels = self.decoder(tokens)[:, 1:]            # (B, N, 3p²)
            mim = masked_l1(pixels, patchify(view_mim, self.patch_size), mask)
            features = tokens[:, 1:].mean(dim=1)
        if self.lam > 0:
            cl, features = self.contrast(view1, view2)
        unit = F.normalize(features.detach().float(), dim=-1)
        return {"cl": cl, "mim": mim, "std": unit.std(dim=0).mean() * unit.shape[1] ** 0.5}
    @torch.no_grad()
    def update_average(self, momentum):
        """key ← m·key + (1 - m)·query at a step's end: the next key pass sees what [M]'s would give."""
        if self.lam > 0:
            for key, query in (self.key_encoder, self.encoder), (self.key_projector, self.projector):
                torch._foreach_lerp_([*key.parameters()], [*query.parameters()], 1 - momentum)

# ==== 6. Data: what does the network get to see?   (each choice is a function of seed, epoch and index) ====
SHAPES = {      # level sets of radius 1, negative inside; polar angle a = 0 points up
    "circle": lambda x, y, r, a: r - 0.9, "square": lambda x, y, r, a: np.maximum(abs(x), abs(y)) - 0.75,
    "triangle": lambda x, y, r, a: r * np.cos(a % (2 * np.pi / 3) - np.pi / 3) - 0.5,
    "star": lambda x, y, r, a: r - 0.65 - 0.35 * np.cos(5 * a),
    "cross": lambda x, y, r, a: np.maximum(np.minimum(abs(x), abs(y)) - 0.3, np.fmax(abs(x), abs(y)) - 0.95),
    "ring": lambda x, y, r, a: abs(r - 0.7) - 0.25,
    "bar": lambda x, y, r, a: np.maximum(abs(x) - 0.4, abs(y) - 0.95),
    "crescent": lambda x, y, r, a: np.maximum(r - 0.95, 0.7 - np.hypot(x - 0.5, y))}
TEXTURES = {  # in [-1, 1] over u, v in radians; regular: what a mask hides must follow from its surroundings
    "plain": lambda u, v: np.ones_like(u), "horizontal": lambda u, v: np.sin(v),
    "vertical": lambda u, v: np.sin(u), "diagonal": lambda u, v: np.sin((u + v) / 2**0.5),
    "checks": lambda u, v: 1.5 * np.sin(u) * np.sin(v), "dots": lambda u, v: np.cos(u) + np.cos(v) - 0.6,
    "zigzag": lambda u, v: np.sin(v + 2 * np.arcsin(np.sin(u / 2))),
    "grid": lambda u, v: np.maximum(np.cos(u), np.cos(v)) * 2 - 1}
class Stimuli:
    """stimuli[i] -> image uint8 (S, S, 3), shape 0..7, texture 0..7, mask bool (S, S) of one object on smooth
    grey; drawn independently from (seed, split, i). render(i, shape, texture): scene i with other labels."""
    label_names, classes = ("shape", "texture"), (list(SHAPES), list(TEXTURES))
    def __init__(self, length, image_size=32, seed=0, split="train"):
        self.length, self.size, self.drawn = length, image_size, {}
        self.key = seed, ("train", "test").index(split)
    def __len__(self):
        return self.length
    def __getitem__(self, index):
        shape, texture = np.random.default_rng([*self.key, index, 0]).integers(8, size=2).tolist()
        image, mask = self.render(index, shape, texture)
        return image, shape, texture, mask
    def load(self, index):
        drawn = self.drawn if self.size <= 64 else {}       # drawing is nearly half of loading; 250 MB
        if index not in drawn:
            drawn[index] = (Image.fromarray((scene := self[index])[0]), [*scene[1:3]])
        return drawn[index]
    def render(self, index, shape, texture):
        rng = np.random.default_rng([*self.key, index, 1])
        tilt, radius = np.radians(rng.uniform(-18, 18)), rng.uniform(0.75, 1.0)
        cx, cy, slope_x, slope_y = rng.uniform(-1, 1, 4) * (0.2, 0.2, 0.1, 0.1)
        frequency, phase = 2 * np.pi / rng.uniform(0.36, 0.46), rng.uniform(0, 2 * np.pi, 2)
        grey, hue, fade, bright = rng.uniform((0.3, 0, 0.1, 0.75), (0.7, 1, 0.5, 1.0))
        axis = (np.arange(self.size, dtype=np.float32) + 0.5) * 2 / self.size - 1   # pixel centres in [-1, 1]
        x, y = axis[None, :], axis[:, None]
        u = np.cos(tilt) * (x - cx) + np.sin(tilt) * (y - cy)                  # the object's own axes, (S, S)
        v = np.cos(tilt) * (y - cy) - np.sin(tilt) * (x - cx)
        level = [*SHAPES.values()][shape](u / radius, v / radius, np.hypot(u, v) / radius, np.arctan2(u, -v))
        inside = np.clip(0.5 - level * radius * self.size / 2, 0, 1)            # an edge one pixel wide
        wave = [*TEXTURES.values()][texture](u * frequency + phase[0], v * frequency + phase[1])
        circle = np.clip(np.abs((6 * hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)   # the colour circle, RGB
        light = bright * (fade + (1 - fade) * circle) * (0.65 + 0.35 * np.clip(1.5 * wave, -1, 1)[..., None])
        ground = (grey + slope_x * x + slope_y * y)[..., None]
        image = ground + inside[..., None] * (light - ground)
        return (image * 255 + 0.5).clip(0, 255).astype(np.uint8), inside > 0.5
class ImageFolder(list):
    """(path, labels) of all images below `root`; its folders that hold them, if two or more, are the classes.
    held: None for all, False for nine images in ten, True for the tenth. UserError if there is no image."""
    def __init__(self, root, held=None):
        kinds = tuple(kind for kind, name in Image.registered_extensions().items() if name in Image.OPEN)
        found, seen = [], {os.path.realpath(root)}
        for folder, inner, names in os.walk(root, followlinks=True):
            real = {os.path.realpath(os.path.join(folder, name)): name for name in sorted(inner)}
            inner[:] = [real[path] for path in sorted(real.keys() - seen)]      # links may run in circles
            seen |= real.keys()
            top = os.path.relpath(folder, root).split(os.sep)[0]
            found += [(top, os.path.join(folder, name)) for name in names if name.lower().endswith(kinds)]
        require(found, f"--data {root}: no image that can be read (JPEG, PNG, WebP, TIFF ...)")
        classes = sorted({top for top, _ in found} - {"."})
        self.label_names, self.classes = (("class",), (classes,)) if len(classes) > 1 else ((), ())
        numbers = {name: [i] for i, name in enumerate(classes)}
        super().__init__((path, numbers.get(top, [0])) for i, (top, path) in enumerate(sorted(found))
                         if held is None or (i % 10 == 9) == held)
    def load(self, index):
        return Image.open(self[index][0]), self[index][1]
def find_data(cfg):
    """(training set, test set or None) in --data, or the built-in stimuli."""
    if not cfg.data:
        return [Stimuli(n, cfg.image_size, cfg.seed, name) for n, name in ((20000, "train"), (5000, "test"))]
    require(os.path.isdir(cfg.data), f"--data {cfg.data}: no such folder")
    paths = [os.path.join(cfg.data, name) for name in ("train", "val", "test")]
    if os.path.isdir(paths[0]):
        return ([ImageFolder(path) for path in paths if os.path.isdir(path)] + [None])[:2]
    whole = ImageFolder(cfg.data)
    return [ImageFolder(cfg.data, held) for held in (False, True)] if len(whole) > 19 else (whole, None)
def crop_box(width, height, smallest, rng):
    """RandomResizedCrop's (x0, y0, x1, y1): `smallest` to 1 of the area, aspect 3/4 to 4/3; else a square."""
    area, ratio = width * height * rng.uniform(smallest, 1, 10), (4 / 3) ** rng.uniform(-1, 1, 10)
    w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
    fits = (w <= width) & (h <= height)
    w, h = (w[fits][0], h[fits][0]) if fits.any() else (min(width, height),) * 2
    x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return x, y, x + w, y + h
def cut(image, size, smallest=(), rng=None):
    """Decodes an opened image once -> uint8 (crops, 3, size, size), upright RGB on white: a crop_box for each
    of `smallest`, or the largest centred square. Large JPEGs are decoded at 1/2, 1/4 or 1/8."""
    width, height = image.size[::-1] if image.getexif().get(0x0112, 1) >= 5 else image.size
    x, y = max(width - height, 0) / 2, max(height - width, 0) / 2
    boxes = np.array([crop_box(width, height, s, rng) for s in smallest] or [(x, y, width - x, height - y)])
    spare = max(1, (boxes[:, 2:] - boxes[:, :2]).min() / size)
    image.draft("RGB", (int(image.width / spare), int(image.height / spare)))
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":                               # 16-bit grey, floating point
        values = np.asarray(image, dtype=np.float32)
        values = values / (257 if image.mode[0] == "I" else max(values.max(), 1e-9) / 255)
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.mode != "RGB":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    boxes = np.maximum((boxes * image.width / width).round(), (0, 0, 1, 1)).astype(int)     # between pixels
    boxes[:, :2] = np.minimum(boxes[:, :2], boxes[:, 2:] - 1)       # one pixel at least
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]    # (1, 3, h, w)
    crops = [F.interpolate(x[..., b:d, a:c], size, mode="bilinear", antialias=True) for a, b, c, d in boxes]
    return torch.cat(crops).numpy()
class Views:
    """(epoch, index) -> all crops of a file, every random choice for it; epoch None: centre, for tests."""
    def __init__(self, source, cfg):
        self.source, self.cfg = source, cfg
    def __getitem__(self, key):
        cfg, (epoch, index, *tried) = self.cfg, key
        rng = np.random.default_rng([cfg.seed, 0, epoch or 0, index])
        smallest = [cfg.crop_min] * (2 * (cfg.lam > 0)) + [0.67] * (cfg.lam < 1)    # [S]: 0.67 to 1
        require(len(tried) < 100, "of 100 files in a row not one is an image that can be read")
        try:
            image, labels = self.source.load(index)
            crops = cut(image, cfg.image_size, () if epoch is None else smallest, rng)
        except Exception:                       # Pillow raises almost anything; the next file takes its place
            return self[(epoch, (index + 1) % len(self.source), *tried, index)] | {"broken": index}
        unit = torch.Generator().manual_seed(int(rng.integers(2**62)))
        mask = random_mask(1, cfg.image_size, cfg.patch_size, cfg.mask_unit, cfg.mask_ratio, unit)[0]
        colours = np.stack([self.draw_colours(rng, view) for view in (0, 1)])
        if cfg.lam < 1 and rng.random() < 0.5 and epoch is not None:
            crops[-1] = crops[-1, :, :, ::-1]               # the masked view is cropped and flipped, no more
        return dict(crops=crops, mask=mask, colours=colours, labels=np.array(labels), broken=-1)
    def draw_colours(self, rng, view):
        """[B] appendix B, 12 numbers: order of jitters (-1: none), factors, grey, blur σ, solarise, flip."""
        order = rng.permutation(4) if rng.random() < 0.8 else np.full(4, -1)
        reach = np.array([0.4, 0.4, 0.2, self.cfg.hue])     # of brightness, contrast, saturation, hue
        grey, blur, solarise, flip = rng.random(4) < (0.2, (1.0, 0.1)[view], (0.0, 0.2)[view], 0.5)
        blur = blur * rng.uniform(min(0.1, self.cfg.blur), self.cfg.blur)
        return np.float32([*order, *rng.uniform(-reach, reach) + (1, 1, 1, 0), grey, blur, solarise, flip])
def batches(cfg, length, steps, rank, ranks):
    """Lists of (epoch, index), one per part of a step; order and place follow from epoch and step alone."""
    order = lru_cache(2)(lambda e: np.random.default_rng([cfg.seed, 1, e]).permutation(length).tolist())
    part = cfg.batch_size // (ranks * cfg.accum)
    for piece in range(steps.start * cfg.accum, steps.stop * cfg.accum):
        places = range((piece * ranks + rank) * part, (piece * ranks + rank + 1) * part)
        yield [(place // length, order(place // length)[place % length]) for place in places]
# The rest runs batched on the training device, on images (B, 3, h, w) in [0, 1] with parameters (B, 1, 1, 1).
MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
def greyscale(x):
    return (x * x.new_tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)    # (B, 1, h, w)
def adjust_hue(x, turn):
    """Turns the colour circle by `turn` in [-0.5, 0.5]: RGB to hue, saturation, value and back."""
    value, low = x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True)
    r, g, b = ((value - x) / (value - low).clamp(min=1e-12)).split(1, dim=1)    # 0 in the largest channel
    hue = torch.where(r == 0, b - g, torch.where(g == 0, 2 + r - b, 4 + g - r))     # in sixths of the circle
    k = (hue + 6 * turn + x.new_tensor([5.0, 3.0, 1.0]).view(3, 1, 1)) % 6
    return value - (value - low) * torch.minimum(k, 4 - k).clamp(0, 1)
def gaussian_blur(x, sigma):    # sigma stays on the CPU, as the kernel's length follows from it
    """Blur by σ px up to 4σ, mirrored at the border: two convolutions, one an axis, blur the whole batch."""
    r = min(int(4 * sigma.max()) + 1, x.shape[2] - 1, x.shape[3] - 1)
    kernel = (-0.5 * (torch.arange(-r, r + 1) / sigma) ** 2).softmax(-1).repeat_interleave(x.shape[1], 0)
    y, kernel = F.pad(x, (r,) * 4, mode="reflect").flatten(0, 1)[None], kernel.to(x, non_blocking=True)
    return F.conv2d(F.conv2d(y, kernel, groups=len(kernel)), kernel.mT, groups=len(kernel)).view_as(x)
OPERATIONS = (  # four jitters: brightness, contrast, saturation, hue; then grey, blur, solarise, flip
    lambda x, f: (f * x).clamp(0, 1),
    lambda x, f: torch.lerp(greyscale(x).mean(dim=(2, 3), keepdim=True), x, f).clamp(0, 1),
    lambda x, f: torch.lerp(greyscale(x), x, f).clamp(0, 1), adjust_hue, lambda x, _: greyscale(x),
    gaussian_blur, lambda x, _: torch.where(x >= 0.5, 1 - x, x), lambda x, _: x.flip(-1))
def photometric(x, colours):
    """Applies draw_colours' (B, 12) in place: the jitters in each image's own order, then the rest."""
    todo = [(place == n, n) for place in colours.T[:4] for n in range(4)]   # in each image's own order
    for chosen, n in todo + [(colours[:, 4 + n] > 0, n) for n in range(4, 8)]:
        i = chosen.nonzero().flatten().to(x.device, non_blocking=True)  # found on the CPU: no GPU must wait
        if len(i):
            value = colours[chosen, 4 + n, None, None, None]                    # (images, 1, 1, 1)
            x[i] = OPERATIONS[n](x[i], value if n == 5 else value.to(x.device, non_blocking=True))
    return x
def augment(batch, cfg, device):
    """A loader's batch -> normalised view1, view2, view_mim (B, 3, h, w) or None; mask (B, N)."""
    crops, mask = (batch[name].to(device, non_blocking=True) for name in ("crops", "mask"))
    crops = crops.transpose(0, 1).contiguous().float() / 255                    # (crops, B, 3, h, w)
    if cfg.lam > 0:
        photometric(crops[:2].flatten(0, 1), batch["colours"].transpose(0, 1).flatten(0, 1))
    crops = (crops - MEAN.to(device)) / STD.to(device)
    return *(crops[:2] if cfg.lam > 0 else (None, None)), crops[-1] if cfg.lam < 1 else None, mask

# ==== 7. Optimiser and schedules: how fast, and when? ======================================================
def lr_at(step, total, warmup, peak):
    """Linear to peak in `warmup` steps (Adam's averages are noise at first), half a cosine to 0 at total."""
    return peak * step / warmup if step < warmup else cosine(peak, 0, (step - warmup) / (total - warmup or 1))
def make_optimizer(model, cfg):
    """AdamW. Decay is for matrices, not for biases, norms and tokens; MoCo v3 (λ = 1) decays everything."""
    groups = [dict(params=[], weight_decay=cfg.weight_decay), dict(params=[], weight_decay=0.0)]
    for p in (p for p in model.parameters() if p.requires_grad):
        groups[cfg.lam < 1 and p.squeeze().ndim < 2]["params"].append(p)
    return torch.optim.AdamW(groups, fused=cfg.device.startswith(("cpu", "cuda")))

# ==== 8. Training loop =====================================================================================
def knn(bank, known, queries, k=20):
    """The majority label among the k nearest of a bank, by cosine. bank (..., n, D), queries (..., m, D),
    known (n, label sets) -> (..., m, label sets). Whitened by the bank: no loud direction decides alone."""
    mean = bank.mean(dim=-2, keepdim=True)
    variance, axes = torch.linalg.eigh((bank - mean).mT @ (bank - mean) / len(known))
    white = axes * (variance + 1e-3 * variance.mean(dim=-1, keepdim=True) + 1e-12).rsqrt()[..., None, :]
    bank, queries = (F.normalize((x - mean) @ white, dim=-1) for x in (bank, queries))
    return known[(queries @ bank.mT).topk(min(k, len(known))).indices].mode(dim=-2).values
@torch.no_grad()
def knn_scores(encoder, data, cfg, autocast):
    """{'knn_<label set>': accuracy} of knn(), CLS or mean tokens, after the best layer; {} without labels."""
    if not (cfg.knn_images and data[1] and data[0].classes == data[1].classes != ()):
        return {}
    sets, own = [], torch.Generator()           # loaders draw a seed, which the run's stream must not feel
    for source, size in zip(data, (cfg.knn_images, cfg.knn_images // 4 + 1)):
        keys, parts = [(None, int(i)) for i in np.linspace(0, len(source) - 1, min(size, len(source)))], []
        for batch in DataLoader(Views(source, cfg), 64, False, keys, num_workers=cfg.workers, generator=own):
            with autocast():
                records = encoder(((batch["crops"][:, 0] / 255 - MEAN) / STD).to(cfg.device), record=True)[1]
            states = [x for r in records for x in (r.out[:, 0], r.out[:, 1:].mean(dim=1))]
            parts.append((torch.stack(states).float().cpu(), batch["labels"]))
        sets += [torch.cat([x for x, _ in parts], dim=1), torch.cat([y for _, y in parts])]
    best = (knn(*sets[:3]) == sets[3]).float().mean(dim=1).amax(dim=0)      # bank, known, queries; truth
    return {f"knn_{name}": round(value, 4) for name, value in zip(data[0].label_names, best.tolist())}
def save_checkpoint(path, state):
    """Writes beside the target and renames: whatever happens, `path` is the old or the new one, and whole."""
    with open(f"{path}.tmp", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)
def load_checkpoint(path):
    """Tensors, numbers and strings only: weights_only=True executes nothing that the file may contain."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                              # a damaged file can raise anything
        raise UserError(f"{path}: no such file, or not a checkpoint that is safe to read") from error
def plan(cfg, model, images, rate, say):
    """Says what a run costs. FLOPs of a block and token: 24D² in linear layers, 4TD in attention to T tokens,
    backward twice that. Bytes: 16 a trained weight, 4 an averaged one, 36D a block and token (SimMIM 58D)."""
    D, L, _ = SIZES[cfg.model].values()
    T, passes = 1 + (cfg.image_size // cfg.patch_size) ** 2, 2 * (cfg.lam > 0) + (cfg.lam < 1)
    flops = L * T * (24 * D**2 + 4 * T * D) * (3 * passes + 2 * (cfg.lam > 0))
    kept = (4 if cfg.checkpointing else 58 if cfg.positions == "relative" else 36) * passes * L * T * D
    count = sum(p.numel() for p in model.encoder.parameters())
    weights = sum((16 if p.requires_grad else 4) * p.numel() for p in model.parameters())
    say(f"encoder {count / 1e6:.3g} M parameters, {flops / 1e9:.3g} GFLOP per image; memory per GPU about "
        f"{weights / 2**30:.1f} GiB + {kept / 2**20:.0f} MiB for each image of a part")
    hours = ", ".join(f"{images / rate / 3600 / gpus:.3g} h on {gpus}" for gpus in (1, 8, 64))
    say(f"{images:.3g} images at {rate:.4g} images/s per GPU: {hours}")
def train(cfg, state, rank, ranks):
    """Trains one model, from checkpoint `state` if there is one -> main()'s exit status, None for 0."""
    device, out, say = torch.device(cfg.device), Path(cfg.out), print if rank == 0 else lambda *_, **__: None
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[cfg.dtype]
    autocast = partial(torch.autocast, device.type, dtype, enabled=cfg.dtype != "fp32")
    torch.manual_seed(cfg.seed)
    data = find_data(cfg)
    count, peak = len(data[0]), cfg.lr * cfg.batch_size / 256
    steps = max(1, round(cfg.epochs * count / cfg.batch_size)) if cfg.epochs else cfg.steps
    say(f"{cfg.objective} (λ = {cfg.lam:g}): ViT-{cfg.model}, {cfg.image_size} px, patch {cfg.patch_size}, "
        f"{count} images ({cfg.data or 'built-in stimuli'}), {steps} steps of {ranks} x {cfg.accum} x "
        f"{cfg.batch_size // ranks // cfg.accum} images, learning rate {cfg.lr:g} x {cfg.batch_size}/256 = "
        f"{peak:.2g}, {cfg.dtype} on {cfg.device}, into {out}; step 3 tells the minutes left", flush=True)
    model = SSL(cfg).to(device)
    optimizer = make_optimizer(model, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16")     # keeps small gradients from 0
    parts, broken, stop = dict(model=model, optimizer=optimizer, scaler=scaler), set(), []
    rows = state["log"] if state else [{"step": 0}]
    if state:
        torch.set_rng_state(state["rng"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
    elif rank == 0 and not cfg.dry_run:
        rows[0] |= knn_scores(model.encoder, data, cfg, autocast)
    if cfg.dry_run and cfg.rate:
        return plan(cfg, model, steps * cfg.batch_size, cfg.rate, say)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(model) if ranks > 1 and device.type == "cuda" else model
    net = nn.parallel.DistributedDataParallel(net) if ranks > 1 else net
    net = torch.compile(net) if cfg.compile else net
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(number))
    bad, waited, since, began = torch.zeros((), device=device), 0.0, rows[-1]["step"], time.perf_counter()
    order = batches(cfg, count, range(since, steps), rank, ranks)
    stream = iter(DataLoader(Views(data[0], cfg), batch_sampler=order, num_workers=cfg.workers,
                             pin_memory=device.type == "cuda", generator=torch.Generator()))
    for done in range(since + 1, steps + 1):                # the number of steps when this one is done
        # schedules
        lr, momentum = lr_at(done, steps, cfg.warmup * steps, peak), momentum_at(done, steps, cfg.momentum)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for piece in range(cfg.accum):
            # batch
            clock = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - clock
            for index in set(batch["broken"].tolist()) - broken - {-1}:
                broken.add(index)
                print(f"unreadable, the next file takes its place: {data[0][index][0]!r}", file=sys.stderr)
            require(len(broken) <= max(1, count / 100), "over 1 % of the files are broken: mend the folder")
            # losses, backward; ranks exchange gradients with the last piece only
            with net.no_sync() if ranks > 1 and piece < cfg.accum - 1 else contextlib.nullcontext():
                views = augment(batch, cfg, device)
                with autocast():
                    losses = net(*views)
                loss = (1 - cfg.lam) * losses["mim"] + cfg.lam * losses["cl"]
                scaler.scale(loss / cfg.accum).backward()
        # clip, step, average
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        model.update_average(momentum)
        # log; the first bad number is remembered on the device, where it makes nobody wait
        finite = loss.detach().isfinite() & (norm.isfinite() | scaler.is_enabled())
        bad = torch.where((bad == 0) & ~finite, done, bad)
        due = 0 in (done % cfg.log_every, done % cfg.save_every) or done in (3, steps) or stop and ranks == 1
        if ranks > 1 and due:                               # what one rank knows all must know
            dist.all_gather_object(everyone := [None] * ranks, (int(bad), stop, broken))
            bads, stops, brokens = zip(*everyone)
            bad, stop, broken = max(bads), sum(stops, []), set().union(*brokens)
        halt, saving = due and bool(stop), due and (done % cfg.save_every == 0 or done == steps or bool(stop))
        if due:
            if bad > 0:
                raise FloatingPointError(f"loss or gradient not finite at step {int(bad)}; last good line: "
                    f"{rows[-1]}. Go on from {out}/ckpt.pt with --resume, or start with a lower --lr")
            seconds, numbers = time.perf_counter() - began, dict(losses, loss=loss.detach(), norm=norm)
            pace, speed = seconds / (done - since), (done - since) * cfg.batch_size / seconds
            row = {"step": done} | {name: round(value.item(), 5) for name, value in numbers.items()}
            row |= {"lr": lr, "momentum": momentum, "images/s": round(speed, 1), "broken": len(broken)}
            row |= {"stall": round(waited / seconds, 3), "minutes left": round((steps - done) * pace / 60, 1)}
            if cfg.dry_run:
                return plan(cfg, model, steps * cfg.batch_size, speed / ranks, say)
            if scaler.is_enabled():                         # steps left out because fp16 overflowed
                row["skipped"] = done - int(optimizer.state[optimizer.param_groups[0]["params"][0]]["step"])
            if row["std"] < 0.05 <= rows[-1].get("std", 1):
                say("features collapse (std near 0): all images look alike; lower --lr or raise --momentum")
            if saving and rank == 0:
                row |= knn_scores(model.encoder, data, cfg, autocast)
            rows.append(row)
            say(*(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
            waited, since, began = 0.0, done, time.perf_counter()
        # save
        if saving and rank == 0:
            state = dict(config=asdict(cfg), step=done, log=rows, rng=torch.get_rng_state())
            state |= {name: part.state_dict() for name, part in parts.items()}
            try:
                save_checkpoint(out / "ckpt.pt", state)
                (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            except OSError as error:
                say(f"step {done} could not be saved ({error}); {out}/ckpt.pt, if any, is older and whole")
                require(cfg.on_full == "go", "stopped as --on-full says; make room, then --resume")
        if halt:
            say(f"stopped by a signal after saving step {done}; the same command with --resume goes on")
            return 128 + stop[0]
    if rank == 0:
        finish(cfg, rows, data)
def finish(cfg, rows, data):
    from matplotlib.figure import Figure                    # here, as it takes a second to load
    axis = Figure(figsize=(7, 4), layout="constrained").subplots()
    for key, label in (("mim", "L_MIM: masked L1"), ("cl", "L_CL: InfoNCE"))[cfg.lam == 1:1 + (cfg.lam > 0)]:
        axis.plot([row["step"] for row in rows[1:]], [row[key] for row in rows[1:]], label=label)
    axis.set(xlabel="optimiser step", ylabel="loss", title=f"{cfg.objective}, λ = {cfg.lam:g}")
    axis.legend()
    axis.figure.savefig(Path(cfg.out) / "loss.png", dpi=150)
    for (name, start), classes in zip([*rows[0].items()][1:], data[0].classes):     # of knn_scores
        print(f"{name}: accuracy {rows[-1][name]:.3f}, untrained {start:.3f}, chance {1 / len(classes):.3f}")
    print(f"checkpoint, log and loss curve are in {cfg.out}; next: python analyze.py {cfg.out}/ckpt.pt")

# ==== 9. Command line ======================================================================================
def parse(argv):
    """Command line -> (Config with its recipe, {name: value} of the flags given), or UserError."""
    parser = argparse.ArgumentParser("sslvit.py", description=__doc__, allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, limits = lambda message: require(False, f"{message}; --help lists all flags"), {}
    for knob, text in zip(fields(Config), re.findall(r"^    \w+: .+# (.*)", inspect.getsource(Config), re.M)):
        head, flag = text.split(":")[0], "--" + knob.name.replace("_", "-")
        how = dict(action="store_true") if knob.type is bool else dict(type=knob.type)
        how |= dict(choices=head.split("|")) if "|" in head else {}
        limits[flag] = [*map(float, head.split(".."))] if ".." in head else (knob.type is int, 1e6)
        parser.add_argument(flag, help=f"{text} [{knob.default}]".replace("%", "%%"), **how)
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", "imagenet" if given.get("data") else "micro")
    objective = given.get("objective", "hybrid")
    recipe = {"preset": preset, **PRESETS[preset], **PRESETS.get(f"{preset}-{objective}", {})}
    recipe |= dict(epochs=0.0) if "steps" in given else {}
    cfg = Config(**recipe | given | {"moco": dict(lam=1.0), "simmim": dict(lam=0.0)}.get(objective, {}))
    for (flag, (low, high)), value in zip(limits.items(), asdict(cfg).values()):
        require(isinstance(value, str) or low <= value <= high, f"{flag} {value}: not in {low:g}..{high:.9g}")
    require(given.get("lam", cfg.lam) == cfg.lam, "--lam is for the hybrid: moco is λ = 1, simmim λ = 0")
    cfg.out = cfg.out or f"runs/{preset}-{objective}" + (f"-{cfg.lam:g}" if "lam" in given else "")
    return cfg, given
def has_bf16(gpu, cpu=Path("/proc/cpuinfo")):
    return torch.cuda.is_bf16_supported(False) if gpu else cpu.exists() and "bf16" in cpu.read_text()
def main(argv=None):
    """Runs a command line -> exit status: 0, 1 (number not finite), 2 (bad input), 130 or 143 (signal)."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        cfg, given = parse(argv)
        path, state = Path(cfg.out) / "ckpt.pt", None
        if cfg.resume and not cfg.overwrite:
            state = load_checkpoint(path)
            require(isinstance(state, dict) and "optimizer" in state, f"{path}: not a run of this program")
            saved, here = asdict(Config()) | state["config"], {"device", "workers", "accum", "out"}
            free = here | {"compile", "checkpointing", "save_every", "log_every", "resume", "data", "on_full"}
            fixed = {k: saved[k] for k in {*given} - free if given[k] not in (saved[k], "auto")}
            require(not fixed, f"{path} has {fixed}, which cannot change at --resume")
            cfg = Config(**saved | {name: getattr(cfg, name) for name in free & {*given} | here})
        require(state or cfg.overwrite or not path.exists(), f"{path} exists: give --resume or --overwrite")
        cfg.device = cfg.device.replace("auto", "cuda" if (cuda := torch.cuda.is_available()) else "cpu")
        gpu = cfg.device.startswith("cuda")
        require(cuda if gpu else cfg.device in ("cpu", "mps"), f"--device {cfg.device}: there is none here")
        cfg.dtype = cfg.dtype.replace("auto", "bf16" if has_bf16(gpu) else "fp16" if gpu else "fp32")
        cfg.accum = cfg.accum or math.ceil(cfg.batch_size / ranks / 128)
        cfg.workers = min(8, (os.cpu_count() or 1) // ranks) * gpu if cfg.workers < 0 else cfg.workers
        part, rest = divmod(cfg.batch_size, ranks * cfg.accum)
        require(rest == 0 and part > (cfg.lam > 0), f"--batch-size {cfg.batch_size} does not divide into "
                f"{ranks} ranks x {cfg.accum} parts of at least two images, as the contrastive loss needs")
        random_mask(1, cfg.image_size, cfg.patch_size, cfg.mask_unit, cfg.mask_ratio)   # do the sizes divide?
        if not cfg.dry_run:
            os.makedirs(cfg.out, exist_ok=True)
            path.with_name("log.jsonl").open("a").close()   # a folder without write permission shows here
        if ranks > 1:                                       # started by torchrun
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) if gpu else -1)     # -1 changes nothing
            dist.init_process_group("nccl" if gpu else "gloo")
        return train(cfg, state, rank, ranks) or 0
    except (UserError, OSError, FloatingPointError) as error:
        print(f"sslvit.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
if __name__ == "__main__":
    status = main()
    sys.stdout.flush()      # ranks leave at once: gloo's threads may abort a Python that shuts down (pytorch
    (os._exit if dist.is_initialized() else sys.exit)(status)                               # issue 190489)
