"""What do self-supervised Vision Transformers learn?  This file trains them, analyze.py dissects them.

A Vision Transformer (ViT) can learn from images without labels in two ways. Contrastive learning (CL) asks
'are these two views the same image?', a question about the whole image. Masked image modelling (MIM) asks
'what was under the mask?', a question about each patch. Here are both, and L = (1 - λ)·L_MIM + λ·L_CL.

  python sslvit.py                                        hybrid on built-in stimuli, minutes on two cores
  python sslvit.py --objective moco      (or simmim)      λ = 1: MoCo v3 (λ = 0: SimMIM)
  python sslvit.py --objective hybrid --data /imagenet    ViT-B/16, 224 px, the papers' recipe; with many
  torchrun --nproc_per_node 8 sslvit.py --data /imagenet  GPUs the same. README.md has times and accuracies.

References: [P] Park et al., What Do Self-Supervised Vision Transformers Learn?, ICLR 2023, arXiv 2305.00729.
[M] Chen, Xie, He, MoCo v3, arXiv 2104.02057. [S] Xie et al., SimMIM, arXiv 2111.09886. [B] Grill et al., BYOL,
arXiv 2006.07733. [V] Dosovitskiy et al., ViT, arXiv 2010.11929. Glossary: B batch, N patch tokens (and one CLS
token), D width, H heads, d = D/H, L layers, p patch size in px, C width of the contrastive embedding.
"""

import argparse
import contextlib
import ctypes
import inspect
import json
import math
import os
import re
import signal
import sys
import time
from collections import OrderedDict
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.checkpoint import checkpoint


class UserError(Exception):
    """Something the user can mend: main() prints it as one line and returns exit status 2."""


# ==== 1. Config: which knobs are there, and why do they stand where they stand? ===========================
# fmt: off


@dataclass
class Config:
    """One run's hyper-parameters. Field `crop_min` is the flag --crop-min; its comment is the help text."""

    objective: str = "hybrid"    # moco|simmim|hybrid: contrastive (λ = 1), masked (λ = 0), or both
    lam: float = 0.2             # λ of L = (1 - λ) L_MIM + λ L_CL; 0.2 is what the paper analyses
    data: str = ""               # folder of images: train/ and val/, class folders, or flat; empty: built-in stimuli
    preset: str = "micro"        # micro|small32|imagenet: recipe for stimuli, 32-px photographs, ImageNet (with --data)
    model: str = "micro"         # micro|tiny|small|base|large|huge: small has MoCo v3's 12 heads, not timm's 6
    image_size: int = 32         # px; every crop is resized to this square
    patch_size: int = 4          # px; one token per patch: 32/4 gives 8 x 8 tokens, 224/16 gives 14 x 14
    positions: str = "sincos"    # sincos|learned|relative: fixed as in MoCo v3, or SimMIM's biases with LayerScale
    freeze_patch: str = "auto"   # auto|yes|no: random patch embedding steadies MoCo but stops MIM; auto: only if λ = 1
    decoder_depth: int = 0       # Transformer blocks before the pixel head (figure 11); SimMIM has none
    temperature: float = 0.2     # τ of InfoNCE: smaller looks harder at the nearest negatives
    momentum: float = 0.99       # of the key encoder's average at the start; rises to 1
    proj_hidden: int = 512       # hidden width of projector and predictor; 4096 in MoCo v3
    crop_min: float = 0.4        # smallest contrastive crop as a share of the image; 0.08 on ImageNet
    hue: float = 0.5             # hue jitter; 0.5 is the whole circle, so that colour cannot identify a stimulus
    blur: float = 1.0            # largest blur σ in px: always in view 1, with probability 0.1 in view 2
    mask_unit: int = 4           # px, side of what is masked at once: an eighth of the image, in SimMIM a seventh
    mask_ratio: float = 0.6      # masked share: high, so that copying the neighbour is not enough
    epochs: float = 0.0          # passes over the training set; 0: --steps counts
    steps: int = 1500            # optimiser steps
    batch_size: int = 64         # images per optimiser step, over all ranks and accumulated parts
    accum: int = 0               # parts per step; 0: as few as keep a rank's part at 128 images or fewer
    lr: float = 8e-3             # base learning rate: the peak is lr x batch_size / 256
    weight_decay: float = 0.05   # AdamW's, decoupled from the gradient
    warmup: float = 0.1          # share of the steps in which the learning rate rises
    clip: float = 5.0            # largest gradient norm; 0: no clipping
    device: str = "auto"         # cpu, cuda, cuda:1, mps; auto: CUDA where there is one
    dtype: str = "auto"          # auto|bf16|fp16|fp32: auto takes bf16 where there are units for it
    workers: int = -1            # image-loading processes per rank; -1: none on a CPU, up to 8 beside a GPU
    compile: bool = False        # torch.compile: a slow start, then faster steps
    checkpointing: bool = False  # recompute activations in the backward pass: large models in less memory
    seed: int = 0                # of the weights, the stimuli, the order and every crop
    out: str = ""                # run folder; empty: runs/<preset>-<objective>
    resume: bool = False         # go on with the run in --out
    overwrite: bool = False      # start anew although --out holds a run
    save_every: int = 250        # steps between checkpoints and k-NN tests
    log_every: int = 25          # steps between console lines
    knn_images: int = 4000       # labelled images in the k-NN bank, a quarter of it again are tested; 0: no k-NN


PRESETS = {  # what a recipe changes: for every objective, then for one
    "micro": {},
    "small32": dict(model="tiny", proj_hidden=1024, crop_min=0.2, hue=0.1, blur=0.3, epochs=100, batch_size=256, lr=1e-3),
    "imagenet": dict(
        model="base", image_size=224, patch_size=16, mask_unit=32, proj_hidden=4096, crop_min=0.08, hue=0.1, blur=2.0,
        epochs=300, batch_size=4096, lr=1.5e-4, weight_decay=0.1, warmup=40 / 300, save_every=500),
    "imagenet-moco": dict(clip=0.0),
    "imagenet-simmim": dict(epochs=100, batch_size=2048, lr=0.5e-4, weight_decay=0.05, warmup=0.1, positions="relative"),
}
SIZES = {
    "micro": dict(width=96, depth=6, heads=3), "tiny": dict(width=192, depth=12, heads=3),
    "small": dict(width=384, depth=12, heads=12), "base": dict(width=768, depth=12, heads=12),
    "large": dict(width=1024, depth=24, heads=16), "huge": dict(width=1280, depth=32, heads=16),
}
# fmt: on

# ==== 2. ViT: how does an image become tokens, and how do tokens talk?   (parameter names and shapes are timm's) 


