"""What do self-supervised Vision Transformers learn?

This file trains them, analyze.py takes them apart. A Vision Transformer (ViT) can learn
from images without labels in two ways. Contrastive learning (CL) asks: are these two
views the same image? That is a question about the whole image. Masked image modelling
(MIM) asks: what was under the mask? That is a question about each patch. Here are both,
and their hybrid  L = (1 - λ)·L_MIM + λ·L_CL.

  python sslvit.py                                        hybrid, on built-in stimuli
  python sslvit.py --objective moco                       λ = 1: MoCo v3
  python sslvit.py --objective simmim                     λ = 0: SimMIM
  python sslvit.py --data /imagenet --dry-run             what ViT-B on ImageNet costs
  torchrun --nproc_per_node 8 sslvit.py --data /imagenet  and how it is trained

1 two questions · 2 the ViT · 3 both questions, one encoder · 4 views · 5 optimiser and
schedules · 6 training loop · 7 command line · 8 workshop (stimuli, files, k-NN,
checkpoints, signals, plan).

Letters: B batch, N patch tokens (1+N with CLS), D embed_dim, H heads, d = D/H, L
blocks, p patch size in px, C width of the contrastive embedding. Papers on arXiv:
[P] Park et al. 2305.00729, [V] ViT 2010.11929, [M] MoCo v3 2104.02057, [S] SimMIM
2111.09886, [B] BYOL 2006.07733, [G] gradient caching 2101.06983.
"""

import argparse
import collections
import colorsys
import contextlib
import copy
import ctypes
import datetime
import functools
import hashlib
import inspect
import io
import json
import math
import os
import signal
import sys
import time
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

# While OpenMP's threads wait for each other, they spin. Beside another busy program a
# run on two cores then lost nine tenths of its speed; with this setting, half. It must
# stand before torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import DataLoader


# On a GPU fp32 is fp32, which cuDNN's convolutions would round to three digits (TF32).
# And attention is not cuDNN's, whose backward pass can give NaN, for CLS alone as query
# (NVIDIA/cudnn-frontend, issue 1072) and in other cases: torch's own take its place.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.enable_cudnn_sdp(False)

# torchrun starts a process for each GPU and gives it a number
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


class UserError(ValueError, argparse.ArgumentTypeError):
    """An error the user can fix: main() prints it as one line and returns status 2.

    argparse shows the text of an ArgumentTypeError, and hides that of other errors.
    """


def require(condition, message):
    if not condition:
        raise UserError(message)


# ==== 1. Two questions ================================================================
# Are these two views the same image?   (contrastive learning, MoCo v3)


def contrastive_loss(q, k, temperature):
    """InfoNCE, one direction: each query looks for its own key ([M] algorithm 1, ctr).

    q, k (B, C): row i of both comes from image i, the other rows are its negatives.
    -> scalar, 2τ·log(B) if nothing is told apart. Cosines are bounded, so it never
    reaches 0: with orthogonal negatives, B = 4,096 and τ = 0.2 it stays at 1.34. The
    factor 2τ keeps gradients comparable between temperatures τ.
    """
    # bf16 has two digits, too few for this softmax
    with torch.autocast(q.device.type, enabled=False):
        precision = torch.promote_types(q.dtype, torch.float32)
        q = F.normalize(q.to(precision))
        k = F.normalize(k.to(precision))
        logits = q @ k.T / temperature  # (B, B)
        own_key = torch.arange(len(q), device=q.device)
        return 2 * temperature * F.cross_entropy(logits, own_key)


# What was under the mask?   (masked image modelling, SimMIM)


def random_mask(batch, image_size, patch_size, unit, ratio, generator=None):
    """-> bool (B, N), True = masked: ceil(ratio × units) square units in each image.

    A unit is so large that the next visible pixel does not tell what it hides ([S]
    section 3.2). Sizes in px; UserError where they do not divide.
    """
    require(0 < ratio <= 1, f"mask ratio {ratio}: not in (0, 1]")
    sizes = f"patch size {patch_size}, mask unit {unit}, image size {image_size}"
    divides = unit % patch_size == image_size % unit == 0
    require(divides, f"{sizes}: each must divide the next")
    side = image_size // unit
    patches = unit // patch_size
    # 1e-9: 0.28 × 25 units is 7, not 7.000000000000001
    masked = math.ceil(ratio * side * side - 1e-9)
    # the ranks of random numbers are a random order of the units
    ranking = torch.rand(batch, side * side, generator=generator).argsort().argsort()
    units = (ranking < masked).view(batch, side, side)
    mask = units.repeat_interleave(patches, dim=1).repeat_interleave(patches, dim=2)
    return mask.flatten(1)


def patchify(images, patch_size):
    """(B, 3, h, w) -> (B, N, 3p²): the pixels of each patch, patches row by row."""
    return F.pixel_unshuffle(images, patch_size).flatten(2).mT


def masked_l1(pred, target, mask):
    """Mean |pred - target| over the masked patches ([S] equation 1) -> scalar.

    pred, target (B, N, 3p²) in any unit, mask bool (B, N), True = masked.
    """
    return ((pred - target).abs().mean(dim=-1) * mask).sum() / mask.sum()


# ==== 2. ViT: how does an image become tokens, and how do tokens talk? ================
# Names and shapes of the weights are timm's, so that both read each other's files.

SIZES = {
    name: {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    for name, embed_dim, depth, num_heads in [
        ("nano", 48, 6, 3),
        ("micro", 96, 6, 3),
        # as deep as micro with two decoder blocks, for figure 11's comparison
        ("micro8", 96, 8, 3),
        ("tiny", 192, 12, 3),
        ("small", 384, 12, 12),  # 12 heads as in [M]; timm's has 6
        ("base", 768, 12, 12),
        ("large", 1024, 24, 16),
        ("huge", 1280, 32, 16),
    ]
}


class Attention(nn.Module):
    """Every token asks all tokens: softmax(Q·Kᵀ / √d)·V in H heads ([V] appendix A)."""

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x, bias=None, cls_only=False, explicit=False):
        """x (B, 1+N, D) -> output (B, 1+N, D), heads (B, H, 1+N, d), weights.

        bias (H, 1+N, 1+N): for the logits. weights (B, H, 1+N, 1+N), rows sum to 1; a
        fused kernel never writes them to memory: None, unless `explicit`. cls_only:
        only CLS asks, so that what comes back has one query instead of 1+N.
        """
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, 1+N, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, 1+N, d) each
        if cls_only:
            q = q[:, :, :1]
        if bias is not None:
            bias = bias[:, : q.shape[2]].to(q.dtype)
        # on a CPU bf16's fused kernel was 2 to 7 times slower than this (torch 2.13)
        fused_is_slow = q.dtype == torch.bfloat16 and not q.is_cuda
        weights = None
        if explicit or fused_is_slow:
            logits = q @ k.mT * q.shape[-1] ** -0.5  # (B, H, 1+N, 1+N)
            if bias is not None:
                logits = logits + bias
            weights = logits.softmax(dim=-1)
            heads = weights @ v  # (B, H, 1+N, d)
        else:
            heads = F.scaled_dot_product_attention(q, k, v, bias)
        y = self.proj(heads.transpose(1, 2).flatten(2))  # heads side by side
        return y, heads, weights


class LayerScale(nn.Module):
    """What a sub-layer adds starts small: a learned factor for each channel."""

    def __init__(self, embed_dim, start):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((embed_dim,), start))

    def forward(self, x):
        return x * self.gamma


