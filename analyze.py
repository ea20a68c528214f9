"""What did they learn?  This file takes trained Vision Transformers apart.

  python analyze.py runs/*/ckpt.pt                     every figure, on the stimuli
  python analyze.py runs/micro-hybrid/ckpt.pt          yours beside the shipped ones
  python analyze.py cl=mocov3.pth mim=simmim.pth --data /imagenet        photographs
  python analyze.py --from FOLDER/results.json         judges and draws again

It checks the twelve claims of [P] Park et al., What Do Self-Supervised Vision
Transformers Learn?, ICLR 2023, arXiv 2305.00729. The file is one section per figure: a
lesson, the metric, how it is measured, what the claim says of it and how it is drawn,
ending in one entry of the table FIGURES. To add a figure, add a section: help text,
claims, results and report follow from the table.

Glossary: B batch, N patch tokens (CLS is dropped), D width, H heads, d = D/H, L layers,
F frequencies, n rows of a matrix, A[q,k] attention of query q to key k; CL contrastive
learning, MIM masked image modelling.
"""

import argparse
import base64
import importlib.util
import json
import math
import os
import pickle
import platform
import re
import sys
import textwrap
import time
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property, partial
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

import sslvit
from sslvit import MEAN, SIZES, STD
from sslvit import Config, Stimuli, UserError, ViT, require, sincos_positions

# ==== What a figure is ==============================================================


def greater(first, second=0.0):
    """What most claims say: the first role's value is greater than the second's."""
    return first - second


@dataclass
class Part:
    """One sentence of a claim that can be tested: a difference that it says is > 0.

    Part("distance", ("distance",), np.mean, ("CL", "MIM")): CL's mean distance - MIM's.
    """

    name: str
    # read(means of these keys over a network's test images) -> a number
    keys: tuple
    read: Callable
    # the networks compared, and test(their numbers) -> the difference
    roles: tuple
    test: Callable = greater
    # unless(numbers of the roles, untrained) -> why it would be unfair, or ""
    unless: Callable | None = None
    # read() takes matrices of images instead of means
    of_matrices: bool = False


@dataclass
class Panel:
    """One axis with a curve for each network: value `key`, after pick()."""

    key: str
    label: str
    x: str = "layer"  # the axis, one of those in places()
    pick: Callable = np.asarray
    dotted: str = ""  # key of a second definition, drawn as dotted curves
    line: tuple | None = None  # a reference line: (height, name)


@dataclass
class Figure:
    number: str  # the paper's, "-" for those that it does not have
    text: str  # what the claim says
    lesson: str
    claim: int | None = None
    parts: tuple = ()
    roles: tuple = ("CL", "MIM")
    needs: tuple = ()  # of NEEDS
    # What is computed: functions, which several figures may share.
    # measure(layer of a batch) -> {key: (B, ...)}, stacked over layers: (n, L, ...);
    # of test images, and of those that probes learn from
    measure: tuple = ()
    learn_from: tuple = ()
    # learn(study) -> {key: (n, ...)}: what has to be trained first
    learn: tuple = ()
    # pictures(network, images) -> {key: lists}, of the first seed
    pictures: tuple = ()
    # summary(rows) -> {key: value}: what is no mean over images
    summary: tuple = ()
    # across(models, their rows) -> {key: value}: what compares networks
    across: tuple = ()
    # drawn as panels, or by draw(models) from the values named in keys
    panels: tuple = ()
    draw: Callable | None = None
    keys: tuple = ()
    # enough(models) -> whether these can say something together
    enough: Callable = bool
    # the title: what the first part found, if it holds or is opposed, and its numbers
    finding: str = ""
    otherwise: str = ""
    numbers: str = "{CL:.3f} against {MIM:.3f}"


FIGURES = {}

NEEDS = {
    "labels": "labels and a training set (the stimuli, or --data with two or more "
    "class folders, the same in train and val)",
    "masks": "masks (the stimuli's, or --masks)",
    "cues": "the stimuli or --cue-conflict",
    "sizes": "checkpoints of two model sizes",
    "decoder": "MIM with and without decoder",
    "lambdas": "checkpoints of λ = 0, λ = 1 and between",
}


def several(fact, models, count=2):
    """Enough for a figure: trained networks with `count` values of a fact."""
    return len({m[fact] for m in models if m["role"] != "untrained"}) >= count


# Early is the first third of the layers, late the last, both rounded up.
def early(x):
    return np.mean(x[: math.ceil(len(x) / 3)])


def late(x):
    return np.mean(x[-math.ceil(len(x) / 3) :])


def late_minus_early(x):
    return late(x) - early(x)


def last(x):
    return np.mean(x[-1])


def middle(x):
    third = math.ceil(len(x) / 3)
    if len(x) <= 2 * third:
        return np.mean(x)
    return np.mean(x[third:-third])


# ==== How figures are drawn =========================================================

STYLE = {
    "font.size": 12,
    "figure.titlesize": 15,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# λ from MIM's blue to CL's orange, over violet: half way between them lies a grey
COLOURS = [(0, "#0072B2"), (0.25, "#8A45B5"), (0.6, "#C8438A"), (1, "#D55E00")]
LAMBDAS = LinearSegmentedColormap.from_list("lambda", COLOURS)
# networks of one role
MARKERS = "osD^vP"
LINES = ("-", "--", ":", "-.")

# kinds of x axes
LAYER = "layer"
HALF = "layer (half: after its attention)"
RANK = "rank, last layer"
FREQUENCY = "frequency (π per patch)"
BAND = "noise frequency (π per pixel)"


def places(kind, count, depth):
    """Where `count` values of a network of `depth` layers lie on a kind of axis."""
    ends = {
        LAYER: (depth - count + 1, depth),  # neighbours: one value less than layers
        HALF: (0.5, depth),
        RANK: (1, count),
        FREQUENCY: (0, 1),
        BAND: (0.5 / count, 1 - 0.5 / count),
    }
    return np.linspace(*ends[kind], count)


def sub_layers(values):
    """(L, 2, ...) -> (2L, ...): after a layer's attention, after its MLP."""
    return values.reshape(-1, *values.shape[2:])


def colour_of(model):
    if model["role"] == "untrained":
        return "#8C8C8C"
    if model["lam"] is None:
        return "#333333"
    return LAMBDAS(float(model["lam"]))


def by_name(models):
    """Models -> {name: its seeds}."""
    names = defaultdict(list)
    for model in models:
        names[model["name"]].append(model)
    return names


def canvas(columns, rows=1, height=4.6, **axis):
    """A figure 1,600 px wide, at 150 dots an inch, and its axes (rows, columns)."""
    size = (32 / 3, height * rows)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, subplot_kw=axis)


def curves(axis, models, panel):
    """A curve per name. Seeds are thin lines, and heads, if there are any, a band."""
    for name, seeds in by_name(models).items():
        first = seeds[0]
        colour = colour_of(first)
        y = stack_values(seeds, panel.key, panel.pick)
        x = places(panel.x, y.shape[1], first["depth"])
        if y.ndim == 3:  # (seeds, x, heads)
            heads = y.mean(axis=0)
            low, high = heads.min(axis=1), heads.max(axis=1)
            axis.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
            y = y.mean(axis=2)
        if len(y) > 1:
            axis.plot(x, y.T, color=colour, lw=0.7, alpha=0.6)
        line = LINES[first["nth"] % len(LINES)]
        axis.plot(x, y.mean(axis=0), line, color=colour, lw=2.2, label=name)
        if panel.dotted:
            other = stack_values(seeds, panel.dotted, panel.pick).mean(axis=0)
            axis.plot(x, other, ":", color=colour, lw=2)
    if panel.dotted:  # once in the legend
        axis.plot([], [], ":", color="black", lw=2, label=panel.dotted)
    if panel.line:
        reference(axis, *panel.line)
    axis.set(xlabel=panel.x, ylabel=panel.label)


def stack_values(models, key, pick):
    return np.stack([pick(np.array(m["values"][key], dtype=float)) for m in models])


def draw_panels(models, panels):
    columns = len(panels)
    if columns > 3:
        columns = 2
    fig, axes = canvas(columns, math.ceil(len(panels) / columns))
    for axis, panel in zip(axes.flat, panels, strict=True):
        curves(axis, models, panel)
    return fig


def draw_points(models, columns, label, line=None):
    """Seeds as points, a bar at their mean; columns: {title: (key, read(value))}."""
    fig, [[axis]] = canvas(1)
    names = by_name(models)
    offsets = np.linspace(-0.3, 0.3, len(names) + 2)[1:-1]
    for offset, (name, seeds) in zip(offsets, names.items(), strict=True):
        colour = colour_of(seeds[0])
        marker = MARKERS[seeds[0]["nth"] % len(MARKERS)]
        style = {"color": colour, "mfc": "none", "ms": 9, "mew": 1.8, "label": name}
        for place, (key, read) in enumerate(columns.values()):
            x = place + offset
            y = [read(m["values"][key]) for m in seeds]
            axis.plot([x] * len(y), y, marker, clip_on=False, **style)
            axis.hlines(np.mean(y), x - 0.05, x + 0.05, color=colour, lw=3)
    if line:
        reference(axis, *line)
    axis.set_xticks(range(len(columns)), columns)
    axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(0, 1), ylabel=f"{label} (test)")
    return fig


def against(axis, models, fact, key, **line):
    """An accuracy against a fact of the networks: seeds as points, a line of means."""
    means = {}
    for x in sorted({m[fact] for m in models}):
        seeds = [m for m in models if m[fact] == x]
        y = [np.mean(m["values"][key]) for m in seeds]
        style = {"mfc": "none", "ms": 9, "color": colour_of(seeds[0])}
        axis.plot([x] * len(y), y, "o", clip_on=False, **style)
        means[x] = np.mean(y)
    axis.plot(list(means), list(means.values()), zorder=0, **line)
    axis.set(ylabel=f"{key} (test)", ylim=(0, 1))


def reference(axis, y, text):
    """A dotted line that says what a value would mean; its name is in the legend."""
    axis.axhline(y, color="black", lw=1, ls=(0, (1, 3)), label=text, zorder=0)


def legend(fig):
    """One legend below, each name once; none where nothing has a name."""
    lines = {}
    for axis in fig.axes:
        handles, labels = axis.get_legend_handles_labels()
        lines |= dict(zip(labels, handles, strict=True))
    if not lines:
        return
    columns = len(lines)
    if sum(len(label) + 7 for label in lines) > 105:  # too long for one row
        columns = 3
    where = "outside lower center"
    fig.legend(lines.values(), lines.keys(), loc=where, ncols=columns, frameon=False)


# ==== Figure 2. Where does a token look? ============================================

maps_lesson = """\
Before any number, look. Attention is a row of weights for each query token: how much it
takes from every other, A[q,k] = softmax(q·k / √d), averaged here over the heads. The
paper saw that late layers of contrastive networks draw the same outline of the object
whoever asks, and that masked networks look near the query.

What to look at: are the maps of two queries of one network equal? And how much of them
does the untrained network have, which is where every Vision Transformer starts?"""