class Record(NamedTuple):
    """One block's inner life for one batch: what analyze.py dissects."""

    attn: torch.Tensor  # (B, H, 1+N, 1+N) attention weights, rows sum to 1
    heads: torch.Tensor  # (B, H, 1+N, d)  what each head read: attn @ v
    mid: torch.Tensor  # (B, 1+N, D)       state after the attention sub-layer
    out: torch.Tensor  # (B, 1+N, D)       state after the MLP sub-layer


def sincos_positions(width, rows, cols):
    """Fixed 2-D positions ([M] section 4): a quarter of the width each for sin x, cos x, sin y, cos y.

    Returns (1, 1 + rows·cols, width). The CLS token stands nowhere: zeros.
    """
    frequency = 10000.0 ** -(torch.arange(width // 4) / (width // 4))  # (D/4,)
    n = torch.arange(rows * cols)[:, None]  # patches are numbered row by row
    y, x = n // cols * frequency, n % cols * frequency  # (N, D/4)
    return F.pad(torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1), (0, 0, 1, 0))[None]


def resize_grid(grid, rows, cols):
    """Bicubic interpolation of a map of vectors, (r, c, D) -> (rows, cols, D)."""
    if grid.shape[:2] == (rows, cols):
        return grid
    return F.interpolate(grid.permute(2, 0, 1)[None], (rows, cols), mode="bicubic")[0].permute(1, 2, 0)


class RelativePositionBias(nn.Module):
    """SimMIM's positions: a learned number per head and offset (Δy, Δx), added to the attention logits."""

    def __init__(self, grid, heads):
        super().__init__()
        self.grid = grid  # rows: (2·grid - 1)² offsets, then CLS to patch, patch to CLS, CLS to CLS
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, heads))

    def forward(self, rows, cols):
        table, side = self.relative_position_bias_table, 2 * self.grid - 1
        offsets = resize_grid(table[:-3].reshape(side, side, -1), 2 * rows - 1, 2 * cols - 1)
        n = torch.arange(rows * cols, device=table.device)
        y, x = n // cols, n % cols
        bias = offsets[y[:, None] - y + rows - 1, x[:, None] - x + cols - 1]  # (N, N, H), query minus key
        bias = F.pad(bias, (0, 0, 1, 0, 1, 0))  # (1+N, 1+N, H), row 0: the query is CLS
        bias[0, 1:], bias[1:, 0], bias[0, 0] = table[-3], table[-2], table[-1]
        return bias.permute(2, 0, 1)  # (H, 1+N, 1+N)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, bias=None, record=False):
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
        attn = None
        if record:  # the same sum with the weights in the open
            logits = q @ k.mT * q.shape[-1] ** -0.5  # (B, H, N, N)
            attn = (logits if bias is None else logits + bias).softmax(dim=-1)
            heads = attn @ v  # (B, H, N, d)
        else:  # one fused kernel, which never writes the N × N matrix to memory
            bias = None if bias is None else bias.to(q.dtype)
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(heads.transpose(1, 2).reshape(B, N, D)), attn, heads  # heads side by side


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): tokens talk, then each thinks for itself."""

    def __init__(self, width, heads, layer_scale=None):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        fc1, fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))
        self.ls1 = self.ls2 = None  # LayerScale: each sub-layer starts as a small correction
        if layer_scale:
            self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.full((width,), layer_scale)}) for _ in "12")

    def forward(self, x, bias=None, record=False):
        y, attn, heads = self.attn(self.norm1(x), bias, record)
        mid = x + (y if self.ls1 is None else y * self.ls1["gamma"])
        y = self.mlp(self.norm2(mid))
        out = mid + (y if self.ls2 is None else y * self.ls2["gamma"])
        return (out, Record(attn, heads, mid, out)) if record else out


class ViT(nn.Module):
    """Vision Transformer [V], pre-norm; its state dict and timm's VisionTransformer's are interchangeable.

    image_size, patch_size: px. positions: 'sincos' (fixed), 'learned' or 'none'. rel_pos_bias: SimMIM's shared
    table. layer_scale: LayerScale's initial value. num_classes > 0 adds a linear `head` for the caller to use.
    Raises ValueError where the patch does not divide the image or the heads the width.
    """

    def __init__(
        self, image_size, patch_size, width, depth, heads, *, positions="sincos", num_classes=0, rel_pos_bias=False,
        layer_scale=None,
    ):  # fmt: skip
        super().__init__()
        if image_size % patch_size or width % heads or width % 4:
            raise ValueError(f"patch {patch_size} must divide image {image_size}; {heads} and 4 the width {width}")
        self.patch_size, self.grid, self.checkpointing = patch_size, image_size // patch_size, False
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, width))
        self.pos_embed = None
        if positions != "none":
            start = sincos_positions(width, self.grid, self.grid)
            start = 0.02 * torch.randn_like(start) if positions == "learned" else start
            self.pos_embed = nn.Parameter(start, requires_grad=positions == "learned")
        # stride = kernel: the same linear map for every patch
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, patch_size, patch_size)))
        self.rel_pos_bias = RelativePositionBias(self.grid, heads) if rel_pos_bias else None
        self.blocks = nn.ModuleList(Block(width, heads, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        init_weights(self)

    def forward(self, x, mask=None, record=False, mask_token=None):
        """x (B, 3, h, w), of any size that the patch divides -> tokens (B, 1+N, D) after the last norm.

        mask: bool (B, N), True = this patch's embedding is replaced by mask_token (1, 1, D; None: zeros).
        record: also return a list of L Records, from the same weights by an explicit softmax.
        """
        rows, cols = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        x = self.patch_embed(x).flatten(2).mT  # (B, D, rows, cols) -> (B, N, D)
        if mask is not None:  # the pixels under the mask end here; their tokens go on through all layers
            x = torch.where(mask[..., None], 0 if mask_token is None else mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)  # (B, 1+N, D)
        if self.pos_embed is not None:
            grid = self.pos_embed[0, 1:].reshape(self.grid, self.grid, -1)
            x = x + torch.cat([self.pos_embed[0, :1], resize_grid(grid, rows, cols).flatten(0, 1)])
        bias = self.rel_pos_bias(rows, cols) if self.rel_pos_bias is not None else None
        records = []
        for block in self.blocks:
            if record:
                x, inner = block(x, bias, record=True)
                records.append(inner)
            elif self.checkpointing and self.training:
                x = checkpoint(block, x, bias, use_reentrant=False)
            else:
                x = block(x, bias)
        return (self.norm(x), records) if record else self.norm(x)


def init_weights(module):
    """MoCo v3's start: Xavier-uniform weights, zero biases. `qkv` holds three matrices and is initialised as three:
    as one (3D, D) matrix it would start √2 smaller, with an attention that stays uniform for long."""
    for name, m in module.named_modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            for part in m.weight.data.flatten(1).chunk(3 if name.endswith("qkv") else 1):
                nn.init.xavier_uniform_(part)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


# ==== 3. Contrastive learning: are these two views the same image?   (MoCo v3) ============================


def mlp_head(widths):
    """Linear-BN-ReLU stack. BatchNorm ties the batch together: one embedding for all images is impossible. The
    last BN has no affine part, which could only undo that ([M]'s code; its linear layers have no bias)."""
    layers = []
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()]
    return nn.Sequential(*layers[:-2], nn.BatchNorm1d(widths[-1], affine=False))