# What analyze.py looks at. attn: attention weights; heads: what each head reads;
# mid, out: the tokens after attention, and after the MLP.
Record = collections.namedtuple("Record", ["attn", "heads", "mid", "out"])


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): tokens talk, then think."""

    def __init__(self, embed_dim, num_heads, layer_scale=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        layers = collections.OrderedDict(
            fc1=nn.Linear(embed_dim, 4 * embed_dim),
            act=nn.GELU(),
            fc2=nn.Linear(4 * embed_dim, embed_dim),
        )
        self.mlp = nn.Sequential(layers)
        self.ls1 = nn.Identity()
        self.ls2 = nn.Identity()
        if layer_scale is not None:
            self.ls1 = LayerScale(embed_dim, layer_scale)
            self.ls2 = LayerScale(embed_dim, layer_scale)
        # Xavier ([M]), for Q, K and V as three matrices: as one, (3D, D), their
        # weights would be √2 smaller, and attention would stay uniform for long
        for linear in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            gain = 2**0.5 if linear is self.attn.qkv else 1.0
            nn.init.xavier_uniform_(linear.weight, gain)
            nn.init.zeros_(linear.bias)

    def record(self, x, bias=None, cls_only=False, explicit=False):
        """x (B, 1+N, D) -> Record: the forward pass and what happens on the way."""
        y, heads, attn = self.attn(self.norm1(x), bias, cls_only, explicit)
        if cls_only:
            x = x[:, :1]
        mid = x + self.ls1(y)
        out = mid + self.ls2(self.mlp(self.norm2(mid)))
        return Record(attn, heads, mid, out)

    def forward(self, x):
        """x (B, 1+N, D) -> (B, 1+N, D)."""
        return self.record(x).out


def sincos_positions(embed_dim, rows, cols):
    """Fixed positions ([M] section 5, in MAE's order): sin x, cos x, sin y, cos y.

    A quarter of the channels each, zeros for CLS -> (1, 1+N, D).
    """
    quarter = embed_dim // 4
    frequency = 10000.0 ** -(torch.arange(quarter) / quarter)  # (D/4,)
    n = torch.arange(rows * cols)[:, None]  # patches are numbered row by row
    x = (n % cols) * frequency  # (N, D/4)
    y = (n // cols) * frequency
    patches = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)  # (N, D)
    return F.pad(patches, (0, 0, 1, 0))[None]  # a row of zeros for CLS, in front


def resize_grid(grid, rows, cols):
    """Bicubic interpolation of a square map: (side², D) -> (1, D, rows, cols)."""
    side = round(len(grid) ** 0.5)
    channels_first = grid.T.unflatten(1, (side, side))[None]  # (1, D, side, side)
    return F.interpolate(channels_first, (rows, cols), mode="bicubic")


class RelativePositionBias(nn.Module):
    """SimMIM's positions: a number per head and offset, one table for all blocks.

    The last three rows are CLS to patch, patch to CLS and CLS to CLS, as in BEiT.
    """

    def __init__(self, grid, num_heads):
        super().__init__()
        offsets = (2 * grid - 1) ** 2  # from -(grid - 1) to grid - 1 in y and x
        table = torch.zeros(offsets + 3, num_heads)
        self.relative_position_bias_table = nn.Parameter(table)

    def forward(self, rows, cols):
        """-> what to add to the attention logits, (H, 1+N, 1+N)."""
        table = self.relative_position_bias_table
        offsets = resize_grid(table[:-3], 2 * rows - 1, 2 * cols - 1)
        # a bias depends on query - key: a query's biases for all keys are the window of
        # the map that begins at the query's place, the last key first
        windows = F.unfold(offsets, (rows, cols))[0]  # (H·N, N)
        bias = windows.unflatten(0, (-1, rows * cols)).flip(1).mT  # (H, query, key)
        bias = F.pad(bias, (1, 0, 1, 0))  # a row and a column for CLS, in front
        bias[:, 0, 1:] = table[-3, :, None]
        bias[:, 1:, 0] = table[-2, :, None]
        bias[:, 0, 0] = table[-1]
        return bias


class ViT(nn.Module):
    """[V], pre-norm, with a CLS token. Sizes in px; UserError if they do not divide.

    positions: "sincos" (fixed), "learned" or "none"; rel_pos_bias: SimMIM's;
    layer_scale: where it starts; num_classes: of a linear head for others to use.
    """

    def __init__(
        self,
        image_size,
        patch_size,
        embed_dim,
        depth,
        num_heads,
        *,
        positions="sincos",
        num_classes=0,
        rel_pos_bias=False,
        layer_scale=None,
    ):
        super().__init__()
        divides = image_size % patch_size == embed_dim % num_heads == embed_dim % 4 == 0
        require(divides, "patches must divide the image; heads, and 4, embed_dim")
        self.patch_size = patch_size
        self.grid = image_size // patch_size
        self.embed_dim = embed_dim

        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, embed_dim))
        self.pos_embed = None
        if positions == "sincos":
            table = sincos_positions(embed_dim, self.grid, self.grid)
            self.pos_embed = nn.Parameter(table, requires_grad=False)
        if positions == "learned":
            table = 0.02 * torch.randn(1, 1 + self.grid**2, embed_dim)
            self.pos_embed = nn.Parameter(table)
        # one linear map of each patch's pixels
        proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(proj.weight.data.flatten(1))
        nn.init.zeros_(proj.bias)
        self.patch_embed = nn.Sequential(collections.OrderedDict(proj=proj))
        self.rel_pos_bias = None
        if rel_pos_bias:
            self.rel_pos_bias = RelativePositionBias(self.grid, num_heads)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, layer_scale) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Identity()  # for others: not used in forward()
        if num_classes:
            self.head = nn.Linear(embed_dim, num_classes)

    def embed(self, x, mask, mask_token, rows, cols):
        """Pixels (B, 3, h, w) -> tokens with positions (B, 1+N, D)."""
        x = self.patch_embed(x).flatten(2).mT  # (B, D, rows, cols) -> (B, N, D)
        if mask is not None:
            # masked patches lose their pixels, but stay in the sequence
            x = torch.where(mask[..., None], mask_token, x)
        cls = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)  # (B, 1+N, D)
        if self.pos_embed is not None:
            patches = resize_grid(self.pos_embed[0, 1:], rows, cols).flatten(2).mT
            x = x + torch.cat([self.pos_embed[:, :1], patches], dim=1)
        return x

    def forward(self, x, mask=None, record=False, mask_token=0.0, cls_only=False):
        """Images (B, 3, h, w), any size -> tokens after the last norm (B, 1+N, D).

        mask bool (B, N): True becomes mask_token (1, 1, D). record: ->
        (tokens, L Records). cls_only: -> (B, 1, D), which spares most of a block.
        """
        rows, cols = [side // self.patch_size for side in x.shape[2:]]
        x = self.embed(x, mask, mask_token, rows, cols)
        bias = None
        if self.rel_pos_bias is not None:
            bias = self.rel_pos_bias(rows, cols)
        records = []
        for block in self.blocks:
            # earlier blocks need every token, as key and value
            asks_cls_only = cls_only and block is self.blocks[-1]
            entry = block.record(x, bias, asks_cls_only, explicit=record)
            x = entry.out
            if record:
                records.append(entry)
        x = self.norm(x)
        return (x, records) if record else x


# ==== 3. Both questions, one encoder ==================================================


def mlp_head(*widths):
    """Projector or predictor: Linear, BatchNorm, ReLU, ... ([M] section 5).

    BatchNorm spreads each channel over the batch, which counters collapse: the batch of
    all ranks, each view apart, as MoCo v3's SyncBatchNorm. The last one has no learned
    scale, which could shrink to 0. Heads are never evaluated: no running statistics,
    and no model.train() or model.eval() in this file.
    """
    layers = []
    for i in range(1, len(widths)):
        has_scale = i < len(widths) - 1
        layers += [
            nn.Linear(widths[i - 1], widths[i], bias=False),
            nn.BatchNorm1d(widths[i], affine=has_scale, track_running_stats=False),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers[:-1])  # nothing after the last BatchNorm


class SSL(nn.Module):
    """L = (1 - λ)·L_MIM + λ·L_CL ([P] section 5): λ = 0 is SimMIM, λ = 1 MoCo v3."""

    def __init__(self, cfg):
        super().__init__()
        self.use_cl = cfg.lam > 0
        self.use_mim = cfg.lam < 1
        self.temperature = cfg.temperature
        self.encoder = make_encoder(cfg)
        embed_dim, _, num_heads = SIZES[cfg.model].values()
        if self.use_cl:
            self.projector = mlp_head(embed_dim, cfg.proj_hidden, cfg.proj_hidden, 256)
            self.predictor = mlp_head(256, cfg.proj_hidden, 256)  # C = 256
            self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
            self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(
                False
            )
        if self.use_mim:
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
            # [S]: one linear layer, so that the encoder's last blocks learn to decode;
            # --decoder-depth adds blocks that take this work over ([P] figure 11)
            layers = [Block(embed_dim, num_heads) for _ in range(cfg.decoder_depth)]
            if layers:
                layers.append(nn.LayerNorm(embed_dim, eps=1e-6))
            pixels = nn.Linear(embed_dim, 3 * cfg.patch_size**2)
            self.decoder = nn.Sequential(*layers, pixels)

    # MoCo v3 in the steps of [M] algorithm 1:
    # 1. two views: augment()       2. queries: encode_views()  3. keys, of the average
    # 4. q1 looks for k2, q2 for k1: compare()                  5. contrastive_loss()
    # 6. gradient step for the queries: train()                 7. update_average()

    def compare(self, query_cls, key_cls):
        """CLS outputs (2, B, D) of a whole batch -> L_CL, feature_std() of view 1's."""
        # each view apart: BatchNorm would leak one view's statistics into the other
        q = [self.predictor(self.projector(cls)) for cls in query_cls]
        k = [self.momentum_projector(cls) for cls in key_cls]
        # each looks for the other view's key
        loss = contrastive_loss(q[0], k[1], self.temperature)
        loss = loss + contrastive_loss(q[1], k[0], self.temperature)
        return loss, feature_std(q[0])

    def reconstruct(self, view, mask):
        """SimMIM: mask, encode ALL tokens, predict pixels, compare what was masked.

        view (B, 3, h, w), mask bool (B, N) -> L_MIM.
        """
        tokens = self.encoder(view, mask, mask_token=self.mask_token)  # (B, 1+N, D)
        pixels = self.decoder(tokens)[:, 1:]  # (B, N, 3p²)
        return masked_l1(pixels, patchify(view, self.encoder.patch_size), mask)

    def forward(self, view1, view2, view_mim, mask):
        """Views (B, 3, h, w), mask bool (B, N) -> {"cl": L_CL, "mim": L_MIM, "std"}.

        A loss that λ switches off is 0, and its views may be None. std, where λ > 0:
        feature_std() of view 1's queries.
        """
        zero = torch.zeros((), device=mask.device)
        losses = {"cl": zero, "mim": zero}
        if self.use_cl:
            query_cls = encode_views(self.encoder, view1, view2)
            # no gradient: nothing in the average requires one
            key_cls = encode_views(self.momentum_encoder, view1, view2)
            losses["cl"], losses["std"] = self.compare(query_cls, key_cls)
        if self.use_mim:
            losses["mim"] = self.reconstruct(view_mim, mask)
        return losses

    @torch.no_grad()
    def update_average(self, momentum):
        """key ← m·key + (1 - m)·query, for the keys of the next step.

        The authors' code does it at the start of that step, which is the same.
        """
        if not self.use_cl:
            return
        keys = [*self.momentum_encoder.parameters()]
        keys += self.momentum_projector.parameters()
        queries = [*self.encoder.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(keys, queries, 1 - momentum)


def make_encoder(cfg):
    """The ViT of a configuration: MoCo v3's, or SimMIM's with positions "relative"."""
    look = {"positions": cfg.positions}
    if cfg.positions == "relative":
        look = {"positions": "none", "rel_pos_bias": True, "layer_scale": 0.1}
    encoder = ViT(cfg.image_size, cfg.patch_size, **SIZES[cfg.model], **look)
    # a fixed random patch embedding keeps MoCo stable ([M] section 4.2); in a hybrid it
    # would keep MIM's gradient from the pixels
    encoder.patch_embed.requires_grad_(cfg.lam < 1)
    return encoder


def encode_views(encoder, view1, view2):
    """Two views (B, 3, h, w), in one pass -> their CLS outputs (2, B, D)."""
    tokens = encoder(torch.cat([view1, view2]), cls_only=True)  # (2B, 1, D)
    return tokens[:, 0].unflatten(0, (2, -1))


def feature_std(features):
    """Measures collapse of features (B, C): about 1 when spread, 0 when identical.

    Standard deviation of the unit-length features over the batch, times √C.
    """
    unit = F.normalize(features.detach().float())
    return unit.std(dim=0).mean() * unit.shape[1] ** 0.5


# ==== 4. Views: what does the network get to see? =====================================
# First in the loader: every random choice, as a function of (seed, epoch, index), and
# the crops. Then on the training device, for the whole batch: the colours.


class TrainingViews:
    """views[epoch, index] -> crops of an image, and every random choice for it.

    A dict: crops uint8 (crops, 3, S, S), contrastive ones first; mask bool (N,);
    colours (draw_colours). A file that cannot be read is replaced by the next one.
    """

    def __init__(self, source, cfg):
        self.source = source
        self.cfg = cfg
        self.scales = []
        if cfg.lam > 0:
            self.scales += [cfg.crop_min] * 2
        if cfg.lam < 1:
            self.scales += [0.67]  # [S] appendix A

    def __getitem__(self, key):
        cfg = self.cfg
        epoch, wanted = key
        rng = np.random.default_rng([cfg.seed, 0, epoch, wanted])
        crop = functools.partial(
            random_crops, size=cfg.image_size, scales=self.scales, rng=rng
        )
        crops, _ = first_readable(self.source, wanted, crop)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        mask = draw_masks(1, cfg, generator)[0]
        colours = draw_colours(rng, cfg) if cfg.lam > 0 else []
        is_flipped = rng.random(len(crops)) < 0.5
        crops[is_flipped] = crops[is_flipped, ..., ::-1]
        return {"crops": crops, "mask": mask, "colours": colours}


def draw_masks(batch, cfg, generator=None):
    sizes = (cfg.image_size, cfg.patch_size, cfg.mask_patch_size)
    return random_mask(batch, *sizes, cfg.mask_ratio, generator)


# Images here are (B, 3, h, w) in [0, 1], with one parameter (B, 1, 1, 1) for each.

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # of ImageNet's colours
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def greyscale(x):
    """(B, 3, h, w) -> brightness (B, 1, h, w)."""
    r, g, b = x.split(1, dim=1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def adjust_brightness(x, factor):
    return (factor * x).clamp(0, 1)


def adjust_contrast(x, factor):
    mean = greyscale(x).mean(dim=(2, 3), keepdim=True)
    return torch.lerp(mean, x, factor).clamp(0, 1)


def adjust_saturation(x, factor):
    return torch.lerp(greyscale(x), x, factor).clamp(0, 1)


def adjust_hue(x, shift):
    """Turns the colour circle by `shift` in [-0.5, 0.5]: RGB to HSV and back."""
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    # (largest - colour) / chroma: 0 in the largest, 1 in the smallest
    r, g, b = ((value - x) / chroma.clamp(min=1e-12)).split(1, dim=1)
    hue = torch.where(g == 0, 2 + r - b, 4 + g - r)  # in sixths of the circle
    hue = torch.where(r == 0, b - g, hue)
    # back, for red, green, blue: value - chroma·clamp(min(k, 4 - k), 0, 1)
    start = torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)
    k = (hue + 6 * shift + start) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x, sigma):
    """Blur by sigma px, cut at 4σ, mirrored at the border, in one convolution per axis.

    Each image and channel is a group of its own. sigma (B, 1, 1, 1) stays on the CPU,
    where it tells the length of the kernel without making a GPU wait.
    """
    reach = (4 * sigma).int() + 1
    radius = min(reach.max().item(), min(x.shape[2:]) - 1)
    offsets = torch.arange(-radius, radius + 1)
    exponent = -0.5 * (offsets / sigma) ** 2  # (B, 1, 1, 2r+1)
    # each image's own 4σ, so that its blur does not depend on the others'
    exponent = exponent.masked_fill(offsets.abs() > reach, -math.inf)
    kernel = exponent.softmax(dim=-1).repeat_interleave(3, dim=0)
    kernel = kernel.to(x, non_blocking=x.is_cuda)
    y = F.pad(x, [radius] * 4, mode="reflect").flatten(0, 1)  # (B·3, h+2r, w+2r)
    y = F.conv2d(y, kernel, groups=len(kernel))
    y = F.conv2d(y, kernel.mT, groups=len(kernel))
    return y.view_as(x)


def solarise(x, threshold):
    return torch.where(x >= threshold, 1 - x, x)


OPERATIONS = (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_hue,
    gaussian_blur,
    adjust_saturation,  # by 0: grey
    solarise,
)
# [B] appendix B: view 1 is always blurred; view 2 seldom, but it may be solarised
COLOUR_SHARES = [
    [0.8, 0.8],  # jitter
    [0.2, 0.2],  # grey
    [1.0, 0.1],  # blur
    [0.0, 0.2],  # solarise
]


def draw_colours(rng, cfg):
    """The random choices for two views, which change_colours() carries out.

    -> float (2, 14), a row for each view: what happens to it one after the other, as
    numbers of OPERATIONS, -1: nothing; then the parameters of all operations.
    """
    happens = (rng.random((4, 2)) < COLOUR_SHARES).T
    jitters = rng.permuted([[0, 1, 2, 3]] * 2, axis=1)
    reach = np.array([0.4, 0.4, 0.2, cfg.hue_shift])
    factors = rng.uniform(-reach, reach, (2, 4)) + (1, 1, 1, 0)
    sigma = rng.uniform(0.1, max(0.1, cfg.blur), (2, 1))  # 0.1 changes no pixel
    order = np.hstack([jitters, [[5, 4, 6]] * 2])  # (2, 7)
    order[~happens.repeat([4, 1, 1, 1], axis=1)] = -1
    # no saturation is grey; what is brighter than 0.5 may be solarised
    draws = [order, factors, sigma, [[0.0, 0.5]] * 2]
    return np.hstack(draws, dtype=np.float32)


def change_colours(x, draws):
    """Does to x (B, 3, h, w) what draw_colours() has drawn, in place.

    draws (B, 14) on the CPU, which finds the images that an operation is for: a GPU
    would have to finish its work to tell how many there are.
    """
    order, parameters = draws.chunk(2, dim=1)  # (B, 7) each
    for column in order.T:  # what comes first, what comes second ...
        for number, operation in enumerate(OPERATIONS):
            images = (column == number).nonzero().flatten()
            if len(images) == 0:
                continue
            parameter = parameters[images, number].view(-1, 1, 1, 1)
            if operation is not gaussian_blur:
                parameter = parameter.to(x.device, non_blocking=x.is_cuda)
            images = images.to(x.device, non_blocking=x.is_cuda)
            x[images] = operation(x[images], parameter)


def augment(batch, cfg):
    """A loader's batch -> view1, view2, view_mim (B, 3, h, w) or None, mask (B, N).

    Nothing is drawn here: the same batch gives the same views, however often.
    """
    # a copy that nobody waits for needs memory that stays: CUDA sees to that, not MPS
    on_gpu = "cuda" in cfg.device
    mask = batch["mask"].to(cfg.device, non_blocking=on_gpu)
    crops = batch["crops"].to(cfg.device, non_blocking=on_gpu)  # (B, crops, 3, h, w)
    crops = crops.transpose(0, 1).contiguous() / 255
    if cfg.lam > 0:
        draws = batch["colours"].transpose(0, 1)  # (2, B, 14)
        change_colours(crops[:2].flatten(0, 1), draws.flatten(0, 1))  # no copy
    mean = MEAN.to(crops, non_blocking=True)
    crops = (crops - mean) / STD.to(crops, non_blocking=True)
    if cfg.lam == 0:
        return None, None, crops[0], mask
    if cfg.lam == 1:
        return *crops, None, mask
    return *crops, mask


# ==== 5. Optimiser and schedules: how fast, and when? =================================


def cosine(start, end, progress):
    """Half a cosine from `start` (progress 0) to `end` (1): behind every schedule."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def lr_at(step, total, warmup, peak):
    """Learning rate: linear to `peak` in `warmup` steps, then half a cosine to 0.

    The start is slow as Adam's averages are noise at first.
    """
    if step < warmup:
        return peak * step / warmup
    # with warm-up alone, the last step has the peak
    return cosine(peak, 0, (step - warmup) / max(total - warmup, 1e-9))


def make_optimizer(model, cfg):
    """AdamW. Decay is for matrices; MoCo v3 (λ = 1) decays biases and norms too."""
    decayed = []
    spared = []
    for p in model.parameters():
        is_vector = p.squeeze().ndim < 2  # biases, norms, tokens
        if p.requires_grad:
            group = spared if is_vector and cfg.lam < 1 else decayed
            group.append(p)
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, weight_decay=cfg.weight_decay, fused=True)


# ==== 6. Training loop ================================================================


def train(cfg, state, log):
    """Trains one model, from checkpoint `state` if there is one -> exit status."""
    data, model, optimizer, scaler, rows = prepare(cfg, state)
    total = number_of_steps(cfg, len(data[0]))
    since = rows[-1]["step"]  # speed is measured from here: the last in the log
    batches = make_loader(cfg, data[0], range(since, total))  # its first step is 0
    log.truncate(0)
    log.writelines(json.dumps(row) + "\n" for row in rows)
    signals = catch_signals()
    began = time.perf_counter()

    for step in range(since + 1, total + 1):
        # schedules
        lr = lr_at(step, total, cfg.warmup * total, cfg.lr * cfg.batch_size / 256)
        momentum = cosine(cfg.momentum, 1.0, step / total)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # batch: this rank's share, in micro-batches
        views = [augment(next(batches), cfg) for _ in range(cfg.accum)]

        # losses, backward: of the whole batch, or the same from many parts
        is_whole = WORLD_SIZE * cfg.accum == 1
        if is_whole:
            with autocast(cfg):
                losses = model(*views[0])
        else:
            losses = backward_in_parts(model, views, cfg, scaler)
        loss = (1 - cfg.lam) * losses["mim"] + cfg.lam * losses["cl"]
        if is_whole:  # else it is only for the log
            scaler.scale(loss).backward()
        del views  # before the next ones come

        # step, average; the scaler does nothing except with fp16
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.update_average(momentum)

        # log: every log_every steps, and at step 3, the first that tells the time
        stop_by = signal_of_any_rank(signals, step, cfg)
        is_saved = stop_by or step == total or step % cfg.save_every == 0
        if not is_saved and step != 3 and step % cfg.log_every != 0:
            if step == 1:  # it starts loaders and compiles: no measure of speed
                since, began = 1, time.perf_counter()
            continue
        row = {"step": step, "lr": lr, "momentum": momentum}
        for name, value in (losses | {"loss": loss, "norm": norm}).items():
            row[name] = round(value.item(), 5)  # for which a GPU has to finish its work
        stop_if_not_finite(row, scaler)
        seconds = (time.perf_counter() - began) / (step - since)
        row["images/s"] = cfg.batch_size / seconds
        row["minutes left"] = (total - step) * seconds / 60
        if is_saved and not stop_by and RANK == 0:
            row |= knn_scores(model.encoder, data, cfg)
        rows.append(row)
        print(json.dumps(row), file=log)
        # four digits, but steps in full
        say(*(f"{k} {x:{'d' if k == 'step' else '.4g'}}" for k, x in row.items()))

        # save
        if is_saved and RANK == 0:
            save_run(cfg, data, rows, model, optimizer, scaler)
        if stop_by:
            say(f"stopped by a signal after saving step {step}; --resume goes on")
            return 128 + stop_by
        since, began = step, time.perf_counter()
    if RANK == 0:
        finish(cfg, model, rows, data)
    return 0


# A batch means the same on any machine: 4,096 images have 4,095 negatives on one GPU as
# on 64. The encoder sees one image at a time, so it may run in micro-batches, on many
# ranks; the heads' BatchNorm and InfoNCE need all images at once. Gradient caching [G]
# has both: collect the encoder's outputs, take the loss of them all, and send its
# gradient at the outputs back through the encoder, part by part. Only the first --keep
# parts keep their graph, for want of memory; the others are encoded a second time, with
# the same outputs, as nothing in the encoder is random.


def backward_in_parts(model, parts, cfg, scaler):
    """Adds to .grad what one backward pass over the joint batch of all ranks would.

    parts: views of this rank's micro-batches. -> the joint losses, as SSL.forward's.
    """
    zero = torch.zeros((), device=cfg.device)
    losses = {"cl": zero, "mim": zero}
    query_cls = []
    key_cls = []
    if model.use_cl:
        # all outputs of the encoder, and the gradient of their loss
        for part, views in enumerate(parts):
            with autocast(cfg), torch.set_grad_enabled(part < cfg.keep):
                query_cls.append(encode_views(model.encoder, *views[:2]))
                key_cls.append(encode_views(model.momentum_encoder, *views[:2]))
        outputs = gather(query_cls).requires_grad_()  # (2, B, D)
        with autocast(cfg):
            losses["cl"], losses["std"] = model.compare(outputs, gather(key_cls))
        scaler.scale(cfg.lam * losses["cl"]).backward()
        # the mean over ranks below is right for the heads, whose gradient is whole on
        # every rank; the encoder's shares are summed, so this undoes its division
        gradient = outputs.grad.chunk(WORLD_SIZE, dim=1)[RANK] * WORLD_SIZE
    for part, views in enumerate(parts):
        if model.use_cl:
            if part >= cfg.keep:
                with autocast(cfg):
                    query_cls[part] = encode_views(model.encoder, *views[:2])
            # with the gradient that was collected, which the scaler has scaled
            at_outputs = gradient.chunk(len(parts), dim=1)[part]
            query_cls[part].backward(at_outputs)
        if model.use_mim:
            with autocast(cfg):
                # all images have equally many masked patches: a mean of means is exact
                mim = model.reconstruct(*views[2:]) / len(parts)
            losses["mim"] = losses["mim"] + mim.detach()
            scaler.scale((1 - cfg.lam) * mim).backward()
    if WORLD_SIZE > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for shared in (losses["mim"], *gradients):
            dist.all_reduce(shared)
            shared /= WORLD_SIZE
    return losses


def gather(parts):
    """Parts (views, b, D) on all ranks -> joined (views, B, D), without gradient."""
    x = torch.cat(parts, dim=1).detach()
    if WORLD_SIZE == 1:
        return x
    shares = [torch.empty_like(x) for _ in range(WORLD_SIZE)]
    dist.all_gather(shares, x)
    return torch.cat(shares, dim=1)


# What the loop asks for, in the order of its lines.


def prepare(cfg, state):
    """Data, model and optimiser, from checkpoint `state` if there is one; the log."""
    torch.manual_seed(cfg.seed)
    data = find_data(cfg)
    check_identity(cfg, data[0], state)
    announce(cfg, len(data[0]))
    model = SSL(cfg).to(cfg.device)
    optimizer = make_optimizer(model, cfg)
    # keeps the gradients of fp16 from becoming 0
    scaler = torch.GradScaler(cfg.device.split(":")[0], enabled=cfg.dtype == "fp16")
    rows = [{"step": 0}]
    if state:
        rows = state["log"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    elif RANK == 0:
        rows[0] |= knn_scores(model.encoder, data, cfg)
        # an older run's, which --overwrite gives up
        Path(cfg.out, "ckpt.pt").unlink(missing_ok=True)
    if cfg.compile:
        # in place, so that the weights keep their names
        model.encoder.compile(dynamic=False)
        if model.use_cl:
            model.momentum_encoder.compile(dynamic=False)
    return data, model, optimizer, scaler, rows


def check_identity(cfg, train_set, state):
    """UserError if ranks, or a run and its checkpoint, have different training sets.

    The schedules and the order of images follow from the set. Also if CL's batch is one
    image, or larger than the set.
    """
    identities = [train_set.identity()] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(identities, identities[0])
    if state:
        identities.append(state["data"])
    message = f"not one training set, of ranks or of the run: {set(identities)}"
    require(len(set(identities)) == 1, message)
    require(
        cfg.lam == 0 or 1 < cfg.batch_size <= len(train_set),
        f"--batch-size {cfg.batch_size} of {len(train_set)} images: CL needs other "
        "images in a batch",
    )


def number_of_steps(cfg, images):
    if cfg.epochs:
        return max(1, round(cfg.epochs * images / cfg.batch_size))
    return cfg.steps


def announce(cfg, images):
    """The first line: what will happen."""
    say(
        f"{cfg.objective} (λ = {cfg.lam:g}): ViT-{cfg.model}, {cfg.image_size} px, "
        f"patch {cfg.patch_size}, {images} images ({cfg.data or 'built-in stimuli'}), "
        f"{number_of_steps(cfg, images)} steps of {WORLD_SIZE} x {cfg.accum} x "
        f"{cfg.batch_size // WORLD_SIZE // cfg.accum} images, "
        f"learning rate {cfg.lr:g} x {cfg.batch_size}/256 = "
        f"{cfg.lr * cfg.batch_size / 256:.2g}, {cfg.dtype} on {cfg.device}, into "
        f"{cfg.out}; step 3 tells the minutes left"
    )


def autocast(cfg):
    """Context in which matrix products are of --dtype, everything else as needed."""
    dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float16
    kind = cfg.device.split(":")[0]
    return torch.autocast(kind, dtype, enabled=cfg.dtype != "fp32")


def stop_if_not_finite(row, scaler):
    """NaNs persist in the weights, so it is enough to look before a line is written.

    In fp16 gradients overflow now and then, and the scaler leaves such steps out.
    """
    is_finite = math.isfinite(row["loss"])
    is_finite &= scaler.is_enabled() or math.isfinite(row["norm"])
    require(is_finite, f"loss or gradient not finite, try a lower --lr: {row}")
    if row.get("std", 1) < 0.05:
        say("features collapse: all images look alike; lower --lr")


# ==== 7. Command line =================================================================


def fraction(text):
    value = float(text)
    require(0 <= value <= 1, "not in 0 .. 1")
    return value


def nonnegative(text):
    value = float(text)
    require(0 <= value < math.inf, "negative or not finite")
    return value


def positive(text):
    value = int(text)
    require(value > 0, "not a whole number from 1 on")
    return value


# The comments are the help texts: --help prints this class. Behind the colon stands the
# function that reads a flag's text.


@dataclass
class Config:
    # method
    objective: str = "hybrid"  # moco, simmim or hybrid
    lam: fraction = 0.2  # λ: 0 is SimMIM, 1 is MoCo; [P] analyses 0.2
    # τ of InfoNCE: the smaller, the harder it looks at the nearest negatives
    temperature: nonnegative = 0.2
    # of the key average, rises from here to 1; a faster average than [M]'s 0.99 for a
    # thousand steps instead of 94,000
    momentum: fraction = 0.97
    proj_hidden: positive = 512  # hidden width of the heads; MoCo v3: 4096
    mask_patch_size: positive = 4  # px, side of what is masked at once
    mask_ratio: fraction = 0.6  # so high that copying the neighbour is not enough
    decoder_depth: int = 0  # blocks before the pixel head ([P] figure 11)

    # data
    data: str = ""  # folder: train/ and val/, class folders, or flat; "": stimuli
    # recipe: micro (for stimuli), small32 (photographs of 32 px), imagenet (the default
    # with --data)
    preset: str = "micro"
    # smallest contrastive crop, share of area; a whole object must remain; [M]: 0.08
    crop_min: fraction = 0.2
    # largest turn of the colour circle; 0.5 is half of it either way: colour must not
    # tell which image it is; [B]: 0.1
    hue_shift: fraction = 0.5
    blur: nonnegative = 1.0  # px, largest σ; view 1 always, view 2 in 1 of 10

    # model
    model: str = "micro"  # nano, micro, micro8, tiny, small, base, large, huge
    image_size: positive = 32  # px; crops are resized to this square
    patch_size: positive = 4  # px; 32/4 gives 8 x 8 tokens, 224/16 gives 14 x 14
    # sincos (fixed) or relative: SimMIM's biases, with LayerScale
    positions: str = "sincos"

    # optimiser
    epochs: nonnegative = 0.0  # passes over the training set; 0: --steps counts
    steps: positive = 1500  # optimiser steps
    batch_size: positive = 64  # images per step, over all ranks and micro-batches
    lr: nonnegative = 12e-3  # base learning rate; the peak is lr x batch_size / 256
    weight_decay: nonnegative = 0.05  # AdamW's
    warmup: fraction = 0.1  # share of the steps in which the rate rises
    clip: nonnegative = 5.0  # largest gradient norm; 0: no clipping

    # system
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: CUDA if there is one
    # bf16, fp16, fp32; auto: bf16 where there are units for it, else fp16 on a GPU,
    # fp32 on a CPU
    dtype: str = "auto"
    # micro-batches per step, any number gives the same result: more of them need less
    # memory; 0: of 128 images at most
    accum: int = 0
    # how many of them keep their graph: as many as fit, as others are encoded twice
    keep: int = 1
    workers: int = -1  # loading processes; -1: up to 16 for a GPU
    compile: bool = False  # torch.compile: a slow start, then faster steps

    # run
    seed: int = 0  # of weights, stimuli, order and crops
    out: str = ""  # run folder; "": runs/<preset>-<objective>, and the seed if given
    resume: bool = False  # go on with the run in --out
    overwrite: bool = False  # start anew although --out holds a run
    dry_run: bool = False  # print FLOPs, memory and hours of the run, and stop
    save_every: positive = 500  # steps between checkpoints and k-NN tests
    log_every: positive = 25  # steps between console lines
    knn_images: int = 4000  # in the k-NN bank; tested: a quarter; 0: no test


CHOICES = {
    "objective": ("moco", "simmim", "hybrid"),
    "preset": ("micro", "small32", "imagenet"),
    "model": tuple(SIZES),
    "positions": ("sincos", "relative"),
    "dtype": ("auto", "bf16", "fp16", "fp32"),
}
# Recipes: flags of a preset, of an objective, of both together; the later ones count.
PRESETS = {
    "moco": "--lam 1",
    "simmim": "--lam 0",
    "hybrid": "",
    # stimuli, minutes on two cores; the encoder's work is equal: 1.056 million passes
    # (an image costs MoCo 2·3 + 2, SimMIM 3, the hybrid 11)
    "micro": "",
    "micro-hybrid": "--lr 6e-3",
    "micro-moco": "--steps 1032 --batch-size 128 --lr 2e-3",
    "micro-simmim": "--steps 5500",
    # photographs of 32 px
    "small32": """
        --epochs 100 --batch-size 128 --lr 4e-3 --momentum 0.99
        --hue-shift 0.1 --blur 0.3""",
    # the encoder's work is equal here too
    "small32-moco": "--epochs 137.5",
    "small32-simmim": "--epochs 366.7",
    # ViT-B/16 on ImageNet: MoCo v3's recipe ([M] section 5), also for the hybrid
    "imagenet": """
        --model base --image-size 224 --patch-size 16 --proj-hidden 4096
        --epochs 300 --batch-size 4096 --lr 1.5e-4 --weight-decay 0.1
        --warmup 0.13333333 --momentum 0.99
        --crop-min 0.08 --hue-shift 0.1 --blur 2.0 --mask-patch-size 32""",
    "imagenet-moco": "--clip 0",
    # SimMIM's ViT-B ([S] section 4): learning rate 1e-4 for a batch of 512. Published
    # are 800 epochs, with a rate that falls in a step, and stochastic depth; here 100,
    # as its ablations (of Swin-B, at twice this rate), falling to 0
    "imagenet-simmim": """
        --epochs 100 --batch-size 2048 --lr 0.5e-4 --weight-decay 0.05
        --warmup 0.1 --positions relative""",
}
# at --resume; everything else is as it was
MAY_CHANGE = """resume out data device workers accum keep compile
    save_every log_every""".split()

LOG_HELP = """
what a line of the log says:
  cl, mim        losses: InfoNCE of both directions, 4τ·log B if nothing is told apart;
                 masked L1 in standard deviations of ImageNet's colours
  std            of CL's unit-length queries: about 1 when spread, 0 when all are alike
  norm           length of the gradient, before clipping
  knn_<labels>   accuracy of the 20 nearest training images' majority, by the cosine of
                 mean patch tokens; log.jsonl has the untrained network's as step 0
"""


def make_parser():
    parser = argparse.ArgumentParser(
        "sslvit.py",
        description=__doc__,
        epilog=inspect.getsource(Config) + LOG_HELP,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # only what was given comes back
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = functools.partial(require, False)  # in one line, as all errors
    for flag in fields(Config):
        how = {"type": flag.type, "choices": CHOICES.get(flag.name)}
        if flag.type is bool:
            how = {"action": "store_true"}
        parser.add_argument("--" + flag.name.replace("_", "-"), **how)
    return parser


def parse(argv):
    """Command line -> (Config with its recipe, {name: value} of the flags given)."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    objective = given.get("objective", "hybrid")
    preset = given.get("preset", "imagenet" if given.get("data") else "micro")
    recipe = f"--preset {preset} {PRESETS[preset]} {PRESETS[objective]} "
    recipe += PRESETS.get(f"{preset}-{objective}", "")
    if "steps" in given:
        recipe += " --epochs 0"
    cfg = Config(**(vars(parser.parse_args(recipe.split())) | given))
    require(
        objective == "hybrid" or "lam" not in given,
        "--lam is for the hybrid: moco is λ = 1, simmim λ = 0",
    )
    if not cfg.out:
        cfg.out = f"runs/{preset}-{objective}"
        if "seed" in given:
            cfg.out += f"-seed{cfg.seed}"
    return cfg, given


def resume(cfg, given):
    """-> configuration of the run in --out, with what may change; its checkpoint."""
    path = Path(cfg.out, "ckpt.pt")
    state = load_checkpoint(path)
    is_run = isinstance(state, dict) and state.keys() >= {"config", "data", "optimizer"}
    is_ours = is_run and types_of(state["config"]) == types_of(vars(cfg))
    require(is_ours, f"{path}: not a run of this version of the program")
    config = state["config"]
    for name in given.keys() - MAY_CHANGE:
        message = f"{path} has {name} = {config[name]}, which cannot change"
        require(given[name] == config[name], message)
    of_this_machine = {"device": "auto", "workers": -1, "out": cfg.out}
    if state.get("ranks") != WORLD_SIZE:  # whose micro-batches would not fit here
        of_this_machine |= {"accum": 0, "keep": 1}
    return Config(**(config | of_this_machine | given)), state


def types_of(values):
    return {name: type(value) for name, value in values.items()}


def has_bf16(on_gpu):
    """Are there units for bf16? Without them it is slower than fp32."""
    if on_gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "bf16" in cpuinfo.read_text()


def settle(cfg):
    """Replaces each "auto" by what this machine has; UserError if it does not fit."""
    if cfg.device in ("auto", "cuda") and torch.cuda.is_available():
        cfg.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if cfg.device == "auto":
        cfg.device = "cpu"
    on_gpu = "cuda" in cfg.device
    if on_gpu and torch.cuda.is_available():
        # before anything touches a GPU: each rank has its own
        torch.cuda.set_device(cfg.device)
    torch.zeros(1, device=cfg.device)  # an error if there is none here
    if cfg.dtype == "auto":
        cfg.dtype = "fp16" if on_gpu else "fp32"
        if has_bf16(on_gpu):
            cfg.dtype = "bf16"
    if cfg.workers < 0:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cfg.workers = min(16, os.cpu_count() // ranks_here) if on_gpu else 0
    share = cfg.batch_size // WORLD_SIZE
    if cfg.accum < 1:
        cfg.accum = 1
        while share > 128 * cfg.accum or share % cfg.accum != 0:
            cfg.accum += 1
    parts = f"{WORLD_SIZE} ranks x {cfg.accum} micro-batches"
    text = f"--batch-size {cfg.batch_size} does not divide into {parts}"
    require(cfg.batch_size % (WORLD_SIZE * cfg.accum) == 0, text)
    draw_masks(1, cfg)  # do the sizes divide?
    require(cfg.decoder_depth >= 0, "--decoder-depth is negative")


def open_run_folder(cfg):
    """Makes --out and owns it -> its log.jsonl; other ranks' go nowhere.

    UserError if it holds a run or another run writes into it.
    """
    if RANK > 0:
        return io.StringIO()
    folder = Path(cfg.out)
    folder.mkdir(parents=True, exist_ok=True)
    # a buffer of one line: a crash loses none
    log = open(folder / "log.jsonl", "a", buffering=1)  # noqa: SIM115
    try:
        import fcntl

        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another run writes into {folder}: give --out") from error
    except (ImportError, OSError):
        # Windows, file systems without locks: two runs in one folder are not noticed
        pass
    is_empty = log.tell() == 0 and not (folder / "ckpt.pt").exists()
    require(
        is_empty or cfg.overwrite or cfg.resume,
        f"{folder} holds a run: give --resume or --overwrite",
    )
    return log


def run(argv):
    """Reads a command line, then plans or trains -> exit status."""
    cfg, given = parse(argv)
    state = None
    if cfg.resume:
        cfg, state = resume(cfg, given)
    settle(cfg)
    if cfg.dry_run:
        return plan(cfg)
    with open_run_folder(cfg) as log:
        if WORLD_SIZE > 1:
            backend = "nccl" if "cuda" in cfg.device else "gloo"
            # the others wait for the first rank's k-NN test
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=3))
        status = train(cfg, state, log)
    if WORLD_SIZE > 1:
        # the first rank may still save; torchrun kills it 30 s after another has ended
        dist.barrier()
        dist.destroy_process_group()
    return status


