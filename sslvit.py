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
schedules · 6 training loop · 7 command line · 8 workshop (stimuli, files, k-NN, plan).
Letters: B batch, N patch tokens (1+N with CLS), D embed_dim, H heads, d = D/H, L
blocks, p patch size in px, C width of the contrastive embedding. Papers on arXiv:
[P] Park et al. 2305.00729, [V] ViT 2010.11929, [M] MoCo v3 2104.02057, [S] SimMIM
2111.09886, [B] BYOL 2006.07733, [G] gradient caching 2101.06983.
"""

import argparse
import collections
import contextlib
import copy
import ctypes
import datetime
import functools
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

# OpenMP's threads spin while they wait for each other. Beside another busy program that
# cost the default run on two cores nine tenths of its speed (270 images/s alone, 15
# beside a busy loop); with this setting, which must stand before torch, 282 and 148.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed
    fcntl = None


class UserError(ValueError):
    """An error the user can fix: main() prints it as one line and returns status 2."""


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
    # bf16 has three digits, too few for this softmax
    with torch.autocast(q.device.type, enabled=False):
        precision = torch.promote_types(q.dtype, torch.float32)
        q = F.normalize(q.to(precision), dim=-1)
        k = F.normalize(k.to(precision), dim=-1)
        logits = q @ k.T / temperature  # (B, B)
        own_key = torch.arange(len(q), device=q.device)
        return 2 * temperature * F.cross_entropy(logits, own_key)


# What was under the mask?   (masked image modelling, SimMIM)


def random_mask(batch, image_size, patch_size, unit, ratio, generator=None):
    """-> bool (B, N), True = masked: ceil(ratio × units) square units in each image.

    A unit is so large that the next visible pixel does not tell what it hides ([S]
    section 3.2). Sizes in px; UserError, a ValueError, where they do not divide.
    """
    divides = unit % patch_size == 0 and image_size % unit == 0
    sizes = f"patch size {patch_size}, mask unit {unit}, image size {image_size}"
    require(divides, f"{sizes}: each must divide the next")
    side = image_size // unit
    patches = unit // patch_size
    # 1e-9: 0.28 × 25 units is 7, not 7.000000000000001
    masked = math.ceil(ratio * side * side - 1e-9)
    # the ranks of random numbers are a random order of the units
    ranking = torch.rand(batch, side * side, generator=generator)
    ranking = ranking.argsort(dim=1).argsort(dim=1)
    units = (ranking < masked).unflatten(1, (side, side))
    mask = units.repeat_interleave(patches, dim=1).repeat_interleave(patches, dim=2)
    return mask.flatten(1)


def patchify(images, patch_size):
    """(B, 3, h, w) -> (B, N, 3p²): the pixels of each patch, patches row by row."""
    p = patch_size
    grid = images.unflatten(3, (-1, p)).unflatten(
        2, (-1, p)
    )  # (B, 3, rows, p, cols, p)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches, size, patch_size):
    """The way back: (B, N, 3p²) and size (h, w) -> (B, 3, h, w)."""
    return F.fold(patches.mT, size, patch_size, stride=patch_size)


def masked_l1(pred, target, mask):
    """Mean |pred - target| over the masked patches ([S] equation 1) -> scalar.

    pred, target (B, N, 3p²) in any unit, mask bool (B, N), True = masked.
    """
    return ((pred - target).abs().mean(dim=-1) * mask).sum() / mask.sum()


# ==== 2. ViT: how does an image become tokens, and how do tokens talk? ================
# Names and shapes of the weights are timm's, so that both read each other's files.

SIZES = {
    "nano": {"embed_dim": 48, "depth": 6, "num_heads": 3},
    "micro": {"embed_dim": 96, "depth": 6, "num_heads": 3},
    # as deep as micro with two decoder blocks, for figure 11's comparison
    "micro8": {"embed_dim": 96, "depth": 8, "num_heads": 3},
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    # 12 heads as in [M]; timm's has 6
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 12},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
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
        if explicit or fused_is_slow:
            logits = q @ k.mT * q.shape[-1] ** -0.5  # (B, H, 1+N, 1+N)
            if bias is not None:
                logits = logits + bias
            weights = logits.softmax(dim=-1)
            heads = weights @ v  # (B, H, 1+N, d)
        else:
            weights = None
            heads = F.scaled_dot_product_attention(q, k, v, bias)
        side_by_side = heads.transpose(1, 2).flatten(2)  # (B, 1+N, D)
        return self.proj(side_by_side), heads, weights


class Mlp(nn.Module):
    """Then each token thinks for itself: D -> 4D -> D."""

    def __init__(self, embed_dim):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 4 * embed_dim)
        self.fc2 = nn.Linear(4 * embed_dim, embed_dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


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
        self.mlp = Mlp(embed_dim)
        self.ls1 = nn.Identity()
        self.ls2 = nn.Identity()
        if layer_scale is not None:
            self.ls1 = LayerScale(embed_dim, layer_scale)
            self.ls2 = LayerScale(embed_dim, layer_scale)
        self.init_weights()

    def init_weights(self):
        """Xavier ([M]), for Q, K and V as three matrices: as one, (3D, D), their
        weights would be √2 smaller, and attention would stay uniform for long."""
        matrices = [*self.attn.qkv.weight.data.chunk(3)]
        for linear in (self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            matrices.append(linear.weight)
        for matrix in matrices:
            nn.init.xavier_uniform_(matrix)
        for linear in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            nn.init.zeros_(linear.bias)

    def record(self, x, bias=None, cls_only=False, explicit=True):
        """x (B, 1+N, D) -> Record: the forward pass and what happens on the way."""
        y, heads, attn = self.attn(self.norm1(x), bias, cls_only, explicit)
        if cls_only:
            x = x[:, :1]
        mid = x + self.ls1(y)
        out = mid + self.ls2(self.mlp(self.norm2(mid)))
        return Record(attn, heads, mid, out)

    def forward(self, x, bias=None, cls_only=False):
        """x (B, 1+N, D) -> (B, 1+N, D), or (B, 1, D) if only CLS is asked for."""
        return self.record(x, bias, cls_only, explicit=False).out


class PatchEmbed(nn.Module):
    """One linear map of each patch's pixels."""

    def __init__(self, patch_size, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, x):
        return self.proj(x).flatten(2).mT  # (B, D, rows, cols) -> (B, N, D)


def sincos_positions(embed_dim, rows, cols):
    """Fixed positions ([M] section 4): sin x, cos x, sin y, cos y; CLS: zeros.

    A quarter of the channels each -> (1, 1+N, D).
    """
    quarter = embed_dim // 4
    frequency = 10000.0 ** -(torch.arange(quarter) / quarter)  # (D/4,)
    n = torch.arange(rows * cols)[:, None]  # patches are numbered row by row
    x = (n % cols) * frequency  # (N, D/4)
    y = (n // cols) * frequency
    patches = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)  # (N, D)
    return F.pad(patches, (0, 0, 1, 0))[None]  # a row of zeros for CLS, in front


def resize_grid(grid, rows, cols):
    """Bicubic interpolation of a map of vectors, (r, c, D) -> (rows, cols, D)."""
    if grid.shape[:2] == (rows, cols):
        return grid
    channels_first = grid.permute(2, 0, 1)[None]
    resized = F.interpolate(channels_first, (rows, cols), mode="bicubic")
    return resized[0].permute(1, 2, 0)