def world():
    """(rank, ranks) of this process; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def contrastive_loss(q, k, temperature):
    """InfoNCE, one direction ([M] equation 1): each query must find its own key among all images' keys.

    q, k: (B, C), normalised here; the keys of all ranks are gathered. Returns a scalar: about 2τ·log(batch) for
    random embeddings, 0 at best. The factor 2τ is [M]'s: gradients stay comparable when τ changes.
    """
    with torch.autocast(q.device.type, enabled=False):  # bf16 has 3 digits, too few for a softmax over a batch
        q, k = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1)
        rank, ranks = world()
        if ranks > 1:
            keys = [torch.empty_like(k) for _ in range(ranks)]
            dist.all_gather(keys, k.contiguous())  # keys carry no gradient, so this needs none either
            k = torch.cat(keys)  # (ranks·B, C)
        logits = q @ k.T / temperature  # (B, ranks·B): cosine similarities over τ
        labels = torch.arange(len(q), device=q.device) + len(q) * rank
        return 2 * temperature * F.cross_entropy(logits, labels)


def cosine(start, end, progress):
    """Half a cosine from `start` (progress 0) to `end` (progress 1): the one curve behind every schedule."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def momentum_at(step, total, base):
    """Momentum of the key average: from `base` to 1, as a late teacher should hold still ([M] section 4)."""
    return cosine(base, 1.0, step / total)


# ==== 4. Masked image modelling: what was under the mask?   (SimMIM) ======================================


def random_mask(batch, image_size, patch_size, unit, ratio, generator=None):
    """Masks units of `unit` px, larger than a patch if the next pixel tells too much ([S] section 3.2).

    Sizes in px: the patch must divide the unit and the unit the image, or ValueError. Returns bool (B, N), True =
    masked, with ceil(ratio × units) units masked in each image.
    """
    if unit % patch_size or image_size % unit:
        raise ValueError(f"patch {patch_size} must divide mask unit {unit}, and that the image size {image_size}")
    side, patches = image_size // unit, unit // patch_size
    masked = math.ceil(ratio * side * side - 1e-9)  # 1e-9: 0.28 × 25 is 7, not 7.000000000000001
    order = torch.rand(batch, side * side, generator=generator).argsort(dim=1).argsort(dim=1)
    mask = (order < masked).reshape(batch, side, side)  # units
    return mask.repeat_interleave(patches, 1).repeat_interleave(patches, 2).flatten(1)  # patches


def patchify(images, patch_size):
    """(B, 3, h, w) -> (B, N, 3p²), the pixels of each patch. F.fold(x.mT, (h, w), p, stride=p) is the way back."""
    return F.unfold(images, patch_size, stride=patch_size).mT


def pixel_decoder(width, heads, patch_size, depth):
    """Tokens (B, 1+N, D) to pixels (B, 1+N, 3p²). Depth 0 is SimMIM's linear head, which leaves the decoding to the
    encoder's last layers; `depth` Transformer blocks take it over from them ([P] figure 11)."""
    blocks = [Block(width, heads) for _ in range(depth)] + [nn.LayerNorm(width, eps=1e-6)] * (depth > 0)
    return nn.Sequential(*blocks, nn.Linear(width, 3 * patch_size**2))


def masked_l1(pred, target, mask):
    """Mean |pred - target| over masked pixels and channels only ([S] equation 1).

    pred, target: (B, N, 3p²). mask: bool (B, N) with some True. Returns a scalar in the target's unit.
    """
    error = (pred.float() - target.float()).abs().mean(dim=-1)  # (B, N)
    return (error * mask).sum() / mask.sum()


# ==== 5. The hybrid: both questions, one encoder ==========================================================


class SSL(nn.Module):
    """L = (1 - λ)·L_MIM + λ·L_CL ([P] section 5). λ = 0 builds no contrastive part and is SimMIM; λ = 1 builds no
    mask token and no decoder and is MoCo v3. A whole step is one forward(): DDP and compile see one module."""

    def __init__(self, cfg):
        super().__init__()
        self.lam, self.patch_size, self.temperature = cfg.lam, cfg.patch_size, cfg.temperature
        size, width = SIZES[cfg.model], SIZES[cfg.model]["width"]
        simmim_vit = dict(positions="none", rel_pos_bias=True, layer_scale=0.1)
        look = simmim_vit if cfg.positions == "relative" else dict(positions=cfg.positions)
        self.encoder = ViT(cfg.image_size, cfg.patch_size, **size, **look)
        self.encoder.checkpointing = cfg.checkpointing
        if cfg.freeze_patch == "yes" or cfg.freeze_patch == "auto" and cfg.lam == 1:
            self.encoder.patch_embed.requires_grad_(False)  # [M] section 5: gradient spikes start in this layer
        if self.lam > 0:
            self.projector = mlp_head((width, cfg.proj_hidden, cfg.proj_hidden, 256))
            self.predictor = mlp_head((256, cfg.proj_hidden, 256))  # C = 256
            init_weights(nn.ModuleList([self.projector, self.predictor]))
            self.key_encoder = deepcopy(self.encoder).requires_grad_(False)
            self.key_projector = deepcopy(self.projector).requires_grad_(False)
        if self.lam < 1:
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
            self.decoder = pixel_decoder(width, size["heads"], cfg.patch_size, cfg.decoder_depth)
            init_weights(self.decoder)

    def contrast(self, view1, view2):
        """MoCo v3's algorithm 1 in its seven steps -> loss, one view's queries (B, C)."""
        views = torch.cat([view1, view2])  # 1. two views of each image, from section 6: (2B, 3, h, w)
        z = self.encoder(views)[:, 0]  # 2. CLS tokens (2B, D), both views in one pass
        # 3. queries (B, C). Apart, since BatchNorm would leak one view's statistics into the other
        q1, q2 = (self.predictor(self.projector(half)) for half in z.chunk(2))
        with torch.no_grad():  # 4. keys from the average of the past encoders, see update_average()
            k1, k2 = (self.key_projector(half) for half in self.key_encoder(views)[:, 0].chunk(2))
        # 5. to 7. similarities, softmax and cross-entropy, in both directions
        return contrastive_loss(q1, k2, self.temperature) + contrastive_loss(q2, k1, self.temperature), q1

    def reconstruct(self, view, mask):
        """SimMIM: mask, encode ALL tokens, predict pixels -> tokens (B, 1+N, D), pixels (B, N, 3p²)."""
        tokens = self.encoder(view, mask, mask_token=self.mask_token)
        return tokens, self.decoder(tokens)[:, 1:]

    def forward(self, view1, view2, view_mim, mask):
        """Views (B, 3, h, w), mask bool (B, N) -> scalars {'cl': L_CL, 'mim': L_MIM, 'std': feature spread}.

        A branch that λ switches off is not computed and gives 0; its views may be None. 'std': standard deviation
        over the batch of unit-length features, times √width: near 1 = spread out, 0 = all alike (collapse).
        """
        cl = mim = torch.zeros((), device=mask.device)
        if self.lam < 1:
            tokens, pixels = self.reconstruct(view_mim, mask)
            mim = masked_l1(pixels, patchify(view_mim, self.patch_size), mask)
            features = tokens[:, 1:].mean(dim=1)
        if self.lam > 0:
            cl, features = self.contrast(view1, view2)
        unit = F.normalize(features.detach().float(), dim=-1)
        return {"cl": cl, "mim": mim, "std": unit.std(dim=0).mean() * unit.shape[1] ** 0.5}

    @torch.no_grad()
    def update_average(self, momentum):
        """key ← m·key + (1 - m)·query. [M] does this between a step's query and key pass; at the end of the step
        before, with the next step's momentum, it gives every key pass the same average."""
        if self.lam > 0:
            keys = [*self.key_encoder.parameters(), *self.key_projector.parameters()]
            queries = [*self.encoder.parameters(), *self.projector.parameters()]
            torch._foreach_lerp_(keys, queries, 1 - momentum)