def main(argv=None, run=run, program="sslvit.py"):
    """Runs a command line -> exit status: run's; 2 after an error that the user can
    fix, in one line; 128 and its number after a signal.

    If you change this file: run(argv) itself raises errors with their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # not every console has a λ
    try:
        # puts the handlers of signals back at the end: of STOPS, which train() catches,
        # and DEATHS, which torch catches and raises an error from wherever we are
        with contextlib.ExitStack() as handlers:
            for number in STOPS + DEATHS:
                handlers.callback(signal.signal, number, signal.getsignal(number))
            return run(argv)
    except KeyboardInterrupt:
        print(f"{program}: ended at once; what was saved before stays", file=sys.stderr)
        status = 130
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]
        # a loading process sends its traceback, whose last line is the message
        line = lines[-1] if lines[0].startswith("Caught ") else lines[0]
        print(f"{program}: {line}", file=sys.stderr)
        status = 2
    for process in torch.multiprocessing.active_children():
        process.kill()  # loading processes, which ignore softer signals
    if dist.is_initialized():
        # NCCL's end in order would wait for ranks that wait for this one
        os._exit(status)
    return status


# ==== 8. Workshop: what the lecture takes for granted =================================
# ---- Stimuli: images whose shape and texture are known ----

SHAPES = "circle square triangle star cross ring bar crescent".split()
TEXTURES = "plain horizontal vertical diagonal checks dots zigzag grid".split()


def shape_level(shape, x, y):
    """Negative inside the shape, 0 on its outline; angle 0 points up."""
    radius = np.hypot(x, y)
    angle = np.arctan2(x, -y)
    third = 2 * np.pi / 3
    across, down = abs(x), abs(y)
    longest = np.maximum(across, down)
    levels = {
        "circle": radius - 0.9,
        "square": longest - 0.75,
        "triangle": radius * np.cos(angle % third - third / 2) - 0.5,
        "star": radius - 0.65 - 0.35 * np.cos(5 * angle),
        # in either arm, which ends
        "cross": np.maximum(np.minimum(across, down) - 0.3, longest - 0.95),
        "ring": abs(radius - 0.7) - 0.25,
        "bar": np.maximum(across - 0.4, down - 0.95),
        # a circle without another one
        "crescent": np.maximum(radius - 0.95, 0.7 - np.hypot(x - 0.5, y)),
    }
    return levels[shape]


def texture_wave(texture, u, v):
    """Brightness at (u, v) in radians; what is outside [-1, 1] will be cut.

    Regular, so that what a mask hides follows from its surroundings.
    """
    waves = {
        "plain": np.ones_like(u),
        "horizontal": np.sin(v),
        "vertical": np.sin(u),
        "diagonal": np.sin((u + v) / 2**0.5),
        "checks": 1.5 * np.sin(u) * np.sin(v),
        "dots": np.cos(u) + np.cos(v) - 0.6,
        "zigzag": np.sin(v + 2 * np.arcsin(np.sin(u / 2))),
        "grid": np.maximum(np.cos(u), np.cos(v)) * 2 - 1,
    }
    return waves[texture]


class Stimuli:
    """Images of one object, of 8 shapes in 8 textures, on smooth grey.

    stimuli[i] -> image uint8 (S, S, 3), shape 0..7, texture 0..7, mask bool (S, S),
    True on the object (not MIM's mask). Everything is drawn from (seed, split, i).
    Shape and texture are independent.
    """

    label_names = ("shape", "texture")
    classes = (SHAPES, TEXTURES)

    def __init__(self, length, image_size=32, seed=0, split="train"):
        self.length = length
        self.size = image_size
        self.key = (seed, int(split == "test"))
        self.cache = {}

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng([*self.key, index, 0])
        shape, texture = rng.integers(8, size=2).tolist()
        image, mask = self.render(index, shape, texture)
        return image, shape, texture, mask

    def identity(self):
        return f"{self.length} stimuli of {self.size} px"

    def load(self, index):
        """-> PIL image, [shape, texture]; small ones are drawn once and kept."""
        if index in self.cache:
            return self.cache[index]
        image, *labels, _ = self[index]
        loaded = Image.fromarray(image), labels
        if self.size <= 64:  # 246 MB of training images
            self.cache[index] = loaded
        return loaded

    def render(self, index, shape, texture):
        """Scene `index` with an object of one's choice -> image, mask."""
        rng = np.random.default_rng([*self.key, index, 1])
        tilt = np.radians(rng.uniform(-18, 18))
        scale = rng.uniform(0.75, 1.0)
        x0, y0, slope_x, slope_y = rng.uniform(-1, 1, 4) * (0.2, 0.2, 0.1, 0.1)
        frequency = 2 * np.pi / rng.uniform(0.36, 0.46)
        phase_u, phase_v = rng.uniform(0, 2 * np.pi, 2)
        grey, hue, fade, bright = rng.uniform((0.3, 0, 0.1, 0.75), (0.7, 1, 0.5, 1.0))

        # pixel centres in [-1, 1], and in the object's own axes u, v (S, S)
        x = (np.arange(self.size, dtype=np.float32) + 0.5) * 2 / self.size - 1
        y = x[:, None]
        cos, sin = np.cos(tilt), np.sin(tilt)
        u = cos * (x - x0) + sin * (y - y0)
        v = cos * (y - y0) - sin * (x - x0)
        level = shape_level(SHAPES[shape], u / scale, v / scale)
        # an edge one pixel wide
        inside = np.clip(0.5 - level * scale * self.size / 2, 0, 1)
        u = u * frequency + phase_u
        v = v * frequency + phase_v
        wave = np.clip(1.5 * texture_wave(TEXTURES[texture], u, v), -1, 1)

        colour = colorsys.hsv_to_rgb(hue, 1 - fade, bright)
        light = (0.65 + 0.35 * wave[..., None]) * colour  # (S, S, 3)
        ground = (grey + slope_x * x + slope_y * y)[..., None]  # (S, S, 1)
        image = ground + inside[..., None] * (light - ground)
        return (image * 255 + 0.5).clip(0, 255).astype(np.uint8), inside > 0.5


# ---- Image files ----

TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = "val valid validation test testing".split()
MASK_FOLDERS = "mask masks labels annotations".split()


def list_images(folder, left_out, top=""):
    """Yields (top, path) of the images in and below a folder; links are followed.

    top: the folder of the first level, "" if there is none. left_out counts the rest.
    OSError if a folder cannot be listed, or links lead in a circle.
    """
    kinds = Image.registered_extensions()
    for entry in os.scandir(folder):
        ending = Path(entry.name).suffix.lower()
        if entry.name[0] == "." or entry.name.lower() in MASK_FOLDERS:
            left_out[f"hidden, or named {', '.join(MASK_FOLDERS)}"] += 1
        elif entry.is_dir():
            yield from list_images(entry.path, left_out, top or entry.name)
        elif kinds.get(ending) in Image.OPEN:
            yield top, entry.path
        else:
            left_out[f"file {ending}, no kind of image for Pillow"] += 1


class ImageFolder(list):
    """A list of (path, labels). Root's folders with images are the classes, if several.

    UserError if there is no image.
    """

    def __init__(self, root):
        left_out = collections.Counter()
        images = sorted(list_images(root, left_out))
        for reason, number in left_out.items():
            say(f"left out in {root}: {number} x {reason}")
        require(images, f"--data {root}: no image that can be read (JPEG, PNG ...)")
        self.root = os.path.join(root, "")
        self.label_names = ()
        self.classes = ()
        names = sorted({top for top, _ in images} - {""})
        if len(names) > 1:
            self.label_names = ("class",)
            self.classes = (names,)
            # what lies beside the class folders is of no class
            images = [image for image in images if image[0]]
        numbers = {name: number for number, name in enumerate(names)}
        for top, path in images:
            self.append((path, [numbers.get(top, 0)]))
        say(f"{root}: {len(self)} images, {len(self.classes and names)} class folders")

    def identity(self):
        """How many images, and a fingerprint of their names and order."""
        names = "\n".join(path.removeprefix(self.root) for path, _ in self)
        digest = hashlib.sha256(os.fsencode(names)).hexdigest()
        return f"{len(self)} images ({digest[:12]})"

    def load(self, index):
        """-> opened PIL image, [class]."""
        path, labels = self[index]
        return Image.open(path), labels


def find_data(cfg):
    """-> training set, test set (or None, or empty): of --data, or stimuli."""
    if not cfg.data:
        train_set = Stimuli(20000, cfg.image_size, cfg.seed)
        return train_set, Stimuli(5000, cfg.image_size, cfg.seed, "test")
    train_set = test_set = None
    for path in sorted(Path(cfg.data).iterdir()):
        if path.name.lower() in TRAIN_FOLDERS:
            train_set = ImageFolder(path)
        elif path.name.lower() in TEST_FOLDERS:
            test_set = ImageFolder(path)
    if train_set is None:
        require(test_set is None, f"--data {cfg.data}: a test set, but no folder train")
        train_set = ImageFolder(cfg.data)
        test_set = copy.copy(train_set)
        test_set[:] = train_set[9::10]  # every tenth
        del train_set[9::10]
    elif test_set and train_set.classes != test_set.classes:
        say(f"no accuracies, as classes differ: {train_set.classes} {test_set.classes}")
    return train_set, test_set


def crop_box(width, height, smallest, rng):
    """RandomResizedCrop -> (left, top, right, bottom) in px.

    `smallest` to 1 of the area, aspect 3/4 to 4/3; the first of ten tries that fits,
    else the largest square.
    """
    w = h = min(width, height)
    for _ in range(10):
        area = width * height * rng.uniform(smallest, 1)
        ratio = (4 / 3) ** rng.uniform(-1, 1)
        if area * ratio <= width**2 and area / ratio <= height**2:
            w = math.sqrt(area * ratio)
            h = math.sqrt(area / ratio)
            break
    left = rng.uniform(0, width - w)
    top = rng.uniform(0, height - h)
    return left, top, left + w, top + h


def make_upright(image):
    """Rotates an image as its EXIF entry says; only such an image is decoded here."""
    with contextlib.suppress(Exception):  # a broken EXIF block costs no pixels
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            ImageOps.exif_transpose(image, in_place=True)


def to_rgb(image):
    """Decodes an opened image of any mode -> RGB; what is transparent becomes white.

    Of 16 and 32 bits, whose range nobody knows, the darkest pixel becomes black, the
    brightest white.
    """
    if image.mode[0] in "IF":
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        values = np.interp(values, (values.min(), values.max()), (0, 255))
        image = Image.fromarray(values.astype(np.uint8))
    if image.mode != "RGB":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image


def random_crops(image, size, scales, rng):
    """A RandomResizedCrop of an image for each smallest share of area in `scales`.

    The image is decoded here, once -> uint8 (len(scales), 3, size, size).
    """
    make_upright(image)
    width = image.width
    boxes = np.array([crop_box(*image.size, smallest, rng) for smallest in scales])
    # a large JPEG is decoded at 1/2, 1/4 or 1/8, never smaller than a crop needs
    spare = max(1, (boxes[:, 2:] - boxes[:, :2]).min() / size)
    image.draft("RGB", (int(image.width / spare), int(image.height / spare)))
    image = to_rgb(image)
    boxes = (boxes * image.width / width).round().astype(int)  # between pixels
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, h, w)
    crops = []
    for left, top, right, bottom in boxes:
        crop = pixels[:, :, top:bottom, left:right]
        crops.append(F.interpolate(crop, size, mode="bilinear", antialias=True))
    return torch.cat(crops).numpy()