class RelativePositionBias(nn.Module):
    """SimMIM's positions: a number per head and offset, one table for all blocks.

    The last three rows are CLS to patch, patch to CLS and CLS to CLS, as in BEiT.
    """

    def __init__(self, grid, num_heads):
        super().__init__()
        self.side = 2 * grid - 1  # offsets from -(grid - 1) to grid - 1
        table = torch.zeros(self.side**2 + 3, num_heads)
        self.relative_position_bias_table = nn.Parameter(table)

    def forward(self, rows, cols):
        """-> what to add to the attention logits, (H, 1+N, 1+N)."""
        table = self.relative_position_bias_table
        offsets = table[:-3].unflatten(0, (self.side, self.side))
        offsets = resize_grid(offsets, 2 * rows - 1, 2 * cols - 1)
        n = torch.arange(rows * cols, device=table.device)
        x = n % cols
        y = n // cols
        row_offset = y[:, None] - y + rows - 1  # (N, N), query minus key, from 0
        col_offset = x[:, None] - x + cols - 1
        # a row and a column for CLS, in front
        bias = F.pad(offsets[row_offset, col_offset], (0, 0, 1, 0, 1, 0))
        bias[0, 1:] = table[-3]
        bias[1:, 0] = table[-2]
        bias[0, 0] = table[-1]
        return bias.permute(2, 0, 1)


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
            self.pos_embed = nn.Parameter(
                0.02 * torch.randn(1, 1 + self.grid**2, embed_dim)
            )
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
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
        x = self.patch_embed(x)  # (B, N, D)
        if mask is not None:
            # masked patches lose their pixels, but stay in the sequence
            hidden = 0.0 if mask_token is None else mask_token.to(x.dtype)
            x = torch.where(mask[..., None], hidden, x)
        cls = self.cls_token.expand(len(x), -1, -1).to(x.dtype)
        x = torch.cat([cls, x], dim=1)  # (B, 1+N, D)
        if self.pos_embed is not None:
            grid = self.pos_embed[0, 1:].unflatten(0, (self.grid, self.grid))
            grid = resize_grid(grid, rows, cols).flatten(0, 1)
            x = x + torch.cat([self.pos_embed[0, :1], grid])
        return x

    def forward(self, x, mask=None, record=False, mask_token=None, cls_only=False):
        """Images (B, 3, h, w), any size -> tokens after the last norm (B, 1+N, D).

        mask bool (B, N): True becomes mask_token (1, 1, D; None: zeros). record: ->
        (tokens, L Records). cls_only: -> (B, 1, D), which spares most of a block.
        """
        rows = x.shape[2] // self.patch_size
        cols = x.shape[3] // self.patch_size
        x = self.embed(x, mask, mask_token, rows, cols)
        bias = None
        if self.rel_pos_bias is not None:
            bias = self.rel_pos_bias(rows, cols)
        records = []
        for block in self.blocks:
            # earlier blocks need every token, as key and value
            is_last = block is self.blocks[-1]
            if record:
                records.append(block.record(x, bias))
                x = records[-1].out
            else:
                x = block(x, bias, is_last and cls_only)
        x = self.norm(x)
        return (x, records) if record else x


# ==== 3. Both questions, one encoder ==================================================


def mlp_head(*widths):
    """Projector or predictor: Linear, BatchNorm, ReLU, ... ([M] section 4).

    BatchNorm spreads each channel over the batch, which counters collapse. The last one
    has no learned scale, which could shrink to 0. Heads are never evaluated: no running
    statistics.
    """
    batch_norm = functools.partial(nn.BatchNorm1d, track_running_stats=False)
    layers = []
    for i in range(1, len(widths) - 1):
        layers.append(nn.Linear(widths[i - 1], widths[i], bias=False))
        layers.append(batch_norm(widths[i]))
        layers.append(nn.ReLU())
    layers.append(nn.Linear(widths[-2], widths[-1], bias=False))
    layers.append(batch_norm(widths[-1], affine=False))
    return nn.Sequential(*layers)


class SSL(nn.Module):
    """L = (1 - λ)·L_MIM + λ·L_CL ([P] section 5): λ = 0 is SimMIM, λ = 1 MoCo v3."""

    def __init__(self, cfg):
        super().__init__()
        self.use_cl = cfg.lam > 0
        self.use_mim = cfg.lam < 1
        self.one_view = cfg.one_view
        self.patch_size = cfg.patch_size
        self.temperature = cfg.temperature
        self.encoder = make_encoder(cfg)
        embed_dim = self.encoder.embed_dim
        if self.use_cl:
            self.projector = mlp_head(embed_dim, cfg.proj_hidden, cfg.proj_hidden, 256)
            self.predictor = mlp_head(256, cfg.proj_hidden, 256)  # C = 256
            self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
            self.momentum_projector = copy.deepcopy(self.projector)
            self.momentum_projector.requires_grad_(False)
        if self.use_mim:
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
            # [S]: one linear layer, so that the encoder's last blocks learn to decode;
            # --decoder-depth adds blocks that take this work over ([P] figure 11)
            heads = SIZES[cfg.model]["num_heads"]
            layers = [Block(embed_dim, heads) for _ in range(cfg.decoder_depth)]
            if layers:
                layers.append(nn.LayerNorm(embed_dim, eps=1e-6))
            pixels = nn.Linear(embed_dim, 3 * cfg.patch_size**2)
            self.decoder = nn.Sequential(*layers, pixels)

    # MoCo v3 in the steps of [M] algorithm 1:
    # 1. two views: augment()       2. encode_queries()    3. encode_keys(), no gradient
    # 4. q1 looks for k2, q2 for k1: compare()             5. contrastive_loss()
    # 6. gradient step for the queries: train()            7. update_average()

    def encode_queries(self, view1, view2, view_mim, mask):
        """-> CLS outputs of the queries (2, B, D), and None.

        With --one-view the masked view is the query: (1, B, D), its tokens (B, 1+N, D).
        """
        if self.one_view:
            tokens = self.encoder(view_mim, mask, mask_token=self.mask_token)
            return tokens[None, :, 0], tokens
        return encode_views(self.encoder, view1, view2), None

    @torch.no_grad()
    def encode_keys(self, view1, view2):
        """-> CLS outputs of the average (2, B, D); with --one-view of view 1 alone."""
        if self.one_view:
            return self.momentum_encoder(view1, cls_only=True)[None, :, 0]
        return encode_views(self.momentum_encoder, view1, view2)

    def compare(self, query_cls, key_cls):
        """CLS outputs (2, B, D) of a whole batch -> L_CL, queries of view 1 (B, C)."""
        # each view apart: BatchNorm would leak one view's statistics into the other
        q1 = self.predictor(self.projector(query_cls[0]))
        with torch.no_grad():
            k1 = self.momentum_projector(key_cls[0])
        if self.one_view:
            return 2 * contrastive_loss(q1, k1, self.temperature), q1
        q2 = self.predictor(self.projector(query_cls[1]))
        with torch.no_grad():
            k2 = self.momentum_projector(key_cls[1])
        loss = contrastive_loss(q1, k2, self.temperature)
        loss = loss + contrastive_loss(q2, k1, self.temperature)
        return loss, q1

    def reconstruct(self, view, mask, tokens=None):
        """SimMIM: mask, encode ALL tokens, predict pixels, compare what was masked.

        view (B, 3, h, w), mask bool (B, N), tokens if the view is already encoded ->
        L_MIM, tokens (B, 1+N, D).
        """
        if tokens is None:
            tokens = self.encoder(view, mask, mask_token=self.mask_token)
        pixels = self.decoder(tokens)[:, 1:]  # (B, N, 3p²)
        loss = masked_l1(pixels, patchify(view, self.patch_size), mask)
        return loss, tokens

    def forward(self, view1, view2, view_mim, mask):
        """Views (B, 3, h, w), mask bool (B, N) -> {"cl": L_CL, "mim": L_MIM, "std"}.

        A loss that λ switches off is 0, and its views may be None. std: feature_std()
        of view 1's queries; without CL, of the mean patch tokens.
        """
        cl = torch.zeros((), device=mask.device)
        mim = torch.zeros((), device=mask.device)
        tokens = None
        if self.use_cl:
            query_cls, tokens = self.encode_queries(view1, view2, view_mim, mask)
            cl, features = self.compare(query_cls, self.encode_keys(view1, view2))
        if self.use_mim:
            mim, tokens = self.reconstruct(view_mim, mask, tokens)
        if not self.use_cl:
            features = tokens[:, 1:].mean(dim=1)
        return {"cl": cl, "mim": mim, "std": feature_std(features)}

    @torch.no_grad()
    def update_average(self, momentum):
        """key ← m·key + (1 - m)·query, for the keys of the next step."""
        if not self.use_cl:
            return
        pairs = [
            (self.momentum_encoder, self.encoder),
            (self.momentum_projector, self.projector),
        ]
        for key, query in pairs:
            weights = [*key.parameters()]
            torch._foreach_lerp_(weights, [*query.parameters()], 1 - momentum)


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
    """The CLS outputs of both views, in one pass -> (2, B, D)."""
    views = torch.cat([view1, view2])  # (2B, 3, h, w)
    tokens = encoder(views, cls_only=True)  # (2B, 1, D)
    return tokens[:, 0].unflatten(0, (2, -1))


def feature_std(features):
    """Measures collapse of features (B, D): about 1 when spread, 0 when identical.

    Standard deviation of the unit-length features over the batch, times √D.
    """
    unit = F.normalize(features.detach().float(), dim=-1)
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
            self.scales += [cfg.crop_min] * (1 if cfg.one_view else 2)
        if cfg.lam < 1:
            self.scales += [0.67]  # [S] appendix A

    def __getitem__(self, key):
        epoch, wanted = key
        rng = np.random.default_rng([self.cfg.seed, 0, epoch, wanted])
        size = self.cfg.image_size
        crop = functools.partial(random_crops, size=size, scales=self.scales, rng=rng)
        crops, _ = first_readable(self.source, wanted, crop)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        mask = draw_masks(1, self.cfg, generator)[0]
        colours = draw_colours(rng, self.cfg) if self.cfg.lam > 0 else []
        is_flipped = rng.random(len(crops)) < 0.5
        crops[is_flipped] = crops[is_flipped, :, :, ::-1]
        return {"crops": crops, "mask": mask, "colours": colours}