# ==== 6. Data: what does the network get to see?   (every choice is a function of seed, epoch, index) ======
# fmt: off
SHAPES = {  # level sets of radius 1, negative inside; polar angle a = 0 points up
    "circle": lambda x, y, r, a: r - 0.9,
    "square": lambda x, y, r, a: np.maximum(abs(x), abs(y)) - 0.75,
    "triangle": lambda x, y, r, a: r * np.cos(a % (2 * np.pi / 3) - np.pi / 3) - 0.5,
    "star": lambda x, y, r, a: r - 0.65 - 0.35 * np.cos(5 * a),
    "cross": lambda x, y, r, a: np.maximum(np.minimum(abs(x), abs(y)) - 0.3, np.maximum(abs(x), abs(y)) - 0.95),
    "ring": lambda x, y, r, a: abs(r - 0.7) - 0.25,
    "bar": lambda x, y, r, a: np.maximum(abs(x) - 0.4, abs(y) - 0.95),
    "crescent": lambda x, y, r, a: np.maximum(r - 0.95, 0.7 - np.hypot(x - 0.5, y)),
}
# Surfaces in [-1, 1] over u, v in radians of their period. All are regular: what a mask hides follows from what is
# around it. A noise texture could only teach masked modelling its mean.
TEXTURES = {
    "plain": lambda u, v: np.ones_like(u),
    "horizontal": lambda u, v: np.sin(v),
    "vertical": lambda u, v: np.sin(u),
    "diagonal": lambda u, v: np.sin((u + v) / 2**0.5),
    "checks": lambda u, v: 1.5 * np.sin(u) * np.sin(v),
    "dots": lambda u, v: np.cos(u) + np.cos(v) - 0.6,
    "zigzag": lambda u, v: np.sin(v + 2 * np.arcsin(np.sin(u / 2))),
    "grid": lambda u, v: np.maximum(np.cos(u), np.cos(v)) * 2 - 1,
}
# fmt: on


class Stimuli:
    """Procedural images: one object, 8 shapes × 8 textures drawn independently, on a smooth grey background.

    stimuli[i] -> image uint8 (S, S, 3), shape 0..7, texture 0..7, mask bool (S, S) of the object: a function of
    (seed, split, i). Pose, colour and brightness are random and tell neither label. render(i, shape, texture) is
    scene i with another shape or texture, for cue-conflict tests. split: 'train' or 'test' (no image in common).
    """

    label_names, classes = ("shape", "texture"), (list(SHAPES), list(TEXTURES))

    def __init__(self, length, image_size=32, seed=0, split="train"):
        self.length, self.size, self.key = length, image_size, (seed, 2 + ("train", "test").index(split))

    def __len__(self):
        return self.length

    def labels(self, index):
        return np.random.default_rng([*self.key, index]).integers(8, size=2)

    def __getitem__(self, index):
        shape, texture = self.labels(index)
        image, mask = self.render(index, shape, texture)
        return image, int(shape), int(texture), mask

    def render(self, index, shape, texture):
        rng = np.random.default_rng([*self.key, index, 1])
        tilt, radius = np.radians(rng.uniform(-18, 18)), rng.uniform(0.75, 1.0)
        cx, cy, slope_x, slope_y = rng.uniform(-1, 1, 4) * (0.2, 0.2, 0.1, 0.1)
        frequency, phase = 2 * np.pi / rng.uniform(0.36, 0.46), rng.uniform(0, 2 * np.pi, 2)
        grey, hue, fade, bright = rng.uniform((0.3, 0, 0.1, 0.75), (0.7, 1, 0.5, 1.0))
        axis = (np.arange(self.size, dtype=np.float32) + 0.5) * 2 / self.size - 1  # pixel centres in [-1, 1]
        x, y = axis[None, :], axis[:, None]
        u = np.cos(tilt) * (x - cx) + np.sin(tilt) * (y - cy)  # the object's own axes, (S, S)
        v = np.cos(tilt) * (y - cy) - np.sin(tilt) * (x - cx)
        level = SHAPES[list(SHAPES)[shape]](u / radius, v / radius, np.hypot(u, v) / radius, np.arctan2(u, -v))
        edge = level * radius * self.size / 2  # about the distance to the outline in px
        wave = TEXTURES[list(TEXTURES)[texture]](u * frequency + phase[0], v * frequency + phase[1])
        circle = np.abs((6 * hue + np.array([0, 4, 2])) % 6 - 3) - 1  # the colour circle, one channel each
        light = bright * (fade + (1 - fade) * circle.clip(0, 1))  # (3,)
        surface = light * (0.65 + 0.35 * np.clip(1.5 * wave, -1, 1)[..., None])  # 30 % to 100 % of it
        ground = (grey + slope_x * x + slope_y * y)[..., None]
        image = ground + np.clip(0.5 - edge, 0, 1)[..., None] * (surface - ground)  # with a smooth outline
        return (image * 255 + 0.5).clip(0, 255).astype(np.uint8), edge < 0

    def open(self, index):
        return Image.fromarray(self[index][0])