def picture_maps(vit, x):
    """Attention of two queries in three layers, relative to uniform attention."""
    _, records = vit(x[:1], record=True)
    rows, cols = x.shape[2] // vit.patch_size, x.shape[3] // vit.patch_size
    shown = sorted({0, len(records) // 2, len(records) - 1})
    attn = torch.cat([records[layer].attn[:, :, 1:, 1:] for layer in shown])
    attn = attn.mean(dim=1)  # (layers, N, N)
    maps = []
    centre, corner = (rows // 2, cols // 2), (rows // 8, cols // 8)
    for row, col in (centre, corner):
        for layer, seen in zip(shown, attn[:, row * cols + col], strict=True):
            relative = (seen / seen.mean()).reshape(rows, cols).tolist()
            maps.append({"query": [row, col], "layer": layer + 1, "map": relative})
    return {"maps": maps, "photograph": to_picture(x[0])}


def to_picture(x):
    """Normalised image (3, h, w) -> brightness 0 .. 255 (h, w, 3), at most 112 px."""
    x = (x.cpu() * STD + MEAN).clamp(0, 1)
    x = F.adaptive_avg_pool2d(x, min(112, x.shape[1]))
    return (x * 255).round().byte().permute(1, 2, 0).numpy()


def draw_maps(models):
    """A row for each network, left of the first the photograph with both queries."""
    maps = [model["pictures"]["maps"] for model in models]
    columns = 1 + len(maps[0])
    fig, axes = canvas(columns, len(models), height=1.6, xticks=[], yticks=[])
    for axis in axes[1:, 0]:
        axis.axis("off")
    # one scale for all: 0 to where one value in a hundred lies above
    highest = np.percentile([entry["map"] for own in maps for entry in own], 99)
    for model, own, line in zip(models, maps, axes[:, 1:], strict=True):
        line[0].set_ylabel(wrapped(model["name"]), color=colour_of(model), fontsize=12)
        for entry, axis in zip(own, line, strict=True):
            shown = axis.imshow(entry["map"], cmap="magma", vmin=0, vmax=highest)
            frame(axis, entry["query"], 1)
    pixels = models[0]["pictures"]["photograph"]
    photograph = axes[0, 0]
    photograph.imshow(pixels)
    side = len(pixels) / len(maps[0][0]["map"])  # of a patch, in pixels
    for entry, axis in zip(maps[0], axes[0, 1:], strict=True):
        row, col = entry["query"]
        name = "B"
        if entry["query"] == maps[0][0]["query"]:
            name = "A"
        axis.set_title(f"query {name}\nlayer {entry['layer']}", fontsize=12)
        frame(photograph, entry["query"], side)
        photograph.text(col * side, row * side, name, color="white", va="bottom")
    fig.colorbar(shown, ax=axes, shrink=0.8, label="attention / uniform")
    return fig


def wrapped(name):
    return name.replace(" (", "\n(")


def frame(axis, patch, side, colour="#56B4E9"):
    """A square around a patch, (row, column)."""
    corner = (patch[1] * side - 0.5, patch[0] * side - 0.5)
    axis.add_patch(plt.Rectangle(corner, side, side, fill=False, ec=colour, lw=2.5))


FIGURES["maps"] = Figure(
    number="2",
    claim=4,
    text="CL attends globally, MIM locally",
    lesson=maps_lesson,
    pictures=(picture_maps,),
    draw=draw_maps,
    keys=("maps",),
)


# ==== Figure 3. How far does a token look? ==========================================

distance_lesson = """\
The map as one number: the mean distance between a token and what it looks at,
d = mean_q Σ_k A[q,k]·‖x_q - x_k‖, in pixels. A token that looks everywhere alike has
the mean distance of all pairs of grid points, the dotted line. The paper saw CL far
above MIM, most in later layers, and reads it as shape against texture.

Read it against grey: an untrained network looks about as far as can be, so what
training does is to shorten. What to look at: whether the gap widens with depth, and the
band, which are the heads: one layer can hold near and far ones."""


def attention_distance(attn, grid, patch_size):
    """How far does a token look?  Σ_k A[q,k]·‖x_q - x_k‖, mean over queries.

    attn (B, H, N, N), rows sum to 1; grid (rows, cols), or one number for a square ->
    (B, H) in px. 0: every token looks at itself. Uniform attention: the mean distance
    between grid points.
    """
    x = grid_points(grid, attn) * patch_size
    distance = (x[:, None] - x).norm(dim=-1)  # (N, N)
    return attn.flatten(-2) @ distance.flatten() / len(x)


def grid_points(grid, like):
    """Row and column of every token of a grid -> (N, 2)."""
    if isinstance(grid, int):
        grid = (grid, grid)
    rows, cols = grid
    n = torch.arange(rows * cols, device=like.device)
    return torch.stack([n // cols, n % cols], dim=1).to(like.dtype)


def measure_distance(layer):
    return {"distance": attention_distance(layer.attn, layer.grid, layer.patch_size)}


def draw_distance(models):
    """With a line at the mean distance of all pairs of grid points."""
    patch_size = models[0]["patch_size"]
    side = models[0]["image_size"] // patch_size
    uniform = torch.full((1, 1, side**2, side**2), 1 / side**2)
    far = attention_distance(uniform, side, patch_size).item()
    label = "attention distance (px; band: heads)"
    line = (far, "uniform attention")
    return draw_panels(models, [Panel("distance", label, line=line)])


FIGURES["distance"] = Figure(
    number="3",
    claim=4,
    text="CL attends globally, MIM locally, most in later layers",
    lesson=distance_lesson,
    measure=(measure_distance,),
    # the gap of late layers > that of early ones, written as a difference of roles
    parts=(
        Part("attention distance, px", ("distance",), np.mean, ("CL", "MIM")),
        Part("the same, late - early", ("distance",), late_minus_early, ("CL", "MIM")),
    ),
    finding="CL looks farther",
    otherwise="CL does not look farther",
    numbers="{CL:.1f} px against {MIM:.1f}",
    draw=draw_distance,
    keys=("distance",),
)


# ==== Figure 4. Does it matter who asks? ============================================

nmi_lesson = """\
If all queries get the same map, attention has collapsed: the layer adds the same vector
to every token. Mutual information says how much the map tells about who asked,

    I = Σ p(q) A[q,k] log(A[q,k] / p(k)),   NMI = I / √(H(q)·H(k)),

with p(q) = 1/N and p(k) = mean_q A[q,k]. The paper saw CL's late layers near 0 and
MIM's far above. Grey is near 0 as well: attention need not collapse under training, it
starts collapsed. What to look at: which layers leave the grey curve, and how far."""


def entropy(p):
    """-Σ p·log p over the last dimension; in place, as weights are many."""
    tiny = torch.finfo(p.dtype).tiny  # 0·log 0 is 0
    return -p.clamp(min=tiny).log_().mul_(p).sum(dim=-1)


def attention_nmi(attn):
    """Does it matter who asks?  Mutual information of query and key ([P] figure 4).

    I = H(k) - mean_q H(A[q]), NMI = I / √(H(q)·H(k)). attn (B, H, N, N), rows sum to 1
    -> (B, H) in [0, 1]. 0: one map for all queries (collapse), and if all look at one
    key, where H(k) = 0. 1: each query its own key.
    """
    key_entropy = entropy(attn.mean(dim=-2))  # H(k): (B, H)
    row_entropy = entropy(attn).mean(dim=-1)
    query_entropy = math.log(attn.shape[-2])
    nmi = (key_entropy - row_entropy) / (key_entropy * query_entropy).sqrt()
    # rounding may step over the ends
    return torch.where(key_entropy > 0, nmi, 0.0).clamp(0, 1)


def measure_nmi(layer):
    return {"nmi": attention_nmi(layer.attn)}


def below_half(mim, cl):
    return mim / 2 - cl


NMI = Panel("nmi", "NMI (band: heads)", line=(0, "one map for all queries"))

FIGURES["nmi"] = Figure(
    number="4",
    claim=5,
    text="CL's later attention collapses into one map for all queries",
    lesson=nmi_lesson,
    measure=(measure_nmi,),
    parts=(Part("NMI, late: MIM / 2 - CL", ("nmi",), late, ("MIM", "CL"), below_half),),
    panels=(NMI,),
    finding="CL's late attention hardly asks who looks",
    otherwise="CL's late attention does ask who looks",
    numbers="NMI {CL:.3f} against {MIM:.3f}",
)


# ==== Figure 5. Do heads, layers and tokens say different things? ===================

similarity_lesson = """\
Twelve heads that say the same are one head. Three mean cosines of what attention adds:
between heads at one token, between neighbouring layers at one token, between the tokens
of an image. 1: all alike, 0: orthogonal. The paper saw CL near 1 in late layers for all
three, MIM lower. Tokens near 1 is where an untrained network starts (grey).

A lesson on instruments is the dotted curve. The paper's A_h·V_h, which the verdict
follows, compares coordinate 5 of one head with coordinate 5 of another, which mean
different things; A_h·V_h·W_h, W_h the head's slice of the output matrix, does not."""


def token_similarity(tokens):
    """Are the tokens of an image told apart?  Mean cosine ([P] figure 5 right).

    Over the N(N - 1) pairs of different tokens, from |Σu|² = Σ|u|² + Σ_pairs for unit
    vectors u. tokens (..., N, D) -> (...) in [-1/(N-1), 1]. 1: alike; one token: nan.
    """
    unit = F.normalize(tokens, dim=-1)
    n = tokens.shape[-2]
    total = unit.sum(dim=-2).square().sum(dim=-1)
    alone = unit.square().sum(dim=(-2, -1))
    return (total - alone) / (n * (n - 1) or math.nan)


def head_similarity(heads):
    """Do the heads read different things?  Mean cosine of A_h·V_h ([P] figure 5 left).

    At the same token. heads (B, H, N, d) -> (B,) in [-1, 1]. 1: alike; one head: nan.
    """
    return token_similarity(heads.transpose(1, 2)).mean(dim=-1)


def shared_head_similarity(heads, weight):
    """The same in coordinates that all heads share: A_h·V_h·W_h.

    heads (B, H, N, d), weight (D, H·d) of the output layer -> (B,). The heads' outputs
    (B, H, N, D) are never formed: a length is √(xᵀ W_hᵀ W_h x), and the sum of all unit
    vectors is the output layer applied to x / length.
    """
    count, width = heads.shape[1], heads.shape[3]
    slices = weight.unflatten(1, (count, width)).transpose(0, 1)  # (H, D, d)
    gram = slices.mT @ slices  # (H, d, d)
    square = ((heads @ gram) * heads).sum(dim=-1, keepdim=True)  # (B, H, N, 1)
    unit = heads / square.clamp(min=1e-24).sqrt()
    total = F.linear(unit.transpose(1, 2).flatten(2), weight)  # (B, N, D)
    pairs = total.square().sum(dim=-1) - count
    return pairs.mean(dim=-1) / (count * (count - 1) or math.nan)


def depth_similarity(a, b):
    """Do neighbouring layers add different things?  Mean cosine ([P] figure 5 middle).

    Of the same token in two layers. a, b (B, N, D) -> (B,) in [-1, 1]. 1: the second
    layer repeats the first.
    """
    return F.cosine_similarity(a, b, dim=-1).mean(dim=-1)


SHARED = "heads, shared coordinates"


def measure_similarity(layer):
    found = {"heads": head_similarity(layer.heads)}
    # costs as much as the output layer: a quarter of the tokens is enough for a mean
    some = layer.heads[:, :, ::4]
    found[SHARED] = shared_head_similarity(some, layer.output_weight)
    found["tokens"] = token_similarity(layer.added)
    if layer.above is not None:
        found["depths"] = depth_similarity(layer.above, layer.added)
    return found


FIGURES["similarity"] = Figure(
    number="5",
    claim=6,
    text="CL lacks diversity across heads, depths and tokens in later layers",
    lesson=similarity_lesson,
    measure=(measure_similarity,),
    parts=(
        Part("cosine between heads, late", ("heads",), late, ("CL", "MIM")),
        Part("cosine between depths, late", ("depths",), late, ("CL", "MIM")),
        Part("cosine between tokens, late", ("tokens",), late, ("CL", "MIM")),
    ),
    panels=(
        Panel("heads", "cosine between heads", dotted=SHARED),
        Panel("depths", "cosine between depths"),
        Panel("tokens", "cosine between tokens"),
    ),
    finding="CL's late heads are more alike",
    otherwise="CL's late heads are not more alike",
    numbers="cosine {CL:.2f} against {MIM:.2f}",
)


# ==== Figure 6. What does attention do to the tokens of an image? ===================

plane_lesson = """\
The tokens of three images on the plane of their largest variance, before (hollow) and
after (full) the last attention. A network that works on whole images moves all tokens
of one image together, in parallel lines; one that works on tokens moves each its own
way. The paper saw the first in CL and the second in MIM.

What to look at: whether a colour is an island, and whether its lines are parallel.
Beware: two directions hide most of what there is. The next figure counts all."""

IMAGE_COLOURS = ("#009E73", "#CC79A7", "#E6A800")  # not those of the objectives


def picture_plane(vit, x):
    """Tokens of three images before and after the last attention -> (3, 2N, 2)."""
    _, records = vit(x[:3], record=True)
    before = records[max(len(records) - 2, 0)].out[:, 1:]
    after = records[-1].mid[:, 1:]
    groups = torch.cat([before, after], dim=1).cpu()  # (3, 2N, D)
    centred = groups - groups.mean(dim=(0, 1))
    _, _, directions = torch.linalg.svd(centred.flatten(0, 1), full_matrices=False)
    plane = (centred @ directions[:2].T).numpy()
    return {"plane": plane, "photographs": [to_picture(image) for image in x[:3]]}


def draw_plane(models):
    photographs = models[0]["pictures"]["photographs"]
    fig, [[left, *right]] = canvas(1 + len(models), height=5.2, xticks=[], yticks=[])
    left.imshow(np.concatenate(photographs))  # one below the other
    for number, colour in enumerate(IMAGE_COLOURS):
        frame(left, (number, 0), len(photographs[0]), colour)
    for axis, model in zip(right, models, strict=True):
        images = np.array(model["pictures"]["plane"])
        for tokens, colour in zip(images, IMAGE_COLOURS, strict=True):
            before, after = np.split(tokens, 2)
            x, y = np.stack([before, after], axis=1).T  # (2, N) each
            axis.plot(x, y, color=colour, lw=0.5)  # N lines, from before to after
            axis.scatter(*before.T, s=12, ec=colour, fc="none")
            axis.scatter(*after.T, s=12, color=colour)
        axis.set_title(wrapped(model["name"]), color=colour_of(model), fontsize=12)
    return fig


FIGURES["plane"] = Figure(
    number="6",
    claim=7,
    text="CL moves the tokens of an image together",
    lesson=plane_lesson,
    pictures=(picture_plane,),
    draw=draw_plane,
    keys=("plane",),
)


# ==== Figure 7. How many directions do tokens and images fill? ======================

spectra_lesson = """\
Singular values of a centred matrix say how far its rows spread in each direction; the
mean of their logarithms is the log of the volume that they fill. Two matrices: the
tokens of one image (N × D, averaged over images) and the mean tokens of all images
(images × D). The paper saw that CL's layers spread images apart while the tokens of an
image gain no volume, and that MIM does the reverse. The claim is about growth, from the
tokens that enter the first layer to those that leave the last.

What to look at: a network that only gets louder gains volume too. The dotted curves, of
the matrix divided by its Frobenius norm, show how evenly directions are filled."""


def singular_spectrum(x):
    """How many directions do rows fill?  Log singular values ([P] figure 7).

    x (..., n, D), centred over n here -> (..., min(n, D)), largest first. Equal values:
    all directions alike; a steep fall: few. From the Gram matrix in float64: as exact
    as an SVD in float32 and faster; the floor, 1e-8 of the largest, is rounding.
    """
    x = (x - x.mean(dim=-2, keepdim=True)).double()
    if x.shape[-2] <= x.shape[-1]:
        gram = x @ x.mT
    else:
        gram = x.mT @ x
    square = torch.linalg.eigvalsh(gram).flip(-1)
    floor = (square[..., :1] * 1e-16).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.maximum(square, floor).log() / 2


def free_spectrum(x):
    """singular_spectrum(x) without the value that is 0 because rows were centred."""
    rank = min(x.shape[-2] - 1, x.shape[-1])
    return singular_spectrum(x)[..., :rank]


def log_volume(x):
    """Mean log singular value of x (..., n, D), and of x / its Frobenius norm.

    The means over free_spectrum(x), for less: log singular values sum to half the
    log-determinant of the Gram matrix, which a Cholesky factor has on its diagonal.
    """
    x = (x - x.mean(dim=-2, keepdim=True)).double()
    n, width = x.shape[-2:]
    rank = min(n - 1, width)
    square_norm = x.square().sum(dim=(-2, -1))
    if n > width:
        gram = x.mT @ x
        log_fill = torch.zeros(())
    else:
        # centred rows leave the direction (1, ..., 1) empty: it gets the value `fill`
        fill = square_norm / n
        gram = x @ x.mT + fill[..., None, None] / n
        log_fill = fill.log()
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    volume = (pivots.log().sum(dim=-1) - log_fill / 2) / (rank or math.nan)
    # singular_spectrum() has a floor for directions that hold nothing but rounding
    empty = (failed > 0) | (pivots.amin(dim=-1).square() < 1e-13 * square_norm)
    if empty.any():
        volume[empty] = free_spectrum(x[empty]).mean(dim=-1)
    return volume, volume - square_norm.log() / 2


def scale_free(log):
    """Log singular values of x -> those of x / its Frobenius norm, √Σ σ²."""
    return log - torch.logsumexp(2 * log, dim=-1, keepdim=True) / 2


def measure_tokens(layer):
    """Mean patch token and CLS, after the layer's attention and MLP (B, 2, D)."""
    return {"pooled": layer.states.mean(dim=2), "cls": layer.cls}


def measure_spectra(layer):
    volume, free = log_volume(layer.states)  # (B, 2)
    found = {"token volume": volume, "token volume, scale-free": free}
    if layer.number == 1:
        found["token volume, entered"], _ = log_volume(layer.entered)
        found["images, entered"] = layer.entered.mean(dim=1)
    if layer.last:
        found["token spectrum"] = free_spectrum(layer.states[:, 1])
        found["images, left"] = layer.states[:, 1].mean(dim=1)
    return found


def image_spectra(rows):
    """The same of each layer's matrix of mean tokens (n images, D)."""
    layers = torch.from_numpy(rows["pooled"]).permute(1, 2, 0, 3)  # (L, 2, n, D)
    log = torch.stack([free_spectrum(layer) for layer in layers])  # (L, 2, K)
    return {
        "image volume": log.mean(dim=-1).numpy(),
        "image volume, scale-free": scale_free(log).mean(dim=-1).numpy(),
        "image spectrum": log[-1, 1].numpy(),
    }


def token_growth(entered, volume):
    """entered (1,), volume (L, 2): from before the first layer to after the last."""
    return volume[-1, -1] - entered[0]


def image_growth(entered, left):
    """Of matrices (n, 1, D) of mean tokens: those that enter and leave the network.

    An embedding of 48 numbers fills 48 directions of its 96. What enters the others is
    rounding: they are left out on both sides.
    """
    x = torch.from_numpy(np.concatenate([entered, left], axis=1)).float()
    before, after = free_spectrum(x.transpose(0, 1))
    is_filled = before > before[0] + math.log(ROUNDING)
    return float((after - before)[is_filled].mean())


def relative_to_first(log):
    """Of the last layer alone (1, K), or (K,) -> (K,)."""
    log = log.reshape(-1)
    return log - log[0]


def spectra_panels(what):
    log = f"log singular value, {what}s"
    even = f"{what} volume, scale-free"
    volume = Panel(f"{what} volume", f"mean {log}", HALF, sub_layers, dotted=even)
    spectrum = Panel(f"{what} spectrum", log, RANK, relative_to_first)
    return volume, spectrum


TOKENS = ("token volume, entered", "token volume")
IMAGES = ("images, entered", "images, left")
ROUNDING = torch.finfo(torch.float16).eps / 2  # samples.npz is in half precision
image_part = partial(Part, roles=("CL", "MIM"), of_matrices=True)

FIGURES["spectra"] = Figure(
    number="7",
    claim=7,
    text="CL spreads images apart, MIM the tokens of an image",
    lesson=spectra_lesson,
    measure=(measure_tokens, measure_spectra),
    summary=(image_spectra,),
    parts=(
        Part("growth of log volume, tokens", TOKENS, token_growth, ("MIM", "CL")),
        image_part("growth of log volume, images", IMAGES, image_growth),
    ),
    panels=spectra_panels("token") + spectra_panels("image"),
    finding="MIM's tokens gain more volume than CL's",
    otherwise="MIM's tokens gain no more volume than CL's",
    numbers="{MIM:+.2f} against {CL:+.2f}",
)


# ==== Figure 8. Which frequencies survive? ==========================================

fourier_lesson = """\
A layer's tokens form a map, and a map has frequencies: low ones are blobs and outlines,
high ones differ from patch to patch, which is texture. Shown is the log amplitude along
the diagonal from 0 to π per patch, minus its value at 0; far below 0 at π means that
only the mean of the map is left,

    Δ(ω) = mean over channels of log|X(ω)| - log|X(0)|,   X(ω) = Σ x[r,c]·exp(-iω(r+c)).

The paper saw CL keep low frequencies and MIM high ones. 'High' is π, where neighbours
have opposite signs; the public code stops short of it. What to look at: attention is a
low-pass filter and the MLP is not. Is the left curve a saw, low after attention?"""


def fourier_amplitude(tokens, grid):
    """Which frequencies does a token map keep?  Δ log amplitude, 0 … π ([P] figure 8).

    On an even square grid these are the FFT's diagonal bins up to Nyquist; the sum
    reaches π on odd grids too. tokens (..., N, D), grid (rows, cols) or a number ->
    (..., F) at ω = π·j/(F - 1), F = short side // 2 + 1. First 0; last: far below 0 =
    only low frequencies left (blurred), about 0 = as much detail as mean.
    """
    place = grid_points(grid, tokens).double().sum(dim=1)  # r + c: (N,)
    short_side = min(grid) if isinstance(grid, tuple) else grid
    omega = torch.linspace(0, math.pi, short_side // 2 + 1, dtype=torch.float64)
    phase = omega.to(tokens.device)[:, None] * place  # (F, N)
    real = phase.cos().to(tokens.dtype) @ tokens  # (..., F, D)
    imag = phase.sin().to(tokens.dtype) @ tokens
    amplitude = torch.hypot(real, imag).clamp(min=1e-37)  # keeps log 0 finite
    log = amplitude.log().mean(dim=-1)
    return log - log[..., :1]


def measure_fourier(layer):
    return {"fourier": fourier_amplitude(layer.states, layer.grid)}  # (B, 2, F)


def early_high(fourier):
    return early(fourier[:, -1, -1])


def late_high(fourier):
    return late(fourier[:, -1, -1])


def at_pi(fourier):
    return sub_layers(fourier)[:, -1]


def last_layer(fourier):
    return fourier[-1, 1]


AT_PI = Panel("fourier", "Δ log amplitude at π", HALF, at_pi)
LAST_LAYER = Panel("fourier", "Δ log amplitude, last layer", FREQUENCY, last_layer)

FIGURES["fourier"] = Figure(
    number="8",
    claim=8,
    text="CL keeps low frequencies, MIM high ones",
    lesson=fourier_lesson,
    measure=(measure_fourier,),
    parts=(Part("Δ log amplitude at π, late", ("fourier",), late_high, ("MIM", "CL")),),
    panels=(AT_PI, LAST_LAYER),
    finding="MIM's late layers keep more high frequencies than CL's",
    otherwise="MIM's late layers keep no more high frequencies than CL's",
    numbers="Δ {MIM:.2f} against {CL:.2f}",
)


# ==== Figure 1 left. What are the features good for? ================================

accuracy_lesson = """\
Two questions to a trained network. The linear probe freezes it and asks what a
hyperplane can read: mean cross-entropy + strength/2·|W|², the strength chosen on
validation images. Fine-tuning trains all weights on and asks what the network is a good
start for; learning rate and layer decay are chosen on validation, in trainings of a
third of the epochs, and seeds of a network share what its first one chose. The paper
saw CL win the first and MIM the second.

Grey is a new network: what fine-tuning reaches from scratch, and a probe from random
weights. What to look at: is the gap larger than the scatter of seeds, and is anything
above grey?"""

STRENGTHS = (1.0, 0.1, 0.01, 1e-3, 1e-4)
ROWS_AT_ONCE = 65536  # features that are on the device together
SAMPLE = 65536  # features that mean and deviation are taken from
FEW_SHOT = 20  # training images a class: below it, results carry a note


def linear_probe(train, val, test, strengths=STRENGTHS, device="cpu"):
    """Multinomial logistic regression on features ([P] figures 1, 10).

    train, val, test: (features (n, D), labels (n,)); `val` chooses the strength, `test`
    is only scored. Loss and gradient are those of the whole set, summed over pieces.
    Returns accuracy and val in [0, 1], predicted (n,), val_predicted, weight, and
    classify(features) -> (n,).
    """
    features = torch.as_tensor(train[0])
    labels = torch.as_tensor(train[1]).long().to(device)
    # rows are in random order, so that of a large set the first are enough
    sample = features[:SAMPLE].double()
    mean = sample.mean(dim=0).float()
    std = sample.std(dim=0).float().clamp(min=1e-6)
    classes = 1 + max(int(np.asarray(known).max()) for _, known in (train, val, test))
    weight = torch.zeros(features.shape[1] + 1, classes, device=device)
    weight.requires_grad_()

    def pieces(rows):
        """Standardised, and a 1 for the bias."""
        for x in torch.as_tensor(rows).split(ROWS_AT_ONCE):
            yield F.pad((x.float() - mean) / std, (0, 1), value=1.0).to(device)

    @torch.no_grad()
    def classify(rows):
        decisions = [(x @ weight).argmax(dim=1) for x in pieces(rows)]
        return torch.cat(decisions).cpu().numpy()

    kept = []
    if len(features) <= ROWS_AT_ONCE:  # standardised once for all steps
        kept = list(pieces(features))

    def batches():
        return zip(kept or pieces(features), labels.split(ROWS_AT_ONCE), strict=True)

    best = {"val": -1.0}
    # from strong to weak, each from the last one's solution
    for strength in strengths:
        descend(weight, strength, batches, len(labels))
        predicted = classify(val[0])
        right = float((predicted == np.asarray(val[1])).mean())
        if right > best["val"]:
            best = {"val": right, "val_predicted": predicted}
            best["weight"] = weight.detach().clone()
    weight.data = best["weight"]
    predicted = classify(test[0])
    right = float((predicted == np.asarray(test[1])).mean())
    return best | {"accuracy": right, "predicted": predicted, "classify": classify}


def descend(weight, strength, batches, count):
    """Minimises mean cross-entropy + strength/2·|W|² from this weight on, by L-BFGS."""
    limits = {"max_iter": 100, "history_size": 10}
    solver = torch.optim.LBFGS([weight], line_search_fn="strong_wolfe", **limits)

    def objective():
        solver.zero_grad()
        total = strength / 2 * weight[:-1].square().sum()
        total.backward()
        for x, labels in batches():
            loss = F.cross_entropy(x @ weight, labels, reduction="sum") / count
            loss.backward()
            total = total + loss.detach()
        return total.detach()

    solver.step(objective)


class Probe:
    """A linear probe for each label set of a study's images."""

    def __init__(self, study, seen, rows):
        cut, device = study.cut, study.options.device
        self.parts, right, val_right = [], [], []
        for known, labels in zip(study.seen_labels.T, study.labels.T, strict=True):
            train, val = (seen[:cut], known[:cut]), (seen[cut:], known[cut:])
            part = linear_probe(train, val, (rows, labels), device=device)
            self.parts.append(part)
            right.append(part["predicted"] == labels)
            val_right.append(part["val_predicted"] == known[cut:])
        self.right = np.stack(right, axis=1)  # (n, label sets)
        self.val_right = np.stack(val_right, axis=1)
        self.val = self.val_right.mean()

    def classify(self, features):
        return np.stack([part["classify"](features) for part in self.parts], axis=1)


def learn_probe(study):
    probe = study.probe
    return {"linear probe": probe.right, "linear probe val": probe.val_right}


RATES = [3e-4, 1e-3]
FINE_TUNING = [{"lr": lr, "decay": decay} for lr in RATES for decay in (0.75, 1.0)]
SMALLEST_CROP = 0.35  # of the area; 0.08 in the papers, whose images have more room
BATCH = 64


def parameter_groups(network, lr, decay):
    """AdamW's groups: what is early is general and moves less (BEiT, SimMIM).

    Block l of L learns at lr·decay^(L - l), the patch embedding as block 0; the last
    norm, the head and position-bias tables at the last block's rate. Biases, norms
    and tokens carry no weight decay.
    """
    depth = len(network.vit.blocks)
    groups = []
    for name, p in network.named_parameters():
        if not p.requires_grad:
            continue
        layer = depth
        block = re.match(r"vit\.blocks\.(\d+)\.", name)
        if block:
            layer = int(block[1]) + 1
        elif re.match(r"vit\.(patch_embed|cls_token|pos_embed)", name):
            layer = 0
        weight_decay = 0.05
        if p.squeeze().ndim < 2 or "pos_embed" in name or "bias_table" in name:
            weight_decay = 0.0
        rate = lr * decay ** (depth - layer)
        groups.append({"params": [p], "lr": rate, "weight_decay": weight_decay})
    return groups


class Tuned(nn.Module):
    """A copy of a network with a linear head on its patch tokens, or on their mean."""

    def __init__(self, vit, outputs, pooled, tune):
        super().__init__()
        torch.manual_seed(0)
        self.vit = deepcopy(vit).requires_grad_(tune)
        self.pooled = pooled
        self.norm = nn.BatchNorm1d(vit.embed_dim, affine=False)
        self.head = nn.Linear(vit.embed_dim, outputs)
        self.to(vit.cls_token.device)
        if vit.pos_embed is not None and fixed_positions(vit):
            self.vit.pos_embed.requires_grad_(False)

    def forward(self, x):
        """(B, 3, S, S) -> (B, outputs), or (B, N, outputs) if not pooled."""
        tokens = self.vit(x)[:, 1:]
        if self.pooled:
            return self.head(self.norm(tokens.mean(dim=1)))
        flat = self.head(self.norm(tokens.flatten(0, 1)))
        return flat.unflatten(0, tokens.shape[:2])


def fixed_positions(vit):
    """Sines and cosines stay as they are: told by rows of one length, √(D/2)."""
    length = vit.pos_embed[0, 1:].norm(dim=-1)
    return bool((length - math.sqrt(vit.embed_dim / 2)).abs().max() < 1e-2)


def fit(network, loss, train, epochs, lr, decay=1.0):
    """Trains a Tuned by AdamW and half a cosine, on crops and flips of `train`."""
    device = network.head.weight.device
    solver = torch.optim.AdamW(parameter_groups(network, lr, decay))
    peaks = [group["lr"] for group in solver.param_groups]
    size = min(BATCH, len(train))
    steps = epochs * (len(train) // size)
    bf16 = sslvit.has_bf16(device.type)
    batches = train.augmented(epochs, size)
    for step, batch in enumerate(batches, start=1):
        if len(batch["images"]) < 2:  # BatchNorm has nothing to say about one image
            continue
        for group, peak in zip(solver.param_groups, peaks, strict=True):
            group["lr"] = sslvit.lr_at(step, steps + 1, steps / 10, peak)
        solver.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            error = loss(network(normalise(batch["images"], device)), batch)
        error.backward()
        solver.step()
    return network.eval()


@torch.no_grad()
def score_images(network, source, score):
    """score(logits, batch) of all images of a source, a row for each."""
    device = network.head.weight.device
    rows = []
    for batch in source.batches(BATCH):
        logits = network(normalise(batch["images"], device)).float().cpu()
        rows.append(score(logits, batch))
    return torch.cat(rows).numpy()


def choose(make, loss, score, total, sources, epochs, settings):
    """Every setting for a third of the epochs, then the best for all of them.

    make() -> a Tuned; loss, score(logits, batch) -> scalar, a row for each image;
    total(rows) on validation images chooses the setting, and the better of its two
    trainings. -> rows of test, of validation, the setting.
    """
    train, val, test = sources

    def attempt(epochs, setting):
        network = fit(make(), loss, train, epochs, **setting)
        rows = score_images(network, val, score)
        return {"total": total(rows), "network": network, "val": rows}

    best, chosen = {"total": -1.0}, settings[0]
    if len(settings) > 1:
        for setting in settings:
            short = attempt(max(1, epochs // 3), setting)
            if short["total"] > best["total"]:
                best, chosen = short, setting
    long = attempt(epochs, chosen)
    if long["total"] >= best["total"]:
        best = long
    return score_images(best["network"], test, score), best["val"], chosen


def fine_tune(vit, sources, classes, epochs, settings):
    """All weights of a copy trained on labels, mean patch token ([P] figure 1).

    sources: to train, to choose and to test; classes: number per label set. Returns
    whether it was right, of test and of validation (n, label sets), and the setting.
    """

    def loss(logits, batch):
        labels = batch["labels"].to(logits.device)
        parts = zip(logits.float().split(classes, dim=1), labels.T, strict=True)
        return sum(F.cross_entropy(part, y) for part, y in parts)

    def right(logits, batch):
        parts = logits.split(classes, dim=1)
        guess = torch.stack([part.argmax(dim=1) for part in parts], dim=1)
        return guess == batch["labels"]

    def make():
        return Tuned(vit, sum(classes), pooled=True, tune=True)

    return choose(make, loss, right, np.mean, sources, epochs, settings)


def learn_tuned(study):
    settings = study.chosen.get("fine-tuning", FINE_TUNING)
    train, val = study.learning.split(study.cut)
    sources = (train, val, study.testing)
    epochs = study.options.epochs
    test, val, setting = fine_tune(study.vit, sources, study.classes, epochs, settings)
    print(f"  fine-tuned with {setting}", flush=True)
    study.chosen["fine-tuning"] = [setting]
    return {"fine-tuned": test, "fine-tuned val": val}


def draw_accuracy(models):
    """Columns for each label set, which have as many classes on the stimuli."""
    columns = {}
    for place, name in enumerate(models[0]["label_names"]):
        for key in FIGURES["accuracy"].keys:
            columns[f"{key}, {name}"] = key, partial(np.take, indices=place)
    chance = 1 / models[0]["classes"][0]
    return draw_points(models, columns, "accuracy", (chance, f"chance {chance:.3g}"))


FIGURES["accuracy"] = Figure(
    number="1 left",
    claim=1,
    text="CL wins linear probing, MIM wins fine-tuning",
    lesson=accuracy_lesson,
    needs=("labels",),
    learn=(learn_probe, learn_tuned),
    parts=(
        Part("linear probe, last layer", ("linear probe",), np.mean, ("CL", "MIM")),
        Part("fine-tune accuracy", ("fine-tuned",), np.mean, ("MIM", "CL")),
    ),
    finding="CL is ahead in the linear probe",
    otherwise="CL is not ahead in the linear probe",
    draw=draw_accuracy,
    keys=("linear probe", "fine-tuned"),
)


# ==== Figure 1 middle. Does the winner depend on size? ==============================

scaling_lesson = """\
Which objective to pretrain with may depend on how large the network is: the paper saw
CL fine-tune better as ViT-Ti and MIM as ViT-L, and reads it as attention that does not
collapse making use of more room. The comparison is fair only where pretraining helped
at all: each network must be above a new one of its size (grey), else the verdict is
'not testable'.

What to look at: the slopes rather than the points, and grey's slope too."""


def trained_enough(pretrained, new):
    """Both networks above a new one of their size, if there is one."""
    if new is None or min(pretrained) > new:
        return ""
    return f"not trained enough: a new network of this size has {new:.3f}"


def draw_scaling(models):
    fig, [[axis]] = canvas(1)
    for role in dict.fromkeys(m["role"] for m in models):
        group = [m for m in models if m["role"] == role]
        line = {"color": colour_of(group[0]), "lw": 2.2, "label": role}
        against(axis, group, "embed_dim", "fine-tuned", **line)
    widths = sorted({m["embed_dim"] for m in models})
    axis.set_xscale("log", base=2)
    axis.set_xticks(widths, widths)
    axis.set_xlabel("width of the tokens")
    return fig


SMALLEST = ("smallest CL", "smallest MIM")
LARGEST = ("largest MIM", "largest CL")
size_part = partial(Part, keys=("fine-tuned",), read=np.mean, unless=trained_enough)

FIGURES["scaling"] = Figure(
    number="1 middle",
    claim=2,
    text="CL wins small models, MIM wins large ones",
    lesson=scaling_lesson,
    needs=("sizes", "labels"),
    learn=(learn_tuned,),
    parts=(
        size_part("fine-tuning, smallest size", roles=SMALLEST),
        size_part("fine-tuning, largest size", roles=LARGEST),
    ),
    finding="CL fine-tunes better at the smallest size",
    otherwise="CL does not fine-tune better at the smallest size",
    draw=draw_scaling,
    keys=("fine-tuned",),
    enough=partial(several, "embed_dim"),
)


# ==== Figure 1 right. Do tokens know what is where? =================================

dense_lesson = """\
Segmentation asks every token for the classes of its own p × p pixels. One linear layer
does it, on a frozen network or fine-tuned with it, chosen on validation as before; the
paper used COCO boxes and Mask R-CNN, which need a GPU for days. The score, with sums
over all test images, is the mean over classes of

    IoU(c) = Σ|predicted c and true c| / Σ|predicted c or true c|.

The paper saw MIM ahead, as its tokens stay themselves. What to look at: linear says
what tokens hold, fine-tuned what they can become."""

VOID = 255  # a pixel of no class, which neither the loss nor the score counts
LINEAR_HEADS = [{"lr": 1e-2}, {"lr": 1e-3}]


def overlap(pred, target, classes):
    """Pixels of intersection and union; pred, target (B, h, w) of class numbers.

    target is VOID where nobody knows -> (B, classes, 2).
    """
    known = (target != VOID).flatten(1)[..., None]
    p = F.one_hot(pred.flatten(1).long(), classes).bool() & known  # (B, hw, classes)
    true = target.masked_fill(target == VOID, 0).flatten(1).long()
    t = F.one_hot(true, classes).bool() & known
    return torch.stack([(p & t).sum(dim=1), (p | t).sum(dim=1)], dim=-1)


def mean_iou(counts):
    """Intersection over union, mean over the classes that occur ([P] figure 1 right).

    counts (classes, 2): overlap()'s pixels, summed (or averaged) over a set of images
    -> scalar in [0, 1]. 1: every pixel right.
    """
    intersection, union = np.asarray(counts, dtype=float).T
    occurs = union > 0
    return (intersection[occurs] / union[occurs]).mean()


def dense_probe(vit, sources, classes, epochs, tune, settings):
    """Segmentation: a linear layer per token predicts the classes of its p × p pixels.

    tune: the network learns too ([P] figure 1 right). sources as in fine_tune(), with
    masks. Returns overlaps (n, classes, 2) of test and of validation, and the setting.
    """
    p = vit.patch_size

    def fold(logits, mask):  # (B, N, classes·p²) -> (B, classes, S, S)
        return F.fold(logits.float().mT, mask.shape[1:], p, stride=p)

    def loss(logits, batch):
        mask = batch["masks"].to(logits.device)
        return F.cross_entropy(fold(logits, mask), mask, ignore_index=VOID)

    def counts(logits, batch):
        mask = batch["masks"]
        return overlap(fold(logits, mask).argmax(dim=1), mask, classes)

    def total(counts):
        return mean_iou(counts.mean(axis=0))

    def make():
        return Tuned(vit, classes * p * p, pooled=False, tune=tune)

    return choose(make, loss, counts, total, sources, epochs, settings)


def learn_dense(study):
    if not (study.on_stimuli or study.options.masks):
        return {}
    vit, epochs = study.vit, study.options.epochs
    testing = replace(study.testing, with_masks=True)
    learning = study.learning.first(max(4, len(study.learning) // 4))
    learning = replace(learning, with_masks=True)
    classes = 1 + max(largest_class(learning), largest_class(testing))
    train, val = learning.split(3 * len(learning) // 4)
    sources = (train, val, testing)
    found = {}
    for head, settings in (("linear", LINEAR_HEADS), ("fine-tuned", FINE_TUNING)):
        key = f"mIoU {head}"
        tune = head == "fine-tuned"
        settings = study.chosen.get(key, settings)
        rows, _, setting = dense_probe(vit, sources, classes, epochs, tune, settings)
        print(f"  {head} segmentation with {setting}", flush=True)
        study.chosen[key] = [setting]
        found[key] = rows
    return found


def largest_class(source):
    largest = 0
    for batch in source.batches(BATCH):
        known = batch["masks"] * (batch["masks"] != VOID)
        largest = max(largest, int(known.max()))
    return largest


def draw_dense(models):
    columns = {key: (key, mean_iou) for key in FIGURES["dense"].keys}
    return draw_points(models, columns, "mean intersection over union")


FIGURES["dense"] = Figure(
    number="1 right",
    claim=3,
    text="MIM wins dense prediction",
    lesson=dense_lesson,
    needs=("masks", "labels"),
    learn=(learn_dense,),
    parts=(
        Part("mIoU, linear", ("mIoU linear",), mean_iou, ("MIM", "CL")),
        Part("mIoU, fine-tuned", ("mIoU fine-tuned",), mean_iou, ("MIM", "CL")),
    ),
    finding="MIM's tokens know better what is where",
    otherwise="MIM's tokens do not know better what is where",
    numbers="mIoU {MIM:.3f} against {CL:.3f}",
    draw=draw_dense,
    keys=("mIoU linear", "mIoU fine-tuned"),
)


# ==== Figure 9 left. Outline or surface? ============================================

bias_lesson = """\
Give a network a cat's outline with an elephant's skin and ask what it sees: among the
decisions that match either cue, shape bias is the share that match the shape (Geirhos
et al. 2019). Humans are near 0.95, supervised CNNs near 0.2. A probe first learns
classes whose two cues agree. On the stimuli the pairing of shape and texture that is
taught is one of eight, so all eight are taught and averaged; images whose two cues are
of one class are dropped. The paper saw CL nearer to shape, MIM to texture.

What to look at: on which side of 0.5 a network is, and where the untrained one is,
which has no opinion, only an architecture."""


def shape_bias(cues):
    """Outline or surface?  The share of shape among decisions that match either cue.

    Geirhos et al. 2019; [P] figure 9 left. cues (pairings, 2): the share of decisions
    that match shape, texture -> scalar in [0, 1], mean over the pairings. 1: always the
    shape, 0: always the texture; nan if no decision matches.
    """
    shape, texture = np.asarray(cues, dtype=float).T
    matched = shape + texture
    matched[matched == 0] = math.nan
    return (shape / matched).mean()


def learn_bias(study):
    """-> cues (n, pairings, 2): did it match shape, texture; 0 where not asked."""
    if study.on_stimuli:
        pairings = [taught_pairing(study, offset) for offset in range(8)]
        return {"cues": np.stack(pairings, axis=1)}
    if study.cues is None:
        return {}
    cues = study.cues["labels"]
    known = np.isin(study.seen_labels[:, 0], cues)
    decisions = decide(study, known, study.seen_labels[:, 0], study.cues["output"])
    return {"cues": (decisions[:, None] == cues)[:, None]}


def taught_pairing(study, offset):
    """Taught: class c is shape c with texture c + offset. Asked: all other pairs."""
    seen_shapes, seen_textures = study.seen_labels.T
    known = (seen_textures - seen_shapes) % 8 == offset
    decisions = decide(study, known, seen_shapes, study.rows["output"])
    # the class of each cue: that of a texture is the shape that it was taught with
    cues = (study.labels - [0, offset]) % 8
    conflict = cues[:, 0] != cues[:, 1]
    return (decisions[:, None] == cues) & conflict[:, None]


def decide(study, known, labels, rows):
    """Classes of `rows` by a probe that learnt the `known` training images.

    The better one, on validation, of mean patch token and CLS.
    """
    seen, labels = study.seen["output"][known], labels[known]
    cut = 3 * len(seen) // 4
    probes = []
    for kind in range(2):
        train = seen[:cut, kind], labels[:cut]
        val = seen[cut:, kind], labels[cut:]
        test = rows[:, kind], np.zeros(len(rows))
        probes.append(linear_probe(train, val, test))
    return max(probes, key=lambda probe: probe["val"])["predicted"]


def draw_bias(models):
    columns = {"cue conflict": ("cues", shape_bias)}
    line = (0.5, "no preference")
    return draw_points(models, columns, "share of shape decisions", line)


FIGURES["bias"] = Figure(
    number="9 left",
    claim=9,
    text="CL is shape-biased, MIM texture-biased",
    lesson=bias_lesson,
    needs=("cues", "labels"),
    learn=(learn_bias,),
    parts=(Part("shape bias", ("cues",), shape_bias, ("CL", "MIM")),),
    finding="CL decides by shape more often",
    otherwise="CL does not decide by shape more often",
    numbers="{CL:.2f} against {MIM:.2f}",
    draw=draw_bias,
    keys=("cues",),
)


# ==== Figure 9 right. Which frequencies does recognition need? ======================

noise_lesson = """\
Noise of one ring of spatial frequencies and of fixed energy is added to test images,
and the probe of clean images decides: relative drop = 1 - accuracy(noisy) /
accuracy(clean). A network that reads texture needs what lies under high-frequency
noise. The paper saw it hurt MIM more; that must mean more than 'noise hurts MIM more',
so the claim compares the drop in the upper third of the frequencies minus that in the
lower third.

What to look at: which ring hurts most. The upper axis is in pixels per wave: 2 is one
dark, one bright pixel; a patch is as long as its side."""

BANDS = [(0.1 * math.pi * i, 0.1 * math.pi * (i + 1)) for i in range(10)]  # rad/px
NOISE = 25.5  # root mean square: a tenth of full brightness


def band_noise(size, low, high, generator=None):
    """Gaussian noise of the frequencies low ≤ |ω| < high (rad/px), without the mean.

    (B, 3, h, w) like `size`: each image's root mean square is 1 ([P] figure 9 right).
    """
    noise = torch.fft.fft2(torch.randn(size, generator=generator))
    y = torch.fft.fftfreq(size[-2]) * 2 * math.pi
    x = torch.fft.fftfreq(size[-1]) * 2 * math.pi
    radius = (y[:, None].square() + x.square()).sqrt()  # (h, w)
    ring = (radius >= low) & (radius < high) & (radius > 0)
    noise = torch.fft.ifft2(noise * ring).real
    return noise / noise.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


def band_noise_drop(accuracies):
    """What does noise cost?  1 - noisy / clean accuracy ([P] figure 9 right).

    accuracies (1 + bands,), the clean one first -> (bands,), at most 1. 0: does not
    matter, 1: all is lost; nan: never right.
    """
    return 1 - np.asarray(accuracies[1:]) / (accuracies[0] or math.nan)


@torch.no_grad()
def learn_noise(study):
    """-> noise (n / 2, 1 + bands): share of label sets that are right, clean first."""
    half = study.testing.first(max(1, len(study.testing) // 2))
    generator = torch.Generator().manual_seed(0)
    rows = []
    for batch in half.batches(BATCH, "band noise"):
        images = batch["images"].float()
        right = []
        for low, high in [(0, 0), *BANDS]:
            noisy = images
            if high > 0:  # else the clean ones
                noise = NOISE * band_noise(images.shape, low, high, generator)
                noisy = (images + noise).clamp(0, 255)
            tokens = study.vit(normalise(noisy, study.vit.cls_token.device))
            seen = pooled_and_cls(tokens)[:, study.probe.kind].cpu()
            decisions = study.probe.classify(seen)
            right.append((decisions == batch["labels"].numpy()).mean(axis=1))
        rows.append(np.stack(right, axis=1))
    return {"noise": np.concatenate(rows)}


def high_minus_low(accuracies):
    return late_minus_early(band_noise_drop(accuracies))


def pixels_per_wave(frequency):
    """π per pixel -> pixels per wave, and back: both are 2 / x."""
    return 2 / np.maximum(frequency, 1e-3)


def draw_noise(models):
    drop = "relative accuracy drop"
    panel = Panel("noise", drop, BAND, band_noise_drop, line=(0, "no loss"))
    fig = draw_panels(models, [panel])
    both_ways = (pixels_per_wave, pixels_per_wave)
    above = fig.axes[0].secondary_xaxis("top", functions=both_ways)
    above.set_xlabel("pixels per wave")
    above.set_xticks([40, 13, 8, 5, 4, 3, 2.5, 2.1])
    return fig


FIGURES["noise"] = Figure(
    number="9 right",
    claim=9,
    text="high-frequency noise hurts MIM more",
    lesson=noise_lesson,
    needs=("labels",),
    learn=(learn_noise,),
    parts=(Part("noise: drop, high - low", ("noise",), high_minus_low, ("MIM", "CL")),),
    finding="High-frequency noise hurts MIM more than CL",
    otherwise="High-frequency noise does not hurt MIM more than CL",
    numbers="high - low {MIM:+.2f} against {CL:+.2f}",
    draw=draw_noise,
    keys=("noise",),
)


# ==== Figure 10. Which layer knows? =================================================

layers_lesson = """\
A linear probe after every sub-layer: where in the network does a class become a
direction? The paper saw MIM ahead in early layers and best in the middle, its last
layers a decoder of pixels, while CL rises to the last. So a probe should say which
layer and which pooling it reads: the verdict reads mean patch tokens after each MLP,
CLS is drawn beside, and the best layer is chosen on validation images, lest chance
choose it.

What to look at: does MIM fall in its last third, and random layers (grey) not?"""


def learn_layers(study):
    """-> layers, layers val (n, L) for claims; curves (n, 2L, label sets)."""
    depth = len(study.vit.blocks)
    states = list(np.ndindex(depth, 2))  # (layer, 0 after attention or 1 after MLP)
    found = {}
    for kind in ("cls", "pooled"):
        seen, rows = study.seen[kind], study.rows[kind]  # (n, L, 2, D)
        probes = []
        for state in progress(states, f"probes of every layer, {kind}", 2 * depth):
            probes.append(Probe(study, seen[:, *state], rows[:, *state]))
        right = np.stack([probe.right for probe in probes], axis=1)
        val_right = np.stack([probe.val_right for probe in probes], axis=1)
        found[f"layers {kind}"] = right
    # claims read what came last, pooled tokens, after each MLP; mean over label sets
    found["layers"] = right[:, 1::2].mean(axis=2)
    found["layers val"] = val_right[:, 1::2].mean(axis=2)
    return found


BOTH = ("layers", "layers val")


def best_layer(validated):
    return 1 + np.argmax(validated)


def best_minus_last(layers, validated):
    return layers[np.argmax(validated)] - layers[-1]


def last_minus_best(layers, validated):
    return -best_minus_last(layers, validated)


def draw_layers(models):
    """A row for each pooling, a column for each label set."""
    panels = []
    for kind in ("pooled", "cls"):
        for column, name in enumerate(models[0]["label_names"]):
            chance = 1 / models[0]["classes"][column]
            pick = partial(np.take, indices=column, axis=1)
            line = (chance, f"chance {chance:.3g}")
            label = f"probe of {name}, {kind}"
            panels.append(Panel(f"layers {kind}", label, HALF, pick, line=line))
    fig = draw_panels(models, panels)
    for axis in fig.axes:
        axis.set_ylim(0, 1)
    return fig


FIGURES["layers"] = Figure(
    number="10",
    claim=10,
    text="MIM is better in early layers, CL in the last",
    lesson=layers_lesson,
    needs=("labels",),
    measure=(measure_tokens,),
    learn_from=(measure_tokens,),
    learn=(learn_layers,),
    parts=(
        Part("pooled probe, early", ("layers",), early, ("MIM", "CL")),
        Part("best layer, on validation", ("layers val",), best_layer, ("CL", "MIM")),
        Part("MIM: best layer - last", BOTH, best_minus_last, ("MIM",)),
        Part("CL: late - early", ("layers",), late_minus_early, ("CL",)),
    ),
    finding="MIM's early layers know more",
    otherwise="MIM's early layers do not know more",
    numbers="probe {MIM:.3f} against {CL:.3f}",
    draw=draw_layers,
    keys=("layers pooled", "layers cls"),
)


# ==== Figure 11. What if the decoder does the decoding? =============================

decoder_lesson = """\
SimMIM predicts pixels with one linear layer, so that its last encoder layers have to do
the decoding. Give it a few decoder blocks, as MAE has, and the encoder is free to know
more up to its end: that is how the paper explains MIM's falling curve. A decoder also
makes the network larger, so the control is a network without decoder that is as deep as
encoder and decoder together.

What to look at: the drop from the best layer to the last, with decoder, without, and in
the control."""

DECODED = "MIM with decoder"


def draw_decoder(models):
    models = [m for m in models if m["role"] in ("MIM", "untrained")]
    probe = Panel("layers", "probe of mean patch token")
    return draw_panels(models, (probe, NMI, AT_PI))


FIGURES["decoder"] = Figure(
    number="11",
    claim=11,
    text="an explicit decoder keeps the last layers useful",
    lesson=decoder_lesson,
    roles=("MIM",),
    needs=("decoder", "labels"),
    measure=(measure_tokens, measure_nmi, measure_fourier),
    learn_from=(measure_tokens,),
    learn=(learn_layers,),
    parts=(
        Part("last layer - best", BOTH, last_minus_best, (DECODED, "MIM")),
        Part("last - best, as deep", BOTH, last_minus_best, (DECODED, "MIM as deep")),
        Part("NMI, last layer", ("nmi",), last, (DECODED, "MIM")),
    ),
    finding="With a decoder the last layer stays closer to the best",
    otherwise="With a decoder the last layer stays no closer to the best",
    numbers="{difference:+.3f}",
    draw=draw_decoder,
    keys=("layers", "nmi", "fourier"),
    enough=partial(several, "decoder_depth"),
)


# ==== Figure 12. Can one network have both? =========================================

sweep_lesson = """\
L = (1 - λ)·L_MIM + λ·L_CL on one shared encoder. The two objectives ask for different
layers, so the paper expected no quarrel, and saw the sum beat both at λ = 0.2: masked
early, contrastive late. The λ that is compared is chosen on validation images, then
tested on others: the best of many by its test score always wins.

What to look at: whether the middle of the upper curves is above both ends by more than
the seeds scatter, and whether the NMI of λ = 0.2 follows blue at first and orange at
the end."""

THREE = ("best hybrid", "CL", "MIM")


def beats_both(hybrid, cl, mim):
    """Against the better of the two, so that the difference can be read off the row."""
    better = mim
    if np.mean(cl[0]) > np.mean(mim[0]):
        better = cl
    return hybrid - better


def middle_minus_last(nmi):
    return middle(nmi) - last(nmi)


def draw_sweep(models):
    fig, axes = canvas(2, rows=2, height=4.2)
    trained = [m for m in models if m["lam"] is not None and not m["decoder_depth"]]
    untrained = [m for m in models if m["role"] == "untrained"]
    for axis, key in zip(axes[0], ("linear probe", "fine-tuned"), strict=True):
        against(axis, trained, "lam", key, color="black", lw=1)
        if untrained:
            grey = np.mean([m["values"][key] for m in untrained])
            reference(axis, grey, "new network")
        axis.set_xlabel("λ (0: MIM, 1: CL)")
    curves(axes[1, 0], models, NMI)
    curves(axes[1, 1], models, AT_PI)
    fig.colorbar(ScalarMappable(cmap=LAMBDAS), ax=axes, shrink=0.6, label="λ")
    return fig


FIGURES["sweep"] = Figure(
    number="12",
    claim=12,
    text="a hybrid beats both",
    lesson=sweep_lesson,
    roles=("CL", "MIM", "hybrid"),
    needs=("lambdas", "labels"),
    measure=(measure_nmi, measure_fourier),
    learn=(learn_probe, learn_tuned),
    parts=(
        Part("probe: best λ - better", ("linear probe",), np.mean, THREE, beats_both),
        Part("fine-tune: best λ - better", ("fine-tuned",), np.mean, THREE, beats_both),
        Part("λ = 0.2: NMI, middle - last", ("nmi",), middle_minus_last, ("hybrid",)),
        Part("Δ at π, early: λ = 0.2 - CL", ("fourier",), early_high, ("hybrid", "CL")),
        Part("Δ at π, late: MIM - λ = 0.2", ("fourier",), late_high, ("MIM", "hybrid")),
    ),
    finding="A hybrid probes better than both",
    otherwise="No hybrid probes better than both",
    numbers="{hybrid:.3f} against CL {CL:.3f}, MIM {MIM:.3f}",
    draw=draw_sweep,
    keys=("linear probe", "fine-tuned", "nmi", "fourier"),
    enough=partial(several, "lam", count=3),
)


# ==== Not in the paper. Which layers see the same differences? ======================

cka_lesson = """\
Do two layers, of one network or of two, tell the same images apart? Centred kernel
alignment is the cosine of their centred matrices of similarities between images
(Kornblith et al. 2019). The usual estimator is biased upwards when there are fewer
images than dimensions; this one (Song et al. 2012) has unrelated layers at 0.

What to look at: blocks on the diagonal are layers that change little; off it, whether
CL's layers resemble MIM's at any depth, or both only the untrained ones."""

CKA_IMAGES = 1000  # an unbiased estimator does not need more, and matrices are n × n


def cka(matrices):
    """Do two layers see the same differences between images?  Linear CKA, unbiased.

    Cosines of U-centred similarity matrices. matrices: K of (n, D), D may differ ->
    (K, K), at most 1. 1: the same up to rotation and scale. 0: unrelated, in the mean.
    """
    units = []
    for x in matrices:
        n = len(x)
        gram = (x @ x.T).double().fill_diagonal_(0)
        rows = gram.sum(dim=1, keepdim=True) / (n - 2)
        total = gram.sum() / ((n - 1) * (n - 2))
        centred = (gram - rows - rows.T + total).fill_diagonal_(0)
        units.append((centred / centred.norm()).flatten().float())
    units = torch.stack(units)
    return units @ units.T


def compare_layers(models, rows):
    """CKA of every layer's mean patch token with every other, of the first seeds."""
    matrices, ends, names = [], [0], []
    for model, found in zip(models, rows, strict=True):
        if model["run"] == 0:
            pooled = torch.from_numpy(found["pooled"][:CKA_IMAGES, :, 1])  # (n, L, D)
            matrices += pooled.unbind(dim=1)
            ends.append(len(matrices))
            names.append(model["name"])
    return {"cka": cka(matrices).numpy(), "ends": ends, "names": names}


def draw_cka(models):
    together = models[0]["together"]
    fig, [[axis]] = canvas(1, height=7)
    ends = np.array(together["ends"])
    shown = axis.imshow(together["cka"], vmin=0, vmax=1, origin="lower")
    for end in ends[1:-1]:
        axis.axhline(end - 0.5, color="white")
        axis.axvline(end - 0.5, color="white")
    middles = (ends[1:] + ends[:-1] - 1) / 2
    names = [wrapped(name) for name in together["names"]]
    axis.set_xticks(middles, names)
    axis.set_yticks(middles, names)
    axis.set_xlabel("layers, in order")
    fig.colorbar(shown, label="CKA of mean patch tokens (unbiased)")
    return fig


FIGURES["cka"] = Figure(
    number="-",
    text="Which layers see the same differences between images",
    lesson=cka_lesson,
    measure=(measure_tokens,),
    across=(compare_layers,),
    draw=draw_cka,
    keys=("cka",),
)


# ==== The engine: images ============================================================
# Images are read anew by every pass, by DataLoader's workers, and are never all in
# memory; what grows with their number are the rows and features that were asked for.


@dataclass
class Source:
    """Some images of a set (Stimuli, ImageFolder), in an order."""

    images: object
    indices: list
    size: int
    workers: int = 0
    masks: str = ""  # folder of PNGs named as the images are
    root: str = ""  # of the images
    with_masks: bool = False

    def __len__(self):
        return len(self.indices)

    def only(self, indices):
        return replace(self, indices=list(indices))

    def first(self, count):
        return self.only(self.indices[:count])

    def split(self, cut):
        return self.first(cut), self.only(self.indices[cut:])

    def batches(self, size, label="images"):
        """Centre squares: dicts of images, labels, index and perhaps masks."""
        keys = [(None, index) for index in self.indices]
        return self.load(keys, size, label)

    def augmented(self, epochs, size):
        """Every epoch in another order, cropped and flipped; whole batches only."""
        keys = []
        for epoch in range(epochs):
            order = np.random.default_rng([0, epoch]).permutation(len(self))
            whole = order[: len(order) // size * size]
            keys += [(epoch, self.indices[place]) for place in whole]
        return self.load(keys, size, "training")

    def load(self, keys, size, label):
        batches = [keys[i : i + size] for i in range(0, len(keys), size)]
        loader = DataLoader(
            self,
            batch_sampler=batches,
            num_workers=self.workers,
            collate_fn=collate,
            generator=torch.Generator(),
        )
        for faults, batch in progress(loader, label, len(batches)):
            for fault in faults:
                if isinstance(fault, UserError):
                    raise fault
                print(f"  left out: {fault}")
            if batch:
                yield batch

    def __getitem__(self, key):
        """What the loader asks for, with key = (epoch, index)."""
        epoch, index = key
        try:
            return self.read(epoch, index)
        except UserError as error:
            return {"fault": error}
        except Exception as error:  # Pillow raises almost anything on a broken file
            name = self.images[index][0]
            return {"fault": f"{name!r} ({type(error).__name__}: {error})"}

    def read(self, epoch, index):
        """One image; epoch None: its centre square. Masks are flipped, not cropped."""
        image, labels = self.images.load(index)
        found = {"labels": torch.tensor(labels), "index": torch.tensor(index)}
        if self.with_masks:
            found["masks"] = self.read_mask(index, sslvit.upright_size(image))
        rng = np.random.default_rng([1, epoch or 0, index])
        if epoch is None or self.with_masks:
            pixels = sslvit.center_crop(image, self.size)
        else:
            pixels = sslvit.random_crops(image, self.size, [SMALLEST_CROP], rng)[0]
        found["images"] = torch.from_numpy(pixels)
        if epoch is not None and rng.random() < 0.5:
            found["images"] = found["images"].flip(-1)
            if self.with_masks:
                found["masks"] = found["masks"].flip(-1)
        return found

    def read_mask(self, index, image_size):
        if isinstance(self.images, Stimuli):
            return torch.from_numpy(self.images[index][-1]).long()
        path = Path(self.images[index][0]).relative_to(self.root)
        path = Path(self.masks) / path.with_suffix(".png")
        png = Image.open(path)
        sizes = f"{png.size}, its image {image_size}"
        require(png.size == image_size, f"--masks: {path} has size {sizes}")
        mask = np.asarray(ImageOps.fit(png, (self.size, self.size), Image.NEAREST))
        fault = f"--masks: {path}: class numbers need grey or palette PNGs"
        require(mask.ndim == 2, fault)
        return torch.from_numpy(mask.astype(np.int64))


def collate(items):
    """-> what could not be read, and the rest as a batch."""
    batch = defaultdict(list)
    for item in items:
        for key, value in item.items():
            batch[key].append(value)
    faults = batch.pop("fault", [])
    return faults, {key: torch.stack(values) for key, values in batch.items()}


def normalise(images, device):
    """Brightness 0 .. 255 -> what the networks were trained on."""
    return (images.to(device) / 255 - MEAN.to(device)) / STD.to(device)


def progress(items, label, total):
    """Yields the items; a line every 5 s with the time left."""
    began = said = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now > said + 5:
            left = (now - began) * (total / done - 1)
            print(f"  {label}: {done}/{total}, {left:.0f} s left", flush=True)
            said = now


# ==== The engine: one pass ==========================================================


@dataclass
class Layer:
    """One layer on one batch: what measurements ask for, computed once; no CLS."""

    number: int  # 1 .. L
    last: bool
    grid: tuple  # rows, columns
    patch_size: int
    output_weight: torch.Tensor  # of its attention (D, D)
    record: sslvit.Record
    entered: torch.Tensor  # tokens before it (B, N, D)
    above: torch.Tensor | None  # what attention added in the layer before

    @property
    def heads(self):
        return self.record.heads[:, :, 1:]  # (B, H, N, d)

    @cached_property
    def attn(self):
        """Attention among patches, rows renormalised to sum 1 (B, H, N, N)."""
        among = self.record.attn[:, :, 1:, 1:]
        return among / among.sum(dim=-1, keepdim=True).clamp(min=1e-37)

    @cached_property
    def added(self):
        """What attention adds to the residual stream, LayerScale included (B, N, D)."""
        return self.record.mid[:, 1:] - self.entered

    @cached_property
    def states(self):
        """Tokens after attention and after the MLP (B, 2, N, D)."""
        return torch.stack([self.record.mid[:, 1:], self.record.out[:, 1:]], dim=1)

    @cached_property
    def cls(self):
        return torch.stack([self.record.mid[:, 0], self.record.out[:, 0]], dim=1)


def pooled_and_cls(tokens):
    """Tokens (B, 1+N, D) -> (B, 2, D): the mean patch token, and CLS."""
    return torch.stack([tokens[:, 1:].mean(dim=1), tokens[:, 0]], dim=1)


def measure_batch(vit, x, measures):
    """All measurements of one batch -> {key: (B, L, ...)}; output is (B, 2, D)."""
    if not measures:
        return {"output": pooled_and_cls(vit(x))}
    tokens, records = vit(x, record=True)
    p = vit.patch_size
    grid = (x.shape[2] // p, x.shape[3] // p)
    entered, above = vit.embed(x, None, None, *grid)[:, 1:], None
    found = defaultdict(list)
    for number, record in enumerate(records, start=1):
        last = number == len(records)
        weight = vit.blocks[number - 1].attn.proj.weight
        layer = Layer(number, last, grid, p, weight, record, entered, above)
        for measure in measures:
            for key, value in measure(layer).items():
                found[key].append(value)
        entered, above = record.out[:, 1:], layer.added
    rows = {key: torch.stack(values, dim=1) for key, values in found.items()}
    return rows | {"output": pooled_and_cls(tokens)}


FEATURES = ("output", "pooled", "cls")  # large: not kept with the samples


@torch.no_grad()
def collect(vit, batches, measures, total, half=False):
    """One pass over batches serves every measurement -> arrays, a row per image.

    half: features in half precision. Their size is known after the first batch.
    """
    rows, done = {}, 0
    for batch in batches:
        x = normalise(batch["images"], vit.cls_token.device)
        new = measure_batch(vit, x, measures)
        new |= {"labels": batch["labels"], "index": batch["index"]}
        for key, value in new.items():
            value = value.cpu()
            if half and key in FEATURES:
                value = value.half()
            if done == 0:
                rows[key] = np.empty((total, *value.shape[1:]), value.numpy().dtype)
            rows[key][done : done + len(x)] = value
        if done == 0:
            size = sum(array.nbytes for array in rows.values()) / 1e9
            print(f"  {total} images: {size:.3f} GB of numbers to keep", flush=True)
        done += len(x)
    require(done > 0, "not one image could be read")
    return {key: array[:done] for key, array in rows.items()}


def unique(figures, field):
    """The functions of several figures, each once, in order."""
    found = []
    for figure in figures:
        found += [f for f in getattr(figure, field) if f not in found]
    return found


class Study:
    """One network and what its figures need.

    testing, learning: Sources, to test on and to learn from; rows, labels: measured on
    the first; seen, seen_labels: on the second, where something is learnt.
    """

    def __init__(self, vit, options, chosen):
        self.vit = vit
        self.options = options
        # what the first seed of a network chose, for the others
        self.chosen = chosen
        self.size = vit.facts["image_size"]
        config = Config(data=options.data, image_size=self.size)
        train, test = sslvit.find_data(config)
        self.on_stimuli = isinstance(train, Stimuli)
        self.is_labelled = test is not None and train.classes == test.classes != ()
        if test is None:
            test = train
        self.label_names = list(test.label_names)
        self.class_names = test.classes
        self.classes = [len(names) for names in test.classes]
        rng = np.random.default_rng(0)
        self.testing = self.source(test, rng, options.images)
        self.learning = self.source(train, rng, 4 * options.images)
        self.seen, self.cues = {}, None

    def source(self, images, rng, count):
        order = rng.permutation(len(images)).tolist()
        if count > 0:
            order = order[:count]
        given = self.options
        return Source(images, order, self.size, given.workers, given.masks, given.data)

    def run(self, figures):
        """Everything that the figures ask for; -> rows, one per test image."""
        can_do = self.is_labelled or any("labels" not in f.needs for f in figures)
        fault = "one class or none, or not the same classes in train and val"
        require(can_do, f"--data {self.options.data}: {fault}")
        self.rows = self.look(self.testing, unique(figures, "measure"), "test images")
        self.testing = self.testing.only(self.rows["index"].tolist())
        self.labels = self.rows["labels"]
        learners = unique(figures, "learn")
        if not self.is_labelled or not learners:
            return self.rows
        measures = unique(figures, "learn_from")
        self.seen = self.look(self.learning, measures, "training images", half=True)
        self.learning = self.learning.only(self.seen["index"].tolist())
        self.seen_labels = self.seen["labels"]
        if self.options.cue_conflict and learn_bias in learners:
            self.cues = self.look(self.cue_source(), [], "cue-conflict images")
        for learner in learners:
            self.rows |= learner(self)
        return self.rows

    def look(self, source, measures, label, half=False):
        """One pass over a source -> {key: rows}."""
        size = BATCH
        if measures:  # at most 400 MB of attention weights
            heads = self.vit.blocks[0].attn.num_heads
            tokens = 1 + (source.size // self.vit.patch_size) ** 2
            weights = len(self.vit.blocks) * heads * tokens**2
            size = max(1, min(BATCH, 10**8 // weights))
        batches = source.batches(size, label)
        return collect(self.vit, batches, measures, len(source), half)

    def cue_source(self):
        """Geirhos' names, cat1-elephant2.png: a cat's shape; congruent ones dropped."""
        names = list(self.class_names[0])
        images = sslvit.ImageFolder(self.options.cue_conflict)
        keep = []
        for place, (path, _) in enumerate(images):
            match = re.fullmatch(r"([a-z]+)\d*-([a-z]+)\d*\.png", Path(path).name)
            known = match and names.count(match[1]) and names.count(match[2])
            fault = "is no <shape><n>-<texture><n>.png of classes in --data"
            require(known, f"--cue-conflict: {path} {fault}")
            images[place] = path, [names.index(cue) for cue in match.groups()]
            if match[1] != match[2]:
                keep.append(place)
        return replace(self.testing, images=images, indices=keep)

    @property
    def cut(self):
        """Three quarters of the training images to learn from, the rest to choose."""
        return 3 * len(self.seen_labels) // 4

    @cached_property
    def probe(self):
        """The better probe, on validation, of mean patch token and CLS."""
        seen, rows = self.seen["output"], self.rows["output"]
        probes = [Probe(self, seen[:, kind], rows[:, kind]) for kind in range(2)]
        best = max(probes, key=lambda probe: probe.val)
        best.kind = probes.index(best)
        return best

    @torch.no_grad()
    def pictures(self, figures):
        """Numbers for pictures, from the first test images."""
        batch = next(self.testing.first(10).batches(10))
        x = normalise(batch["images"], self.vit.cls_token.device)
        found = {}
        for picture in unique(figures, "pictures"):
            found |= picture(self.vit, x)
        return found

    def values(self, figures):
        """Means over images, and what is no mean."""
        found = {}
        for key, rows in self.rows.items():
            if key not in (*FEATURES, "labels", "index"):
                found[key] = rows.mean(axis=0, dtype=np.float64)
        for summarise in unique(figures, "summary"):
            found |= summarise(self.rows)
        return found

    def note(self):
        """What a reader must know of the probes."""
        if not self.seen:
            return ""
        per_class = self.cut / max(self.classes)
        if per_class >= FEW_SHOT:
            return ""
        return f"few-shot: {per_class:.0f} training images a class"


# ==== The engine: verdicts ==========================================================
# A part holds when its difference has the claim's sign and its 95 % interval excludes
# 0; it is opposed when the interval lies on the other side.

ROLES = ("untrained", "CL", "MIM", "hybrid")
SHAPE = ("image_size", "patch_size", "embed_dim", "depth")
DRAWS = 400  # resampled sets of test images, the same for all networks
HALVES = 100
T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]


def t_quantile(freedom):
    """Student's 97.5 % quantile."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    return 1.96 + 2.372 / freedom + 2.82 / freedom**2


@cache
def resampled(n):
    """Weights (1 + DRAWS, n). Row 0: all n images; others: how often each is drawn."""
    counts = np.random.default_rng(0).multinomial(n, [1 / n] * n, size=DRAWS)
    return np.concatenate([np.ones((1, n)), counts]) / n


@cache
def halves(n):
    """Row 0: all n images; the others: half of them, without replacement.

    Copies of rows would lower a matrix's rank; and a half's spread around the whole is
    that of n new images.
    """
    rng = np.random.default_rng(0)
    drawn = [rng.permutation(n)[: n // 2] for _ in range(HALVES)]
    return [np.arange(n), *drawn]


def numbers_of(part, rows):
    """A part's number of one network: of all test images, then of every draw."""
    if part.of_matrices:
        matrices = [rows[key] for key in part.keys]
        draws = halves(len(matrices[0]))
        return np.array([part.read(*[x[take] for x in matrices]) for take in draws])
    means = []
    for key in part.keys:
        x = rows[key].astype(np.float64)
        means.append(np.tensordot(resampled(len(x)), x, axes=1))
    return np.array([part.read(*drawn) for drawn in zip(*means, strict=True)])


def paired(groups):
    """Groups of networks -> of equal length, seed by seed where seeds are known."""
    by_seed = [{m["seed"]: m for m in group} for group in groups]
    common = set.intersection(*map(set, by_seed)) - {None}
    no_seed_twice = [len(seeds) for seeds in by_seed] == [len(g) for g in groups]
    if common and no_seed_twice:
        return [[seeds[seed] for seed in sorted(common)] for seeds in by_seed]
    length = min(map(len, groups))
    return [group[:length] for group in groups]


def interval_of(differences):
    """(1 + draws, seeds) -> [low, high], and what it is over.

    Three seeds or more: ± t·√(s²/n + v), s of the seeds' differences, v the variance
    over images. Fewer: images alone.
    """
    seeds = differences.shape[1]
    mean = differences[0].mean()
    variance = np.nanvar(differences[1:].mean(axis=1), ddof=1)
    quantile = 1.96
    kind = f"images only, {count_seeds(seeds)}"
    if seeds >= 3:
        variance += differences[0].var(ddof=1) / seeds
        quantile = t_quantile(seeds - 1)
        kind = "seeds and images"
    reach = quantile * math.sqrt(variance)
    return [mean - reach, mean + reach], kind


def count_seeds(seeds):
    if seeds == 1:
        return "one seed"
    return f"{seeds} seeds"


def shape_of(model):
    return tuple(model[key] for key in SHAPE)


def group_of(models, role, shape):
    """Of a role and a shape: the networks of the first name, which are its seeds."""
    found = [m for m in models if m["role"] == role and shape_of(m) == shape]
    return [m for m in found if m["name"] == found[0]["name"]]


def groups_of(models):
    """-> {role: networks that may be compared}.

    Plain roles have the shape that most encoders have, and no decoder. 'hybrid' is the
    λ nearest 0.2, 'best hybrid' the one best on validation.
    """
    plain = [m for m in models if not m["decoder_depth"] and m["role"] in ROLES]
    decoded = [m for m in models if m["decoder_depth"]]
    trained = [m for m in plain if m["role"] != "untrained"] + decoded
    shapes = [shape_of(m) for m in trained]
    if not shapes:
        return {}
    # of shapes that are as frequent the largest
    common = max(shapes, key=lambda shape: (shapes.count(shape), shape))
    groups = {role: group_of(plain, role, common) for role in ROLES}
    hybrids = [m for m in plain if m["role"] == "hybrid" and shape_of(m) == common]
    if hybrids:
        lams = by_name(hybrids).values()
        groups["hybrid"] = min(lams, key=lambda group: abs(group[0]["lam"] - 0.2))
        groups["best hybrid"] = max(lams, key=validation_score)
    with_decoder = group_of(decoded, "MIM", common)
    if with_decoder:
        groups[DECODED] = with_decoder
        *others, depth = common
        as_deep = (*others, depth + with_decoder[0]["decoder_depth"])
        groups["MIM as deep"] = group_of(plain, "MIM", as_deep)
    # sizes that both have, for the same images and patches, as parameters grow
    both = {shape_of(m) for m in plain if m["role"] == "CL"}
    both &= {shape_of(m) for m in plain if m["role"] == "MIM"}
    sizes = [shape for shape in both if shape[:2] == common[:2]]
    by_size = sorted(sizes, key=lambda shape: (shape[2] ** 2 * shape[3], shape))
    if len(by_size) > 1:
        for role in ROLES:
            groups[f"smallest {role}"] = group_of(plain, role, by_size[0])
            groups[f"largest {role}"] = group_of(plain, role, by_size[-1])
    groups = {role: group for role, group in groups.items() if group}
    return groups


def validation_score(group):
    """Mean accuracy of a λ's seeds on validation images, 0 if nothing was trained."""
    keys = ("linear probe val", "fine-tuned val")
    scores = [m["rows"][key].mean() for m in group for key in keys if key in m["rows"]]
    return np.mean(scores or [0.0])


def note_on_left_out(models, groups, roles):
    """Which trained networks a claim about `roles` does not compare."""
    compared = {m["name"] for role in roles for m in groups.get(role, [])}
    # 'smallest CL', 'MIM with decoder'; of hybrids there are as many as λs
    asked = {word for role in roles for word in role.split()} & {"CL", "MIM"}
    left_out = [m for m in models if m["role"] in asked and m["name"] not in compared]
    if not left_out or not compared:  # then the rows say what is missing
        return ""
    names = "; ".join(by_name(left_out))
    return f"not compared, of another shape or not the first of it: {names}"


def judge_part(part, groups, needs):
    """A row of the table: the roles' values, their difference, its interval."""
    row = {"part": part.name}
    absent = [role for role in part.roles if role not in groups]
    if absent:
        return row | {"why": f"needs a checkpoint: {' and '.join(absent)}"}
    compared = paired([groups[role] for role in part.roles])
    if not all(was_measured(part, group) for group in compared):
        return row | {"why": f"needs {needs}"}
    numbers = []  # of each role (1 + draws, seeds)
    for group in compared:
        numbers.append(np.stack([numbers_of(part, m["rows"]) for m in group], axis=1))
    difference = part.test(*numbers)
    if np.isnan(difference[0]).any():
        return row | {"why": "gives no number here (needs two heads and two layers)"}
    # columns of the table: every role, of the size that is asked about
    size = re.match("(smallest |largest )?", part.roles[0])[0]
    for role in ROLES:
        row[role] = None
        group = groups.get(size + role, [])
        if group and was_measured(part, group):
            row[role] = np.mean([numbers_of(part, m["rows"])[0] for m in group])
    # those compared: means of the paired seeds only; 'best hybrid' stands as hybrid
    means = [drawn[0].mean() for drawn in numbers]
    for role, mean in zip(part.roles, means, strict=True):
        row[role.removeprefix(size).removeprefix("best ")] = mean
    if part.unless is not None:
        reason = part.unless(means, row["untrained"])
        if reason:
            return {"part": part.name, "why": reason}
    (low, high), kind = interval_of(difference)
    row |= {"difference": difference[0].mean(), "interval": [low, high]}
    row |= {"interval_kind": kind, "seeds": difference.shape[1]}
    return row | {"holds": bool(low > 0), "opposed": bool(high < 0)}


def was_measured(part, models):
    return all(key in m["rows"] for m in models for key in part.keys)


def verdict_of(rows):
    """agrees, opposed, mixed, weak, open or not testable."""
    if any("why" in row for row in rows):
        return "not testable"
    holds = [row["holds"] for row in rows]
    opposed = [row["opposed"] for row in rows]
    right = [row["difference"] > 0 for row in rows]
    if all(holds):
        return "agrees"
    if any(holds) and any(opposed):
        return "mixed"
    if any(opposed):
        return "opposed"
    if all(right) or 2 * sum(holds) >= len(rows):
        return "weak"
    return "open"


def judge(models, names=None, note=""):
    """models: facts with "rows" -> the claims' table, of the figures in `names`."""
    groups = groups_of(models)
    asked = {FIGURES[name].claim for name in names or FIGURES} - {None}
    table = []
    for number in sorted(asked):
        figures = {n: f for n, f in FIGURES.items() if f.claim == number and f.parts}
        roles = {role for f in figures.values() for p in f.parts for role in p.roles}
        rows, notes = [], [note_on_left_out(models, groups, roles)]
        for name, figure in figures.items():
            needs = ", ".join([f"--only {name}", *(NEEDS[n] for n in figure.needs)])
            rows += [judge_part(part, groups, needs) for part in figure.parts]
            if "labels" in figure.needs and note not in notes:
                notes.append(note)
        seeds = min((row["seeds"] for row in rows if "seeds" in row), default=0)
        verdict = verdict_of(rows)
        if verdict == "agrees" and seeds < 3:
            verdict = f"agrees ({count_seeds(seeds)})"
        claim = {"claim": number, "verdict": verdict, "seeds": seeds, "parts": rows}
        claim["figure"] = ", ".join(figure.number for figure in figures.values())
        claim["text"] = "; ".join(figure.text for figure in figures.values())
        claim["note"] = "; ".join(filter(None, notes))
        table.append(claim)
    return table


def claims_table(table):
    """The table of claims as text."""
    heads = " ".join(f"{role:>9}" for role in ROLES)
    lines = [f"{'':34} {heads}   difference [95 % interval]"]
    for claim in table:
        line = "{claim:2} {text} (figure {figure}): ".format(**claim)
        line += claim["verdict"].upper()
        if claim["seeds"] >= 3:
            line += f", {claim['seeds']} seeds"
        lines.append(line)
        for row in claim["parts"]:
            lines.append(f"   {row['part']:31} {row_text(row)}")
        if claim["note"]:
            lines.append(f"   note: {claim['note']}")
    return "\n".join(lines)


def row_text(row):
    if "why" in row:
        return row["why"]
    cells = " ".join(f"{number_text(row[role]):>9}" for role in ROLES)
    difference = number_text(row["difference"], sign="+")
    low, high = [number_text(end, sign="+") for end in row["interval"]]
    text = f"{cells}   {difference} [{low}, {high}]  {outcome_of(row)}"
    for role, value in row.items():
        if role.startswith("MIM "):  # with decoder, as deep: they have no column
            text += f"; {role} {number_text(value)}"
    return text


def number_text(value, sign=""):
    """Three decimals and a typographic minus; a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:{sign}.3f}".replace("-", "−")


def outcome_of(row):
    if row["holds"]:
        return "holds"
    if row["opposed"]:
        return "opposed"
    return "undecided"


# ==== The engine: which networks ====================================================

COMPANIONS = Path(__file__).resolve().parent / "figures" / "checkpoints"
ROLE_OF = {None: "other", 0: "MIM", 1: "CL"}  # of λ; between 0 and 1: hybrid
GIVEN_ROLES = {"cl": ("CL", 1.0), "mim": ("MIM", 0.0), "hybrid": ("hybrid", 0.2)}
METHODS = {"CL": "MoCo v3", "MIM": "SimMIM"}


def split_name(text):
    """NAME=FILE or FILE -> name or "", file."""
    if os.path.exists(text):
        return "", text
    name, _, path = text.rpartition("=")
    return name, path


def load_given(text, options):
    """FILE or NAME=FILE -> network."""
    name, path = split_name(text)
    vit = load_encoder(path, options.heads).requires_grad_(False)
    if name.lower() in GIVEN_ROLES:
        role, lam = GIVEN_ROLES[name.lower()]
        if role != vit.facts["role"]:
            vit.facts |= {"role": role, "lam": lam}
        name = ""
    vit.facts["given"] = name
    return vit


def load_companions(loaded, options):
    """The shipped networks of the roles that are missing, of the same size and data."""
    roles = {vit.facts["role"] for vit in loaded}
    companions, used = [], []
    for path in sorted(COMPANIONS.rglob("*.pt")):
        config = sslvit.load_checkpoint(path)["config"]
        role = ROLE_OF.get(config["lam"], "hybrid")
        shape = shape_of(config | SIZES[config["model"]])
        fits = shape == shape_of(loaded[0].facts) and not config["decoder_depth"]
        same_data = bool(config["data"]) == bool(options.data)
        if fits and same_data and role not in roles:
            companions.append(load_given(str(path), options))
            used.append(path.name)
            roles.add(role)
    if used:
        print(f"beside it the shipped {', '.join(used)}; --alone leaves them out")
    return companions


def untrained_like(vit):
    """A network of the same shape and seed that was never trained."""
    facts = vit.facts
    seed = facts["seed"] or 0
    torch.manual_seed(seed)
    if facts["config"]:
        known = {field.name for field in fields(Config)}
        given = {key: v for key, v in facts["config"].items() if key in known}
        new = sslvit.make_encoder(Config(**given))
    else:
        sizes = [facts[key] for key in (*SHAPE, "num_heads")]
        options = dict(vit.options)
        if vit.pos_embed is not None and fixed_positions(vit):
            options["positions"] = "sincos"
        new = ViT(*sizes, **options)
    new.facts = facts | {"role": "untrained", "lam": None, "path": "", "given": ""}
    new.facts |= {"decoder_depth": 0, "config": {}, "family": "untrained", "seed": seed}
    return new.eval().requires_grad_(False)


# what legends say of a network where several differ in it
SHAPE_IN_WORDS = {
    "image_size": "{} px",
    "patch_size": "patches of {}",
    "embed_dim": "{} wide",
    "depth": "{} deep",
    "decoder_depth": "decoder of {}",
}
# of those whose shape is the same; others as 'clip 3.0'
SETTING_IN_WORDS = {
    "crop_min": "crops from {}",
    "blur": "blur to {} px",
    "steps": "{} steps",
    "epochs": "{} epochs",
    "batch_size": "batches of {}",
}
# settings that names tell already, and those that do not change what is learned
IN_NAMES = {"objective", "lam", "model", "preset", *SHAPE_IN_WORDS}
SYSTEM = {"device", "dtype", "accum", "workers", "compile", "checkpointing"}
RUN = {"seed", "out", "resume", "overwrite", "dry_run"}
RUN |= {"save_every", "log_every", "knn_images"}


def name_networks(all_facts):
    """Names for legends: 'CL (MoCo v3)', 'hybrid, λ = 0.2', and what differs else.

    Files of one name are seeds of one network: whatever else differs is in the name.
    """
    shape_varies = [k for k in SHAPE_IN_WORDS if len({f[k] for f in all_facts}) > 1]
    alike = defaultdict(list)
    for facts in all_facts:
        told = [
            SHAPE_IN_WORDS[key].format(facts[key]) for key in shape_varies if facts[key]
        ]
        alike[", ".join([base_name(facts), *told])].append(facts)
    for name, several in alike.items():
        unnamed = [facts for facts in several if not facts["given"]]
        for facts, differs in zip(unnamed, what_differs(unnamed), strict=True):
            facts["name"] = ", ".join([name, *differs])
    names = defaultdict(list)
    for facts in all_facts:
        name = facts["name"] = facts["given"] or facts["name"]
        seeds = names[name]
        seeds.append(facts)
        for key in ("role", "lam", *SHAPE):
            fault = f"{name} has another {key} already: one NAME= is for seeds"
            require(seeds[0][key] == facts[key], f"{fault} of one network")
        # the nth name of its role, which chooses a marker and a kind of line
        kin = [n for n, s in names.items() if s[0]["role"] == facts["role"]]
        facts |= {"run": len(seeds) - 1, "nth": kin.index(name)}


def what_differs(networks):
    """Networks of one role and shape -> for each, words for what else it differs in.

    Those are the settings that not all were trained with. Files of others do not tell
    theirs: each is a network of its own, with its own file's name.
    """
    configs = [facts["config"] for facts in networks if facts["config"]]
    varies = []
    for key in sorted(set().union(*configs) - IN_NAMES - SYSTEM - RUN):
        if len({str(config[key]) for config in configs if key in config}) > 1:
            varies.append(key)
    words = []
    for facts in networks:
        config = facts["config"]
        differs = [in_words(key, config[key]) for key in varies if key in config]
        from_others = facts["path"] and not config
        if from_others and len(networks) > 1:
            differs = ["/".join(Path(facts["path"]).with_suffix("").parts[-2:])]
        words.append(differs)
    return words


def in_words(key, value):
    if key == "data":
        value = Path(value).name or "stimuli"
    return SETTING_IN_WORDS.get(key, key.replace("_", " ") + " {}").format(value)


def require_each_run_once(all_facts):
    """One run that counts twice would make intervals too narrow."""
    seen = {}
    for facts in all_facts:
        name, seed, path = facts["name"], facts["seed"], facts["path"]
        if not path:
            continue  # untrained networks, one for each shape
        run = (name, path if seed is None else seed)
        require(run not in seen, f"{seen.get(run)} and {path} are one run of {name}")
        seen[run] = path


def base_name(facts):
    role = facts["role"]
    if role == "untrained":
        return "untrained"
    if role == "hybrid":
        return f"hybrid, λ = {facts['lam']:g}"
    if role == "other":
        return f"{facts['family']}: {Path(facts['path']).stem}"
    method = facts["family"]
    if facts["config"]:
        method = METHODS[role]
    return f"{role} ({method})"


# ==== The engine: results and drawing ===============================================


def analyse(options):
    """Checkpoints -> (what results.json holds, every network's rows)."""
    # every file is read before anything long begins
    loaded = [load_given(text, options) for text in options.checkpoints]
    if not options.alone:
        loaded += load_companions(loaded, options)
    shapes = {}
    for vit in loaded:  # the first of each shape has an untrained twin
        shapes.setdefault(shape_of(vit.facts), vit)
    loaded += [untrained_like(vit) for vit in shapes.values()]
    name_networks([vit.facts for vit in loaded])
    require_each_run_once([vit.facts for vit in loaded])
    figures = [FIGURES[name] for name in options.only]
    models, rows, chosen, note = [], [], defaultdict(dict), ""
    for vit in loaded:
        name = vit.facts["name"]
        print(name, flush=True)
        vit.to(options.device)
        study = Study(vit, options, chosen[name])
        rows.append(study.run(figures))
        model = vit.facts | {"values": study.values(figures), "pictures": {}}
        model |= {"label_names": study.label_names, "classes": study.classes}
        if model["run"] == 0:
            model["pictures"] = study.pictures(figures)
        models.append(model)
        note = note or study.note()
        vit.cpu()
    together = {}
    for compare in unique(figures, "across"):
        together |= compare(models, rows)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["numpy"] = np.__version__
    results = {"edition": 2, "settings": vars(options), "versions": versions}
    results |= {"note": note, "models": models, "together": together}
    return plain(results), [lean(found, options.only) for found in rows]


SAME_FOR_ALL = {"labels", "index"}  # networks see the same test images


def read_by_claims(rows, names):
    """Of a network's numbers by image those that these figures' verdicts read."""
    parts = [part for name in names for part in FIGURES[name].parts]
    read = {key for part in parts for key in part.keys} | SAME_FOR_ALL
    chosen_by = " val"  # the best layer, token and λ are chosen on validation images
    return {key: rows[key] for key in rows if key in read or key.endswith(chosen_by)}


def lean(rows, names):
    """What samples.npz keeps of an image's numbers, and verdicts are computed from.

    Three digits, as means over images ask for no more; what no claim reads is left out.
    """
    kept = {}
    for key, x in read_by_claims(rows, names).items():
        if key in IMAGES:
            x = on_principal_axes(x[:500])
        if key == "images, entered":
            size = np.linalg.norm(x, axis=0)
            x = x * (size > ROUNDING * size.max())  # the rest is rounding: image_growth
        if key in ("distance", "nmi"):
            x = x.mean(axis=-1)  # over heads
        if key == "fourier":
            x = x[:, :, -1:, -1:]  # after each MLP, at π
        if key == "token volume":
            x = x[:, -1:]  # leaves the last layer
        if x.dtype.kind == "f":
            x = x.astype(np.float16)
        kept[key] = x
    return kept


def on_principal_axes(x):
    """Mean tokens (n, 1, D), centred and turned so that each direction is a column.

    Spectra stay the same, and half precision rounds each direction by itself.
    """
    x = x[:, 0].astype(np.float64)
    u, values, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    return (u * values)[:, None]


def plain(results):
    """Arrays as lists, 5 significant digits, nan as None: what JSON can hold."""
    text = json.dumps(results, default=np.ndarray.tolist)
    return json.loads(text, parse_float=five_digits, parse_constant=none_of)


def five_digits(text):
    return float(f"{float(text):.5g}")


def none_of(constant):
    """For NaN and the infinities."""


def write_results(results, samples, out):
    """results.json, and samples.npz with a row per image, to be judged otherwise."""
    arrays = {}
    for number, rows in enumerate(samples):
        for key, array in rows.items():
            if number == 0 or key not in SAME_FOR_ALL:
                arrays[f"{number}/{key}"] = array
    # under other names first: whole or not at all
    (out / "new.json").write_text(json.dumps(results))
    np.savez_compressed(out / "new.npz", **arrays)
    os.replace(out / "new.json", out / "results.json")
    os.replace(out / "new.npz", out / "samples.npz")


def read_results(path):
    """results.json and the samples.npz beside it."""
    try:
        results = json.loads(Path(path).read_text())
        models, edition = results["models"], results.get("edition", 1)
    except (ValueError, TypeError, KeyError) as error:
        reason = type(error).__name__
        raise UserError(f"--from {path}: not results ({reason})") from error
    fault = "the first edition's numbers mean other things: analyse again"
    require(edition == 2, f"--from {path}: {fault}")
    samples = [{} for _ in models]
    with np.load(Path(path).parent / "samples.npz") as arrays:
        for name in arrays.files:
            number, key = name.split("/", maxsplit=1)
            samples[int(number)][key] = arrays[name]
    for rows in samples:
        for key in SAME_FOR_ALL & samples[0].keys():
            rows[key] = samples[0][key]
    return results, samples


def join_results(paths):
    """Several analyses of the same images as one: seeds and sizes may come later."""
    results, samples = read_results(paths[0])
    if len(paths) == 1:
        return results, samples
    models = results["models"]
    for path in paths[1:]:
        more, found = read_results(path)
        for key in ("data", "images", "epochs"):
            same = more["settings"][key] == results["settings"][key]
            require(same, f"--from {path}: another --{key} than {paths[0]}")
        for rows in found:
            same = np.array_equal(rows["index"], samples[0]["index"])
            require(same, f"--from {path}: other test images than {paths[0]}")
        models += more["models"]
        samples += found
    name_networks(models)
    # who is in several analyses, as untrained networks often are, counts once
    once = {}
    for model, rows in zip(models, samples, strict=True):
        path = model["path"] if model["seed"] is None else ""
        once.setdefault((model["name"], model["seed"], path), (model, rows))
    models, samples = map(list, zip(*once.values(), strict=True))
    name_networks(models)
    for model in models:
        if model["run"] > 0:
            model["pictures"] = {}
    return results | {"models": models}, samples


def reduce_to(options, results, samples):
    """Leaves out what --only does not name, in results and -> samples."""
    was = results["settings"]["only"]
    names = [name for name in was if name in options.only]
    require(names, f"--only: these results have {', '.join(was)}")
    if len(names) == len(was):
        return samples
    sources = {Path(path).parent.resolve() for path in options.results}
    fault = "--only leaves numbers out: give another --out"
    require(Path(options.out).resolve() not in sources, fault)
    results["settings"]["only"] = names
    figures = [FIGURES[name] for name in names]
    drawn = {key for figure in figures for key in keys_of(figure)}
    for model in results["models"]:
        for kind in ("values", "pictures"):
            found = model[kind]
            model[kind] = {key: found[key] for key in found if key in drawn}
    return [read_by_claims(rows, names) for rows in samples]


def title_of(figure, claims):
    """The finding, with its numbers, verdict and seeds."""
    title = figure.text
    claims = [claim for claim in claims if claim["claim"] == figure.claim]
    if not claims:
        return title
    claim = claims[0]
    own = {part.name for part in figure.parts}
    rows = [row for row in claim["parts"] if row["part"] in own]
    if rows and "difference" in rows[0]:
        title = f"{figure.finding}? Undecided"
        if rows[0]["holds"]:
            title = figure.finding
        if rows[0]["opposed"]:
            title = figure.otherwise
        title += ": " + figure.numbers.format(**rows[0])
    verdict = verdict_of(rows or claim["parts"])
    if claim["seeds"] > 0:
        verdict += ", " + count_seeds(claim["seeds"])
    return f"{title} ({verdict})"


def keys_of(figure):
    return figure.keys + tuple(panel.key for panel in figure.panels)


def drawable(figure, results):
    """The models that have the figure's numbers."""
    keys = keys_of(figure)
    found = []
    for model in results["models"]:
        here = model["values"] | model["pictures"] | results["together"]
        if all(key in here for key in keys):
            found.append(model | {"together": results["together"]})
    return found


def draw_figures(results, names, out):
    """Every figure that the results support -> list for the report."""
    drawn = []
    for name in names:
        figure = FIGURES[name]
        models = drawable(figure, results)
        if not models or not figure.enough(models):
            needs = " and ".join(NEEDS[need] for need in figure.needs)
            print(f"skipped {name}: needs {needs or 'more numbers: --only ' + name}")
            continue
        title = title_of(figure, results["claims"])
        with plt.rc_context(STYLE):
            if figure.panels:
                fig = draw_panels(models, figure.panels)
            else:
                fig = figure.draw(models)
            legend(fig)
            fig.suptitle(textwrap.fill(title, 95))
            file = out / file_name(name, figure)
            save(fig, file)
        entry = {"name": name, "title": title, "file": file, "claim": figure.claim}
        drawn.append(entry | {"number": figure.number, "lesson": figure.lesson})
    return drawn


def file_name(name, figure):
    if figure.number == "-":
        return f"{name}.png"
    number, *side = figure.number.split()
    return "_".join([f"fig{number:0>2}", *side, name]) + ".png"


def save(fig, file):
    """1,600 px wide, in 256 colours, rare ones among them: a third of the bytes."""
    fig.savefig(file, dpi=150)
    plt.close(fig)
    image = Image.open(file).convert("RGB")
    image.quantize(256, Image.Quantize.MAXCOVERAGE, 1).save(file, optimize=True)


# ==== Command line ==================================================================


def figure_table():
    """The help text's list of figures, from FIGURES."""
    lines = ["figures (for --only), their claims, and where they stand in [P]:"]
    for name, figure in FIGURES.items():
        claim = figure.claim or "-"
        lines.append(f"  {name:11} {claim:>3}  {figure.text} ({figure.number})")
    return "\n".join(lines)


def parse(argv):
    parser = sslvit.Parser(
        "analyze.py",
        description=f"{__doc__}\n{figure_table()}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    device, workers = "cpu", 0
    if torch.cuda.is_available():
        device, workers = "cuda", min(8, sslvit.usable_cpus())
    names = list(FIGURES)
    add = parser.add_argument
    text = "FILE or NAME=FILE, one NAME for all seeds; cl=, mim=, hybrid= say the role"
    add("checkpoints", nargs="*", help=text)
    add("--data", default="", help="folder of images as for sslvit.py, else stimuli")
    add("--masks", default="", help="folder with <same path>.png, a class per pixel")
    add("--cue-conflict", default="", help="folder of <shape><n>-<texture><n>.png")
    add("--only", nargs="+", default=names, choices=names, metavar="NAME")
    add("--out", default="", help="for everything [figures/ beside the first file]")
    text = "results.json of one analysis or several, to judge and draw again (--only)"
    add("--from", dest="results", nargs="+", default=[], help=text)
    add("--alone", action="store_true", help="without the shipped networks")
    text = "test images, four times as many to learn from; 0: all [%(default)s]"
    add("--images", type=int, default=1000, help=text)
    text = "of fine-tuning and segmentation, a third for a choice [%(default)s]"
    add("--epochs", type=int, default=10, help=text)
    add("--heads", type=int, help="attention heads, where shapes do not tell")
    text = "one; several GPUs run several analyses [%(default)s]"
    add("--device", default=device, help=text)
    add("--workers", type=int, default=workers, help="read images [%(default)s]")
    options = parser.parse_args(argv)
    check(options)
    return options


def check(options):
    try:
        torch.zeros(1, device=options.device)
    except Exception as error:  # torch has many kinds
        raise UserError(f"--device {options.device}: there is none here") from error
    one = bool(options.checkpoints) != bool(options.results)
    require(one, "give checkpoints, or --from results")
    require(options.images == 0 or options.images >= 20, "--images is 0, or 20 or more")
    require(options.epochs >= 1, "--epochs is 1 or more")
    require(0 <= options.workers <= 256, "--workers is 0 to 256")
    for folder in (options.masks, options.cue_conflict):
        require(not folder or os.path.isdir(folder), f"{folder}: no such folder")
    if not options.out and options.results:
        options.out = str(Path(options.results[0]).parent)
    elif not options.out:
        _, first = split_name(options.checkpoints[0])
        options.out = str(Path(first).parent / "figures")


def main(argv=None):
    """Runs the command line -> exit status: 0, or 2 with one line on what to mend."""
    try:
        options = parse(argv)
        if options.results:
            results, samples = join_results(options.results)
            samples = reduce_to(options, results, samples)
        else:
            results, samples = analyse(options)
        models = []
        for model, rows in zip(results["models"], samples, strict=True):
            models.append(model | {"rows": rows})
        claims = judge(models, results["settings"]["only"], results["note"])
        results["claims"] = plain(claims)
        out = Path(options.out)
        out.mkdir(parents=True, exist_ok=True)
        # numbers first: a full disk takes the pictures only
        write_results(results, samples, out)
        print(claims_table(results["claims"]))
        figures = draw_figures(results, results["settings"]["only"], out)
        write_report(out / "report.html", results, figures)
        print(f"what was computed and drawn is in {out}")
        return 0
    except (UserError, OSError) as error:
        print(f"analyze.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


# ==== The report: one page with the claims, their figures and their lessons =========
# report.html needs no network, library or script: pictures stand in it as base64. It
# opens from a mail and prints. The comments <!-- like this --> of PAGE are filled in.

VERDICT_MARKS = {"agrees": "✓", "weak": "≈", "mixed": "±", "opposed": "✗", "open": "?"}
MODEL_FACTS = ("path", "role", "lam", "seed", *SHAPE, "num_heads")


def write_report(path, results, figures):
    """results: as in results.json; figures: dicts of draw_figures."""
    rows, chapters = "", ""
    for claim in results["claims"]:
        number, text = claim["claim"], escape(claim["text"])
        own = [figure for figure in figures if figure["claim"] == number]
        heading = f"{number} · {text}"
        if own:
            heading = f'<a href="#claim-{number}">{heading}</a>'
        verdict = report_verdict(claim)
        rows += report_rows(f"{heading} {verdict}", claim["parts"])
        heading = f'<h2 id="claim-{number}">Claim {number}: {text}</h2>'
        chapters += report_chapter(f"{heading}<p>{verdict}</p>", own)
    judged = [claim["claim"] for claim in results["claims"]]
    others = [figure for figure in figures if figure["claim"] not in judged]
    chapters += report_chapter("<h2>Beyond the paper</h2>", others)
    slots = {
        "data": escape(results["settings"]["data"] or "the built-in stimuli"),
        "rows": rows,
        "chapters": chapters,
        "facts": escape(report_facts(results)),
    }
    page = PAGE
    for name, content in slots.items():
        page = page.replace(f"<!-- {name} -->", content)
    Path(path).write_text(page, encoding="utf-8")


def report_verdict(claim):
    """The verdict as a coloured label, and what stands behind it."""
    kind = claim["verdict"].partition(" (")[0]
    label = f"{VERDICT_MARKS.get(kind, '–')} {claim['verdict']}"
    kinds = {part["interval_kind"] for part in claim["parts"] if "why" not in part}
    evidence = sorted(kinds)
    if claim["seeds"] > 1:
        evidence.append(f"{claim['seeds']} seeds")
    if claim["note"]:
        evidence.append(claim["note"])
    behind = escape(", ".join(evidence))
    return f'<b class="verdict {kind}">{label}</b> <small>{behind}</small>'


def report_rows(heading, parts):
    """A claim in the table: its heading, then a row for each part."""
    rows = f'<tr><th colspan="7">{heading}</th></tr>\n'
    for part in parts:
        rows += f"<tr><td>{escape(part['part'])}</td>{report_cells(part)}</tr>\n"
    return f"<tbody>{rows}</tbody>\n"


def report_cells(part):
    if "why" in part:
        return f'<td colspan="6" class="why">{escape(part["why"])}</td>'
    cells = ""
    for role in ROLES:
        cells += f'<td class="number {role}">{number_text(part[role])}</td>'
    difference = number_text(part["difference"], sign="+")
    low, high = [number_text(end, sign="+") for end in part["interval"]]
    cells += f'<td class="number"><b>{difference}</b> [{low}, {high}]</td>'
    outcome = outcome_of(part)
    return cells + f'<td class="{outcome}">{outcome}</td>'


def report_chapter(heading, figures):
    """Figures, each with its lesson below; nothing if there are none."""
    if not figures:
        return ""
    body = "\n".join(report_figure(figure) for figure in figures)
    return f"<section>{heading}{body}</section>\n"


def report_figure(figure):
    title = escape(figure["title"])
    picture = base64.b64encode(Path(figure["file"]).read_bytes()).decode()
    lesson = ""
    for paragraph in figure["lesson"].split("\n\n"):
        kind = "text"
        if paragraph.startswith(" "):  # an equation keeps its lines
            kind = "equation"
        lesson += f'<p class="{kind}">{escape(paragraph.strip())}</p>'
    origin = figure["name"]
    if figure["number"] != "-":
        origin += f", the paper's figure {figure['number']}"
    return (
        f'<figure><img src="data:image/png;base64,{picture}" alt="{title}">'
        f"<figcaption><h3>{title}</h3>{lesson}<small>{origin}</small></figcaption>"
        "</figure>"
    )


def report_facts(results):
    """Networks, settings and versions, a line each."""
    lines = []
    for model in results["models"]:
        facts = [f"{key} {model[key]}" for key in MODEL_FACTS]
        lines.append(f"{model['name']}: {', '.join(facts)}")
    for name, value in (results["settings"] | results["versions"]).items():
        lines.append(f"{name}: {value}")
    return "\n".join(lines)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>What did they learn?</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { margin: 0 auto; padding: 1.5em; max-width: 62em; color: #1a1a1a;
  font: 17px/1.55 system-ui, "DejaVu Sans", sans-serif; }
h2 { margin-top: 2.2em; padding-top: 0.6em; border-top: 3px solid; }
p { max-width: 42em; }
small { font-weight: normal; color: #555; }
a { color: inherit; }
table { border-collapse: collapse; font-size: 0.88em; line-height: 1.35; }
td, th { padding: 0.3em 0.6em; text-align: left; vertical-align: top; }
tbody th { padding-top: 1em; border-top: 1px solid #bbb; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.CL { color: #b34e00; } .MIM { color: #0072b2; } .hybrid { color: #7a3aa2; }
.untrained, .why, .undecided { color: #666; }
.verdict { padding: 0 0.5em; border-radius: 1em; background: #eee; }
.agrees { color: #00573f; } .opposed { color: #a0001c; } .holds { font-weight: bold; }
figure { margin: 1.2em 0 2.5em; }
figure img { display: block; max-width: 100%; }
.equation { white-space: pre-wrap; padding-left: 1.5em; font-family: Georgia, serif; }
.wide { overflow-x: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.75em; }
@media print {
  body { font-size: 10pt; padding: 0; }
  figure, tr { break-inside: avoid; }
  table { font-size: 7.5pt; }
}
</style></head><body>
<h1>What did they learn?</h1>
<p>Vision Transformers that were taught without labels, taken apart on <!-- data -->.
<b class="CL">CL</b> learnt to recognise two views of one image (MoCo v3),
<b class="MIM">MIM</b> to fill in what was hidden (SimMIM), the
<b class="hybrid">hybrid</b> both; the <b class="untrained">untrained</b> network learnt
nothing. The claims are those of Park et al., <i>What Do Self-Supervised Vision
Transformers Learn?</i> (ICLR 2023, arXiv 2305.00729).</p>
<div class="wide"><table><thead><tr><th>The paper's claim, and what is measured</th>
<th class="number untrained">untrained</th><th class="number CL">CL</th>
<th class="number MIM">MIM</th><th class="number hybrid">hybrid</th>
<th class="number">difference [95 % interval]</th><th></th></tr></thead>
<!-- rows --></table></div>
<p><small>A part <b>holds</b> when its difference, counted in the claim's direction, is
above 0 with its whole interval, and is <b>opposed</b> when the interval lies below 0. A
claim <b>agrees</b> when every part holds; <b>opposed</b>: none holds and some are
opposed; <b>mixed</b>: some hold, some are opposed; <b>weak</b>: none is opposed, and
every sign is right or half of the parts hold; <b>open</b>: anything else. One seed says
how sure the images are, not whether another training would end alike.</small></p>
<!-- chapters -->
<section><h2>Models, settings, versions</h2>
<pre><!-- facts --></pre></section>
</body></html>
"""


# ==== Whose network is it?  Checkpoints of other people, as data ====================
# Nearly every published ViT has timm's tensors: the same shapes and, but for a few, the
# same names, somewhere in a file. So the encoder is what stands behind the same prefix
# as its patches, and each tensor there must have a place in our ViT.
#
# Strict: a network that is almost the published one gives figures that look right. What
# is not understood is refused by name; what no tensor tells is printed and can be set.
#
# A file is data: torch's own safe reader opens it, nothing that it names is imported or
# called, and a size that it claims costs nothing before it is checked.

PATCHES = "patch_embed.proj.weight"
TABLE = "rel_pos_bias.relative_position_bias_table"
# published is the teacher of a student, and an encoder rather than its average
SECOND_CHOICE = "student|momentum|key_encoder|target|ema"
RENAMES = {
    # what DDP, torch.compile and FSDP put into keys
    r"\b(module|_orig_mod|_fsdp_wrapped_module)\.": "",
    r"^blocks\.\d+\.(\d+)\.": r"blocks.\1.",  # DINOv2's chunks of blocks
    r"\.gamma_([12])$": r".ls\1.gamma",  # LayerScale of BEiT, SimMIM and iBOT
}
# behind the encoder's prefix, and without a part in its tokens
NOT_ENCODER = (
    r"^(head|fc|fc_norm|lm_head|mask_token|masked_embed|decoder\w*)(\.|$)"
    r"|(relative_position_index|num_batches_tracked)$"
)
# the end of a key -> format, λ, pixels that the network was trained on
MARKS = {
    ".decoder_pos_embed": ("MAE", 0.0, "imagenet"),
    ".lm_head.weight": ("BEiT", 0.0, "half"),
    ".encoder.mask_token": ("SimMIM", 0.0, "imagenet"),
    ".masked_embed": ("iBOT", None, "imagenet"),
    ".mask_token": ("DINOv2", None, "imagenet"),
}
# what else is saved under the name of a checkpoint, by its first bytes
NOT_CHECKPOINTS = {
    b"version https://git-lfs": "a pointer of git LFS: run git lfs pull",
    b"<": "a web page",
    b"\x89HDF": "an HDF5 file, as of Keras",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a compressed file: unpack it",
}


# ---- From a file to tensors ----


class Inert:
    """Stands in for whatever a file names beside tensors and dicts.

    Be it the arguments of a run, a NumPy number or a function that runs commands: it
    takes any call and does nothing.
    """

    def __new__(cls, *arguments):
        # made of nothing (yacs, easydict) or of a class (defaultdict), it is likely a
        # dict whose items are set, which torch allows for few types
        if all(argument is Inert for argument in arguments):
            return OrderedDict()
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def check_archive(path):
    """A zip file must be as torch.save writes it: not compressed, checksums right."""
    with zipfile.ZipFile(path) as archive:
        names = " ".join(archive.namelist())
        require("data.pkl" in names, "a zip archive, but not one of torch.save")
        require("constants.pkl" not in names, "a TorchScript program")
        # a few kB could become the whole memory
        is_packed = any(entry.compress_type for entry in archive.infolist())
        require(not is_packed, "a compressed archive, which torch.save never writes")
        require(archive.testzip() is None, "damaged: a checksum is wrong")


def read_checkpoint(path):
    """What is in a file. Objects other than tensors, dicts and lists become Inert."""
    require(os.path.isfile(path), "no such file, or a folder")
    with open(path, "rb") as file:
        start = file.read(512)
    require(start, "an empty file")
    for first_bytes, what in NOT_CHECKPOINTS.items():
        require(not start.startswith(first_bytes), f"no checkpoint, but {what}")
    require(start[257:262] != b"ustar", "no checkpoint, but a tar archive: unpack it")
    if start[8:9] == b"{":  # a header behind its length
        has_package = importlib.util.find_spec("safetensors")
        require(has_package, "a safetensors file: first pip install safetensors")
        from safetensors.torch import load_file

        return load_file(path)
    stand_ins = []
    if start.startswith(b"PK\x03\x04"):
        check_archive(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins = [(Inert, name) for name in names]
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True)


def find_tensors(content):
    """Dicts within dicts -> {keys, joined by dots: tensor}."""
    tensors = {}
    dicts = set()
    entries = [("", content)]
    for key, value in entries:  # grows while it is read
        if isinstance(value, torch.Tensor):
            tensors[key[1:]] = value
        # a dict that holds itself is read once
        if isinstance(value, dict) and id(value) not in dicts:
            dicts.add(id(value))
            entries += [(f"{key}.{name}", inner) for name, inner in value.items()]
    require(tensors, "no tensors in its dicts (of a module, save the state_dict())")
    return tensors


def find_config(content):
    """The settings of a run of sslvit.py, which tell λ and more. Others: {}."""
    config = content.get("config")
    if not isinstance(config, dict) or "objective" not in config:
        return {}
    for knob in fields(Config):
        value = config.get(knob.name, knob.default)
        types = (int, float) if knob.type is float else knob.type
        is_sound = isinstance(value, types) and str(value).isprintable()
        require(is_sound, f"in its config, {knob.name} is {value!r}")
    is_sound = config["model"] in SIZES and 0 <= config["lam"] <= 1
    require(is_sound, "its config has a model of no size here, or lam outside [0, 1]")
    return config


# ---- From their names to ours ----


def find_prefix(tensors):
    """What stands before the encoder's keys: "model.", "teacher.backbone.", "" ..."""
    patches = [key for key in tensors if f".{key}".endswith(f".{PATCHES}")]
    some = ", ".join(list(tensors)[:3])
    require(patches, f"{len(tensors)} tensors ({some} ...), none of them {PATCHES}")
    # False comes before True, and of equals the shortest
    best = min(patches, key=lambda key: (bool(re.search(SECOND_CHOICE, key)), len(key)))
    return best.removesuffix(PATCHES)


def take_encoder(tensors, prefix):
    """-> {our name: weights} of the encoder, Counter of what was left out."""
    weights = {}
    skipped = Counter()
    for key, value in tensors.items():
        name = key.removeprefix(prefix)
        for pattern, new in RENAMES.items():
            name = re.sub(pattern, new, name)
        if not key.startswith(prefix):
            skipped[".".join(name.split(".")[:2])] += 1
        elif match := re.search(NOT_ENCODER, name):
            skipped[match[0].strip(".")] += 1
        else:
            require(name not in weights, f"two tensors for {name}")
            weights[name] = checked(value, key)
    return join_biases(weights), skipped


def checked(value, key):
    """A tensor of a file -> float32, not larger than what the file holds of it."""
    require(value.is_floating_point(), f"{key} is {value.dtype}: quantised?")
    is_whole = value.nbytes <= value.untyped_storage().nbytes()
    require(is_whole, f"{key} claims more numbers than the file holds")
    require(value.isfinite().all(), f"{key} holds NaN or infinity")
    return value.detach().float().contiguous()


def join_biases(weights):
    """SimMIM and BEiT have biases of queries and of values; those of keys are 0."""
    for name in list(weights):
        attn = name.removesuffix("q_bias")
        joined = f"{attn}qkv.bias"
        if attn != name and joined not in weights:
            q_bias = weights.pop(name)
            biases = [q_bias, torch.zeros_like(q_bias), weights.pop(f"{attn}v_bias")]
            weights[joined] = torch.cat(biases)
    return weights


# ---- What no tensor tells ----


def find_side(weights, grid):
    """Patches in a row of the square grid. Where CLS has no position, it gets zeros."""
    positions = weights.get("pos_embed")
    if positions is None:
        # (2·side - 1)² offsets, and three places for CLS
        offsets = len(weights[TABLE]) - 3 if TABLE in weights else 1
        return (math.isqrt(offsets) + 1) // 2
    count = positions.shape[1]
    rows, cols = grid or 2 * [math.isqrt(count - 1)]
    require(rows == cols, f"{rows} x {cols} patches: only square grids are analysed")
    if rows * cols == count:
        weights["pos_embed"] = F.pad(positions, (0, 0, 1, 0))
    return rows


def which_sines(positions, side):
    """Fixed sines begin with x in MAE and here, with y in MoCo v3. Learned ones: ""."""
    if positions is None:
        return ""
    embed_dim = positions.shape[-1]
    sines = sincos_positions(embed_dim, side, side)
    for first, shift in {"x": 0, "y": embed_dim // 2}.items():
        turned = sines.roll(shift, dims=-1)
        if turned.shape == positions.shape and turned.allclose(positions, atol=1e-3):
            return first
    return ""


def recognise(tensors, prefix, sines, content):
    """-> format, λ, pixels; None: nothing tells."""
    # solo-learn writes its method into the file
    is_moco = "mocov3" in str(content.get("hyper_parameters"))
    if is_moco or sines == "y" or "base_encoder" in prefix:
        return "MoCo v3", 1.0, "imagenet"
    for mark, facts in MARKS.items():
        if any(f".{key}".endswith(mark) for key in tensors if key.startswith(prefix)):
            return facts
    if sines:
        return "MoCo v3 or MAE", None, "imagenet"
    return "timm", None, None


def find_sizes(weights, side, heads, form):
    """-> arguments of ViT. Heads are usually 64 wide, 80 in a ViT-H."""
    shape = weights[PATCHES].shape
    require(len(shape) == 4, f"{PATCHES} is {shape}: of videos?")
    embed_dim, _, _, patch_size = shape
    numbers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    usual = {1280: 16}
    if form.startswith("MoCo v3"):
        usual[384] = 12
    return {
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": len(numbers) or 1,
        "num_heads": heads or usual.get(embed_dim, max(1, embed_dim // 64)),
    }


# ---- From weights to a network ----


def build(weights, sizes):
    """The ViT that has these weights and no others; UserError if there is none."""
    options = {
        "positions": "learned" if "pos_embed" in weights else "none",
        "rel_pos_bias": TABLE in weights,
        "layer_scale": 1.0 if "blocks.0.ls1.gamma" in weights else None,
    }
    with torch.device("meta"):  # shapes without memory
        vit = ViT(**sizes, **options)
    # refused here, as torch would name the same key of each block
    odd = weights.keys() - vit.state_dict().keys()
    names = sorted({re.sub(r"blocks\.\d+", "blocks.*", key) for key in odd})
    require(not odd, f"tensors that an ordinary ViT has not: {', '.join(names)}")
    positions = weights.get("pos_embed")
    has_any = TABLE in weights or positions is not None
    require(has_any, "no positions: no tensor tells how they are computed")
    is_square = positions is None or positions.shape[1] == 1 + vit.grid**2
    require(is_square, "pos_embed: no square and CLS (--grid if CLS has none)")
    vit.load_state_dict(weights, assign=True)
    vit.options = options
    return vit.eval()


def in_one_line(text):
    """Keys in a file may hold anything: sequences, too, that move the cursor."""
    return ascii(" ".join(text.split()))[1:-1][:400]


def load_encoder(path, heads=None, grid=None, pixels=None):
    """File -> ViT in eval mode with a dict `facts`; prints what it is.

    What no tensor tells can be given: heads (else 64 wide each; 12 in a ViT-S of MoCo
    v3), grid (rows, cols) of patches (else a square and CLS), pixels "imagenet" or
    "half", which is (x - 0.5) / 0.5 (else half for BEiT, ImageNet's mean and deviation
    for others). A table of position biases and a config of sslvit.py count more.

    UserError, in one line: no checkpoint, a damaged one, or a network that is not ours
    to the last tensor: RoPE, registers, QK norm, LoRA, int8, position biases of each
    block, no CLS, no last norm (fine-tuned on mean tokens), a grid that is not square.
    No tensor tells other activations, norms behind attention and MLP, or RoPE beside
    learned positions: figures of such a network would be another's.
    """
    try:
        content = read_checkpoint(path)
        tensors = find_tensors(content)
        prefix = find_prefix(tensors)
        config = find_config(content)
        weights, skipped = take_encoder(tensors, prefix)
        side = find_side(weights, grid)
        sines = which_sines(weights.get("pos_embed"), side)
        form, lam, usual_pixels = recognise(tensors, prefix, sines, content)
        pixels = pixels or usual_pixels
        if TABLE in weights:
            heads = weights[TABLE].shape[1]
        if config:
            heads = SIZES[config["model"]]["num_heads"]
            form, lam, pixels = "sslvit", config["lam"], "imagenet"
        sizes = find_sizes(weights, side, heads, form)
        vit = build(weights, sizes)
    except Exception as error:  # a damaged file can raise anything
        reason = str(error) or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "not readable as data alone (of a module, save the state_dict())"
        raise UserError(f"{path}: {in_one_line(reason)}") from error
    answers = {
        "heads": heads,
        "grid": grid or sines or config or TABLE in weights,
        "pixels": pixels,
    }
    guesses = [f"--{name}" for name, answer in answers.items() if not answer]
    vit.facts = sizes | {"path": str(path), "format": form, "lam": lam}
    vit.facts |= {"pixels": pixels or "imagenet", "seed": config.get("seed")}
    vit.facts |= {"config": config, "decoder_depth": config.get("decoder_depth", 0)}
    line = "{path}: {format}, {image_size} px in patches of {patch_size}, {embed_dim} "
    line += "wide, {depth} deep, {num_heads} heads, {pixels} pixels; guessed: "
    print(line.format(**vit.facts) + (", ".join(guesses) or "nothing"))
    print(f"  encoder {prefix!a}, skipped {in_one_line(str(dict(skipped)))}")
    return vit


if __name__ == "__main__":
    sys.exit(main())