def draw_masks(batch, cfg, generator=None):
    sizes = (cfg.image_size, cfg.patch_size, cfg.mask_patch_size)
    return random_mask(batch, *sizes, cfg.mask_ratio, generator)


# [B] appendix B: view 1 is always blurred; view 2 seldom, but it may be solarised
COLOUR_SHARES = {
    "jitter": (0.8, 0.8),
    "grey": (0.2, 0.2),
    "blur": (1.0, 0.1),
    "solarise": (0.0, 0.2),
}


def draw_colours(rng, cfg):
    """The random choices for two views, which change_colours() carries out.

    -> float (2, 11), a row for each view: 0-3 when which jitter runs, -1: never; 4-7
    factors of brightness, contrast, saturation, hue; σ of the blur in px, 0: none; 1
    for grey; 1 for solarised.
    """
    happens = dict(zip(COLOUR_SHARES, rng.random((4, 2)), strict=True))
    for name, shares in COLOUR_SHARES.items():
        happens[name] = (happens[name] < shares)[:, None]  # (2, 1)
    order = rng.permuted([[0, 1, 2, 3]] * 2, axis=1)
    reach = np.array([0.4, 0.4, 0.2, cfg.hue_shift])
    factors = rng.uniform(-reach, reach, (2, 4)) + (1, 1, 1, 0)
    sigma = rng.uniform(min(0.1, cfg.blur), cfg.blur, (2, 1)) * happens["blur"]
    order = np.where(happens["jitter"], order, -1)
    draws = [order, factors, sigma, happens["grey"], happens["solarise"]]
    return np.concatenate(draws, axis=1, dtype=np.float32)


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
    channels = x.shape[1]
    radius = min(int(4 * sigma.max()) + 1, x.shape[2] - 1, x.shape[3] - 1)
    offsets = torch.arange(-radius, radius + 1)
    exponent = -0.5 * (offsets / sigma) ** 2  # (B, 1, 1, 2r+1)
    # each image's own 4σ, so that its blur does not depend on the others'
    too_far = offsets.abs() > (4 * sigma).int() + 1
    kernel = exponent.masked_fill(too_far, -math.inf).softmax(dim=-1)
    kernel = kernel.repeat_interleave(channels, dim=0).to(x, non_blocking=True)
    groups = len(kernel)
    padded = F.pad(x, (radius, radius, radius, radius), mode="reflect")
    y = padded.flatten(0, 1)[None]  # (1, B·3, h+2r, w+2r)
    y = F.conv2d(y, kernel, groups=groups)
    y = F.conv2d(y, kernel.mT, groups=groups)
    return y.view_as(x)


def solarise(x):
    return torch.where(x >= 0.5, 1 - x, x)


JITTERS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def change_colours(x, draws):
    """Does to x (B, 3, h, w) what draw_colours() has drawn, in place ([B] appendix B).

    draws (B, 11) on the CPU, where it is told which images an operation is for: a GPU
    would have to wait for their number.
    """
    order, factors, sigma, grey, solarised = draws.split([4, 4, 1, 1, 1], dim=1)

    def apply(operation, chosen, *parameters):
        images = chosen.nonzero().flatten().to(x.device, non_blocking=True)
        if len(images) > 0:
            x[images] = operation(x[images], *parameters)

    for place in range(4):  # in each image's own order
        for n, jitter in enumerate(JITTERS):
            chosen = order[:, place] == n
            factor = factors[chosen, n].view(-1, 1, 1, 1)
            apply(jitter, chosen, factor.to(x.device, non_blocking=True))
    apply(greyscale, grey[:, 0] > 0)
    is_blurred = sigma[:, 0] > 0
    apply(gaussian_blur, is_blurred, sigma[is_blurred].view(-1, 1, 1, 1))
    apply(solarise, solarised[:, 0] > 0)


def augment(batch, cfg):
    """A loader's batch -> view1, view2, view_mim (B, 3, h, w) or None, mask (B, N).

    Nothing is drawn here: the same batch gives the same views, however often.
    """
    mask = batch["mask"].to(cfg.device, non_blocking=True)
    crops = batch["crops"].to(cfg.device, non_blocking=True)  # (B, crops, 3, h, w)
    crops = crops.transpose(0, 1).contiguous().float() / 255
    view1 = view2 = view_mim = None
    views = 1 if cfg.one_view else 2
    if cfg.lam > 0:
        contrastive = crops[:views].flatten(0, 1)  # (2B, 3, h, w), memory of `crops`
        draws = batch["colours"][:, :views]  # (B, 2, 11)
        change_colours(contrastive, draws.transpose(0, 1).flatten(0, 1))
    mean = MEAN.to(cfg.device, non_blocking=True)
    crops = (crops - mean) / STD.to(cfg.device, non_blocking=True)
    if cfg.lam > 0:
        view1 = crops[0]
        view2 = None if cfg.one_view else crops[1]
    if cfg.lam < 1:
        view_mim = crops[-1]
    return view1, view2, view_mim, mask


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
    rest = total - warmup
    if rest == 0:
        return peak
    return cosine(peak, 0, (step - warmup) / rest)


def make_optimizer(model, cfg):
    """AdamW. Decay is for matrices; MoCo v3 (λ = 1) decays biases and norms too."""
    decayed = []
    spared = []
    for p in model.parameters():
        is_vector = p.squeeze().ndim < 2  # biases, norms, tokens
        if p.requires_grad:
            (spared if is_vector and cfg.lam < 1 else decayed).append(p)
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    fused = cfg.device.startswith(("cpu", "cuda"))
    return torch.optim.AdamW(groups, weight_decay=cfg.weight_decay, fused=fused)


# ==== 6. Training loop ================================================================


def train(cfg, state, log):
    """Trains one model, from checkpoint `state` if there is one -> exit status."""
    rank, world_size = world()
    data, model, optimizer, autocast, scaler, rows = prepare(cfg, state)
    total = number_of_steps(cfg, len(data[0]))
    peak_lr = cfg.lr * cfg.batch_size / 256
    since = rows[-1]["step"]
    # step s is the loader's s - 1
    batches = make_loader(cfg, data[0], range(since, total))
    log.truncate(0)
    write_lines(log, rows)
    signals = catch_signals()
    waited = 0.0
    began = time.perf_counter()

    for step in range(since + 1, total + 1):
        # schedules
        lr = lr_at(step, total, cfg.warmup * total, peak_lr)
        momentum = cosine(cfg.momentum, 1.0, step / total)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # batch: this rank's share, in micro-batches
        asked = time.perf_counter()
        micro_batches = [next(batches) for _ in range(cfg.accum)]
        waited += time.perf_counter() - asked
        views = [augment(micro_batch, cfg) for micro_batch in micro_batches]

        # losses: of the whole batch, or of its parts, which also go backward there
        is_whole = world_size * cfg.accum == 1
        if is_whole:
            with autocast():
                losses = model(*views[0])
        else:
            losses = backward_in_parts(model, views, cfg, autocast, scaler)
        loss = (1 - cfg.lam) * losses["mim"] + cfg.lam * losses["cl"]

        # backward
        if is_whole:
            scaler.scale(loss).backward()

        # step
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # average
        model.update_average(momentum)

        # log: every log_every steps, and at step 3, the first that tells the time
        stop_by = signal_of_any_rank(signals, step, cfg)
        is_saved = stop_by or step == total or step % cfg.save_every == 0
        if not is_saved and step != 3 and step % cfg.log_every != 0:
            continue
        row = {"step": step, "lr": lr, "momentum": momentum}
        for name, value in (losses | {"loss": loss, "norm": norm}).items():
            row[name] = round(value.item(), 5)  # for which a GPU has to finish its work
        stop_if_not_finite(row, scaler)
        seconds = time.perf_counter() - began
        row["images/s"] = round((step - since) * cfg.batch_size / seconds, 1)
        row["stall"] = round(waited / seconds, 3)
        row["minutes left"] = round((total - step) * seconds / (step - since) / 60, 1)
        if is_saved and not stop_by and rank == 0:
            row |= knn_scores(model.encoder, data, cfg, autocast)
        rows.append(row)
        write_lines(log, [row])
        say(*(f"{name} {value:.4g}" for name, value in row.items()))
        if row["std"] < 0.05:
            say("features collapse: all images look alike; lower --lr")

        # save
        if is_saved and rank == 0:
            save_run(cfg, data, rows, model, optimizer, scaler)
        if stop_by:
            say(f"stopped by a signal after saving step {step}; --resume goes on")
            return 128 + stop_by
        waited = 0.0
        since = step
        began = time.perf_counter()
    if rank == 0:
        finish(cfg, model, rows, data)
    return 0


# A batch means the same on any machine: 4,096 images have 4,095 negatives on one GPU as
# on 64. The encoder sees one image at a time, so it may run in micro-batches, on many
# ranks; the heads' BatchNorm and InfoNCE need all images at once. Gradient caching [G]
# has both: collect the encoder's outputs, take the loss of them all, and send its
# gradient at the outputs back through the encoder, part by part. A part whose graph was
# not kept (--keep), for want of memory, is encoded a second time.