def center_crop(image, size):
    """The largest centred square -> uint8 (3, size, size)."""
    make_upright(image)
    image.draft("RGB", (size, size))
    square = ImageOps.fit(to_rgb(image), (size, size), Image.Resampling.BILINEAR)
    return np.array(square).transpose(2, 0, 1)


# a line that was printed is in the cache, and not printed again
warn_once = functools.cache(print)


def first_readable(source, wanted, crop):
    """crop(image) of image `wanted` or of the next that can be read -> that, labels."""
    for place in range(wanted, wanted + 100):
        index = place % len(source)
        try:
            image, labels = source.load(index)
            return crop(image), np.array(labels)
        except Exception as error:  # Pillow raises almost anything
            warning = f"unreadable, next one used: {source[index][0]!r} ({error})"
            warn_once(warning, file=sys.stderr)
    raise UserError("of 100 files in a row not one is an image that can be read")


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, length):
    return np.random.default_rng([seed, 1, epoch]).permutation(length).tolist()


def image_keys(cfg, length, steps):
    """(epoch, index) of this rank's images, one after the other.

    They follow from the step alone, so a resumed run goes on where it stopped, and any
    number of ranks and micro-batches sees the same images in the same step. Nothing is
    dropped: a batch that spans two epochs may hold an image twice.
    """
    share = cfg.batch_size // WORLD_SIZE
    for step in steps:
        first = step * cfg.batch_size + RANK * share
        for place in range(first, first + share):
            epoch, position = divmod(place, length)
            yield epoch, epoch_order(cfg.seed, epoch, length)[position]