class ImageFolder:
    """The images below `root`, sorted by path; its sub-folders, if two or more hold images, are the classes."""

    SUFFIXES = tuple(".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm".split())

    def __init__(self, root, held=None):
        self.files = []
        for folder, _, names in os.walk(root):
            self.files += [os.path.join(folder, n) for n in names if n.lower().endswith(self.SUFFIXES)]
        if not os.access(root, os.R_OK | os.X_OK) or not self.files:
            raise UserError(f"--data {root}: no image to read in it (looked for {' '.join(self.SUFFIXES)})")
        self.files.sort()
        top = [os.path.relpath(f, root).split(os.sep) for f in self.files]
        names = sorted({parts[0] for parts in top if len(parts) > 1})
        self.targets = [names.index(parts[0]) if len(parts) > 1 else -1 for parts in top]
        self.label_names, self.classes = (("class",), (names,)) if len(names) > 1 else ((), ())
        if held is not None:  # without a test folder, every tenth image is the test set
            keep = [i for i in range(len(self.files)) if (i % 10 == 9) == held]
            self.files, self.targets = [self.files[i] for i in keep], [self.targets[i] for i in keep]

    def __len__(self):
        return len(self.files)

    def labels(self, index):
        return np.array([self.targets[index]])

    def open(self, index):
        return Image.open(self.files[index])


def find_data(cfg):
    """(training set, test set or None) of --data, or the built-in stimuli."""
    if not cfg.data:
        return [Stimuli(n, cfg.image_size, cfg.seed, split) for n, split in ((20000, "train"), (5000, "test"))]
    if not os.path.isdir(cfg.data):
        wrong = "is a file, not a folder" if os.path.exists(cfg.data) else "no such folder"
        raise UserError(f"--data {cfg.data}: {wrong}")
    splits = [os.path.join(cfg.data, name) for name in ("train", "val", "test")]
    splits = [path for path in splits if os.path.isdir(path)]
    if splits and splits[0].endswith("train"):
        return ImageFolder(splits[0]), ImageFolder(splits[1]) if len(splits) > 1 else None
    whole = ImageFolder(cfg.data)
    return (ImageFolder(cfg.data, False), ImageFolder(cfg.data, True)) if len(whole) > 19 else (whole, None)


def random_box(rng, width, height, smallest):
    """RandomResizedCrop: (x0, y0, x1, y1) with a share `smallest` to 1 of the area and aspect 3/4 to 4/3."""
    for _ in range(10):
        area = rng.uniform(smallest, 1) * width * height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return x, y, x + w, y + h
    return centre_box(width, height)


def centre_box(width, height):
    """The largest square in the middle."""
    side = min(width, height)
    x, y = (width - side) / 2, (height - side) / 2
    return x, y, x + side, y + side


def cut(image, size, draw_boxes):
    """Decodes an opened image once and cuts every box of draw_boxes(width, height) -> uint8 (boxes, 3, size, size).

    Photographs are turned upright (EXIF). A JPEG with crops far larger than `size` is decoded at 1/2, 1/4 or 1/8.
    Every mode of Pillow becomes RGB: 16 bits become 8, transparency is laid on white.
    """
    sideways = image.getexif().get(0x0112, 1) >= 5
    width, height = image.size[::-1] if sideways else image.size
    boxes = draw_boxes(width, height)
    spare = max(1, min(min(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes) / size)
    image.draft("RGB", (int(image.width / spare), int(image.height / spare)))
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16-bit grey and floating point
        values = np.asarray(image, dtype=np.float32)
        values = values / (257 if image.mode[0] == "I" else max(values.max(), 1e-9) / 255)
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.mode != "RGB":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    scale = np.array([image.width / width, image.height / height] * 2)
    boxes = np.minimum(np.array(boxes) * scale, image.size * 2).tolist()  # rounding must not step over the edge
    crops = [image.resize((size, size), Image.BILINEAR, box) for box in boxes]
    return np.stack([np.asarray(crop) for crop in crops]).transpose(0, 3, 1, 2)


def draw_photometric(rng, cfg, view):
    """BYOL's colours ([B] appendix B) for one view, 12 numbers: order of the four jitters (4, -1 = none), their
    factors (4), grey, blur σ, solarise, flip."""
    order = rng.permutation(4) if rng.random() < 0.8 else np.full(4, -1)
    strength = np.array([0.4, 0.4, 0.2, cfg.hue])
    factors = rng.uniform(-strength, strength) + [1, 1, 1, 0]  # brightness, contrast, saturation, hue
    grey, blur, solarise, flip = rng.random(4) < [0.2, (1.0, 0.1)[view], (0.0, 0.2)[view], 0.5]
    return np.array([*order, *factors, grey, blur * rng.uniform(0.1, 1) * cfg.blur, solarise, flip], np.float32)


class Views(torch.utils.data.Dataset):
    """(epoch, index) -> one training sample: all crops of one decoded file and all random choices for it."""

    def __init__(self, source, cfg):
        self.source, self.cfg = source, cfg

    def __getitem__(self, key):
        cfg, (epoch, wanted) = self.cfg, key
        smallest = [cfg.crop_min] * (2 * (cfg.lam > 0)) + [0.67] * (cfg.lam < 1)  # of each crop, in area
        for index in range(wanted, wanted + len(self.source)):
            index %= len(self.source)
            rng = np.random.default_rng([cfg.seed, 1, epoch, index])
            try:  # Pillow raises almost anything on a broken file; the next file takes its place
                with self.source.open(index) as image:
                    crops = cut(image, cfg.image_size, lambda w, h: [random_box(rng, w, h, s) for s in smallest])
                break
            except Exception:
                continue
        else:
            raise UserError("not one image of the folder can be read")
        units = torch.Generator().manual_seed(int(rng.integers(2**62)))
        mask = random_mask(1, cfg.image_size, cfg.patch_size, cfg.mask_unit, cfg.mask_ratio, units)[0]
        photo = np.stack([draw_photometric(rng, cfg, view) for view in (0, 1)])
        flip, broken = rng.random() < 0.5, wanted if index != wanted else -1
        return dict(crops=crops, photo=photo, flip=flip, mask=mask, broken=broken)


def batches(cfg, length, steps, rank, ranks, accum):
    """Lists of (epoch, index), one per part: each epoch in its own order, without end. Where the stream stands
    follows from the step alone, so that a run resumes by starting it there."""
    part, orders = cfg.batch_size // (ranks * accum), {}
    for piece in range(steps.start * accum, steps.stop * accum):
        start = (piece * ranks + rank) * part
        keys = [divmod(place, length) for place in range(start, start + part)]
        for epoch in {epoch for epoch, _ in keys} - set(orders):
            orders = {epoch - 1: orders.get(epoch - 1), epoch: np.random.default_rng([cfg.seed, 0, epoch]).permutation(length)}
        yield [(epoch, int(orders[epoch][i])) for epoch, i in keys]


# Augmentation on the training device: images float (B, 3, h, w) in [0, 1], one parameter per image.
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def greyscale(x):
    return (x * x.new_tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)  # (B, 1, h, w)


def adjust_hue(x, turn):
    """Turns the colour circle by `turn` (B, 1, 1, 1) in [-0.5, 0.5]: RGB to hue, saturation, value and back."""
    value, spread = x.amax(dim=1, keepdim=True), x.amax(dim=1, keepdim=True) - x.amin(dim=1, keepdim=True)
    r, g, b = ((value - x) / spread.clamp(min=1e-12)).split(1, dim=1)
    red, green = x[:, :1] == value, x[:, 1:2] == value
    sector = torch.where(red, b - g, torch.where(green, 2 + r - b, 4 + g - r))  # six sectors of hue
    k = (sector + 6 * turn + x.new_tensor([5.0, 3.0, 1.0]).view(3, 1, 1)) % 6
    return value - spread * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x, sigma, radius):
    """Gaussian blur, σ (B,) px, mirrored at the border. Along an axis blurring is a matrix product: row i of an
    (h, h) matrix holds the kernel around pixel i. Two batched products blur the whole batch."""
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    kernel = (-0.5 * (offsets / sigma[:, None]) ** 2).softmax(dim=1)  # (B, 2·radius + 1)

    def matrix(n):
        source = (torch.arange(n, device=x.device)[:, None] + offsets).abs()  # mirror at 0 ...
        source = (n - 1) - (n - 1 - source).abs()  # ... and at n - 1
        index = source.expand(len(x), -1, -1)
        return x.new_zeros(len(x), 1, n, n).scatter_add_(3, index[:, None], kernel[:, None, None].expand(-1, 1, n, -1))

    return matrix(x.shape[2]) @ x @ matrix(x.shape[3]).mT