def backward_in_parts(model, parts, cfg, autocast, scaler):
    """Adds to .grad what one backward pass over the joint batch of all ranks would.

    parts: views of this rank's micro-batches. -> the joint losses, as SSL.forward's.
    """
    cl = mim = torch.zeros((), device=cfg.device)
    if model.use_cl:
        args = (model, parts, cfg, autocast, scaler)
        cl, features, graphs, gradients = contrast_in_parts(*args)
    pooled = []
    for part, views in enumerate(parts):
        outputs, at_outputs = [], []  # what goes backward, and the gradient there
        tokens = None
        if model.use_cl:
            with autocast():
                query_cls, tokens = graphs.pop(part, 0) or model.encode_queries(*views)
            outputs.append(query_cls)
            at_outputs.append(gradients[part])
        if model.use_mim:
            with autocast():
                part_mim, tokens = model.reconstruct(*views[2:], tokens)
            # all images have equally many masked patches: the mean of means is exact
            outputs.append(scaler.scale((1 - cfg.lam) * part_mim / len(parts)))
            at_outputs.append(None)
            mim = mim + part_mim.detach() / len(parts)
            pooled.append(tokens[:, 1:].detach().mean(dim=1))
        torch.autograd.backward(outputs, at_outputs)
    if not model.use_cl:
        features = gather(torch.cat(pooled)[None])[0]  # (B, D)
    average_gradients(model)
    return {"cl": cl, "mim": mean_over_ranks(mim), "std": feature_std(features)}


def contrast_in_parts(model, parts, cfg, autocast, scaler):
    """The contrastive loss of the joint batch, sent back to the encoder's outputs.

    -> L_CL, queries of view 1 (B, C), {part: what encode_queries() gave, if its graph
    was kept}, and for each part the gradient at its CLS outputs (views, b, D).
    """
    rank, world_size = world()
    graphs = {}
    query_cls = []
    key_cls = []
    for part, views in enumerate(parts):
        with autocast(), torch.set_grad_enabled(part < cfg.keep):
            encoded = model.encode_queries(*views)
        if part < cfg.keep:
            graphs[part] = encoded
        query_cls.append(encoded[0])
        with autocast():
            key_cls.append(model.encode_keys(*views[:2]))
    all_queries = gather(torch.cat(query_cls, dim=1)).requires_grad_()  # (2, B, D)
    all_keys = gather(torch.cat(key_cls, dim=1))
    with autocast():
        cl, queries = model.compare(all_queries, all_keys)
    scaler.scale(cfg.lam * cl).backward()
    # a mean over ranks follows, but each rank's encoder has its own images only
    share = all_queries.grad.chunk(world_size, dim=1)[rank] * world_size
    return cl.detach(), queries, graphs, share.chunk(len(parts), dim=1)


def world():
    """-> this process's rank, number of processes (torchrun starts one per GPU)."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather(x):
    """(views, b, D) of this rank -> (views, B, D) of all ranks, without gradient."""
    x = x.detach().contiguous()
    if not dist.is_initialized():
        return x
    shares = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, x)
    return torch.cat(shares, dim=1)


def mean_over_ranks(x):
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def average_gradients(model):
    """The mean over the ranks: all messages are sent at once, then waited for."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    messages = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
    for message in messages:
        message.wait()
    torch._foreach_div_(gradients, dist.get_world_size())


# What the loop asks for, in the order of its lines.


