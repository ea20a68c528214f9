"""What did they learn?  This file takes trained Vision Transformers apart.

  python analyze.py runs/*/ckpt.pt                     every figure, on the stimuli
  python analyze.py runs/micro-hybrid/ckpt.pt          yours beside the shipped ones
  python analyze.py cl=mocov3.pth mim=simmim.pth --data /imagenet        photographs
  python analyze.py --from FOLDER/results.json         judges and draws again

  NAME=FILE             one NAME for all seeds; cl=, mim=, hybrid= say the role of other
                        people's networks (runs of sslvit.py tell theirs)
  --only NAME ...       figures, see the table below
  --from FILE ...       results.json of one analysis or several, joined
  --alone               without the shipped networks
  --overwrite           an earlier analysis in --out
  --out FOLDER          for everything [figures/ beside the first checkpoint; with
                        --from FILE its folder; of several FILEs it is needed]
  --data FOLDER         of images, as for sslvit.py [stimuli]
  --cue-conflict FOLDER of Geirhos' images, <shape><n>-<texture><n>.png; shape and
                        texture are names of class folders of --data
  --images N            test images; 0: all [1000]
  --labels N            training images to learn from [four times --images, so all
                        with --images 0]
  --epochs N            of fine-tuning; segmentation has a quarter [10]
  --device NAME         [cuda, if there is one]
  --workers N           processes that read images [0]
Where no file tells; one value, or one for each file:
  --heads N ...         of attention
  --pixels NAME ...     imagenet or half: how the network saw pixels

It checks the twelve claims of [P] Park et al., What Do Self-Supervised Vision
Transformers Learn?, ICLR 2023, arXiv 2305.00729. The file is one section per figure: a
lesson, the metric, how it is measured and drawn, and an entry of the table FIGURES with
the sentences of the claim that can be tested. To add a figure, add a section: help
text, results, verdicts and report follow from the table (what is no mean over images
also stands in NOT_AVERAGED). Behind the figures: the engine (images and one pass,
verdicts, networks, results), the command line, the report, and checkpoints of other
people.

Glossary: B batch, N patch tokens (1+N with CLS), D width, H heads, d = D/H, L layers,
F frequencies, n images, A[q,k] attention of query q to key k; CL contrastive learning,
MIM masked image modelling; a state: the tokens after the embedding, after each
attention and after each MLP, 1+2L in all.

Figures for --only, their claims, and where they stand in [P] (listed by --help):
"""

import argparse
import base64
import contextlib
import json
import math
import os
import pickle
import re
import sys
import textwrap
import zipfile
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, partial
from html import escape
from itertools import cycle, pairwise, product
from operator import attrgetter, itemgetter
from pathlib import Path

# before torch, as it sets how threads wait for each other
import sslvit
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.colors import LinearSegmentedColormap
from torch.utils.data import DataLoader

from sslvit import MEAN, SIZES, STD, Config, UserError, ViT, require, sincos_positions

# ==== What a figure is ==============================================================


@dataclass
class Part:
    """One sentence of a claim that can be tested: read(more) - read(less) > 0."""

    text: str
    more: str  # a role: "CL", "MIM", HYBRID, "MIM with decoder" ...
    less: str  # another role, or "" for 'above 0'
    # {key: value} of one network -> a number
    read: Callable
    # can be tested only if both are above a new network of their architecture
    trained: bool = False
    size: str = ""  # SMALLEST or LARGEST, else the one that has most roles


@dataclass
class Figure:
    number: str  # the paper's
    claim: int
    text: str  # what the claim says; of a picture, what it shows
    lesson: str
    draw: Callable  # networks -> matplotlib figure
    parts: tuple = ()
    # measure(Batch of test images) -> {key: (B, ...)}
    measure: tuple = ()
    # learn(study) -> {key: (n, ...)}, for each test image: what needs training first
    learn: tuple = ()
    # whole(rows of test images) -> {key: ...}: what is no mean over images
    whole: tuple = ()
    # picture(Batch of three test images) -> {key: array}, for draw()
    picture: tuple = ()


FIGURES = {}
HYBRID = "hybrid, λ = 0.2"  # which the paper analyses
SMALLEST = "CL and MIM of two sizes, the smallest"
LARGEST = "CL and MIM of two sizes, the largest"


# Early is the first third of the layers, late the last, both rounded up.
def third(x):
    return math.ceil(len(x) / 3)


def early(x):
    return np.mean(x[: third(x)])


def late(x):
    return np.mean(x[-third(x) :])


def middle(x):
    return np.mean(x[third(x) : -third(x)])


def last(x):
    return np.mean(x[-1])


def rise(x):
    return late(x) - early(x)


def of(summary, source):
    """What a part reads: of(late, "nmi") takes late(values["nmi"]), and
    of(rise, noise_drop) takes rise(noise_drop(values))."""
    read = source if callable(source) else itemgetter(source)
    return lambda values: summary(read(values))


# ==== How figures are drawn =========================================================

STYLE = {
    "font.size": 12,
    "figure.titlesize": 12,
    "axes.titlesize": 12,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "text.parse_math": False,  # a name may hold a dollar sign
}
# λ from MIM's blue to CL's orange, over violet: straight between them lies a grey
COLOURS = "#0072B2 #8A45B5 #B5449D #CF4A66 #D55E00".split()
LAMBDAS = LinearSegmentedColormap.from_list("lambda", COLOURS)
GREY = "#8C8C8C"  # untrained
LINES = ("-", "--", "-.", ":")


def style_of(network, turn=0):
    """Colour for λ, dashes for hybrids; each further size or name has other dashes."""
    colour = GREY
    if network.lam is not None:
        colour = LAMBDAS(float(network.lam))
        turn += 0 < network.lam < 1
    elif network.path:  # trained, nobody knows how
        colour = "#333333"
    return {"color": colour, "ls": LINES[turn % 4]}


def canvas(columns, rows=1, height=5.0, **axis):
    """A figure 1,600 px wide, at 150 dots an inch, and its axes (rows, columns)."""
    return plt.subplots(
        rows, columns, figsize=(32 / 3, height * rows), squeeze=False, subplot_kw=axis
    )


def readings(networks, read):
    """-> for each name: its first network, what is read of its seeds (seeds, ...)."""
    pairs = []
    for seeds in by_name(networks):
        with contextlib.suppress(KeyError):
            # row 0 of the 21 rows that the engine keeps: of all test images
            pairs.append((seeds[0], numbers(read, seeds)[0]))
    require(pairs, "no network has its values (accuracies: classes in train and val?)")
    return pairs


def curves(axis, networks, read, label, xlabel=""):
    """A curve per name. Seeds are thin lines, and heads, if there are any, a band.

    read(values) -> (points,) or (points, heads). The last stands at L: of L layers 1 to
    L, of L-1 pairs of neighbours 2 to L; of 1+2L states 0 to L, where 0 is the
    embedding and halves stand after attention. With `xlabel`, of whatever this names,
    from 0 to 1.
    """
    turns = Counter()
    for network, y in readings(networks, read):
        style = style_of(network, turns[network.lam])
        turns[network.lam] += 1
        count = y.shape[1]
        step = 1 if count <= network.depth else 0.5
        places = network.depth - step * np.arange(count)[::-1]
        if xlabel:
            places = np.linspace(0, 1, count)
        if y.ndim == 3:
            heads = np.sort(y).mean(axis=0)  # from each seed's lowest to its highest
            axis.fill_between(places, *heads.T[[0, -1]], alpha=0.12, fc=style["color"])
            y = y.mean(axis=2)
        axis.plot(places, y.T, lw=0.7, alpha=0.6, **style)
        axis.plot(places, y.mean(axis=0), lw=2.2, label=network.name, **style)
    axis.set(xlabel=xlabel or "layer (thin lines: single networks)", ylabel=label)


def points(axis, networks, read, label, fact="name"):
    """A circle for each seed, a bar at their mean -> places, means of the names.

    The place is a fact of the network, a number or its name.
    """
    places, means = [], []
    for network, y in readings(networks, read):
        x = getattr(network, fact)
        colour = style_of(network)["color"]
        axis.plot([x] * len(y), y, "o", ms=9, mfc="none", color=colour)
        axis.plot(x, y.mean(), "_", ms=18, mew=3, color=colour)
        places.append(x)
        means.append(y.mean())
    if fact == "name":
        axis.tick_params(axis="x", labelrotation=90)
    axis.set_ylabel(label)
    return places, means


def on_one_axis(plot, networks):
    """A figure of one axis."""
    fig, [[axis]] = canvas(1)
    plot(axis, networks)
    return fig


# ==== Figure 2. Where does a token look? ============================================

maps_lesson = """\
Before any number, look. Attention is a row of weights for each query token: how much it
takes from every token, A[q,k] = softmax(q·k / √d), without the class token CLS and
averaged here over the heads, of one network each. White is uniform attention, red more,
blue less: one unit is a factor of two. The paper saw that late layers of contrastive
networks draw the outline of the object whatever the query is, and that masked networks
look near the query.

What to look at: are the maps of two queries (crosses) of one network equal? Do they
follow the object (of stimuli, the black outline)? And how much of that does the
untrained network have?"""


# Two places on the diagonal, as shares of the side: near the middle, near a corner.
QUERIES = (9 / 16, 3 / 16)


def picture_maps(batch):
    """-> maps (8, side, side): attention relative to uniform, of two images, two
    queries, the first and the last layer."""
    side = batch.vit.grid
    queries = [int(share * side) * (side + 1) for share in QUERIES]
    attn = batch.attn[:2, [0, -1]].mean(dim=2)  # (images, layers, N, N)
    maps = side**2 * attn[:, :, queries].transpose(1, 2)  # (images, queries, layers, N)
    return {"maps": maps.reshape(8, side, side)}


def draw_maps(networks):
    """Above, the two images; below, a row of maps for each network."""
    networks = [n for n in networks if "maps" in n.pictures]
    pictures = networks[0].pictures
    masks = np.sign(pictures["labels"])  # of stimuli (3, S, S)
    rows = [np.repeat(pictures["photographs"][:2], 4, axis=0)]
    # 0: uniform; 1e-6 is what results.json rounds to
    rows += [np.log2(np.add(n.pictures["maps"], 1e-6)) for n in networks]
    fig, axes = canvas(8, len(rows), height=1.5, xticks=[], yticks=[])
    # pixels, patches and outlines in the same coordinates: shares of the image
    columns = product(range(2), QUERIES, ("first layer", "last layer"))
    for column, (image, query, layer) in enumerate(columns):
        axes[0, column].set_title(layer)
        for row, axis in zip(rows, axes[:, column]):
            shown = axis.imshow(
                row[column], cmap="RdBu_r", vmin=-3, vmax=3, extent=(0, 1, 1, 0)
            )
            axis.plot(query, query, "wP", mec="black", ms=7)
            if masks.ndim == 3:
                axis.contour(masks[image], [0.5], colors="k", extent=(0, 1, 0, 1))
    for network, axis in zip(networks, axes[1:, 0]):
        axis.set_ylabel(network.name)
    fig.colorbar(shown, ax=axes, label="log2 (attention / uniform), cut at ± 3")
    return fig


FIGURES["maps"] = Figure(
    "2",
    4,
    "Attention of two queries (white +) in two images, one network each",
    maps_lesson,
    draw_maps,
    picture=(picture_maps,),
)