def photometric(x, photo, radius):
    """Jitter in each image's own order, then grey, blur, solarise, flip; photo (B, 12) from draw_photometric. It
    stays on the CPU to choose the images of each operation: on a GPU, nonzero() would stop the queue."""
    value = photo.to(x.device, non_blocking=True)[..., None, None]  # (B, 12, 1, 1)

    def apply(chosen, operation):
        i = chosen.nonzero().flatten().to(x.device, non_blocking=True)
        if len(i):
            x[i] = operation(x[i], i)

    def blend(towards, column):  # brightness: black; contrast: the mean grey; saturation: its own grey
        def operation(y, i):
            factor = value[i, column, None]
            return (factor * y + (1 - factor) * towards(y)).clamp(0, 1)

        return operation

    jitters = (
        blend(lambda y: 0.0, 4),
        blend(lambda y: greyscale(y).mean(dim=(1, 2, 3), keepdim=True), 5),
        blend(greyscale, 6),
        lambda y, i: adjust_hue(y, value[i, 7, None]),
    )
    for place in range(4):
        for number, jitter in enumerate(jitters):
            apply(photo[:, place] == number, jitter)
    apply(photo[:, 8] > 0, lambda y, i: greyscale(y).expand_as(y))
    apply(photo[:, 9] > 0, lambda y, i: gaussian_blur(y, value[i, 9].flatten(), radius))
    apply(photo[:, 10] > 0, lambda y, i: torch.where(y >= 0.5, 1 - y, y))
    apply(photo[:, 11] > 0, lambda y, i: y.flip(-1))
    return x


def augment(batch, cfg, device):
    """A loader's batch -> view1, view2, view_mim (B, 3, h, w), normalised, None if λ needs none; mask (B, N)."""
    crops = batch["crops"].to(device, non_blocking=True).float() / 255  # (B, views, 3, h, w)
    mean, std, view1, view2, view_mim = MEAN.to(device), STD.to(device), None, None, None
    if cfg.lam > 0:
        radius = min(math.ceil(3 * cfg.blur), cfg.image_size - 1)
        views = photometric(crops[:, :2].transpose(0, 1).flatten(0, 1), batch["photo"].transpose(0, 1).flatten(0, 1), radius)
        view1, view2 = ((views - mean) / std).chunk(2)
    if cfg.lam < 1:
        flip = batch["flip"].to(device, non_blocking=True).view(-1, 1, 1, 1)
        view_mim = (torch.where(flip, crops[:, -1].flip(-1), crops[:, -1]) - mean) / std
    return view1, view2, view_mim, batch["mask"].to(device, non_blocking=True)


# ==== 7. Optimiser and schedules: how fast, and when? ======================================================


def lr_at(step, total, warmup, peak):
    """Linear from 0 to `peak` in `warmup` steps (Adam's averages are noise at first), half a cosine to 0 at total."""
    if step < warmup:
        return peak * step / warmup
    return cosine(peak, 0.0, min(1.0, (step - warmup) / max(total - warmup, 1e-9)))


def make_optimizer(model, cfg, device):
    """AdamW. Decay is for matrices, not for biases, norms and tokens; MoCo v3 (λ = 1) decays everything."""
    trained = [p for p in model.parameters() if p.requires_grad]
    spared = [cfg.lam < 1 and (p.ndim == 1 or p.shape[:2] == (1, 1)) for p in trained]
    groups = [
        dict(params=[p for p, s in zip(trained, spared) if s == which], weight_decay=decay)
        for which, decay in ((False, cfg.weight_decay), (True, 0.0))
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, fused=device.type == "cuda")


# ==== 8. Training loop =====================================================================================


@torch.no_grad()
def embed(encoder, source, count, cfg, device, autocast):
    """Average-pooled last-layer tokens (n, D) and labels (n, label sets) of `count` images, evenly spread."""
    features, labels = [], []
    for chunk in np.array_split(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int), -(-count // 256)):
        crops = []
        for i in chunk.tolist():
            with contextlib.suppress(Exception), source.open(i) as image:  # training reports broken files
                crops.append(cut(image, cfg.image_size, lambda w, h: [centre_box(w, h)])[0])
                labels.append(source.labels(i))
        if crops:
            x = (torch.from_numpy(np.stack(crops)).to(device) / 255 - MEAN.to(device)) / STD.to(device)
            with autocast():
                features.append(encoder(x)[:, 1:].float().mean(dim=1).cpu())
    return torch.cat(features), torch.from_numpy(np.stack(labels))


def knn_accuracy(bank, bank_labels, queries, labels, k=20):
    """Share of queries (m, D) whose k nearest in the bank (n, D) vote for the right label, weighted by exp(cos / 0.07)
    after centring on the bank. In [0, 1]; nothing is trained, so there is nothing to tune."""
    mean = bank.mean(dim=0)
    similarity = F.normalize(queries - mean) @ F.normalize(bank - mean).T  # (m, n)
    weight, nearest = similarity.topk(min(k, len(bank)))  # (m, k)
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1)
    votes.scatter_add_(1, bank_labels[nearest], (weight / 0.07).exp())
    return (votes.argmax(dim=1) == labels).float().mean().item()