def make_loader(cfg, train_set, steps):
    """Iterates over this rank's micro-batches."""
    return iter(
        DataLoader(
            TrainingViews(train_set, cfg),
            batch_size=cfg.batch_size // WORLD_SIZE // cfg.accum,
            sampler=image_keys(cfg, len(train_set), steps),
            num_workers=cfg.workers,
            worker_init_fn=ignore_signals,
            pin_memory="cuda" in cfg.device,
        )
    )


# ---- k-NN: what do the features know, without training anything? ----


def knn(train_features, train_labels, features, k=20):
    """The majority label among the k nearest training images, by cosine.

    train_features (n, D), train_labels (n, label sets), features (m, D) -> (m, label
    sets).
    """
    train_unit = F.normalize(train_features)
    majority = []
    # in pieces: of 50,000 images all similarities at once are 2.5 GB
    for unit in F.normalize(features).split(256):
        similarity = unit @ train_unit.T  # (256, n)
        nearest = similarity.topk(min(k, len(train_unit))).indices
        majority.append(train_labels[nearest].mode(dim=1).values)
    return torch.cat(majority)


class CenterCrops:
    """crops[i] -> centre square of image i, or of the next readable; its labels."""

    def __init__(self, source, image_size):
        self.source = source
        self.crop = functools.partial(center_crop, size=image_size)

    def __getitem__(self, wanted):
        return first_readable(self.source, wanted, self.crop)