def prepare(cfg, state):
    """Data, model and optimiser, from checkpoint `state` if there is one; the log."""
    torch.manual_seed(cfg.seed)
    data = find_data(cfg)
    check_identity(cfg, data[0], state)
    announce(cfg, len(data[0]))
    model = SSL(cfg).to(cfg.device)
    optimizer = make_optimizer(model, cfg)
    autocast, scaler = mixed_precision(cfg)
    rows = [{"step": 0}]
    if state is not None:
        rows = state["log"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    elif world()[0] == 0:
        rows[0] |= knn_scores(model.encoder, data, cfg, autocast)
    if cfg.compile:
        # in place, so that the weights keep their names
        model.encoder.compile(dynamic=False)
        if model.use_cl:
            model.momentum_encoder.compile(dynamic=False)
    return data, model, optimizer, autocast, scaler, rows


def check_identity(cfg, train_set, state):
    """UserError if ranks, or a run and its checkpoint, have different training sets.

    The schedules and the order of images follow from the set.
    """
    identities = [train_set.identity()]
    if dist.is_initialized():
        identities = identities * dist.get_world_size()
        dist.all_gather_object(identities, train_set.identity())
    if state is not None:
        identities.append(state["data"])
    message = f"not one training set, of ranks or of the run: {set(identities)}"
    require(len(set(identities)) == 1, message)
    has_negatives = cfg.lam == 0 or 1 < cfg.batch_size <= len(train_set)
    message = f"--batch-size {cfg.batch_size} of {len(train_set)} images: in a batch an"
    require(has_negatives, f"{message} image needs others, and itself only once")


def number_of_steps(cfg, images):
    if cfg.epochs:
        return max(1, round(cfg.epochs * images / cfg.batch_size))
    return cfg.steps


def announce(cfg, images):
    """The first line: what will happen."""
    _, world_size = world()
    micro_batch = cfg.batch_size // world_size // cfg.accum
    say(
        f"{cfg.objective} (λ = {cfg.lam:g}): ViT-{cfg.model}, {cfg.image_size} px, "
        f"patch {cfg.patch_size}, {images} images ({cfg.data or 'built-in stimuli'}), "
        f"{number_of_steps(cfg, images)} steps of {world_size} x {cfg.accum} x "
        f"{micro_batch} images, learning rate {cfg.lr:g} x {cfg.batch_size}/256 = "
        f"{cfg.lr * cfg.batch_size / 256:.2g}, {cfg.dtype} on {cfg.device}, into "
        f"{cfg.out}; step 3 tells the minutes left"
    )


def say(*words):
    """Prints at once. Where nobody reads any more (| head), the run goes on."""
    try:
        print(*words, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def mixed_precision(cfg):
    """-> autocast (makes the context), GradScaler (keeps fp16's gradients from 0)."""
    kind = torch.device(cfg.device).type
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.dtype)
    autocast = functools.partial(torch.autocast, kind, dtype, enabled=dtype is not None)
    return autocast, torch.amp.GradScaler(kind, enabled=cfg.dtype == "fp16")


# Ctrl-C, the end of a cluster job, a closed terminal
STOPS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # not on Windows
    STOPS.append(signal.SIGHUP)


def catch_signals():
    """-> list of the signals that will have come; a second Ctrl-C ends at once.

    torchrun sends every signal twice, so there a second one means nothing.
    """
    signals = []

    def remember(number, frame):
        if signals and number == signal.SIGINT and not dist.is_initialized():
            raise KeyboardInterrupt
        signals.append(number)
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
    number = signals[0] if signals else 0
    if not dist.is_initialized():
        return number
    if step % 5 != 0:  # a GPU would have to finish its work
        return 0
    highest = torch.tensor(number, device=cfg.device)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest.item()


class NotFinite(RuntimeError):
    """main() returns status 1, as the input is not to blame."""


def stop_if_not_finite(row, scaler):
    """NaNs persist in the weights, so it is enough to look before a line is written.

    In fp16 gradients overflow now and then, and the scaler leaves such steps out.
    """
    is_finite = math.isfinite(row["loss"])
    if not scaler.is_enabled():
        is_finite = is_finite and math.isfinite(row["norm"])
    if not is_finite:
        advice = "lower --lr, or --resume an earlier save"
        raise NotFinite(f"loss or gradient not finite by {row}: {advice}")


def write_lines(log, rows):
    """Appends to log.jsonl, at once: a crash loses no line."""
    log.writelines(json.dumps(row) + "\n" for row in rows)
    log.flush()


def save_run(cfg, data, rows, model, optimizer, scaler):
    """All that --resume needs. Random numbers follow from the step alone."""
    state = {
        "config": asdict(cfg),
        "data": data[0].identity(),
        "step": rows[-1]["step"],
        "log": rows,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    save_checkpoint(Path(cfg.out, "ckpt.pt"), state)


# ==== 7. Command line =================================================================


def knob(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    # method
    objective: str = knob("hybrid", "loss", choices=("moco", "simmim", "hybrid"))
    lam: float = knob(0.2, "λ: 0 is SimMIM, 1 is MoCo; [P] analyses 0.2")
    # the smaller, the harder it looks at the nearest negatives
    temperature: float = knob(0.2, "τ of InfoNCE")
    # a faster average than [M]'s 0.99 for a thousand steps instead of 300,000
    momentum: float = knob(0.97, "of the key average, rises from here to 1")
    proj_hidden: int = knob(512, "hidden width of the heads; MoCo v3: 4096")
    # 1/8 of the image; in [S] 1/7
    mask_patch_size: int = knob(4, "px, side of what is masked at once")
    # so high that copying the neighbour is not enough
    mask_ratio: float = knob(0.6, "share of the image that is masked")
    one_view: bool = knob(
        False, "the masked view is MoCo's query, too: 4 passes an image for 11"
    )
    decoder_depth: int = knob(0, "blocks before the pixel head ([P] fig. 11)")

    # data
    data: str = knob("", "folder: train/ and val/, class folders, or flat; '': stimuli")
    preset: str = knob(
        "micro",
        "recipe for stimuli, 32-px photographs, ImageNet (the default with --data)",
        choices=("micro", "small32", "imagenet"),
    )
    # a whole object must remain; [M]: 0.08
    crop_min: float = knob(0.2, "smallest contrastive crop, share of area")
    # half the circle either way: colour must not tell which image it is; [B]: 0.1
    hue_shift: float = knob(0.5, "largest turn of the colour circle")
    blur: float = knob(1.0, "px, largest σ; view 1 always, view 2 in 1 of 10")

    # model
    model: str = knob("micro", "size", choices=tuple(SIZES))
    image_size: int = knob(32, "px; crops are resized to this square")
    # 32/4 gives 8 x 8 tokens, 224/16 gives 14 x 14
    patch_size: int = knob(4, "px; a token for each patch")
    positions: str = knob(
        "sincos",
        "fixed; learned; or SimMIM's relative biases, with LayerScale",
        choices=("sincos", "learned", "relative"),
    )

    # optimiser
    epochs: float = knob(0.0, "passes over the training set; 0: --steps counts")
    steps: int = knob(1500, "optimiser steps")
    batch_size: int = knob(64, "images per step, over all ranks and micro-batches")
    lr: float = knob(12e-3, "base learning rate; its peak is lr x batch_size / 256")
    weight_decay: float = knob(0.05, "AdamW's")
    warmup: float = knob(0.1, "share of the steps in which the rate rises")
    clip: float = knob(5.0, "largest gradient norm; 0: no clipping")

    # system
    device: str = knob("auto", "cpu, cuda, cuda:1, mps; auto: CUDA if there is one")
    dtype: str = knob(
        "auto",
        "auto: bf16 where there are units for it, else fp16 on a GPU, fp32 on a CPU",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    # any number gives the same result
    accum: int = knob(0, "micro-batches per step; 0: of 128 images at most")
    # so that a GPU with memory to spare need not encode a part twice
    keep: int = knob(1, "micro-batches whose graph is kept")
    workers: int = knob(-1, "loading processes; -1: up to 16 for a GPU")
    compile: bool = knob(False, "torch.compile: a slow start, then faster steps")

    # run
    seed: int = knob(0, "of weights, stimuli, order and crops")
    out: str = knob("", "run folder; '': runs/<preset>-<objective>, and the seed")
    resume: bool = knob(False, "go on with the run in --out")
    overwrite: bool = knob(False, "start anew although --out holds a run")
    dry_run: bool = knob(False, "print FLOPs, memory and hours of the run, and stop")
    save_every: int = knob(500, "steps between checkpoints and k-NN tests")
    log_every: int = knob(25, "steps between console lines")
    knn_images: int = knob(4000, "in the k-NN bank; tested: a quarter")


# Recipes: flags for every objective, then for one.
PRESETS = {
    # stimuli, minutes on two cores; the encoder's work is equal: 1.056 million passes
    # (an image costs MoCo 2·3 + 2, SimMIM 3, the hybrid 11)
    "micro": "",
    "micro-moco": "--steps 1032 --batch-size 128 --lr 4e-3",
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
    # SimMIM's ([S] section 4): learning rate 1e-4 for a batch of 512
    "imagenet-simmim": """
        --epochs 100 --batch-size 2048 --lr 0.5e-4 --weight-decay 0.05
        --warmup 0.1 --positions relative""",
}
PURE = {"moco": 1.0, "simmim": 0.0}  # their λ
SHARES = ("lam", "momentum", "mask_ratio", "crop_min", "hue_shift", "warmup")
COUNTS = ("proj_hidden", "mask_patch_size", "image_size", "patch_size", "steps")
COUNTS += ("batch_size", "save_every", "log_every")
# at --resume; everything else is as it was
MAY_CHANGE = {"resume", "out", "data", "device", "workers", "accum", "keep"}
MAY_CHANGE |= {"compile", "save_every", "log_every"}


LOG_HELP = """what a line of the log says:
  cl, mim        losses: InfoNCE of both directions, 4τ·log B if nothing is told apart;
                 masked L1 in standard deviations of ImageNet's colours
  std            of unit-length features: about 1 when spread, 0 when all are alike
  norm           length of the gradient, before clipping
  stall          share of the time spent waiting for the loader: else more --workers
  knn_<labels>   accuracy of the 20 nearest training images' majority, in the best layer
                 of the network; log.jsonl has the untrained network's as step 0
"""


def flag_of(name):
    return "--" + name.replace("_", "-")


def make_parser():
    parser = argparse.ArgumentParser(
        "sslvit.py",
        description=__doc__,
        epilog=LOG_HELP,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # only what was given comes back
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    for knob_ in fields(Config):
        how = {"help": f"{knob_.metadata['help']} [{knob_.default}]"}
        if knob_.type is bool:
            how["action"] = "store_true"
        else:
            how["type"] = knob_.type
            how["choices"] = knob_.metadata["choices"]
        parser.add_argument(flag_of(knob_.name), **how)
    return parser


def parse(argv):
    """Command line -> (Config with its recipe, {name: value} of the flags given)."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    objective = given.get("objective", "hybrid")
    preset = given.get("preset", "imagenet" if given.get("data") else "micro")
    recipe = PRESETS[preset] + " " + PRESETS.get(f"{preset}-{objective}", "")
    values = {"preset": preset} | vars(parser.parse_args(recipe.split()))
    if "steps" in given:
        values["epochs"] = 0.0  # the recipe's
    values |= given
    if objective in PURE:
        is_fine = given.get("lam", PURE[objective]) == PURE[objective]
        require(is_fine, "--lam is for the hybrid: moco is λ = 1, simmim λ = 0")
        values["lam"] = PURE[objective]
    cfg = Config(**values)
    require(not cfg.one_view or 0 < cfg.lam < 1, "--one-view needs 0 < λ < 1")
    for name, value in vars(cfg).items():
        lowest = {"workers": -1}.get(name, 1 if name in COUNTS else 0)
        highest = 1 if name in SHARES else math.inf
        is_fine = isinstance(value, str) or lowest <= value <= highest
        require(is_fine, f"{flag_of(name)} {value}: not in {lowest}..{highest}")
    if not cfg.out:
        cfg.out = f"runs/{preset}-{objective}"
        if "lam" in given:
            cfg.out += f"-{cfg.lam:g}"
        if "seed" in given:
            cfg.out += f"-seed{cfg.seed}"
    return cfg, given


def resume(cfg, given):
    """-> configuration of the run in --out, with what may change; its checkpoint."""
    path = Path(cfg.out, "ckpt.pt")
    state = load_checkpoint(path)
    is_run = isinstance(state, dict) and state.keys() >= {"config", "data", "optimizer"}
    is_ours = is_run and types_of(state["config"]) == types_of(asdict(cfg))
    require(is_ours, f"{path}: not a run of this version of the program")
    for name in given.keys() - MAY_CHANGE:
        was = state["config"][name]
        message = f"{path} has {flag_of(name)} {was}, which cannot change"
        require(given[name] == was, message)
    of_this_machine = {"device": "auto", "workers": -1, "accum": 0, "out": cfg.out}
    return Config(**(state["config"] | of_this_machine | given)), state


def types_of(values):
    return {name: type(value) for name, value in values.items()}


def has_bf16(on_gpu):
    """Are there units for bf16? Without them it is slower than fp32."""
    if on_gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "bf16" in cpuinfo.read_text()


def usable_cpus():
    """A job of a cluster may use fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def settle(cfg, world_size):
    """Replaces each "auto" by what this machine has; UserError if it does not fit."""
    if cfg.device in ("auto", "cuda") and torch.cuda.is_available():
        # before anything touches a GPU: each rank has its own
        cfg.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(cfg.device)
    if cfg.device == "auto":
        cfg.device = "cpu"
    on_gpu = cfg.device.startswith("cuda")
    if cfg.dtype == "auto":
        cfg.dtype = "fp16" if on_gpu else "fp32"
        if has_bf16(on_gpu):
            cfg.dtype = "bf16"
    share = cfg.batch_size // world_size
    if cfg.accum == 0:
        cfg.accum = math.ceil(share / 128)
        while share % cfg.accum != 0:
            cfg.accum += 1
    if cfg.workers < 0:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cfg.workers = min(16, usable_cpus() // ranks_here) if on_gpu else 0
    divides = cfg.batch_size == share * world_size and share % max(cfg.accum, 1) == 0
    parts = f"{world_size} ranks x {cfg.accum} micro-batches"
    require(divides, f"--batch-size {cfg.batch_size} does not divide into {parts}")
    draw_masks(1, cfg)  # do the sizes divide?


def open_run_folder(cfg, state, rank):
    """Makes --out and owns it -> its log.jsonl; other ranks' go nowhere.

    UserError if it holds a run or another run writes into it.
    """
    if rank > 0:
        return io.StringIO()
    folder = Path(cfg.out)
    folder.mkdir(parents=True, exist_ok=True)
    log = open(folder / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115
    if fcntl is not None:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run writes into {folder}: give --out") from error
    is_empty = log.tell() == 0 and not (folder / "ckpt.pt").exists()
    may_write = is_empty or cfg.overwrite or state is not None
    require(may_write, f"{folder} holds a run: give --resume or --overwrite")
    return log


def ranks_of_torchrun():
    """-> this process's rank, number of processes."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    has_all = {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys()
    require(world_size == 1 or has_all, "WORLD_SIZE without RANK: start with torchrun")
    return int(os.environ.get("RANK", 0)), world_size


def join_ranks(cfg, rank):
    """Meets the other processes of torchrun. Only the first writes on the console."""
    backend = "nccl" if cfg.device.startswith("cuda") else "gloo"
    # the others wait for the first rank's k-NN test
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=3))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def main(argv=None):
    """Runs a command line -> exit status: 0; 1 if a number is not finite; 2 if the
    input is bad; 128 and its number after a signal."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # not every console has a λ
    handlers = {number: signal.getsignal(number) for number in STOPS}
    try:
        return run(argv)
    except KeyboardInterrupt:
        print("sslvit.py: ended at once; what was saved before stays", file=sys.stderr)
        return 130
    except (UserError, argparse.ArgumentError, OSError, RuntimeError) as error:
        if sys.flags.dev_mode:  # python -X dev
            raise
        lines = str(error).strip().splitlines() or [repr(error)]
        # a loading process sends its traceback, whose last line is the message
        line = lines[-1] if lines[0].startswith("Caught ") else lines[0]
        if isinstance(error, torch.OutOfMemoryError):
            line = "the GPU's memory is full: raise --accum, which changes no result"
        print(f"sslvit.py: {line}", file=sys.stderr)
        return 1 if isinstance(error, NotFinite) else 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def run(argv):
    """Reads a command line, then plans or trains -> exit status."""
    cfg, given = parse(argv)
    rank, world_size = ranks_of_torchrun()
    state = None
    if cfg.resume:
        cfg, state = resume(cfg, given)
    settle(cfg, world_size)
    if cfg.dry_run:
        return plan(cfg)
    log = open_run_folder(cfg, state, rank)
    if world_size > 1:
        join_ranks(cfg, rank)
    return train(cfg, state, log)


# ==== 8. Workshop: what the lecture takes for granted =================================
# ---- Stimuli: images whose shape and texture are known ----

SHAPES = ["circle", "square", "triangle", "star", "cross", "ring", "bar", "crescent"]
TEXTURES = ["plain", "horizontal", "vertical", "diagonal", "checks", "dots"]
TEXTURES += ["zigzag", "grid"]


def shape_level(shape, x, y, radius, angle):
    """Negative inside the shape, 0 on its outline; angle 0 points up."""
    if shape == "circle":
        return radius - 0.9
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.75
    if shape == "triangle":
        third = 2 * np.pi / 3
        return radius * np.cos(angle % third - third / 2) - 0.5
    if shape == "star":
        return radius - 0.65 - 0.35 * np.cos(5 * angle)
    if shape == "cross":
        in_either_arm = np.minimum(abs(x), abs(y)) - 0.3
        return np.maximum(in_either_arm, np.fmax(abs(x), abs(y)) - 0.95)
    if shape == "ring":
        return abs(radius - 0.7) - 0.25
    if shape == "bar":
        return np.maximum(abs(x) - 0.4, abs(y) - 0.95)
    # a circle without another one
    return np.maximum(radius - 0.95, 0.7 - np.hypot(x - 0.5, y))


def texture_wave(texture, u, v):
    """Brightness in about [-1, 1] at (u, v) in radians.

    Regular, so that what a mask hides follows from its surroundings.
    """
    if texture == "plain":
        return np.ones_like(u)
    if texture == "horizontal":
        return np.sin(v)
    if texture == "vertical":
        return np.sin(u)
    if texture == "diagonal":
        return np.sin((u + v) / 2**0.5)
    if texture == "checks":
        return 1.5 * np.sin(u) * np.sin(v)
    if texture == "dots":
        return np.cos(u) + np.cos(v) - 0.6
    if texture == "zigzag":
        return np.sin(v + 2 * np.arcsin(np.sin(u / 2)))
    return np.maximum(np.cos(u), np.cos(v)) * 2 - 1


def may_be_kept(count, width, height):
    """Do `count` images take at most 250 MB? CIFAR-10 has 154, stimuli of 64 px 246."""
    return 3 * count * width * height <= 250e6


class Stimuli:
    """Images of one object, of 8 shapes in 8 textures, on smooth grey.

    stimuli[i] -> image uint8 (S, S, 3), shape 0..7, texture 0..7, mask bool (S, S).
    Everything is drawn from (seed, split, i). Shape and texture are independent.
    """

    label_names = ("shape", "texture")
    classes = (SHAPES, TEXTURES)

    def __init__(self, length, image_size=32, seed=0, split="train"):
        self.length = length
        self.size = image_size
        self.key = (seed, ("train", "test").index(split))
        self.kept = {}

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng([*self.key, index, 0])
        shape, texture = rng.integers(8, size=2).tolist()
        image, mask = self.render(index, shape, texture)
        return image, shape, texture, mask

    def identity(self):
        return f"{self.length} stimuli of {self.size} px, seed {self.key[0]}"

    def load(self, index):
        """-> PIL image, [shape, texture]; small ones are drawn once and kept."""
        if index in self.kept:
            return self.kept[index]
        image, shape, texture, _ = self[index]
        loaded = (Image.fromarray(image), [shape, texture])
        if may_be_kept(len(self), self.size, self.size):
            self.kept[index] = loaded
        return loaded

    def render(self, index, shape, texture):
        """Scene `index` with an object of one's choice -> image, mask."""
        rng = np.random.default_rng([*self.key, index, 1])
        tilt = np.radians(rng.uniform(-18, 18))
        scale = rng.uniform(0.75, 1.0)
        places = rng.uniform(-1, 1, 4) * (0.2, 0.2, 0.1, 0.1)
        center_x, center_y, slope_x, slope_y = places
        frequency = 2 * np.pi / rng.uniform(0.36, 0.46)
        phase = rng.uniform(0, 2 * np.pi, 2)
        grey, hue, fade, bright = rng.uniform((0.3, 0, 0.1, 0.75), (0.7, 1, 0.5, 1.0))

        # pixel centres in [-1, 1], and in the object's own axes u, v (S, S)
        axis = (np.arange(self.size, dtype=np.float32) + 0.5) * 2 / self.size - 1
        x = axis[None, :]
        y = axis[:, None]
        u = np.cos(tilt) * (x - center_x) + np.sin(tilt) * (y - center_y)
        v = np.cos(tilt) * (y - center_y) - np.sin(tilt) * (x - center_x)
        radius = np.hypot(u, v) / scale
        angle = np.arctan2(u, -v)
        level = shape_level(SHAPES[shape], u / scale, v / scale, radius, angle)
        # an edge one pixel wide
        inside = np.clip(0.5 - level * scale * self.size / 2, 0, 1)

        u = u * frequency + phase[0]
        v = v * frequency + phase[1]
        wave = np.clip(1.5 * texture_wave(TEXTURES[texture], u, v), -1, 1)
        # red, green and blue around the colour circle
        colour = np.clip(np.abs((6 * hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
        colour = bright * (fade + (1 - fade) * colour)
        light = colour * (0.65 + 0.35 * wave[..., None])  # (S, S, 3)
        ground = (grey + slope_x * x + slope_y * y)[..., None]  # (S, S, 1)
        image = ground + inside[..., None] * (light - ground)
        return (image * 255 + 0.5).clip(0, 255).astype(np.uint8), inside > 0.5


# ---- Image files ----

TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("val", "valid", "validation", "test", "testing")
MASK_FOLDERS = ("mask", "masks", "labels", "annotations")


def list_images(root):
    """-> sorted [(top folder or ".", path)] of the images below root; says what is not.

    Hidden folders and those of masks are left out, links are followed. OSError if a
    folder cannot be listed.
    """

    def fail(error):
        raise error

    endings = {
        ending
        for ending, kind in Image.registered_extensions().items()
        if kind in Image.OPEN
    }
    images = []
    left_out = collections.Counter()
    for folder, inner, names in os.walk(root, onerror=fail, followlinks=True):
        for name in [*inner]:
            # a link to a folder above would run in circles
            is_circle = (
                Path(folder, name).resolve() in Path(folder, "x").resolve().parents
            )
            if name[0] == "." or name.lower() in MASK_FOLDERS or is_circle:
                inner.remove(name)
                left_out[f"folder {name}"] += 1
        top = os.path.relpath(folder, root).split(os.sep)[0]
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if ending in endings:
                images.append((top, os.path.join(folder, name)))
            else:
                left_out[f"file {ending}, no kind of image for Pillow"] += 1
    for reason, count in left_out.items():
        say(f"left out in {root}: {count} x {reason}")
    return sorted(images)


class ImageFolder(list):
    """A list of (path, labels). Root's folders with images are the classes, if several.

    part: "all" images, "most" (nine in ten) or the "tenth". UserError if there is none.
    """

    def __init__(self, root, part="all"):
        images = list_images(root)
        message = f"--data {root}: no image that can be read (JPEG, PNG, TIFF ...)"
        require(images, message)
        names = sorted({top for top, _ in images} - {"."})
        if len(names) > 1:  # what lies beside the class folders is of no class
            images = [(top, path) for top, path in images if top != "."]
        self.root = str(root)
        self.kept = {}
        self.label_names = ("class",) if len(names) > 1 else ()
        self.classes = (names,) if len(names) > 1 else ()
        for i, (top, path) in enumerate(images):
            if part in ("all", "tenth" if i % 10 == 9 else "most"):
                self.append((path, [names.index(top) if top in names else 0]))

    def identity(self):
        """How many images, and a fingerprint of their names and order."""
        names = "\n".join(path.removeprefix(self.root) for path, _ in self)
        digest = hashlib.sha256(os.fsencode(names)).hexdigest()
        return f"{len(self)} images ({digest[:12]})"

    def load(self, index):
        """-> opened PIL image, [class]; small images are decoded once and kept."""
        path, labels = self[index]
        if index in self.kept:
            return self.kept[index], labels
        image = Image.open(path)
        if may_be_kept(len(self), *image.size):
            turn_upright(image)
            image = to_rgb(image)
            self.kept[index] = image
        return image, labels


def find_data(cfg):
    """-> (training set, test set or None): --data, or the built-in stimuli."""
    if not cfg.data:
        train_set = Stimuli(20000, cfg.image_size, cfg.seed, "train")
        return train_set, Stimuli(5000, cfg.image_size, cfg.seed, "test")
    root = Path(cfg.data)
    require(root.is_dir(), f"--data {cfg.data}: no such folder")
    folders = {path.name.lower(): path for path in sorted(root.iterdir())}
    train = [folders[name] for name in TRAIN_FOLDERS if name in folders]
    test = [folders[name] for name in TEST_FOLDERS if name in folders]
    if not train:
        require(not test, f"--data {root}: there is {test}, but no folder train")
        whole = ImageFolder(root)
        if len(whole) < 20:
            return whole, None
        return ImageFolder(root, "most"), ImageFolder(root, "tenth")
    train_set = ImageFolder(train[0])
    if not test:
        return train_set, None
    test_set = ImageFolder(test[0])
    if train_set.classes != test_set.classes:
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


def upright_size(image):
    """Width and height as they will be once the camera's orientation is obeyed."""
    orientation = 1
    with contextlib.suppress(Exception):  # a broken EXIF block costs no pixels
        orientation = image.getexif().get(0x0112, 1)
    is_turned = orientation in (5, 6, 7, 8) and image.format != "TIFF"  # Pillow's turn
    return image.size[::-1] if is_turned else image.size


def turn_upright(image):
    image.load()
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def to_rgb(image):
    """Any mode of Pillow's -> RGB; what is transparent lies on white.

    Of 16 and 32 bits, whose range nobody knows, the darkest pixel becomes black, the
    brightest white.
    """
    if image.mode[0] in "IF":
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        values = values - values.min()
        values = values * (255 / max(values.max(), 1e-9))
        image = Image.fromarray(values.astype(np.uint8))
    if image.mode != "RGB":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image


def cut(image, boxes, size):
    """Decodes an opened image once and cuts every box -> uint8 (boxes, 3, size, size).

    boxes (n, 4): left, top, right, bottom in px of the upright image.
    """
    boxes = np.array(boxes)
    width = upright_size(image)[0]
    # a large JPEG is decoded at 1/2, 1/4 or 1/8, never smaller than a crop needs
    spare = max(1, (boxes[:, 2:] - boxes[:, :2]).min() / size)
    image.draft("RGB", (int(image.width / spare), int(image.height / spare)))
    turn_upright(image)
    image = to_rgb(image)
    # between pixels, at least one pixel wide and high
    boxes = (boxes * image.width / width).round()
    boxes = np.maximum(boxes, (0, 0, 1, 1)).astype(int)
    boxes[:, :2] = np.minimum(boxes[:, :2], boxes[:, 2:] - 1)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, h, w)
    crops = []
    for left, top, right, bottom in boxes:
        crop = pixels[:, :, top:bottom, left:right]
        crops.append(F.interpolate(crop, size, mode="bilinear", antialias=True))
    return torch.cat(crops).numpy()


def random_crops(image, size, scales, rng):
    """A RandomResizedCrop for each smallest share in `scales` -> uint8 (n, 3, S, S)."""
    width, height = upright_size(image)
    boxes = [crop_box(width, height, smallest, rng) for smallest in scales]
    return cut(image, boxes, size)


def center_crop(image, size):
    """The largest centred square -> uint8 (3, size, size)."""
    width, height = upright_size(image)
    left = max(width - height, 0) / 2
    top = max(height - width, 0) / 2
    return cut(image, [(left, top, width - left, height - top)], size)[0]


def first_readable(source, wanted, crop):
    """crop(image) of image `wanted` or of the next that can be read -> that, labels."""
    for place in range(wanted, wanted + 100):
        index = place % len(source)
        try:
            image, labels = source.load(index)
            return crop(image), np.array(labels)
        except Exception as error:  # Pillow raises almost anything
            reason = error
            warn_once(f"unreadable, the next takes its place: {source[index][0]!r}")
    message = f"of 100 files in a row not one is an image that can be read ({reason})"
    raise UserError(message) from reason


@functools.cache
def warn_once(message):
    print(message, file=sys.stderr)


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, length):
    return np.random.default_rng([seed, 1, epoch]).permutation(length).tolist()


def batch_keys(cfg, length, steps, rank, world_size):
    """Lists of (epoch, index), one for each micro-batch of this rank.

    They follow from the step alone, so a resumed run goes on where it stopped, and any
    number of ranks and micro-batches sees the same images in the same step.
    """
    share = cfg.batch_size // world_size
    micro_batch = share // cfg.accum
    for step in steps:
        for part in range(cfg.accum):
            start = step * cfg.batch_size + rank * share + part * micro_batch
            keys = []
            for place in range(start, start + micro_batch):
                epoch, position = divmod(place, length)
                keys.append((epoch, epoch_order(cfg.seed, epoch, length)[position]))
            yield keys


def make_loader(cfg, train_set, steps):
    loader = DataLoader(
        TrainingViews(train_set, cfg),
        batch_sampler=batch_keys(cfg, len(train_set), steps, *world()),
        num_workers=cfg.workers,
        worker_init_fn=ignore_signals,
        pin_memory=cfg.device.startswith("cuda"),
    )
    return iter(loader)


# ---- k-NN: what do the features know, without training anything? ----


def knn(train_features, train_labels, features, k=20):
    """The majority label among the k nearest training images, by cosine.

    train_features (..., n, D), train_labels (n, label sets), features (..., m, D) ->
    (..., m, label sets). Features are whitened by the training set's: no loud direction
    decides alone.
    """
    mean = train_features.mean(dim=-2, keepdim=True)
    centred = train_features - mean
    covariance = centred.mT @ centred / len(train_labels)
    variance, axes = torch.linalg.eigh(covariance)
    floor = 1e-3 * variance.mean(dim=-1, keepdim=True) + 1e-12
    whiten = axes * (variance + floor).rsqrt()[..., None, :]
    train_unit = F.normalize(centred @ whiten, dim=-1)
    unit = F.normalize((features - mean) @ whiten, dim=-1)
    majority = []
    for piece in unit.split(256, dim=-2):  # of 50,000 images all at once are 60 GB
        nearest = (piece @ train_unit.mT).topk(min(k, len(train_labels))).indices
        majority.append(train_labels[nearest].mode(dim=-2).values)
    return torch.cat(majority, dim=-2)


class CenterCrops:
    """crops[i] -> centre square of image i, or of the next readable; its labels."""

    def __init__(self, source, image_size):
        self.source = source
        self.crop = functools.partial(center_crop, size=image_size)

    def __getitem__(self, wanted):
        return first_readable(self.source, wanted, self.crop)


@torch.no_grad()
def layer_features(encoder, source, count, cfg, autocast):
    """CLS and mean token after each layer of `count` images spread over `source`.

    -> features (2L, count, D), labels (count, label sets).
    """
    count = min(count, len(source))
    loader = DataLoader(
        CenterCrops(source, cfg.image_size),
        batch_size=64,
        sampler=np.linspace(0, len(source) - 1, count).astype(int).tolist(),
        num_workers=cfg.workers,
        worker_init_fn=ignore_signals,
    )
    features = []
    labels = []
    for crops, batch_labels in loader:
        images = ((crops / 255 - MEAN) / STD).to(cfg.device)
        with autocast():
            # .forward: a compiled encoder would compile again for this
            _, records = encoder.forward(images, record=True)
        states = []
        for record in records:
            states.append(record.out[:, 0])
            states.append(record.out[:, 1:].mean(dim=1))
        features.append(torch.stack(states).float().cpu())
        labels.append(batch_labels)
    return torch.cat(features, dim=1), torch.cat(labels)


def knn_scores(encoder, data, cfg, autocast):
    """{"knn_<label set>": accuracy of the best layer and token}; {} without labels."""
    train_set, test_set = data
    has_labels = test_set is not None and train_set.classes == test_set.classes != ()
    if cfg.knn_images == 0 or not has_labels:
        return {}
    bank = layer_features(encoder, train_set, cfg.knn_images, cfg, autocast)
    tested = cfg.knn_images // 4 + 1
    features, labels = layer_features(encoder, test_set, tested, cfg, autocast)
    hits = knn(*bank, features) == labels  # (2L, images, label sets)
    best = hits.float().mean(dim=1).amax(dim=0)
    scores = {}
    for name, accuracy in zip(train_set.label_names, best.tolist(), strict=True):
        scores[f"knn_{name}"] = round(accuracy, 4)
    return scores


# ---- Checkpoints ----


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
        advice = "an earlier save is whole: make room, then --resume"
        raise UserError(f"{path} was not written, {advice}") from error


def load_checkpoint(path):
    """Tensors, numbers and strings only: nothing that a file contains is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # checksums, at which torch does not look
        require(damaged is None, f"{damaged} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        message = f"{path}: no such file, or not a whole checkpoint of this program"
        raise UserError(message) from error


# ---- Plan: what does a run cost? ----

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12}  # bf16, from the data sheets
# of the peak: the hybrid's 711 images/s of ViT-B on one H100, whole batches of 128,
# without --compile, loading, colours, clipping and average
MEASURED_SHARE = 0.26
IMAGENET = 1281167  # images, where --data is not there to be counted


def flops_of_pass(cfg, cls_only=False):
    """FLOPs of an encoder's forward pass; a product and a sum count as two.

    A block costs each of its T tokens 24D² in linear layers and 4TD in attention; where
    only CLS asks, the last one 4D². What is left out, embedding and heads, is 1 %.
    """
    width = SIZES[cfg.model]["embed_dim"]
    tokens = 1 + (cfg.image_size // cfg.patch_size) ** 2
    block = tokens * (24 * width**2 + 4 * tokens * width)
    whole = SIZES[cfg.model]["depth"] * block
    return whole - block + tokens * 4 * width**2 if cls_only else whole


def flops_per_image(cfg):
    """FLOPs of a training step; a backward pass costs twice a forward pass."""
    flops = 0
    if cfg.lam < 1:
        flops += 3 * flops_of_pass(cfg)
    if cfg.lam > 0:
        # two views trained, two keys; with one view the key alone
        flops += (1 if cfg.one_view else 2 * 3 + 2) * flops_of_pass(cfg, cls_only=True)
    return flops


def measure_rate(cfg):
    """-> images/s of this machine, from the encoder's passes alone, without loading."""
    encoder = make_encoder(cfg).to(cfg.device)
    autocast, _ = mixed_precision(cfg)
    full_pass, needed = flops_of_pass(cfg), flops_per_image(cfg)
    count = max(1, min(128, int(2e12 / (3 * full_pass))))  # some seconds of a CPU
    images = torch.randn(count, 3, cfg.image_size, cfg.image_size, device=cfg.device)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        with autocast():
            loss = encoder(images).square().mean()
        loss.backward()
        loss.item()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return count * 3 * full_pass / needed / min(seconds)


def plan(cfg):
    """Prints FLOPs, memory and hours of the run -> exit status."""
    count = IMAGENET
    if not cfg.data or os.path.isdir(cfg.data):
        count = len(find_data(cfg)[0])
    images = number_of_steps(cfg, count) * cfg.batch_size
    flops = flops_per_image(cfg)
    with torch.device("meta"):  # shapes without memory
        model = SSL(cfg)
    # itself, gradient, Adam's two averages; or an averaged weight alone
    weights = sum(
        (16 if p.requires_grad else 4) * p.numel() for p in model.parameters()
    )
    say(
        f"{cfg.objective} (λ = {cfg.lam:g}), ViT-{cfg.model}, {cfg.image_size} px, "
        f"patch {cfg.patch_size}: {images:.4g} images of {flops / 1e9:.4g} GFLOP, "
        f"{weights / 2**30:.2g} GiB of weights, their gradients and averages"
    )
    for gpu, peak in PEAK_FLOPS.items():
        hours = images * flops / (MEASURED_SHARE * peak) / 3600
        share = f"at {MEASURED_SHARE:.0%} of its bf16 peak, {peak / 1e12:g} TFLOP/s"
        say(f"one {gpu}, {share}: {hours:.3g} h; eight: {hours / 8:.3g} h")
    rate = measure_rate(cfg)
    hours = images / rate / 3600
    say(
        f"here ({cfg.device}, {cfg.dtype}): measured {rate:.4g} images/s, {hours:.3g} h"
    )
    return 0


# ---- What a run ends with ----


def finish(cfg, model, rows, data):
    """Draws what was learnt; says how good the features are, and what next."""
    draw_losses(cfg, rows)
    if cfg.lam < 1:
        draw_reconstruction(cfg, model, data[1] or data[0])
        say(f"image, what the network saw, what it makes of it: {cfg.out}/masked.png")
    for name, classes in zip(data[0].label_names, data[0].classes, strict=True):
        key = f"knn_{name}"
        if key in rows[-1]:
            others = f"untrained {rows[0][key]:.3f}, chance {1 / len(classes):.3f}"
            say(f"{name}: k-NN accuracy {rows[-1][key]:.3f}, {others}")
    say(f"checkpoint, log and loss curve are in {cfg.out}")
    data_flag = f" --data {cfg.data}" if cfg.data else ""
    say(f"next, every figure: python analyze.py {cfg.out}/ckpt.pt{data_flag}")


def draw_losses(cfg, rows):
    from matplotlib.figure import Figure  # here, as it takes a second to load

    axis = Figure(figsize=(7, 4), layout="constrained").subplots()
    steps = [row["step"] for row in rows[1:]]
    for name, label in (("mim", "L_MIM: masked L1"), ("cl", "L_CL: InfoNCE")):
        axis.plot(steps, [row[name] for row in rows[1:]], label=label)
    title = f"{cfg.objective}, λ = {cfg.lam:g}"
    axis.set(xlabel="optimiser step", ylabel="loss", title=title)
    axis.legend()
    axis.figure.savefig(Path(cfg.out, "loss.png"), dpi=150)


@torch.no_grad()
def draw_reconstruction(cfg, model, source):
    """Rows of eight test images: as they are, masked, and with what is predicted."""
    crops = CenterCrops(source, cfg.image_size)
    pixels = np.stack([crops[i][0] for i in range(min(8, len(source)))])
    images = (torch.from_numpy(pixels) / 255 - MEAN) / STD
    mask = draw_masks(len(images), cfg, torch.Generator().manual_seed(0))
    model.to("cpu")
    tokens = model.encoder.forward(images, mask, mask_token=model.mask_token)
    target = patchify(images, cfg.patch_size)  # (8, N, 3p²)
    hidden = mask[..., None]
    predicted = torch.where(hidden, model.decoder(tokens)[:, 1:], target)
    patches = torch.cat([target, target * ~hidden, predicted])  # (24, N, 3p²)
    x = unpatchify(patches, images.shape[2:], cfg.patch_size) * STD + MEAN
    x = F.pad((255 * x).clamp(0, 255), (1, 1, 1, 1), value=255)  # a white frame
    x = x.unflatten(0, (3, -1)).permute(0, 3, 1, 4, 2)  # (3, h, 8, w, 3)
    picture = Image.fromarray(x.flatten(2, 3).flatten(0, 1).byte().numpy())
    enlarged = ImageOps.scale(picture, math.ceil(150 / cfg.image_size), resample=0)
    enlarged.save(Path(cfg.out, "masked.png"))


def keep_large_blocks():
    """Stops glibc from returning freed memory: 20 % of the time of a CPU step."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        libc.mallopt(-2, 2**26)  # M_TOP_PAD
        libc.mallopt(-4, 0)  # M_MMAP_MAX


keep_large_blocks()

if __name__ == "__main__":
    sys.exit(main())