def evaluate(encoder, data, cfg, device, autocast):
    """{'knn_<label set>': accuracy} between training and test set; empty without labels."""
    if not cfg.knn_images or data[1] is None or not data[0].label_names:
        return {}
    bank, bank_labels = embed(encoder, data[0], cfg.knn_images, cfg, device, autocast)
    queries, labels = embed(encoder, data[1], -(-cfg.knn_images // 4), cfg, device, autocast)
    return {
        f"knn_{name}": round(knn_accuracy(bank, bank_labels[:, i], queries, labels[:, i]), 4)
        for i, name in enumerate(data[0].label_names)
    }


def save_checkpoint(path, state):
    """Writes beside the target and renames: whatever happens, `path` is the old or the new checkpoint, whole."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {path} ({error}); the checkpoint before it, if any, is whole") from error


def load_checkpoint(path):
    """Tensors, numbers and strings: weights_only=True executes nothing that the file may contain."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = "no such file" if not os.path.exists(path) else f"not a checkpoint ({type(error).__name__})"
        raise UserError(f"{path}: {reason}") from error


def train(cfg, state=None):
    """Trains one model, from checkpoint `state` if given. Exit status: 0, 1 (not finite), 130 or 143 (signal)."""
    (rank, ranks), out, device = world(), Path(cfg.out), torch.device(cfg.device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[cfg.dtype]
    torch.manual_seed(cfg.seed)
    data = find_data(cfg)
    model = SSL(cfg).to(device)
    optimizer = make_optimizer(model, cfg, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # lifts small fp16 gradients
    autocast = lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32)  # noqa: E731
    steps = max(1, round(cfg.epochs * len(data[0]) / cfg.batch_size)) if cfg.epochs else cfg.steps
    warmup, peak = cfg.warmup * steps, cfg.lr * cfg.batch_size / 256
    first, rows, broken, stop = 0, [], set(), []
    if rank == 0:
        print(plan(cfg, model, data, steps, ranks), flush=True)
    if state:
        first, rows = state["step"], state["log"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
    elif rank == 0:
        print(f"about {estimate(cfg, model, autocast, ranks) * steps / 60:.1f} min to go", flush=True)
        rows = [{"step": 0, **evaluate(model.encoder, data, cfg, device, autocast)}]
    (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    net = model
    if ranks > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if device.type == "cuda" else net
        net = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    net = torch.compile(net) if cfg.compile else net
    trained = [p for p in model.parameters() if p.requires_grad]
    order = batches(cfg, len(data[0]), range(first, steps), rank, ranks, cfg.accum)
    stream = iter(torch.utils.data.DataLoader(Views(data[0], cfg), batch_sampler=order, num_workers=cfg.workers,
                                              pin_memory=device.type == "cuda"))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    waited, since, began, bad = 0.0, first, time.perf_counter(), torch.zeros((), device=device)

    for step in range(first, steps):
        # schedules
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step + 1, steps, warmup, peak)
        # batch, losses, backward
        for part in range(cfg.accum):
            clock = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - clock
            note_broken(batch["broken"], broken, data[0])
            views = augment(batch, cfg, device)
            wait = ranks > 1 and part < cfg.accum - 1  # gradients travel once a step
            with net.no_sync() if wait else contextlib.nullcontext():
                with autocast():
                    losses = net(*views)
                loss = (1 - cfg.lam) * losses["mim"] + cfg.lam * losses["cl"]
                scaler.scale(loss / cfg.accum).backward()
        # clip, step
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trained, cfg.clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        # average
        model.update_average(momentum_at(step + 1, steps, cfg.momentum))
        # log; the first step with a bad number is remembered on the device, where it costs no synchronisation
        finite = loss.isfinite() & (norm.isfinite() | scaler.is_enabled())
        bad = torch.where((bad == 0) & ~finite, step + 1, bad)
        saving = (step + 1) % cfg.save_every == 0 or step + 1 == steps or stop
        if (step + 1) % cfg.log_every == 0 or saving:
            if bad > 0:
                raise FloatingPointError(f"loss or gradient not finite at step {int(bad)}; last good line: {rows[-1:]}")
            seconds = time.perf_counter() - began
            row = {"step": step + 1, **{name: round(float(value), 5) for name, value in losses.items()}}
            row |= {"loss": round(float(loss), 5), "lr": lr_at(step + 1, steps, warmup, peak)}
            row |= {"momentum": momentum_at(step + 1, steps, cfg.momentum), "norm": round(float(norm), 4)}
            row |= {"images_per_s": round((step + 1 - since) * cfg.batch_size / seconds, 1)}
            row |= {"stall": round(waited / seconds, 4), "broken": len(broken)}
            if saving and rank == 0:
                row |= evaluate(model.encoder, data, cfg, device, autocast)
            if rank == 0:
                rows.append(row)
                with open(out / "log.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
                left = (steps - step - 1) * cfg.batch_size / row["images_per_s"] / 60
                print(" ".join(f"{k} {v:.4g}" for k, v in row.items()) + f" left {left:.1f} min", flush=True)
            waited, since, began = 0.0, step + 1, time.perf_counter()
        # save
        if saving and rank == 0:
            state = dict(config=asdict(cfg), step=step + 1, model=model.state_dict(), log=rows)
            state |= dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), rng=torch.get_rng_state())
            save_checkpoint(out / "ckpt.pt", state)
        if stop:
            print(f"saved step {step + 1} after {signal.Signals(stop[0]).name}; go on with --resume --out {cfg.out}")
            return 128 + stop[0]
    if rank == 0:
        draw(model, cfg, rows, data, device)
        summarise(cfg, rows, data)
    return 0


def note_broken(indices, broken, source):
    """Names each unreadable file once; more than 1 % of the set ends the run."""
    for index in set(indices.tolist()) - broken - {-1}:
        broken.add(index)
        print(f"unreadable, replaced by the next file: {source.files[index]!r} ({len(broken)} so far)", flush=True)
    if len(broken) > max(1, len(source) / 100):
        raise UserError(f"{len(broken)} of {len(source)} files cannot be read, more than 1 %: mend the folder first")


def plan(cfg, model, data, steps, ranks):
    """The first line: what will run, on what."""
    name = cfg.data or "built-in stimuli"
    millions = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    threads = f" ({torch.get_num_threads()} threads)" if cfg.device == "cpu" else ""
    return (
        f"{cfg.objective} (λ = {cfg.lam:g}) with ViT-{cfg.model} ({millions:.1f} M), {cfg.image_size} px, patch "
        f"{cfg.patch_size}, on {name} ({len(data[0])} images): {steps} steps of {cfg.batch_size} images = "
        f"{ranks} × {cfg.accum} × {cfg.batch_size // (ranks * cfg.accum)}, lr {cfg.lr:g} × {cfg.batch_size}/256 = "
        f"{cfg.lr * cfg.batch_size / 256:.2g}, {cfg.dtype} on {cfg.device}{threads}, into {cfg.out}"
    )


def estimate(cfg, model, autocast, ranks):
    """Seconds per step, from one forward and backward pass of a copy on noise."""
    copy, part, seconds = deepcopy(model).train(), cfg.batch_size // (ranks * cfg.accum), 0.0
    images = max(2, min(part, 2048 * cfg.patch_size**2 // cfg.image_size**2))
    x = torch.randn(images, 3, cfg.image_size, cfg.image_size, device=cfg.device)
    mask = random_mask(images, cfg.image_size, cfg.patch_size, cfg.mask_unit, cfg.mask_ratio).to(cfg.device)
    for _ in range(2):  # the first pass warms up
        began = time.perf_counter()
        with autocast():
            losses = copy(x, x, x, mask)
        float((losses["mim"] + losses["cl"]).backward() or 0)
        seconds = time.perf_counter() - began
    return seconds * cfg.batch_size / ranks / images


@torch.no_grad()
def draw(model, cfg, rows, data, device):
    """loss.png, and views.png: what each branch saw and, with a pixel head, what it predicts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(7, 4))
    for key, label in (("mim", "masked L1"), ("cl", "contrastive (InfoNCE)")):
        if rows[-1][key]:
            axis.plot([r["step"] for r in rows[1:]], [r[key] for r in rows[1:]], label=label)
    axis.set(xlabel="step", ylabel="loss", title=f"{cfg.objective}, λ = {cfg.lam:g}")
    axis.legend()
    fig.savefig(Path(cfg.out) / "loss.png", dpi=150)
    batch = next(iter(torch.utils.data.DataLoader(Views(data[0], cfg), 8, sampler=[(0, i) for i in range(8)])))
    view1, view2, view_mim, mask = augment(batch, cfg, device)
    images = {"view 1": view1, "view 2": view2, "masked view's crop": view_mim}
    if cfg.lam < 1:
        target = patchify(view_mim, cfg.patch_size)
        pixels = model.eval().reconstruct(view_mim, mask)[1].float()
        model.train()
        for name, patches in (("masked", 0 * target), ("predicted", pixels)):
            patches = torch.where(mask[..., None], patches, target)
            images[name] = F.fold(patches.mT, (cfg.image_size,) * 2, cfg.patch_size, stride=cfg.patch_size)
    images = {name: (x.cpu() * STD + MEAN).clamp(0, 1) for name, x in images.items() if x is not None}
    fig, axes = plt.subplots(len(images), 8, figsize=(9, 1.25 * len(images)))
    for row, (name, stack) in zip(axes, images.items()):
        for axis, image in zip(row, stack):
            axis.imshow(image.permute(1, 2, 0), interpolation="nearest")
            axis.axis("off")
        row[0].set_title(name, loc="left", fontsize=10)
    fig.savefig(Path(cfg.out) / "views.png", dpi=110)
    plt.close("all")


def summarise(cfg, rows, data):
    for name, classes in zip(data[0].label_names, data[0].classes):
        if f"knn_{name}" in rows[-1]:
            print(f"k-NN accuracy, {name}: {rows[-1][f'knn_{name}']:.3f}  (untrained network {rows[0][f'knn_{name}']:.3f}, "
                  f"chance {1 / len(classes):.3f})")
    print(f"checkpoint, log and pictures are in {cfg.out}; next: python analyze.py {cfg.out}/ckpt.pt")


# ==== 9. Command line ======================================================================================


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


MAY_CHANGE = {"device", "workers", "compile", "checkpointing", "accum", "out", "resume", "overwrite", "save_every",
              "log_every", "data"}  # at --resume


def parse(argv):
    """Command line -> (Config, names of the flags given)."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    argument_default=argparse.SUPPRESS)
    for field in fields(Config):
        text, flag = comments[field.name], "--" + field.name.replace("_", "-")
        choices = re.match(r"\w+(\|\w+)+", text)
        how = dict(action="store_true") if field.type is bool else dict(type=field.type, choices=choices and choices[0].split("|"))
        parser.add_argument(flag, help=f"{text} [{field.default}]".replace("%", "%%"), **how)
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", "imagenet" if given.get("data") else "micro")
    objective = given.get("objective", "hybrid")
    lam = {"moco": 1.0, "simmim": 0.0}.get(objective, given.get("lam", Config.lam))
    cfg = {"preset": preset, **PRESETS[preset], **PRESETS.get(f"{preset}-{objective}", {}), **given, "lam": lam}
    cfg = Config(**cfg | ({"epochs": 0.0} if "steps" in given and "epochs" not in given else {}))
    sweep = f"-{lam:g}" if objective == "hybrid" and lam != Config.lam else ""
    cfg.out = cfg.out or f"runs/{preset}-{objective}{sweep}"
    return cfg, set(given)


def check(cfg, given, ranks):
    """Raises UserError for anything that cannot work, before anything is touched; resolves every 'auto'."""
    parts = ranks * max(cfg.accum, 1)
    numbers = [n for n, v in asdict(cfg).items() if isinstance(v, (int, float)) and not (math.isfinite(v) and v >= 0)]
    for wrong, message in (
        ("lam" in given and not 0 <= cfg.lam <= 1, f"--lam {cfg.lam}: λ must be between 0 and 1"),
        ("lam" in given and cfg.objective != "hybrid", f"--lam is for the hybrid; {cfg.objective} has λ = {cfg.lam:g}"),
    ):
        if wrong:
            raise UserError(message)


def main(argv=None):
    """Runs the command line; returns the exit status: 0, 1 (not finite), 2 (bad input), 130 or 143 (signal)."""
    cfg, given = parse(argv)
    cfg.accum = cfg.accum or math.ceil(cfg.batch_size / 128)
    cfg.device, cfg.dtype, cfg.workers = "cpu", "bf16" if cfg.dtype == "auto" else cfg.dtype, max(cfg.workers, 0)
    os.makedirs(cfg.out, exist_ok=True)
    with contextlib.suppress(OSError, AttributeError):  # glibc: keep large blocks instead of returning them each step
        libc = ctypes.CDLL("libc.so.6")
        for option, number in ((-1, 2**30), (-2, 2**26), (-4, 0)):  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX
            libc.mallopt(option, number)
    return train(cfg)


if __name__ == "__main__":
    sys.exit(main())