def image_batches(source, count, cfg):
    """Centre squares of `count` images spread over `source`, as the network sees them.

    Yields images (b, 3, h, w), labels (b, label sets).
    """
    loader = DataLoader(
        CenterCrops(source, cfg.image_size),
        batch_size=64,
        sampler=np.linspace(0, len(source) - 1, min(count, len(source))).astype(int),
        num_workers=cfg.workers,
        worker_init_fn=ignore_signals,
    )
    for crops, labels in loader:
        yield ((crops / 255 - MEAN) / STD).to(cfg.device), labels


@torch.no_grad()
def mean_tokens(encoder, source, count, cfg):
    """-> mean patch tokens after the last norm (count, D), labels (count, sets)."""
    features = []
    labels = []
    for images, batch_labels in image_batches(source, count, cfg):
        with autocast(cfg):
            # .forward: a compiled encoder would compile again for this
            tokens = encoder.forward(images)  # (b, 1+N, D)
        features.append(tokens[:, 1:].float().mean(dim=1).cpu())
        labels.append(batch_labels)
    return torch.cat(features), torch.cat(labels)


def knn_scores(encoder, data, cfg):
    """{"knn_<label set>": accuracy}; {} without labels."""
    train_set, test_set = data
    has_labels = test_set and train_set.classes == test_set.classes != ()
    if cfg.knn_images == 0 or not has_labels:
        return {}
    bank = mean_tokens(encoder, train_set, cfg.knn_images, cfg)
    features, labels = mean_tokens(encoder, test_set, cfg.knn_images // 4 + 1, cfg)
    accuracies = (knn(*bank, features) == labels).double().mean(dim=0)
    pairs = zip(train_set.label_names, accuracies.tolist(), strict=True)
    return {f"knn_{name}": round(accuracy, 4) for name, accuracy in pairs}


# ---- Checkpoints ----


def save_run(cfg, data, rows, model, optimizer, scaler):
    """All that --resume needs. Random numbers follow from the step alone."""
    state = {
        "config": vars(cfg),
        "data": data[0].identity(),
        "step": rows[-1]["step"],
        "ranks": WORLD_SIZE,
        "log": rows,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    save_checkpoint(Path(cfg.out, "ckpt.pt"), state)


def save_checkpoint(path, state):
    """Writes beside the target and renames: `path` is the old or the new one, whole."""
    beside = Path(f"{path}.tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch's, if the disk is full
        beside.unlink(missing_ok=True)
        raise UserError(
            f"{path} was not written; --resume goes on from the one before "
            f"({error!r:.99})"
        ) from error


def load_checkpoint(path):
    """Tensors, numbers and strings only: nothing that a file contains is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # checksums, at which torch does not look
        require(damaged is None, f"{damaged} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            f"{path}: no such file, or not a whole checkpoint of this program "
            f"({type(error).__name__})"
        ) from error


# ---- Signals: how does a run end early? ----

# Ctrl-C, the end of a cluster job, a closed terminal
STOPS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP")]
# a loading process died
DEATHS = [s for s in signal.Signals if s.name == "SIGCHLD"]


def catch_signals():
    """-> a list that each signal joins when it comes; a second Ctrl-C ends at once.

    torchrun sends every signal twice, so there a second one means nothing.
    """
    signals = []

    def remember(number, frame):
        signals.append(number)
        if WORLD_SIZE == 1:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nsaves at the end of this step; Ctrl-C again: at once\n")

    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup's
            signal.signal(number, remember)
    return signals


def ignore_signals(worker):
    """A signal reaches loading processes, too: the run still needs them to save."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def signal_of_any_rank(signals, step, cfg):
    """-> its number, or 0. All ranks stop at one step, or they wait for each other."""
    number = max(signals, default=0)
    if WORLD_SIZE == 1:
        return number
    if step % 5 != 0:  # to ask is to make a GPU finish its work
        return 0
    number = torch.tensor(number, device=cfg.device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


# ---- Plan: what does a run cost? ----

# FLOP/s of one H100, 26 % of its peak: the hybrid's 711 images/s of ViT-B, in batches
# of 128, without --compile, loading, colours, clipping and average
H100_SPEED = 0.26 * 989e12
IMAGENET = 1281167  # images, where --data is not there to be counted


def flops_per_image(cfg):
    """FLOPs of a training step for an image; a product and a sum count as two.

    A block costs each of its T tokens 24D² in linear layers and 4TD in attention; where
    only CLS asks, the last one needs 4D². A backward pass costs twice a forward pass.
    Left out are embedding, heads, decoder and queries that nobody uses: 1 to 2 %.
    """
    width, depth, _ = SIZES[cfg.model].values()
    tokens = 1 + (cfg.image_size // cfg.patch_size) ** 2
    block = tokens * (24 * width**2 + 4 * tokens * width)
    full_pass = depth * block
    cls_pass = full_pass - block + tokens * 4 * width**2
    flops = 0
    if cfg.lam < 1:
        flops += 3 * full_pass
    if cfg.lam > 0:
        # what --keep leaves out is encoded a second time
        again = 2 * max(0, cfg.accum - cfg.keep) / max(1, cfg.accum)
        flops += (2 * 3 + 2 + again) * cls_pass  # two views trained, two keys
    return flops


def plan(cfg):
    """Prints FLOPs, memory and hours of the run -> exit status."""
    count = IMAGENET
    with contextlib.suppress(FileNotFoundError):
        count = len(find_data(cfg)[0])
    announce(cfg, count)
    images = number_of_steps(cfg, count) * cfg.batch_size
    flops = flops_per_image(cfg)
    model = SSL(cfg).to(cfg.device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(
        f"{images:.4g} images of {flops / 1e9:.4g} GFLOP, "
        f"{trained * 16 / 2**30:.2g} GiB of weights, gradients and Adam's averages\n"
        f"{WORLD_SIZE} x H100, at 26 % of its bf16 peak of 989 TFLOP/s: "
        f"{images * flops / H100_SPEED / 3600 / WORLD_SIZE:.3g} h"
    )
    # steps on this machine: of a micro-batch, for BatchNorm two images at least, and
    # on a CPU as few as take some seconds
    size = max(2, cfg.batch_size // WORLD_SIZE // cfg.accum)
    if cfg.device == "cpu":
        size = min(size, 2 + int(2e12 / flops))
    views = torch.randn(3, size, 3, cfg.image_size, cfg.image_size, device=cfg.device)
    mask = draw_masks(size, cfg).to(cfg.device)
    for _ in range(3):
        began = time.perf_counter()
        with autocast(cfg):
            losses = model(*views, mask)
        loss = losses["mim"] + losses["cl"]
        loss.backward()
        loss.item()  # waits for a GPU
    seconds = (time.perf_counter() - began) / size
    say(
        "here, on one device, all kept, without --compile and optimiser: "
        f"{1 / seconds:.4g} images/s, {images * seconds / 3600:.3g} h"
    )
    return 0


# ---- What a run says, and what it ends with ----


def say(*words):
    """The first rank prints. Where nobody reads any more (| head), the run goes on."""
    try:
        if RANK == 0:
            print(*words, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def finish(cfg, model, rows, data):
    """Draws what was learnt; says how good the features are, and what next."""
    if cfg.lam < 1:
        draw_reconstruction(cfg, model, data[1] or data[0])
        say(f"image, what the network saw, what it makes of it: {cfg.out}/masked.png")
    for key in rows[0]:
        if key.startswith("knn") and key in rows[-1]:
            say(f"{key} {rows[-1][key]:.3f}, untrained {rows[0][key]:.3f}")
    data_flag = f" --data {cfg.data}" if cfg.data else ""
    say(f"next, every figure: python analyze.py {cfg.out}/ckpt.pt{data_flag}")


@torch.no_grad()
def draw_reconstruction(cfg, model, source):
    """Rows of eight test images: as they are, masked, and with what is predicted."""
    images, _ = next(image_batches(source, 8, cfg))
    mask = draw_masks(len(images), cfg).to(cfg.device)
    tokens = model.encoder.forward(images, mask, mask_token=model.mask_token)
    target = patchify(images, cfg.patch_size)  # (8, N, 3p²)
    hidden = mask[..., None]
    predicted = torch.where(hidden, model.decoder(tokens)[:, 1:], target)
    # 9 standard deviations are white
    patches = torch.stack([target, torch.where(hidden, 9.0, target), predicted]).cpu()
    # back to their places: (3, 8, 3p², grid, grid), then (3, 8, 3, h, w)
    x = patches.mT.unflatten(-1, (model.encoder.grid, -1))
    x = F.pixel_shuffle(x, cfg.patch_size) * STD + MEAN
    x = F.pad(x, (0, 1, 0, 1))  # black lines between images
    x = x.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (3h, 8w, 3)
    picture = Image.fromarray((255 * x.clamp(0, 1)).byte().numpy())
    picture = ImageOps.scale(picture, 1 + 150 // cfg.image_size, resample=0)
    picture.save(Path(cfg.out, "masked.png"))


# Loading processes are forked, as they were before Python 3.14: so they share the list
# of images, and have no server that a signal to all processes would end.
if sys.platform == "linux":
    torch.multiprocessing.set_start_method("fork", force=True)

# Stops glibc from returning freed memory: 20 % of the time of a CPU step.
with contextlib.suppress(OSError, AttributeError):  # another C library
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
    libc.mallopt(-2, 2**26)  # M_TOP_PAD
    libc.mallopt(-4, 0)  # M_MMAP_MAX

if __name__ == "__main__":
    sys.exit(main())