# ==== Figure 3. How far does a token look? ==========================================

distance_lesson = """\
The map as one number: the mean distance between a token and what it looks at, d =
mean_q Σ_k A[q,k]·‖x_q - x_k‖, in pixels. Tokens that attend everywhere alike have the
mean distance of all pairs of grid points, the dotted line. The paper saw CL far above
MIM, most in later layers, which is why CL would see shapes and MIM textures.

Read it against grey: an untrained network attends almost uniformly, so training mostly
shortens. What to look at: whether the gap widens with depth, and the band, from the
nearest head to the farthest (each averaged over the networks): one layer can hold near
and far ones."""


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
    return torch.ones(*np.broadcast_to(grid, 2)).nonzero().to(like)


def measure_distance(batch):
    vit = batch.vit
    return {"distance": attention_distance(batch.attn, vit.grid, vit.patch_size)}


def plot_distance(axis, networks):
    curves(
        axis, networks, itemgetter("distance"), "attention distance (px; band: heads)"
    )
    for image_size, patch_size in {network.shape[:2] for network in networks}:
        patches = grid_points(image_size // patch_size, torch.ones(1))
        far = torch.cdist(patches, patches).mean().item() * patch_size
        axis.axhline(far, color="black", ls=":", label="uniform attention")


FIGURES["distance"] = Figure(
    "3",
    4,
    "CL attends globally, MIM locally, most in later layers",
    distance_lesson,
    partial(on_one_axis, plot_distance),
    parts=(
        Part("attention distance, px", "CL", "MIM", of(np.mean, "distance")),
        Part("the same, late - early", "CL", "MIM", of(rise, "distance")),
    ),
    measure=(measure_distance,),
)


# ==== Figure 4. Does it matter which token asks? ====================================

nmi_lesson = """\
If all queries get the same map, attention has collapsed: the layer adds the same vector
to every token. Mutual information says how much the map tells about the query,

    I = Σ p(q) A[q,k] log(A[q,k] / p(k)) = H(k) - mean_q H(A[q]),
    NMI = I / √(H(q)·H(k)),

with p(q) = 1/N and p(k) = mean_q A[q,k]. The paper saw CL's late layers near 0 and
MIM's far above. Grey is near 0 as well: attention need not collapse under training, it
starts collapsed. What to look at: which layers leave the grey curve, and how far."""


def entropy(p):
    """-Σ p·log p over the last dimension, where 0·log 0 is 0."""
    return torch.special.entr(p).sum(dim=-1)


def attention_nmi(attn):
    """Does it matter which token asks?  Mutual information of query and key.

    I = H(k) - mean_q H(A[q]), NMI = I / √(H(q)·H(k)). attn (B, H, N, N), rows sum to 1
    -> (B, H) in [0, 1]. 0: one map for all queries (collapse), and if all look at one
    key, where H(k) = 0. 1: each query its own key. [P] figure 4.
    """
    key_entropy = entropy(attn.mean(dim=-2))  # H(k): (B, H)
    row_entropy = entropy(attn).mean(dim=-1)
    query_entropy = math.log(attn.shape[-2])
    nmi = (key_entropy - row_entropy) / (key_entropy * query_entropy).sqrt()
    # rounding may step over the ends
    return torch.where(key_entropy > 0, nmi, 0.0).clamp(0, 1)


def measure_nmi(batch):
    return {"nmi": attention_nmi(batch.attn)}


def plot_nmi(axis, networks):
    curves(axis, networks, itemgetter("nmi"), "NMI (band: heads)")
    axis.axhline(0, color="black", ls=":", label="one map for all queries")


FIGURES["nmi"] = Figure(
    "4",
    5,
    "CL's later attention collapses into one map for all queries",
    nmi_lesson,
    partial(on_one_axis, plot_nmi),
    parts=(
        Part("NMI, late", "MIM", "CL", of(late, "nmi")),
        Part("NMI of CL, early - late", "CL", "", lambda values: -rise(values["nmi"])),
    ),
    measure=(measure_nmi,),
)


# ==== Figure 5. Do heads, layers and tokens say different things? ===================

similarity_lesson = """\
Heads that say the same are one head. Three mean cosines of what attention adds: between
heads at one token, between neighbouring layers at one token, between the tokens of an
image. 1: all alike, 0: orthogonal. The paper saw CL near 1 in late layers for all
three, MIM lower. Tokens near 1 is where an untrained network starts (grey). What to
look at: the axes' ranges, which differ, and the last layer, which may jump.

Heads are compared as A_h·V_h·W_h, where W_h is the head's slice of the output matrix:
what each adds to the token. A_h·V_h itself would compare coordinate 5 of one head with
coordinate 5 of another, which mean different things."""


def token_similarity(tokens):
    """Are the tokens of an image told apart?  Mean cosine ([P] figure 5 right).

    Over the N(N - 1) pairs of different tokens, from |Σu|² = N + Σ_pairs for unit
    vectors u. tokens (..., N, D) -> (...) in [-1/(N-1), 1]. 1: alike; one token: nan.
    """
    unit = F.normalize(tokens, dim=-1)
    n = tokens.shape[-2]
    pairs = unit.sum(dim=-2).square().sum(dim=-1) - n
    return pairs / (n * (n - 1) or math.nan)


def head_similarity(heads):
    """Do the heads say different things?  Mean cosine at one token ([P] figure 5 left).

    heads (B, H, N, d), in coordinates that all heads share -> (B,) in [-1/(H-1), 1].
    1: alike; one head: nan.
    """
    return token_similarity(heads.transpose(-3, -2)).mean(dim=-1)


def depth_similarity(a, b):
    """Do neighbouring layers add different things?  Mean cosine ([P] figure 5 middle).

    Of the same token in two layers. a, b (B, N, D) -> (B,) in [-1, 1]. 1: the second
    layer repeats the first.
    """
    return F.cosine_similarity(a, b, dim=-1).mean(dim=-1)


def measure_similarity(batch):
    states = batch.states[:, :, 1:]
    added = states[:, 1::2] - states[:, :-1:2]  # by attention (B, L, N, D)
    heads = []
    for block, x in zip(batch.vit.blocks, batch.heads.unbind(1)):
        # W, and LayerScale where there is one, input first: (H, d, D)
        weight = block.ls1(block.attn.proj.weight.mT).unflatten(0, (x.shape[1], -1))
        heads.append(head_similarity(x @ weight))  # A_h·V_h·W_h: (B, H, N, D)
    return {
        "heads": torch.stack(heads, dim=1),
        "depths": depth_similarity(added[:, :-1], added[:, 1:]),
        "tokens": token_similarity(added),
    }


COSINES = ("heads", "depths", "tokens")


def draw_similarity(networks):
    fig, [axes] = canvas(3)
    for axis, key in zip(axes, COSINES):
        curves(axis, networks, itemgetter(key), f"cosine between {key} (1: alike)")
    return fig


FIGURES["similarity"] = Figure(
    "5",
    6,
    "CL lacks diversity across heads, depths and tokens in later layers",
    similarity_lesson,
    draw_similarity,
    parts=tuple(
        Part(f"cosine between {key}, late", "CL", "MIM", of(late, key))
        for key in COSINES
    ),
    measure=(measure_similarity,),
)


# ==== Figure 6. What does attention do to the tokens of an image? ===================

plane_lesson = """\
The tokens of three images on the plane of their largest variance, before (hollow) and
after (full) the last attention. A network that works on whole images moves all tokens
of one image together, in parallel lines; one that works on tokens moves each its own
way. The paper saw the first in CL and the second in MIM.

What to look at: are the lines of a colour, which is an image, parallel, and more so
than in the untrained network? If all of them look parallel, the plane has not found
what the paper saw: each network has its own axes, which say how much of the variance
they show, and two directions can hide most of it. The next figure counts all."""

IMAGE_COLOURS = ("#009E73", "#CC79A7", "#E6A800")  # not those of the objectives


def picture_plane(batch):
    """-> tokens of three images before and after the last attention (3, 2N, 2), and
    the shares of the variance along both axes (2,)."""
    tokens = batch.states[:, [-3, -2], 1:].flatten(1, 2)  # (3, 2N, D)
    tokens = tokens - tokens.mean(dim=(0, 1))
    _, sizes, directions = torch.linalg.svd(tokens.flatten(0, 1), full_matrices=False)
    shares = (sizes / sizes.norm()).square()
    return {"plane": tokens @ directions[:2].T, "shares": shares[:2]}


def draw_plane(networks):
    networks = [n for n in networks if "plane" in n.pictures]
    rows = 2 - len(networks) % 2  # an odd number in one row
    fig, axes = canvas(len(networks) // rows, rows)
    for axis, network in zip(axes.flat, networks):
        planes = np.array(network.pictures["plane"])
        for tokens, colour in zip(planes, IMAGE_COLOURS):
            x, y = tokens.T.reshape(2, 2, -1)  # of N tokens before and after: (2, N)
            axis.plot(x, y, "o-", color=colour, lw=0.8, ms=4.5, mfc="none")  # N lines
            axis.plot(x[1], y[1], "o", color=colour, ms=4.5)
        x, y = [f"{share:.0%} of the variance" for share in network.pictures["shares"]]
        axis.set(xlabel=x, ylabel=y, title=network.name)
    return fig


FIGURES["plane"] = Figure(
    "6",
    7,
    "Tokens of three images before (hollow) and after the last attention",
    plane_lesson,
    draw_plane,
    picture=(picture_plane,),
)


# ==== Figure 7. How many directions do tokens and images fill? ======================

spectra_lesson = """\
Singular values σ of a centred matrix say how far its rows spread in each direction; the
mean of their logarithms is the log of the volume that they fill, per direction. Two
matrices: the tokens of one image (N × D, averaged over images) and the mean tokens of
all images (images × D). The paper saw that CL's layers spread images apart while the
tokens of an image gain no volume, and that MIM does the reverse.

A network that only gets louder gains volume too. So the verdict divides each matrix by
its Frobenius norm: what remains is how evenly directions are filled. The spectrum on
the right is not divided, so a louder network lies higher there. What to look at: the
last layer, and where the curves part. Layer 0, the embedding, is left out: the pixels
of a patch may give images fewer directions than tokens are wide."""


def singular_spectrum(x):
    """How many directions do rows fill?  Log singular values ([P] figure 7).

    x (..., n, D), centred over n here -> (..., min(n, D)), largest first. Equal values:
    all directions alike; a steep fall: few. From the Gram matrix in float64: as exact
    as an SVD in float32 and faster; what lies near the floor, 1e-8 of the largest, is
    rounding.
    """
    x = (x - x.mean(dim=-2, keepdim=True)).double()
    if x.shape[-2] > x.shape[-1]:
        x = x.mT  # the smaller Gram matrix
    square = torch.linalg.eigvalsh(x @ x.mT).flip(-1)
    floor = 1e-16 * square[..., :1].clamp(min=1e-280)
    return square.clamp(min=floor).log() / 2


def log_volume(x):
    """Mean log singular value of centred rows (..., n, D), divided by √Σ σ² -> (...).

    n rows around their mean fill n - 1 directions at most.
    """
    log = singular_spectrum(x)
    size = torch.logsumexp(2 * log, dim=-1) / 2  # log √Σ σ²
    return log[..., : x.shape[-2] - 1].mean(dim=-1) - size


def measure_volume(batch):
    return {"token volume": log_volume(batch.states[:, :, 1:])}


def measure_features(batch):
    """The mean patch token of every state (B, 1+2L, D)."""
    return {"features": batch.states[:, :, 1:].mean(dim=2)}


def image_spectra(rows):
    """Log volume of all images' mean tokens, of every state; the last spectrum."""
    states = torch.from_numpy(rows["features"]).transpose(0, 1)  # (1+2L, n, D)
    # n rows around their mean have n - 1 directions at most
    log = singular_spectrum(states[-1:])[..., : states.shape[1] - 1]
    # 32 values, however many images are left out
    spectrum = F.interpolate(log[None], 32, mode="linear", align_corners=True)
    return {"image volume": log_volume(states), "spectrum": spectrum[0, 0]}


def draw_spectra(networks):
    fig, [axes] = canvas(3)
    for axis, key in zip(axes, ("token volume", "image volume")):
        # without layer 0, which may be far below, with directions that are empty
        later = of(itemgetter(slice(1, None)), key)
        curves(axis, networks, later, f"{key}: log (σ / norm)")
    curves(
        axes[2],
        networks,
        itemgetter("spectrum"),
        "log σ of images (not divided)",
        "rank, as a share",
    )
    return fig


FIGURES["spectra"] = Figure(
    "7",
    7,
    "CL spreads images apart, MIM the tokens of an image",
    spectra_lesson,
    draw_spectra,
    parts=(
        Part("log volume, tokens of an image", "MIM", "CL", of(last, "token volume")),
        Part("log volume, images", "CL", "MIM", of(last, "image volume")),
    ),
    measure=(measure_volume, measure_features),
    whole=(image_spectra,),
)


# ==== Figure 8. Which frequencies survive? ==========================================

fourier_lesson = """\
A layer's tokens form a map, and a map has frequencies: low ones are blobs and outlines,
high ones differ from patch to patch, which is texture. Shown is the log amplitude along
the diagonal from 0 to π per patch, minus its value at 0,

    Δ(ω) = mean over channels of log|X(ω)| - log|X(0)|,   X(ω) = Σ x[r,c]·exp(-iω(r+c)).

The paper saw CL keep low frequencies and MIM high ones. 'High' is π, where neighbours
have opposite signs; the public code stops short of it. A large mean token lowers Δ
everywhere, so the middle panel compares π with the lowest frequency above 0. Logarithms
are natural. What to look at: is attention (the points between whole layers) a low-pass
filter and the MLP not, so that every curve is a saw? In the middle panel the order may
turn: is the claim about detail, or the mean token?"""


def fourier_amplitude(tokens, grid):
    """Which frequencies does a token map keep?  Δ log amplitude, 0 … π ([P] figure 8).

    On an even square grid these are the FFT's diagonal bins up to Nyquist; on others
    the sum reaches π too, without the mean token, which would leak into it.

    tokens (..., N, D), grid (rows, cols) or a number -> (..., F) at ω = π·j/(F - 1), F
    = short side // 2 + 1. First 0; last: far below 0 = only low frequencies left
    (blurred), about 0 = as much detail as mean.
    """
    place = grid_points(grid, tokens).double().sum(dim=1)  # r + c: (N,)
    omega = np.linspace(0, math.pi, np.min(grid) // 2 + 1)
    phase = torch.from_numpy(omega).to(place)[:, None] * place  # (F, N)
    wave = torch.exp(-1j * phase).to(tokens.dtype.to_complex())
    # takes off the mean token; on even square grids this mean is 0 anyway
    wave[1:] -= wave[1:].mean(dim=1, keepdim=True)
    amplitude = (wave @ tokens.to(wave.dtype)).abs()  # (..., F, D)
    log = amplitude.clamp(min=1e-37).log().mean(dim=-1)  # keeps log 0 finite
    return log - log[..., :1]


def measure_fourier(batch):
    return {"fourier": fourier_amplitude(batch.states[:, :, 1:], batch.vit.grid)}


def high_frequencies(values):
    return values["fourier"][:, -1]


def above_lowest(values):
    return high_frequencies(values) - values["fourier"][:, 1]


def after_mlp(values):
    return high_frequencies(values)[2::2]


def plot_high_frequencies(axis, networks):
    curves(axis, networks, high_frequencies, "Δ log amplitude at π")


def draw_fourier(networks):
    fig, [axes] = canvas(3)
    plot_high_frequencies(axes[0], networks)
    curves(axes[1], networks, above_lowest, "beside the claim: π - lowest")
    last_state = of(itemgetter(-1), "fourier")
    curves(axes[2], networks, last_state, "Δ, last layer", "frequency (π per patch)")
    return fig


FIGURES["fourier"] = Figure(
    "8",
    8,
    "CL keeps low frequencies, MIM high ones",
    fourier_lesson,
    draw_fourier,
    parts=(Part("Δ log amplitude at π, late", "MIM", "CL", of(late, after_mlp)),),
    measure=(measure_fourier,),
)


# ==== Figure 1 left. What are the features good for? ================================

accuracy_lesson = """\
Two questions to a trained network. The linear probe freezes it and asks what a
hyperplane can read from its output: mean cross-entropy + strength/2·|W|². The strength,
and CLS or the mean patch token, are chosen on validation images. Fine-tuning trains all
weights further and asks what the network is a good start for: it reads the mean patch
token, also of CL, whose loss read CLS; learning rate and layer decay are chosen on
validation images, in trainings of a third of the epochs, and seeds of a network share
the first one's choice. The paper saw CL win the first and MIM the second.

Grey is a new network: what fine-tuning reaches from scratch, and a probe of random
weights. Chance is one in as many as there are classes: 0.125 for the stimuli. What to
look at: is the gap larger than the scatter of seeds (circles) where there are several,
and is anything above grey? The axes begin where the data do: compare their ranges. Of
stimuli, does shape say the same as texture?"""

STRENGTHS = (1.0, 0.1, 0.01, 1e-3, 1e-4)


def linear_probe(features, labels, test, device="cpu"):
    """What can a hyperplane read?  Regularised logistic regression ([P] figures 1, 10).

    features (n, D) and labels (n,) to learn from, test (..., D) -> predicted classes
    (...), the accuracy on a quarter of the n rows, and the strength that it chose.
    """
    x, labels, test = [
        torch.as_tensor(part, device=device) for part in (features, labels, test)
    ]
    cut = 3 * len(labels) // 4
    std, mean = torch.std_mean(x[:cut], dim=0)
    x, test = [(part - mean) / std.clamp(min=1e-6) for part in (x, test)]
    head = nn.Linear(x.shape[1], 1 + int(labels.max())).to(device)
    for weights in head.parameters():
        nn.init.zeros_(weights)
    results = []
    for strength in STRENGTHS:  # from strong to weak, each from the last solution
        minimise(head, strength, x[:cut], labels[:cut])
        correct = head(x[cut:]).argmax(dim=1) == labels[cut:]
        predicted = head(test).argmax(dim=-1).cpu().numpy()
        results.append((predicted, correct.float().mean().item(), strength))
    return max(results, key=itemgetter(1))


def minimise(head, strength, x, labels):
    """Mean cross-entropy + strength/2·|W|², by L-BFGS."""
    solver = torch.optim.LBFGS(
        head.parameters(), max_iter=100, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss():
        solver.zero_grad()
        penalty = strength / 2 * head.weight.square().sum()
        total = F.cross_entropy(head(x), labels) + penalty
        total.backward()
        return total

    solver.step(loss)


def probes(features, labels, test, device):
    """Linear probes, one for each place (a token or state) and label set.

    features (n, places, D), labels (n, label sets), test (..., places, D) -> of each
    place: predicted (..., label sets), accuracy on validation, place, strengths.
    """
    for place in range(features.shape[1]):
        x, test_x = features[:, place], test[..., place, :]
        results = [linear_probe(x, column, test_x, device) for column in labels.T]
        predicted, accuracies, strengths = zip(*results)
        yield np.stack(predicted, axis=-1), np.mean(accuracies), place, strengths


def probe(*data):
    """Probes the pooled token and CLS -> what probes() says of the one that is better
    on validation."""
    return max(probes(*data), key=itemgetter(1))


def learn_probe(study):
    predicted, accuracy, place, strengths = probe(
        *study.examples, study.rows["output"], study.device
    )
    study.vit.facts.choices["linear probe"] = (
        f"of {'CLS' if place else 'the mean patch token'}, strengths {strengths}, "
        f"{accuracy:.4f} on validation"
    )
    return {"linear probe": predicted == study.rows["labels"]}


FINE_TUNING = [
    {"lr": lr, "decay": decay} for lr in (3e-4, 1e-3, 3e-3) for decay in (0.75, 1.0)
]
BATCH_SIZE = 64


class Tuned(nn.Module):
    """A copy of a network with a linear head: classes of images, or of pixels."""

    def __init__(self, study, is_dense, is_frozen):
        super().__init__()
        torch.manual_seed(0)
        self.vit = deepcopy(study.vit).requires_grad_(not is_frozen)
        self.norm = nn.BatchNorm1d(self.vit.embed_dim, affine=False)
        self.is_dense = is_dense
        self.classes = study.classes + is_dense  # segmentation has a ground
        questions = len(study.test.source.label_names)
        if is_dense:
            questions = self.vit.patch_size**2
        self.head = nn.Linear(self.vit.embed_dim, self.classes * questions)
        self.to(study.device)

    def forward(self, pixels):
        """(B, 3, S, S) -> logits (B, classes, label sets), or (B, classes, S, S)."""
        tokens = self.vit(normalise(pixels, self.vit))[:, 1:]
        if not self.is_dense:
            tokens = tokens.mean(dim=1, keepdim=True)
        tokens = self.norm(tokens.mT).mT
        logits = self.head(tokens).float().mT  # (B, classes · questions, N or 1)
        if self.is_dense:
            p = self.vit.patch_size
            return F.fold(logits, pixels.shape[2:], p, stride=p)
        return logits.reshape(len(pixels), self.classes, -1)


def random_crop(image, size):
    """35 % to all of the area, mirrored or not -> uint8 (3, size, size).

    From 8 % on in the papers, whose images have more room.
    """
    rng = np.random.default_rng(torch.randint(2**62, (1,)).item())
    [crop] = sslvit.random_crops(image, size, [0.35], rng)
    return crop[:, :, :: rng.choice((1, -1))].copy()


def parameter_groups(model, lr, decay):
    """What is early is general and moves less (BEiT, SimMIM).

    Block l of L learns at lr·decay^(L - l), the embedding as block 0; the last norm,
    the head and position-bias tables as block L.
    """
    depth = len(model.vit.blocks)
    groups = []
    for name, weight in model.named_parameters():
        layer = depth
        if name.startswith("vit.blocks."):
            layer = 1 + int(name.split(".")[2])
        elif name.startswith(("vit.patch_embed", "vit.cls_token", "vit.pos_embed")):
            layer = 0
        groups.append({"params": [weight], "lr": lr * decay ** (depth - layer)})
    return groups


def fit(model, images, epochs, lr, decay=1.0):
    """Trains a Tuned on crops and flips of images; with masks, on whole ones."""
    batches = replace(images, training=True).batches(BATCH_SIZE)
    solver = torch.optim.AdamW(parameter_groups(model, lr, decay), weight_decay=0.05)
    steps = epochs * len(batches)
    # counts from 0, so that the first step moves nothing
    rates = partial(sslvit.lr_at, total=steps, warmup=steps / 10, peak=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(solver, rates)
    device = model.head.weight.device.type
    bf16 = sslvit.has_bf16(device == "cuda")
    for _ in range(epochs):
        for pixels, labels in batches:
            solver.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                logits = model(pixels)
            F.cross_entropy(logits, labels.to(logits.device)).backward()
            solver.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def predict(model, images):
    """-> predicted classes, true ones: (n, label sets), or (n, S, S) of pixels."""
    pairs = []
    for pixels, labels in images.batches(BATCH_SIZE):
        pairs.append((model(pixels).argmax(dim=1).cpu(), labels))
    return [torch.cat(parts).numpy() for parts in zip(*pairs)]


def tune(study, key, settings, is_dense=False, is_frozen=False):
    """Trains with the setting that is best on validation -> predict() of test images.

    The last quarter of the images to learn from chooses, after trainings of a third of
    the epochs; the seeds of a network share the choice.
    """
    make = partial(Tuned, study, is_dense, is_frozen)
    images, test = [replace(x, masks=is_dense) for x in (study.train, study.test)]
    cut = 3 * len(images) // 4
    train = replace(images, indices=images.indices[:cut])
    val = replace(images, indices=images.indices[cut:])
    epochs = study.options.epochs
    if is_dense:  # an image has as many labels as pixels
        epochs = math.ceil(epochs / 4)

    def accuracy(setting):
        model = fit(make(), train, max(1, epochs // 3), **setting)
        share = np.mean(np.equal(*predict(model, val)))
        print(f"  {key}: {setting}: {share:.4f} on validation")
        return share

    choices = study.vit.facts.choices
    if key not in choices:
        choices[key] = max(settings, key=accuracy)
        # is it an end of the grid?
        print(f"  {key}: {choices[key]}, best of {settings[0]} to {settings[-1]}")
    return predict(fit(make(), train, epochs, **choices[key]), test)


def learn_tuned(study):
    return {"fine-tuned": np.equal(*tune(study, "fine-tuned", FINE_TUNING))}


# claim 1 reads shape (of photographs: the class) and texture, other claims their mean
shapes, textures = itemgetter(0), itemgetter(1)
mean_probe = of(np.mean, "linear probe")
mean_tuned = of(np.mean, "fine-tuned")


def draw_accuracy(networks):
    labels = networks[0].label_names or ["no classes"]
    fig, [axes] = canvas(2 * len(labels))
    pairs = product(("linear probe", "fine-tuned"), enumerate(labels))
    for axis, (key, (place, label)) in zip(axes, pairs):
        points(axis, networks, of(itemgetter(place), key), f"{key}, {label}")
    return fig


FIGURES["accuracy"] = Figure(
    "1 left",
    1,
    "CL wins linear probing, MIM wins fine-tuning",
    accuracy_lesson,
    draw_accuracy,
    parts=(
        Part(
            "linear probe, last layer, shape or class",
            "CL",
            "MIM",
            of(shapes, "linear probe"),
        ),
        Part("fine-tuning, shape or class", "MIM", "CL", of(shapes, "fine-tuned")),
        Part(
            "linear probe, last layer, texture",
            "CL",
            "MIM",
            of(textures, "linear probe"),
        ),
        Part("fine-tuning, texture", "MIM", "CL", of(textures, "fine-tuned")),
    ),
    learn=(learn_probe, learn_tuned),
)


# ==== Figure 1 middle. Does the winner depend on size? ==============================

scaling_lesson = """\
Which objective to pretrain with may depend on how large the network is: the paper saw
CL fine-tune better as ViT-Ti and MIM as ViT-L, and reads it as attention that does not
collapse making use of more room. There every network saw equally many images; how many
each saw here stands at the top of the table. The comparison is fair only where
pretraining helped at all: each network must be above a new one of its size (grey), else
the verdict is 'not testable'.

What to look at: the slopes rather than the points, and grey's slope too."""


def draw_scaling(networks):
    """A line for each role."""
    require(len({n.embed_dim for n in networks}) > 1, "needs networks of two sizes")
    lines = defaultdict(list)
    for network in sorted(networks, key=attrgetter("embed_dim")):
        lines[network.role].append(network)
    fig, [[axis]] = canvas(1)
    for role, group in lines.items():
        line = points(axis, group, mean_tuned, "fine-tuning accuracy", "embed_dim")
        axis.plot(*line, label=role, **style_of(group[0]))
    axis.set_xlabel("width of the tokens")
    return fig


FIGURES["scaling"] = Figure(
    "1 middle",
    2,
    "CL wins small models, MIM wins large ones",
    scaling_lesson,
    draw_scaling,
    parts=(
        # True: both must be above a new network
        Part("fine-tuning, smallest size", "CL", "MIM", mean_tuned, True, SMALLEST),
        Part("fine-tuning, largest size", "MIM", "CL", mean_tuned, True, LARGEST),
    ),
    learn=(learn_tuned,),
)


# ==== Figure 1 right. Do tokens know what is where? =================================

dense_lesson = """\
Segmentation asks every token for the classes of its own p × p pixels: one of eight
shapes, or ground. One linear layer does it, on a frozen network or trained with it, in
a quarter of the epochs of figure 1 left; the learning rate, and layer decay, are chosen
by the pixels that are right in validation. The paper used COCO boxes and Mask R-CNN,
which need a GPU for days. The score, with sums over all test images, is the mean over
classes of

    IoU(c) = Σ|predicted c and true c| / Σ|predicted c or true c|.

The paper saw MIM ahead, as its tokens stay themselves. What to look at: linear says
what tokens hold, fine-tuned what they can become. Neither counts where CL or MIM is not
above grey."""

LINEAR_HEADS = [{"lr": lr} for lr in (1e-3, 3e-3, 1e-2)]


def mean_iou(counts):
    """Intersection over union, mean over the classes that occur ([P] figure 1 right).

    counts (classes, 2): pixels of intersection and union, summed (or averaged) over a
    set of images -> scalar in [0, 1]. 1: every pixel correct.
    """
    intersection, union = np.asarray(counts, dtype=float).T
    occurs = union > 0
    return (intersection[occurs] / union[occurs]).mean()


def overlaps(predicted, true, classes):
    """(n, S, S) each -> pixels of intersection and union (n, classes, 2)."""
    labels = np.arange(classes)[:, None, None]
    p, t = [x[:, None] == labels for x in (predicted, true)]  # (n, classes, S, S)
    return np.stack([p & t, p | t], axis=2).sum(axis=(3, 4))


def learn_dense(study):
    require(
        not study.options.data, "segmentation needs the stimuli, whose masks are given"
    )
    classes = 1 + study.classes  # 0 is the ground
    linear = tune(study, "mIoU, linear", LINEAR_HEADS, is_dense=True, is_frozen=True)
    tuned = tune(study, "mIoU, fine-tuned", FINE_TUNING, is_dense=True)
    return {
        "overlap, linear": overlaps(*linear, classes),
        "overlap, fine-tuned": overlaps(*tuned, classes),
    }


def draw_dense(networks):
    fig, [axes] = canvas(2)
    for axis, part in zip(axes, FIGURES["dense"].parts):
        points(axis, networks, part.read, part.text)
    return fig


FIGURES["dense"] = Figure(
    "1 right",
    3,
    "MIM wins dense prediction",
    dense_lesson,
    draw_dense,
    parts=tuple(
        Part(
            f"mIoU, {head}", "MIM", "CL", of(mean_iou, f"overlap, {head}"), trained=True
        )
        for head in ("linear", "fine-tuned")
    ),
    learn=(learn_dense,),
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
which has learnt nothing and may still prefer one."""


def shape_bias(cues):
    """Outline or surface?  The share of shape among decisions that match either cue.

    Geirhos et al. 2019; [P] figure 9 left. cues (pairings, 2): the share of decisions
    that match shape, texture -> scalar in [0, 1], mean over the pairings. 1: always the
    shape, 0: always the texture; nan if in one pairing no decision matches.
    """
    shape, texture = torch.as_tensor(cues).T
    return (shape / (shape + texture)).mean().item()


def learn_bias(study):
    """-> cues (n, pairings, 2): does a decision match shape, texture?"""
    features, labels = study.examples
    rows, count = study.rows, study.classes
    offsets = range(count)
    if study.options.data:  # photographs, whose two cues are of one class
        labels, offsets = labels[:, [0, 0]], [0]
        cues = find_cues(study.options, study.vit)
        images = replace(study.test, source=cues, indices=range(len(cues)))
        rows = one_pass(study.vit, images)
    pairings = []
    for offset in offsets:
        # taught: class c is shape c with texture c + offset; tested: all other pairs,
        # as, for offset 3, shape 0 with texture 5, which are of classes 0 and 2
        taught = (labels[:, 1] - labels[:, 0]) % count == offset
        decisions, *_ = probe(
            features[taught], labels[taught, :1], rows["output"], study.device
        )
        classes = (rows["labels"] - [0, offset]) % count
        is_conflict = classes[:, :1] != classes[:, 1:]
        pairings.append((decisions == classes) & is_conflict)
    return {"cues": np.stack(pairings, axis=1)}


def find_cues(options, vit):
    """Geirhos' images, cat1-elephant2.png, with the classes of shape and texture.

    UserError if a name is not of two classes of the data.
    """
    require(options.cue_conflict, "shape bias needs the stimuli or --cue-conflict")
    images = sslvit.ImageFolder(options.cue_conflict)
    # of the test set
    names = sum(find_sets(options.data, vit.facts.image_size)[1].classes, [])
    cue = rf"({'|'.join(map(re.escape, names))})\d*"
    for i, (path, _) in enumerate(images):
        match = re.fullmatch(f"{cue}-{cue}", Path(path).stem)
        require(match, f"{path}: not named by two classes of the data")
        images[i] = path, [*map(names.index, match.groups())]
    return images


def plot_bias(axis, networks):
    axis.axhline(0.5, color="black", ls=":", label="no preference")
    points(axis, networks, of(shape_bias, "cues"), "share of shape decisions")


FIGURES["bias"] = Figure(
    "9 left",
    9,
    "CL is shape-biased, MIM texture-biased",
    bias_lesson,
    partial(on_one_axis, plot_bias),
    parts=(Part("shape bias", "CL", "MIM", of(shape_bias, "cues")),),
    learn=(learn_bias,),
)


# ==== Figure 9 right. Which frequencies does recognition need? ======================

noise_lesson = """\
Noise of one ring of spatial frequencies, a tenth of full brightness strong, is added to
test images (clipped to valid pixels, which spreads some of it to other rings), and the
probe of clean images decides: relative drop = 1 - accuracy(noisy) / accuracy(clean). A
network that reads texture needs what lies under high-frequency noise. The paper saw it
hurt MIM more; that must mean more than 'noise hurts MIM more', so the claim compares
the drop in the upper third of the rings minus that in the lower third (four of ten,
rounded up).

What to look at: which ring hurts most, whether the curves cross, and who moves: the
difference may come from MIM's rise, or from CL's fall."""

BANDS = list(pairwise(0.1 * math.pi * np.arange(11)))  # from, to: rad/px


def band_noise(size, low, high, generator=None):
    """Gaussian noise of the frequencies low ≤ |ω| < high (rad/px), without the mean.

    (B, 3, S, S) like `size`: each image's root mean square is 1 ([P] figure 9 right).
    Images so small that no frequency lies in the ring have the next higher ones.
    """
    noise = torch.fft.fft2(torch.randn(size, generator=generator))
    frequency = torch.fft.fftfreq(size[-1]) * 2 * math.pi
    radius = torch.hypot(frequency[:, None], frequency)  # (S, S)
    radius[0, 0] = math.inf  # the mean
    nearest = radius[radius >= low].min().item()
    ring = (radius >= low) & (radius < max(high, nearest + 1e-4))
    noise = torch.fft.ifft2(noise * ring).real
    return noise / noise.std(dim=(1, 2, 3), keepdim=True, correction=0)


def band_noise_drop(accuracies):
    """What does noise cost?  1 - noisy / clean accuracy ([P] figure 9 right).

    accuracies (1 + bands,), the clean one first -> (bands,), at most 1. 0: does not
    matter, 1: all is lost; nan: never correct.
    """
    return 1 - np.asarray(accuracies[1:]) / (accuracies[0] or math.nan)


def learn_noise(study):
    """-> noise (n, 1 + bands, label sets): is it correct? Clean first."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for pixels, _ in study.test.batches(BATCH_SIZE):
        noises = [band_noise(pixels.shape, *band, generator) for band in BANDS]
        # a root mean square of 25.5 is a tenth of full brightness
        noisy = [(pixels + 25.5 * noise).clamp(0, 255) for noise in (0, *noises)]
        outputs = [pooled_and_cls(study.vit(normalise(x, study.vit))) for x in noisy]
        rows.append(torch.stack(outputs, dim=1).cpu())  # (B, 1 + bands, 2, D)
    predicted, *_ = probe(*study.examples, torch.cat(rows), study.device)
    return {"noise": predicted == study.rows["labels"][:, None]}


def noise_drop(values):
    return band_noise_drop(values["noise"].mean(axis=1))


def plot_noise(axis, networks):
    curves(
        axis,
        networks,
        noise_drop,
        "relative accuracy drop",
        "ring of noise (0: 0 … 0.1 π per px, 1: 0.9 … 1 π); compared: 4 last - 4 first",
    )


FIGURES["noise"] = Figure(
    "9 right",
    9,
    "high-frequency noise hurts MIM more",
    noise_lesson,
    partial(on_one_axis, plot_noise),
    parts=(
        Part("noise: drop, high - low frequencies", "MIM", "CL", of(rise, noise_drop)),
    ),
    learn=(learn_noise,),
)


# ==== Figure 10. What does each layer know? =========================================

layers_lesson = """\
A linear probe of every layer: where in the network does a class become a direction? The
paper saw MIM ahead in early layers and best in the middle, its last layers a decoder of
pixels, while CL rises to the last. So a probe should say which layer and which token it
reads: here the mean patch token after each MLP, before the last norm; of stimuli, the
mean over shape and texture.

What to look at: does MIM fall from its middle third to the last layer, and more than
random layers (grey)? Do the curves cross?"""


POOLED = "probe of mean patch token"


def learn_layers(study):
    """-> (n, L): the share of the label sets that a probe after each MLP gets right."""
    train = one_pass(study.vit, study.train, [measure_features])
    features, test = [rows["features"][:, 2::2] for rows in (train, study.rows)]
    results = probes(features, train["labels"], test, study.device)
    correct = [predicted == study.rows["labels"] for predicted, *_ in results]
    return {POOLED: np.mean(correct, axis=2).T}


def end_fall(x):
    """From the middle third to the last layer."""
    return middle(x) - last(x)


def plot_layers(axis, networks):
    curves(axis, networks, itemgetter(POOLED), "accuracy of the pooled probe")


FIGURES["layers"] = Figure(
    "10",
    10,
    "MIM is better in early layers, CL in the last",
    layers_lesson,
    partial(on_one_axis, plot_layers),
    parts=(
        Part("pooled probe, early", "MIM", "CL", of(early, POOLED)),
        Part("pooled probe, last layer", "CL", "MIM", of(last, POOLED)),
        Part("pooled probe of MIM, middle - last", "MIM", "", of(end_fall, POOLED)),
    ),
    measure=(measure_features,),
    learn=(learn_layers,),
)


# ==== Figure 11. What if the decoder does the decoding? =============================

decoder_lesson = """\
SimMIM predicts pixels with one linear layer, so that its last encoder layers have to do
the decoding. Give it a few decoder blocks, as MAE has, and the encoder is free to know
more up to its end: that is how the paper explains MIM's falling curve. A decoder also
makes the network larger, so the control is a network without decoder that is as deep as
encoder and decoder together.

What to look at: the drop from the middle to the last layer, with decoder, without, and
in the control. An encoder that need not decode should also keep its NMI to the end."""

DECODED = "MIM with decoder"


def draw_decoder(networks):
    require(DECODED in {n.role for n in networks}, f"needs {DECODED}")
    fig, [axes] = canvas(2)
    plot_layers(axes[0], networks)
    plot_nmi(axes[1], networks)
    return fig


FIGURES["decoder"] = Figure(
    "11",
    11,
    "an explicit decoder keeps the last layers useful",
    decoder_lesson,
    draw_decoder,
    parts=(
        Part("probe, middle - last layer", "MIM", DECODED, of(end_fall, POOLED)),
        Part("the same, as deep", "MIM as deep", DECODED, of(end_fall, POOLED)),
        Part("NMI, last layer", DECODED, "MIM", of(last, "nmi")),
    ),
    measure=(measure_nmi, measure_features),
    learn=(learn_layers,),
)


# ==== Figure 12. Can one network have both? =========================================

sweep_lesson = """\
L = (1 - λ)·L_MIM + λ·L_CL on one shared encoder. The two objectives ask for different
layers, so the paper expected no quarrel, and saw the sum beat both at λ = 0.2: masked
early, contrastive late. An image costs the hybrid 11 encoder passes, CL 8 and MIM 3. So
there are two fair comparisons: equal images, as in the paper, and equal work, which is
images times passes. How many images each network saw stands at the top of the table.

What to look at: whether λ = 0.2 is above both ends by more than the seeds (circles)
scatter; a bar with one circle is one network. Whether the hybrid is like MIM at first
and like CL at the end, --only nmi fourier draws (figures 4 and 8)."""


def draw_sweep(networks):
    """Accuracy against λ; NMI and high frequencies are in figures 4 and 8."""
    roles = sizes_of(networks)[""]
    require(HYBRID in roles, f"needs a {HYBRID}")
    new = roles["untrained"]
    for other in ("untrained", DECODED, "MIM as deep", "other"):
        roles.pop(other, None)
    swept = sorted(sum(roles.values(), []), key=attrgetter("lam"))
    fig, [axes] = canvas(2)
    for axis, key in zip(axes, ("linear probe", "fine-tuned")):
        read = of(np.mean, key)
        axis.axhline(numbers(read, new)[0].mean(), label="untrained", color=GREY)
        line = points(axis, swept, read, f"{key} (mean of labels)", "lam")
        axis.plot(*line, color="black")
        axis.set_xlabel("λ (0: MIM, 1: CL)")
    return fig


FIGURES["sweep"] = Figure(
    "12",
    12,
    "a hybrid beats both",
    sweep_lesson,
    draw_sweep,
    parts=(
        Part("linear probe, hybrid - CL", HYBRID, "CL", mean_probe),
        Part("linear probe, hybrid - MIM", HYBRID, "MIM", mean_probe),
        Part("fine-tuning, hybrid - CL", HYBRID, "CL", mean_tuned),
        Part("fine-tuning, hybrid - MIM", HYBRID, "MIM", mean_tuned),
        # drawn in figures 4 and 8
        Part("NMI of hybrid, middle - last", HYBRID, "", of(end_fall, "nmi")),
        Part("Δ at π, early, hybrid - CL", HYBRID, "CL", of(early, after_mlp)),
        Part("Δ at π, late, MIM - hybrid", "MIM", HYBRID, of(late, after_mlp)),
    ),
    measure=(measure_nmi, measure_fourier),
    learn=(learn_probe, learn_tuned),
)


# ==== The engine: images and one pass ===============================================
# Images are read by DataLoader's workers and are never all in memory (but for small
# stimuli); what grows with their number are the values and features of each.

NOT_AVERAGED = {"output", "features", "labels"}  # for learners and image_spectra
PIXELS = {"imagenet": (MEAN, STD), "half": (0.5, 0.5)}  # mean, standard deviation


@dataclass
class Images:
    """Some images of a set (Stimuli, ImageFolder): centre squares, in an order.

    training: in random order, cropped and mirrored. masks: of stimuli alone, a label
    for each pixel, 0 on the ground, else 1 + the shape; neither cropped nor mirrored.
    """

    source: object
    indices: object  # numbers of images: an array or a range
    size: int
    workers: int
    training: bool = False
    masks: bool = False

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, place):
        """The image there, or the next that can be read -> pixels, labels."""
        index = self.indices[place]
        if self.masks:
            image, shape, _, mask = self.source[index]
            return image.transpose(2, 0, 1), mask * (1 + shape)
        crop = random_crop if self.training else sslvit.center_crop
        return sslvit.first_readable(self.source, index, partial(crop, size=self.size))

    def batches(self, size):
        return DataLoader(
            self,
            batch_size=min(size, len(self)),
            shuffle=self.training,
            drop_last=self.training,
            num_workers=self.workers,
            generator=torch.Generator().manual_seed(0),
        )


def normalise(pixels, vit):
    """Brightness 0 .. 255 -> what the network was trained on, on its device."""
    mean, std = PIXELS[vit.facts.pixels]
    return ((pixels / 255 - mean) / std).to(vit.cls_token.device)


# What happens to images inside a network. attn: of all layers, among patches, rows
# renormalised to sum 1 (B, L, H, N, N); heads: A_h·V_h of patches, with what they read
# from CLS (B, L, H, N, d);
# states: of CLS and patches (B, 1+2L, 1+N, D).
Batch = namedtuple("Batch", "vit attn heads states")


def look_inside(vit, x):
    """Images (B, 3, S, S) -> tokens after the last norm (B, 1+N, D), Batch."""
    tokens, records = vit(x, record=True)
    attn, heads, *states = [torch.stack(layers, dim=1) for layers in zip(*records)]
    # rows sum to 1 also where CLS took all but 1e-12
    attn = F.normalize(attn[..., 1:, 1:], p=1, dim=-1, eps=1e-37)
    embedding = vit.embed(x, None, None, vit.grid, vit.grid)[:, None]
    states = torch.stack(states, dim=2).flatten(1, 2)  # after attention, after MLP ...
    states = torch.cat([embedding, states], dim=1)
    return tokens, Batch(vit, attn, heads[..., 1:, :], states)


def pooled_and_cls(tokens):
    """Tokens (..., 1+N, D) -> (..., 2, D): the mean patch token, and CLS."""
    pooled = tokens[..., 1:, :].mean(dim=-2)
    return torch.stack([pooled, tokens[..., 0, :]], dim=-2)


def join(rows, how):
    """Several {key: value} -> {key: how([value, ...])}, of the keys that all have."""
    keys = set.intersection(*map(set, rows))
    return {key: how([row[key] for row in rows]) for key in keys}


def attempt(function, *arguments):
    """function(*arguments), or {}: a fault costs the figures that need its values."""
    try:
        return function(*arguments)
    except Exception as error:
        sslvit.warn_once(f"  {function.__name__} left out: {error!r}")
        return {}


def one_pass(vit, images, measures=()):
    """One pass over images serves every measurement -> {key: (n, ...)}."""
    rows = []
    # attention grows with the square of the patches; pictures need three images
    for pixels, labels in images.batches(min(BATCH_SIZE, 3 + 2000 // vit.grid**2)):
        tokens, batch = look_inside(vit, normalise(pixels, vit))
        values = {"output": pooled_and_cls(tokens), "labels": labels}
        for measure in measures:
            values |= attempt(measure, batch)
        rows.append({key: value.cpu().numpy() for key, value in values.items()})
    return join(rows, np.concatenate)


@cache
def find_sets(data, size):
    """-> training set, test set, number of classes; 0: nothing can be learnt.

    With fewer than 20 test images, training images are tested and nothing is learnt.
    """
    train, test = sslvit.find_data(Config(data=data, image_size=size))
    classes = 0
    if not test or len(test) < GROUPS:
        test = train
    elif train.classes == test.classes != ():
        classes = len(test.classes[0])
    return train, test, classes


def sample(source, count, size, workers):
    """`count` random Images (0: all), the same for every network."""
    order = np.random.default_rng(0).permutation(len(source))[: count or None]
    require(len(order) >= GROUPS, f"{len(order)} images: at least {GROUPS} are needed")
    return Images(source, order, size, workers)


# What a learner gets: a network, images to learn from and to be tested on, their number
# of classes; examples: of the former, output (n, 2, D) and labels (n, label sets);
# rows: what was measured of the latter.
Study = namedtuple("Study", "vit options device train test classes examples rows")


def measure_network(vit, options, figures):
    """Gives a network the values that the figures need -> train, test Images."""
    network = vit.facts
    size = network.image_size
    train, test, classes = find_sets(options.data, size)
    network.label_names = test.label_names
    train = sample(train, options.labels, size, options.workers)
    test = sample(test, options.images, size, options.workers)
    rows = one_pass(vit, test, unique(figures, "measure"))
    learners = unique(figures, "learn")
    if learners and classes:
        examples = itemgetter("output", "labels")(one_pass(vit, train))
        study = Study(
            vit, options, options.device, train, test, classes, examples, rows
        )
        for function in learners:
            rows |= attempt(function, study)
    network.values = leave_out(rows, unique(figures, "whole"))
    return train, test


def look_at_three(vit, test, figures):
    """What the figures show of three images -> {key: array}, with the images, 64 px
    wide, and their labels, of stimuli the masks."""
    images = replace(
        test, indices=test.indices[:3], masks=isinstance(test.source, sslvit.Stimuli)
    )
    pictures = one_pass(vit, images, unique(figures, "picture"))
    [(pixels, _)] = images.batches(3)
    pictures["photographs"] = F.interpolate(pixels, 64).permute(0, 2, 3, 1)
    return pictures


def unique(figures, slot):
    """The functions of several figures, each once, in order."""
    return dict.fromkeys(sum(map(attrgetter(slot), figures), ()))


# ==== The engine: verdicts ==========================================================
# Every value is stored 21 times: row 0 is of all test images, row g of those without
# the g-th twentieth. Verdicts compare numbers that are read from all rows.
#
# What a network is called: its role ("CL", "MIM") in claims; its name, under which its
# seeds count together; its architecture, which it shares with its untrained twin.

GROUPS = 20


def leave_out(rows, whole=()):
    """{key: (n, ...)} -> {key: (21, ...)}: means over images, and what `whole` adds."""
    results = []
    for group in range(-1, GROUPS):  # -1 leaves none out
        subset = {
            key: x[np.arange(len(x)) % GROUPS != group] for key, x in rows.items()
        }
        means = subset.keys() - NOT_AVERAGED
        values = {key: subset[key].mean(axis=0, dtype=float) for key in means}
        for summarise in whole:
            values |= attempt(summarise, subset)
        results.append(values)
    return join(results, np.stack)


def numbers(read, networks):
    """What is read of every row of the networks' values -> (21, networks, ...)."""
    columns = []
    for network in networks:
        rows = [{key: x[i] for key, x in network.values.items()} for i in range(21)]
        columns.append([read(row) for row in rows])
    return np.stack(columns, axis=1)


def welch(more, less):
    """Reach of Welch's 95 % interval for a difference of means; both (networks,).

    0 for fewer than three networks on a side, whose scatter says nothing.
    """
    counts = np.array([len(more), len(less)])
    if counts.min() < 3:
        return 0.0
    variances = np.array([more.var(ddof=1), less.var(ddof=1)]) / counts
    total = variances.sum()
    if total == 0:
        return 0.0
    freedom = total**2 / np.sum(variances**2 / (counts - 1))
    # Student's t, two-sided: t = √f·tan(a) turns its density (1 + t²/f)^(-(f+1)/2) dt
    # into cos(a)^(f - 1) da, of which 95 % of the positive half lie below the quantile
    angle = np.linspace(0, math.pi / 2, 100_001)
    area = np.cumsum(np.cos(angle) ** (freedom - 1))
    tangent = math.tan(np.interp(0.95, area / area[-1], angle))
    return tangent * math.sqrt(freedom * total)


def interval(more, less):
    """Numbers of two groups (21, networks) -> their difference, reach of its interval.

    The interval is difference ± reach. Images: jackknife over the twentieths, which all
    networks share. Networks, where both groups have three or more: Welch's t.
    """
    difference = more.mean(axis=1) - less.mean(axis=1)
    # 2.09: Student's t with 19 degrees of freedom, 95 % two-sided
    image_reach = 2.09 * math.sqrt(19 * difference[1:].var())
    return difference[0], math.hypot(image_reach, welch(more[0], less[0]))


def sizes_of(networks):
    """-> {size: {role: its networks}}.

    Size "" is the one that has most roles. There, "MIM as deep" is as deep as encoder
    and decoder together.
    """
    sizes = defaultdict(lambda: defaultdict(list))
    for network in sorted(networks, key=attrgetter("embed_dim", "shape")):
        sizes[network.shape][network.role].append(network)
    most = max(sizes.values(), key=len)
    both = [roles for roles in sizes.values() if {"CL", "MIM"} <= roles.keys()]
    groups = {"": most}
    if len(both) > 1:
        groups |= {SMALLEST: both[0], LARGEST: both[-1]}
    for network in most[DECODED][:1]:
        *shape, depth = network.shape
        deeper = *shape, depth + network.config["decoder_depth"]
        most["MIM as deep"] = sizes[deeper]["MIM"]
    return groups


def judge_part(part, sizes, networks):
    """-> a row of the table; IndexError if the images have no such label set.

    Values and gains stand under networks' names, which tell the size where there are
    several. Gains are over untrained networks of the same architecture; of these, the
    value that is shown is that of the first role.
    """
    row = {"part": part.text, "outcome": "undecided"}
    values, untrained, means, gains = [], [], {}, {}
    try:
        for role in filter(None, (part.more, part.less)):
            seeds = sizes[part.size][role]
            if len(by_name(seeds)) != 1:
                raise KeyError(f"{role}, of one name and size")
            name, like = seeds[0].name, seeds[0].architecture
            twins = [n for n in networks if not n.path and n.architecture == like]
            values.append(numbers(part.read, seeds))
            untrained.append(numbers(part.read, twins))
            means[name] = values[-1][0].mean()
            gains[name] = interval(values[-1], untrained[-1])
    except KeyError as error:  # no such size, role or value
        return row | {"outcome": f"needs {error.args[0]}"}
    means["untrained"] = untrained[0][0].mean()
    values.append(0 * values[0])  # for a part that names no other role
    difference, reach = interval(*values[:2])
    row |= {
        "values": means,
        "gains": gains,
        "difference": difference,
        "reach": reach,
        "networks": min(x.shape[1] for x in values),
    }
    low = [name for name, (gain, its_reach) in gains.items() if gain <= its_reach]
    if math.isnan(reach):
        row["outcome"] = "needs a number"
    elif part.trained and low:
        row["outcome"] = f"needs more training: {low[0]} not above a new network"
    elif difference > reach:
        row["outcome"] = "holds"
    elif difference < -reach:
        row["outcome"] = "opposed"
    return row


def verdict_of(rows):
    """What the outcomes of a claim's parts amount to, and of how many networks."""
    outcomes = {row["outcome"] for row in rows}
    if not outcomes <= {"holds", "opposed", "undecided"}:
        return "not testable"
    verdict = "undecided"
    if outcomes == {"holds"}:
        verdict = "agrees"
    elif outcomes >= {"holds", "opposed"}:
        verdict = "mixed"
    elif "holds" in outcomes:
        verdict = "partly"
    elif "opposed" in outcomes:
        verdict = "opposed"
    fewest = min(row["networks"] for row in rows)
    return f"{verdict} ({fewest} network{'s' * (fewest > 1)})"


def judge(networks, names):
    """-> the table: all parts of the claims of these figures."""
    sizes = sizes_of(networks)
    table = {FIGURES[name].claim: [] for name in names}
    for name, figure in FIGURES.items():
        if figure.claim in table:
            for part in figure.parts:
                with contextlib.suppress(IndexError):  # no such label set
                    row = judge_part(part, sizes, networks) | {"figure": name}
                    table[figure.claim].append(row)
    claims = []
    for number, rows in sorted(table.items()):
        texts = "; ".join(dict.fromkeys(FIGURES[row["figure"]].text for row in rows))
        claims.append(
            {
                "claim": number,
                "text": texts,
                "parts": rows,
                "verdict": verdict_of(rows),
            }
        )
    return claims


def table_of(results):
    """The claims as lines of text."""
    images = {n["name"]: n["images"] for n in results["networks"]}
    lines = [f"training images (one costs CL 8 passes, MIM 3, a hybrid 11): {images}"]
    outcomes = Counter()
    for claim in results["claims"]:
        lines.append(f"{claim['claim']:2} {claim['text']}: {claim['verdict']}")
        for row in claim["parts"]:
            line = f"   {row['part']:34} {words_of(row)}"
            for role, gain in row.get("gains", {}).items():
                line += f"; {role} - untrained {between(*gain)}"
            lines.append(line)
            outcomes[row["outcome"].split()[0]] += 1
    tested = outcomes.total() - outcomes["needs"]
    lines.append(
        f"{tested} parts were tested, {outcomes['holds']} hold; if nothing were true, "
        f"{tested / 40:.1f} would by chance (one in forty; with fewer than three "
        "networks more, as intervals do not know how trainings scatter)"
    )
    return "\n".join(lines)


def words_of(row):
    """Values, difference [its interval], outcome."""
    if "values" not in row:
        return row["outcome"]
    values = ", ".join(f"{role}: {x:.3f}" for role, x in row["values"].items())
    return f"{values}; {between(row['difference'], row['reach'])} {row['outcome']}"


def between(difference, reach):
    # a space at which no line breaks
    return (
        f"{difference:+.3f}\xa0"
        f"[{difference - reach:+.3f},\xa0{difference + reach:+.3f}]"
    )


# ==== The engine: networks ==========================================================

COMPANIONS = Path(__file__).resolve().parent / "figures/checkpoints"
# what a shipped network must share with yours to stand beside it
ALIKE = "data model image_size patch_size decoder_depth".split()
GIVEN = {"cl": 1.0, "mim": 0.0, "hybrid": 0.2}  # λ of the names cl=, mim=, hybrid=
# what seeds of one network may differ in
FREE = """
    seed device dtype accum workers compile keep out resume overwrite dry_run
    save_every log_every knn_images""".split()


@dataclass
class Network:
    """One trained or untrained network as it stands in results.json."""

    path: str  # "": untrained
    lam: float | None  # None: the file does not tell, as with seed
    pixels: str
    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    seed: int | None = None
    images: int | None = None  # seen in training, with repeats
    look: str = ""  # what its untrained twin shares beside the shape
    config: dict = field(default_factory=dict)  # of a run of sslvit.py
    given: str = ""  # NAME of NAME=FILE
    name: str = ""
    label_names: tuple = ()
    choices: dict = field(default_factory=dict)  # of learning rates
    values: dict = field(default_factory=dict)  # {key: (21, ...)}
    pictures: dict = field(default_factory=dict)

    @property
    def role(self):
        """What parts of claims call it."""
        if not self.path:
            return "untrained"
        roles = {None: "other", 0: "MIM", 1: "CL"}
        role = roles.get(self.lam, f"hybrid, λ = {self.lam}")
        if self.config.get("decoder_depth"):
            role += " with decoder"
        return role

    @property
    def shape(self):
        return self.image_size, self.patch_size, self.embed_dim, self.depth

    @property
    def architecture(self):
        return self.shape, self.look

    @property
    def settings(self):
        """What seeds of one network share, as pairs (name, value).

        Files of other people do not tell: those that share a NAME are seeds.
        """
        facts = "lam shape look images".split()
        settings = self.config | {name: getattr(self, name) for name in facts}
        if not (self.config or self.given):
            settings["path"] = self.path
        return {pair for pair in settings.items() if pair[0] not in FREE}


def by_name(networks):
    """-> lists of the networks of one name, which are its seeds."""
    names = defaultdict(list)
    for network in networks:
        names[network.name].append(network)
    return names.values()


def give_names(networks):
    """NAME, or role, with the size where networks differ in it.

    Where they differ in more, an untrained one says whose it is like.
    """
    shapes = {network.shape for network in networks}
    like = {n.look: n.given or n.role for n in networks if n.path}
    for network in networks:
        network.name = network.role
        if len(shapes) > 1:
            image, patch, width, depth = network.shape
            network.name += f", {width} × {depth}, {image}/{patch} px"
        if network.given.lower() not in {"", *GIVEN}:
            network.name = network.given
        if len(like) > 1 and not network.path:
            network.name += f", as {like[network.look]}"
    # an error tells of trained networks first
    for seeds in by_name(reversed(networks)):
        check_seeds(seeds)


def check_seeds(networks):
    """Seeds of one network: equal settings, no run or seed twice; else UserError."""
    first = networks[0]
    runs = {n.path if n.seed is None else n.seed for n in networks}
    for network in networks:
        differ = dict(first.settings ^ network.settings)
        files = f"{first.path} and {network.path}, both {first.name},"
        require(not differ, f"{files} differ in {sorted(differ)}: give NAME=FILE")
    require(len(runs) == len(networks), f"{first.name}: one run or seed is there twice")


# ==== The engine: results ===========================================================


def analyse(options):
    """Measures every network; results.json, whole after each -> its path."""
    vits = load_networks(options)
    give_names([vit.facts for vit in vits])
    figures = [FIGURES[name] for name in options.only]
    results = {"settings": vars(options), "networks": []}
    cues = options.cue_conflict and find_cues(options, vits[0]).identity()
    firsts = {}
    for vit in vits:
        network = vit.facts
        print(f"{1 + len(results['networks'])} of {len(vits)}: {network.name}")
        first = firsts.setdefault(network.name, network)
        network.choices = first.choices.copy()
        vit.to(options.device).requires_grad_(False)
        train, test = measure_network(vit, options, figures)
        if network is first:
            network.pictures = look_at_three(vit, test, figures)
        # what analyses must share to be joined
        images = [(x.source.identity(), len(x)) for x in (test, train)]
        results["data"] = [images, options.epochs, cues]
        results["networks"].append(vars(network))
        path = write_results(results, options.out)
        vit.cpu()
    return path


def write_results(results, out):
    """results.json under another name first, whole or not at all -> its path."""
    new = Path(out, "results.new")
    new.write_text(
        json.dumps(results, default=lambda x: np.asarray(x).round(6).tolist())
    )
    return new.replace(Path(out, "results.json"))


def read_results(paths):
    """results.json of one analysis or several -> results of the last, networks."""
    runs = {}
    try:
        analyses = [json.loads(Path(path).read_text()) for path in paths]
        for results in analyses:
            require(results["data"] == analyses[0]["data"], "other images or epochs")
            for entry in results["networks"]:
                network = Network(**entry)
                for key, value in network.values.items():
                    rows = network.values[key] = np.array(value, dtype=float)
                    require(len(rows) == 21, f"{key}: not 21 rows")
                # who is in several analyses, as untrained networks often are
                run = network.path, network.seed, frozenset(network.settings)
                first = runs.setdefault(run, network)
                first.values |= network.values
                first.choices |= network.choices
                first.pictures |= network.pictures
        networks = list(runs.values())
        give_names(networks)
    except Exception as error:  # a file that was cut or edited can raise anything
        raise UserError(f"--from {paths}: {error!r}") from error
    return results, networks


def title_of(name, claims):
    """What the claim says; its first part here in numbers, and how its other parts here
    came out; the verdict on all parts."""
    text = FIGURES[name].text
    for claim in claims:
        rows = [row for row in claim["parts"] if row["figure"] == name]
        if rows:
            parts = [f"{row['part']} {row['outcome']}" for row in rows]
            parts[0] = f"{rows[0]['part']}: {words_of(rows[0])}"
            parts = textwrap.fill(" · ".join(parts), 120, break_on_hyphens=False)
            return (
                f"The paper: {text}\n{parts}\n"
                f"Claim {claim['claim']}, all parts: {claim['verdict']}"
            )
    return text


def draw_figures(networks, names, claims, out):
    """Every figure that the networks allow -> {name: file}."""
    pictures = {}
    # what two pictures of one figure may differ in
    kind = "stimuli" if "texture" in networks[0].label_names else "photographs"
    counts = {n.images for n in networks if n.images} or "unknown"
    for name in names:
        figure = FIGURES[name]
        file = Path(out, f"fig{figure.number.replace(' ', '_')}_{name}.png")
        try:
            with plt.rc_context(STYLE):
                fig = figure.draw(networks)
                lines = {}
                for axis in fig.axes:
                    handles, labels = axis.get_legend_handles_labels()
                    lines |= zip(labels, handles)
                fig.legend(lines.values(), lines, loc="outside lower center", ncols=3)
                fig.suptitle(f"{title_of(name, claims)}\n{kind}; images seen: {counts}")
                fig.draw_without_rendering()  # tick labels, for which layout makes room
                fig.savefig(file, dpi=150)
            pictures[name] = file
        except Exception as error:  # costs this figure, not the others
            print(f"skipped {name}: {error}")
        plt.close("all")
    return pictures


# ==== Command line ==================================================================


FLAGS = {
    "data": "",
    "cue-conflict": "",
    "out": "",
    "images": 1000,
    "labels": 0,
    "epochs": 10,
    "device": "cuda" if torch.cuda.is_available() else "cpu",
    "workers": 0,
}


def parse(argv):
    """The flags are explained at the top of this file, which --help prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, figure in FIGURES.items():
        parser.description += (
            f"  {name:11} {figure.claim:2}  {figure.text} ({figure.number})\n"
        )
    parser.error = partial(require, False)  # in one line, as all errors
    files = parser.add_mutually_exclusive_group(required=True)
    files.add_argument("checkpoints", nargs="*", default=[])
    files.add_argument("--from", dest="results", nargs="+", type=os.path.abspath)
    add = parser.add_argument
    for name, default in FLAGS.items():
        add(f"--{name}", type=type(default), default=default)
    add("--alone", action="store_true")
    add("--overwrite", action="store_true")
    add("--only", nargs="+", default=list(FIGURES), choices=FIGURES)
    answers = {"nargs": "+", "default": [None]}
    add("--heads", type=int, **answers)
    add("--pixels", choices=PIXELS, **answers)
    return parser.parse_args(argv)


def check(options):
    """What can be known to fail late fails here."""
    options.labels = options.labels or 4 * options.images
    if not options.out:
        files = options.checkpoints or options.results
        folder = Path(name_and_path(files[0])[1]).parent
        options.out = str(folder if options.results else folder / "figures")
    path = Path(options.out, "results.json")
    # one analysis may be drawn again where it is
    require(
        options.results == [str(path)] or not path.exists() or options.overwrite,
        f"{options.out} holds an analysis: give --out or --overwrite",
    )
    require(
        min(options.images, options.labels, options.workers, options.epochs - 1) >= 0,
        "--images, --labels, --workers: from 0 on; --epochs: from 1 on",
    )
    require(options.data or not options.cue_conflict, "--cue-conflict needs --data")
    require(options.device != "mps", "--device mps has no float64, give cpu")
    # can we write there? better to know before hours of measuring
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text("")


def run(argv):
    """Analyses, or reads what was analysed; judges, draws, reports -> exit status."""
    options = parse(argv)
    check(options)
    results, networks = read_results(options.results or [analyse(options)])
    claims = results["claims"] = judge(networks, options.only)
    results["networks"] = list(map(vars, networks))
    write_results(results, options.out)
    print(table_of(results))
    pictures = draw_figures(networks, options.only, claims, options.out)
    write_report(results, pictures, options.out)
    print(f"what was computed and drawn is in {options.out}; --from draws it again")
    return 0


def main(argv=None):
    """Runs a command line -> exit status."""
    return sslvit.main(argv, run, "analyze.py")


# ==== The report: one page with the claims, their figures and their lessons =========
# It needs no network, library or script: pictures stand in it as base64.


FACTS = "name path seed images pixels choices".split()


def write_report(results, pictures, out):
    """pictures: {name: file} of draw_figures()."""
    chapters = ""
    for name, file in pictures.items():
        figure = FIGURES[name]
        picture = base64.b64encode(file.read_bytes()).decode()
        chapters += (
            f"<h2>Figure {figure.number}, claim {figure.claim}</h2>\n"
            f'<img src="data:image/png;base64,{picture}" alt="{escape(figure.text)}">\n'
            f"<p>{escape(figure.lesson)}</p>\n"
        )
    facts = [results["data"], results["settings"], FACTS]
    facts += map(itemgetter(*FACTS), results["networks"])
    page = PAGE.format(
        table=escape(table_of(results)),
        chapters=chapters,
        facts=escape("\n".join(map(str, facts))),
    )
    Path(out, "report.html").write_text(page, encoding="utf-8")


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>What did they learn?</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ margin: auto; padding: 1.5em; max-width: 62em; font: 17px/1.55 sans-serif; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.75em; }}
img {{ max-width: 100%; }}
p {{ max-width: 42em; white-space: pre-line; }}
@media print {{ body {{ font-size: 10pt; }} img, p {{ break-inside: avoid; }} }}
</style></head><body>
<h1>What did they learn?</h1>
<p>Vision Transformers that were taught without labels, taken apart. CL learnt to
recognise two views of one image (MoCo v3), MIM to fill in what was hidden (SimMIM), the
hybrid both; the untrained network learnt nothing. The claims are those of Park et al.,
What Do Self-Supervised Vision Transformers Learn? (ICLR 2023, arXiv 2305.00729).</p>
<pre>{table}</pre>
<p>A part holds when its difference is above 0 with its whole 95 % interval, and is
opposed when the interval lies below 0. A claim agrees when every part holds; partly:
some hold, none is opposed; mixed: some hold, some are opposed; opposed: none holds,
some are opposed; undecided: the rest; not testable: a part lacks what it needs. The
interval is over test images and, with three networks or more on both sides, over
networks: then one part in forty would hold if nothing were true. One or two networks
say how sure the images are, not whether another training would end alike. Early is the
first third of the layers, late the last. Thin lines and circles are single networks,
thick lines and bars their means.</p>
{chapters}
<h2>Networks and settings</h2>
<pre>{facts}</pre>
</body></html>
"""


# ==== Whose network is it?  Checkpoints of other people, as data ====================
# Nearly every published ViT has timm's tensors: the same shapes and, but for a few, the
# same names, somewhere in a file. So the encoder is what stands behind the same prefix
# as its patches, and each tensor there must have a place in our ViT.
#
# Strict: a network that is almost the published one gives figures that look right. What
# is not understood is refused by name: registers, QK norm, LoRA, int8, biases of each
# block, no CLS, no last norm (fine-tuned on mean tokens), CLS without a position.
# What no tensor tells is printed and can be set. No tensor tells other activations,
# norms behind attention and MLP, or RoPE beside learned positions: figures of such a
# network would be another's. Learned positions might be of a grid that is not square.
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
# stands behind the encoder's prefix, and does not change its tokens
NOT_ENCODER = (
    r"^(head|fc|fc_norm|lm_head|mask_token|masked_embed|decoder\w*)(\.|$)"
    r"|(relative_position_index|num_batches_tracked)$"
)
# the end of a key -> format, λ, pixels that the network was trained on
MARKS = {
    "decoder_pos_embed": ("MAE", 0.0, "imagenet"),
    "lm_head.weight": ("BEiT or data2vec", 0.0, None),
    "encoder.mask_token": ("SimMIM", 0.0, "imagenet"),
    "attn.q_bias": ("of BEiT's family", None, None),
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


def read_checkpoint(path):
    """What is in a file. Objects other than tensors, dicts and lists become Inert.

    Not in files from before torch 1.6, where such objects are refused.
    """
    with open(path, "rb") as file:
        start = file.read(512)
    if start[8:9] == b"{":  # a header behind its length
        from safetensors.torch import load_file  # not among our requirements

        return load_file(path)
    stand_ins = []
    if start.startswith(b"PK\x03\x04"):
        # as torch.save writes it? if it is packed, a few kB could become all memory
        with zipfile.ZipFile(path) as archive:
            is_packed = any(entry.compress_type for entry in archive.infolist())
            require(not is_packed, "a compressed archive, of TorchScript or NumPy?")
            require(archive.testzip() is None, "damaged: a checksum is wrong")
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
    # Config's types, and its defaults where an older version had fewer settings
    for name, default in vars(Config()).items():
        config[name] = type(default)(config.get(name, default))
    return config | {"data": str(content.get("data"))}  # the training set's identity


# ---- From their names to ours ----


def find_prefix(tensors):
    """What stands before the encoder's keys: "model.", "teacher.backbone.", "" ..."""
    patches = [key for key in tensors if key.endswith(PATCHES)]
    require(patches, f"no {PATCHES} among {len(tensors)} tensors: {list(tensors)[:3]}")
    # False comes before True, and of equals the shortest
    return min(
        patches, key=lambda key: (bool(re.search(SECOND_CHOICE, key)), len(key))
    ).removesuffix(PATCHES)


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
    require(
        value.nbytes <= value.untyped_storage().nbytes(),
        f"{key} claims more numbers than the file holds",
    )
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


def find_positions(weights):
    """-> patches in a row of the square grid; the axis that fixed sines begin with.

    That is x in MAE and here, y in MoCo v3; "" for learned positions and none.
    """
    if "pos_embed" in weights:
        _, count, embed_dim = weights["pos_embed"].shape
        side = math.isqrt(count - 1)
        # 169 may be 13 × 13 patches, or 14 × 12 and CLS
        require(
            count == 1 + side**2, f"{count} positions: no square of patches and CLS"
        )
        sines = sincos_positions(embed_dim, side, side)
        for first in "xy":
            # bf16, in which a file may be, rounds by 2e-3
            if sines.allclose(weights["pos_embed"], atol=5e-3):
                return side, first
            sines = sines.roll(embed_dim // 2, dims=-1)
        return side, ""
    if TABLE in weights:  # (2·side - 1)² offsets, and three places for CLS
        return (math.isqrt(len(weights[TABLE]) - 3) + 1) // 2, ""
    return 1, ""  # build() refuses it


def recognise(tensors, sines):
    """-> format, λ, pixels; None: nothing tells."""
    for mark, facts in MARKS.items():
        if any(key.endswith(mark) for key in tensors):
            return facts
    if sines == "y":
        return "MoCo v3", 1.0, "imagenet"
    return "timm", None, None


def find_sizes(weights, side, heads, form):
    """-> the first arguments of ViT. Heads are usually 64 wide, 80 in a ViT-H."""
    embed_dim, _, _, patch_size = weights[PATCHES].shape  # of videos there are five
    depth = sum(name.endswith(".norm1.weight") for name in weights)
    usual = {1280: 16}
    if form == "MoCo v3":
        usual[384] = 12
    heads = heads or usual.get(embed_dim, max(1, embed_dim // 64))
    return side * patch_size, patch_size, embed_dim, depth or 1, heads


# ---- From weights to a network ----


def build(weights, sizes, sines):
    """The ViT that has these weights and no others; UserError if there is none."""
    positions = "none"
    if "pos_embed" in weights:
        positions = "sincos" if sines else "learned"
    design = {
        "positions": positions,
        "rel_pos_bias": TABLE in weights,
        "layer_scale": 0.1 if "blocks.0.ls1.gamma" in weights else None,
    }
    with torch.device("meta"):  # shapes without memory
        vit = ViT(*sizes, **design)
    # refused here, as torch would name the same key of each block
    odd = weights.keys() - vit.state_dict().keys()
    names = sorted({re.sub(r"blocks\.\d+", "blocks.*", key) for key in odd})
    require(not odd, f"tensors that an ordinary ViT has not: {', '.join(names)}")
    require(
        positions != "none" or TABLE in weights,
        "no positions: no tensor tells how they are computed",
    )
    vit.load_state_dict(weights, assign=True)
    vit.design = design
    return vit.eval()


def in_one_line(text):
    """Keys in a file may hold anything: sequences, too, that move the cursor."""
    return ascii(" ".join(text.split()))[1:-1][:400]


def load_encoder(path, heads=None, pixels=None):
    """File -> ViT in eval mode with its Network as `facts`; prints what it is.

    heads and pixels ("imagenet" or "half", which is (x - 0.5) / 0.5) can be given; a
    table of position biases overrides heads, a config of sslvit.py both. Else heads are
    64 wide, 80 of 1,280, 12 in all in MoCo v3's of 384, and pixels half for BEiT alone.

    UserError, in one line: no checkpoint, a damaged one, or a network that is not ours.
    """
    try:
        content = read_checkpoint(path)
        tensors = find_tensors(content)
        prefix = find_prefix(tensors)
        config = find_config(content)
        weights, skipped = take_encoder(tensors, prefix)
        side, sines = find_positions(weights)
        form, lam, form_pixels = recognise(tensors, sines)
        pixels = pixels or form_pixels
        if TABLE in weights:
            heads = weights[TABLE].shape[1]
        run = {}
        if config:
            form, lam, pixels = "sslvit", config["lam"], "imagenet"
            heads = SIZES[config["model"]]["num_heads"]
            images = int(content["step"]) * config["batch_size"]
            run = {"seed": config["seed"], "config": config, "images": images}
        sizes = find_sizes(weights, side, heads, form)
        vit = build(weights, sizes, sines)
    except Exception as error:  # a damaged file can raise anything
        reason = str(error) or repr(error)
        if isinstance(error, pickle.UnpicklingError):
            reason = (
                "not readable as data alone: a web page, a pointer of git LFS? "
                "Of a module, save the state_dict()"
            )
        raise UserError(f"{path}: {in_one_line(reason)}") from error
    usual = "half" if form.startswith("BEiT") else "imagenet"
    facts = vit.facts = Network(
        os.path.abspath(path), lam, pixels or usual, *sizes, **run
    )
    facts.look = f"{facts.num_heads} heads, {facts.pixels} pixels, {vit.design}"
    answers = {
        "--heads": heads,
        "--pixels": pixels,
        "square grid": sines or config or TABLE in weights,
    }
    guesses = [guess for guess, answer in answers.items() if not answer]
    print(
        f"{path}: {form}, {facts.image_size} px in patches of {facts.patch_size}, "
        f"{facts.embed_dim} wide, {facts.depth} deep, {facts.num_heads} heads, "
        f"{facts.pixels} pixels; guessed: {', '.join(guesses) or 'nothing'}"
    )
    print(f"  encoder {prefix!a}, skipped {in_one_line(str(dict(skipped)))}")
    return vit


# ---- All networks of an analysis ----


def name_and_path(text):
    """FILE or NAME=FILE -> NAME or "", FILE, which may hold a = itself."""
    if os.path.exists(text) or "=" not in text:
        return "", text
    return text.split("=", 1)


def add_companions(vits):
    """Shipped networks of another λ, of the same size and training images."""
    first = vits[0].facts.config
    lams = {vit.facts.lam for vit in vits}
    for path in sorted(COMPANIONS.rglob("*.pt")):
        config = find_config(sslvit.load_checkpoint(path))
        if config["lam"] not in lams and all(
            config[key] == first[key] for key in ALIKE
        ):
            vits.append(load_encoder(path))
            print("  shipped, stands beside yours; --alone leaves it out")


def untrained_like(vit):
    """A network of the same architecture and seed that was never trained."""
    facts = vit.facts
    torch.manual_seed(facts.seed or 0)
    sizes = *facts.shape, facts.num_heads
    new = ViT(*sizes, **vit.design)
    new.facts = Network("", None, facts.pixels, *sizes, facts.seed, look=facts.look)
    return new


def load_networks(options):
    """-> ViTs: untrained ones, given ones, shipped ones beside them.

    Untrained first: what an interrupted analysis has measured can then be judged.
    """
    files = options.checkpoints
    answers = options.heads, options.pixels
    for values in answers:
        require(len(values) in (1, len(files)), f"{values}: one, or one for each file")
    vits = []
    for text, *answer in zip(files, *map(cycle, answers)):
        given, path = name_and_path(text)
        vit = load_encoder(path, *answer)
        vit.facts.given = given
        if not vit.facts.config:  # which knows better
            vit.facts.lam = GIVEN.get(given.lower(), vit.facts.lam)
        vits.append(vit)
    if vits[0].facts.config and not options.alone:
        add_companions(vits)
    # the first seed chooses settings for the others, whatever the order of the files
    vits.sort(key=lambda vit: vit.facts.seed or 0)
    twin = attrgetter("facts.architecture", "facts.seed")
    twins = {twin(vit): vit for vit in vits}
    return [*map(untrained_like, twins.values()), *vits]


if __name__ == "__main__":
    sys.exit(main())
