"""Worked examples for sslvit.py.

Every expected number follows from paper and pencil, or from an independent library.
"""

import importlib.util
import io
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import sslvit
from sslvit import SSL, Config, Stimuli, TrainingViews, ViT

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 3}
QUICK = (
    "--preset micro --batch-size 8 --image-size 16 --knn-images 16 --proj-hidden 16 "
    "--log-every 1 --device cpu --dtype fp32"
).split()
# every kind of run: λ = 1, λ = 0, between, and with the masked view as the query
METHODS = [
    "--objective moco",
    "--objective simmim",
    "--lam 0.3",
    "--lam 0.3 --one-view",
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(sslvit.SIZES, "micro", TINY)
    torch.manual_seed(0)


def config(**changes):
    tiny = {"image_size": 16, "proj_hidden": 16, "batch_size": 8}
    here = {"accum": 1, "device": "cpu", "dtype": "fp32", "workers": 0}
    return Config(**(tiny | here | changes))


def run(words, out):
    """`python sslvit.py WORDS --out OUT` in this process -> exit status."""
    return sslvit.main([*QUICK, *words.split(), "--out", str(out)])


def error_line(capfd):
    """What is said on the error output, which must be one line."""
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("sslvit.py: ")
    return lines[0]


def checkpoint_of(folder):
    return sslvit.load_checkpoint(folder / "ckpt.pt")


def log_of(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def column(values):
    """One parameter per image, as the colour operations want it: (B, 1, 1, 1)."""
    return torch.tensor(values).view(-1, 1, 1, 1)


# ---- 1. Two questions ----


def test_contrastive_loss_by_hand():
    # own key: cosine 1, three others: cosine 0
    eye = torch.eye(4)
    loss = sslvit.contrastive_loss(3 * eye, eye, 0.5).item()
    assert loss == pytest.approx(math.log(1 + 3 * math.exp(-2)))
    # nothing is told apart
    alike = torch.ones(4, 7)
    loss = sslvit.contrastive_loss(alike, alike, 0.2).item()
    assert loss == pytest.approx(0.4 * math.log(4))
    # queries e1, e1 and keys e1, e2: each query finds the first key, which for the
    # second is wrong. Keys that look for queries would be undecided both times.
    q = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    loss = sslvit.contrastive_loss(q, torch.eye(2), 1.0).item()
    one_way = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))
    assert loss == pytest.approx(one_way)


@pytest.mark.parametrize(
    "size,patch,unit,ratio,masked",
    [
        (224, 16, 32, 0.6, 120),  # 30 of 49 units × 4 patches
        (32, 4, 4, 0.6, 39),  # 39 of 64 × 1
        (40, 4, 8, 0.28, 28),  # 7 of 25 × 4: 0.28 × 25 is 7.000000000000001
    ],
)
def test_masks_are_whole_units_at_random(size, patch, unit, ratio, masked):
    generator = torch.Generator().manual_seed(1)
    mask = sslvit.random_mask(200, size, patch, unit, ratio, generator)
    assert mask.dtype == torch.bool
    assert mask.shape == (200, (size // patch) ** 2)
    assert (mask.sum(dim=1) == masked).all()
    side = size // unit
    units = mask.reshape(200, side, unit // patch, side, unit // patch)
    assert torch.equal(units.any(4).any(2), units.all(4).all(2))
    # every unit alike: 200 images, three standard deviations are 0.11
    share = masked / mask.shape[1]
    assert (mask.float().mean(dim=0) - share).abs().max() < 0.14
    with pytest.raises(ValueError):
        sslvit.random_mask(1, size, patch, unit + 1, ratio)


def test_masked_l1_by_hand():
    pred = torch.zeros(1, 3, 2)
    target = torch.tensor([[[1.0, 3.0], [5.0, -7.0], [100.0, 100.0]]])
    mask = torch.tensor([[True, True, False]])
    # (1 + 3 + 5 + 7) / 4
    assert sslvit.masked_l1(pred, target, mask).item() == 4.0


def test_patchify_takes_each_patch_once_and_back():
    image = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    patches = sslvit.patchify(image, 2)
    assert patches.shape == (2, 6, 12)
    # patch 4 of 2 × 3 lies in row 1, column 1
    pixels = image[1, :, 2:4, 2:4].flatten()
    assert patches[1, 4].tolist() == pixels.tolist()
    assert torch.equal(sslvit.unpatchify(patches, (4, 6), 2), image)


# ---- 2. ViT ----


def test_tokens_records_and_shapes():
    vit = ViT(16, 4, **TINY).eval()
    x = torch.randn(2, 3, 16, 16)
    tokens, records = vit(x, record=True)
    # the fused and the explicit attention are one function
    torch.testing.assert_close(tokens, vit(x))
    assert tokens.shape == (2, 17, 24)
    assert len(records) == 2
    last = records[1]
    assert last.attn.shape == (2, 3, 17, 17)
    assert last.heads.shape == (2, 3, 17, 8)
    assert last.mid.shape == last.out.shape == (2, 17, 24)
    torch.testing.assert_close(last.attn.sum(-1), torch.ones(2, 3, 17))
    torch.testing.assert_close(vit.norm(last.out), tokens)
    # what is not computed was not needed
    torch.testing.assert_close(vit(x, cls_only=True), tokens[:, :1])
    # another, oblong size: positions are interpolated
    assert vit(torch.randn(1, 3, 24, 8)).shape == (1, 13, 24)
    with pytest.raises(ValueError):
        ViT(30, 4, **TINY)
    # on a CPU bf16 takes the explicit attention, fp32 the fused one
    with torch.autocast("cpu", torch.bfloat16):
        rough = vit(x).float()
    torch.testing.assert_close(rough, tokens, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("variant", ["learned", "layer_scale", "no_positions"])
def test_timm_parity(variant):
    timm = pytest.importorskip("timm")
    scale = 0.1 if variant == "layer_scale" else None
    positions = "none" if variant == "no_positions" else "learned"
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=32,
        patch_size=8,
        num_classes=5,
        init_values=scale,
        pos_embed={"none": "none", "learned": "learn"}[positions],
        **TINY,
    ).eval()
    look = {"positions": positions, "num_classes": 5, "layer_scale": scale}
    ours = ViT(32, 8, **TINY, **look).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    expected = theirs.forward_features(x)
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-4)


def test_sincos_positions_by_hand():
    positions = sslvit.sincos_positions(8, 2, 3)[0]
    assert positions.shape == (7, 8)
    # CLS
    assert positions[0].abs().max() == 0
    # the last of 2 × 3 patches, x = 2 and y = 1; frequencies 1 and 1/100
    hand = []
    for value in (2, 1):
        hand += [math.sin(value), math.sin(0.01 * value)]
        hand += [math.cos(value), math.cos(0.01 * value)]
    torch.testing.assert_close(positions[6], torch.tensor(hand))


def test_relative_position_bias_by_hand():
    # 2 × 2 patches: offsets -1, 0, 1 in y and x
    vit = ViT(8, 4, 24, 1, 3, positions="none", rel_pos_bias=True)
    table = vit.rel_pos_bias.relative_position_bias_table
    assert table.shape == (9 + 3, 3)
    assert vit.pos_embed is None
    table.data = torch.arange(12.0)[:, None] + torch.tensor([0.0, 100.0, 200.0])
    bias = vit.rel_pos_bias(2, 2)
    # row (query) minus column (key): (Δy + 1)·3 + (Δx + 1);
    # 9: CLS to patch, 10: patch to CLS, 11: CLS to CLS
    hand = torch.tensor(
        [
            [11.0, 9, 9, 9, 9],
            [10, 4, 3, 1, 0],
            [10, 5, 4, 2, 1],
            [10, 7, 6, 4, 3],
            [10, 8, 7, 5, 4],
        ]
    )
    assert torch.equal(bias, torch.stack([hand, hand + 100, hand + 200]))
    assert vit.rel_pos_bias(3, 4).shape == (3, 13, 13)
    # all ways through attention add it
    table.data = torch.randn(12, 3)
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(vit(x), vit(x, record=True)[0])
    torch.testing.assert_close(vit(x, cls_only=True), vit(x)[:, :1])
    vit.rel_pos_bias(2, 2).sum().backward()
    assert table.grad.sum() == 3 * 25


def test_qkv_starts_as_three_xavier_matrices():
    weight = sslvit.Block(96, 3).attn.qkv.weight
    # of a 96 × 96 matrix; of the (288, 96) matrix it would be 0.125
    bound = math.sqrt(6 / (96 + 96))
    for part in weight.chunk(3):
        assert 0.98 * bound < part.abs().max() <= bound


def test_a_masked_patch_becomes_the_mask_token_at_its_place():
    # without blocks a token is what is embedded, after the norm
    vit = ViT(16, 4, 24, 0, 3)
    x = torch.randn(1, 3, 16, 16)
    # the patch in row 1, column 2
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 6] = True
    token = torch.randn(1, 1, 24)
    out = vit(x, mask, mask_token=token)[0]
    place = sslvit.sincos_positions(24, 4, 4)[0, 7]
    torch.testing.assert_close(out[7], F.layer_norm(token[0, 0] + place, [24]))
    # only its own pixels do not count
    hidden = x.clone()
    hidden[..., 4:8, 8:12] = 9
    assert torch.equal(vit(hidden, mask, mask_token=token)[0], out)
    seen = x.clone()
    seen[..., 8:12, 4:8] = 9
    is_other = (vit(seen, mask, mask_token=token)[0] != out).any(dim=1)
    assert is_other.nonzero().flatten().tolist() == [1 + 9]


# ---- 3. Both questions, one encoder ----


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def ctr(q, k):
    """[M] algorithm 1."""
    logits = F.normalize(q) @ F.normalize(k).T / 0.2
    return 2 * 0.2 * F.cross_entropy(logits, torch.arange(len(q)))


@pytest.mark.parametrize("words", METHODS)
def test_both_losses_are_the_papers_spelt_out(words):
    cfg, _ = sslvit.parse([*QUICK, *words.split()])
    model = SSL(cfg).double()
    for name, p in model.named_parameters():
        if name.startswith("momentum"):
            p.data += 0.01 * torch.randn_like(p)
    x1, x2, x_mim = torch.randn(3, 8, 3, 16, 16, dtype=torch.float64)
    mask = sslvit.random_mask(8, 16, 4, 4, 0.6)

    def query(tokens):
        return model.predictor(model.projector(tokens[:, 0]))

    def key(x):
        return model.momentum_projector(model.momentum_encoder(x)[:, 0]).detach()

    mim = cl = torch.zeros(())
    if cfg.lam < 1:
        masked = model.encoder(x_mim, mask, mask_token=model.mask_token)
        pixels = model.decoder(masked)[:, 1:]
        image = F.fold(pixels.mT, (16, 16), 4, stride=4)
        hidden = mask.reshape(8, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)
        mim = (image - x_mim).abs()[hidden[:, None].expand(-1, 3, -1, -1)].mean()
        features = masked[:, 1:].mean(dim=1)
    if cfg.one_view:  # the masked view asks, the whole other one is the key
        features = query(masked)
        cl = 2 * ctr(features, key(x1))
    elif cfg.lam > 0:
        features = query(model.encoder(x1))
        cl = ctr(features, key(x2)) + ctr(query(model.encoder(x2)), key(x1))
    losses = model(x1, None if cfg.one_view else x2, x_mim, mask)
    torch.testing.assert_close(losses["mim"], mim, check_dtype=False)
    torch.testing.assert_close(losses["cl"], cl, check_dtype=False)
    assert losses["std"] == sslvit.feature_std(features)
    ours = gradients_of(model, losses["mim"] + losses["cl"])
    theirs = gradients_of(model, mim + cl)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if name.startswith("momentum")]
    # MoCo's patch embedding is frozen at its random start
    assert ("encoder.patch_embed.proj.weight" in ours) == (cfg.lam < 1)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-9, rtol=1e-7)
    # what λ switches off is not there
    assert hasattr(model, "decoder") == (cfg.lam < 1)
    assert hasattr(model, "momentum_encoder") == (cfg.lam > 0)


def test_decoder_depth_and_simmim_positions():
    model = SSL(config(decoder_depth=2, positions="relative"))
    kinds = [type(layer).__name__ for layer in model.decoder]
    assert kinds == ["Block", "Block", "LayerNorm", "Linear"]
    assert model.encoder.pos_embed is None
    assert model.encoder.rel_pos_bias is not None
    assert model.encoder.blocks[0].ls1.gamma[0].item() == pytest.approx(0.1)


def test_heads_and_averages():
    head = sslvit.mlp_head(8, 16, 16, 4)
    kinds = [type(layer).__name__ for layer in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert head[1].affine
    assert not head[-1].affine
    assert all(layer.bias is None for layer in (head[0], head[3], head[6]))
    model = SSL(config(lam=1.0))
    # the average starts where the queries' weights do
    key = model.momentum_encoder.norm.weight
    query = model.encoder.norm.weight
    assert torch.equal(key, query)
    key.data.fill_(3.0)
    query.data.fill_(1.0)
    model.update_average(0.75)
    assert torch.all(key == 2.5)
    assert torch.all(query == 1.0)


def test_feature_std_by_hand():
    # unit vectors e1 and e2: each channel has values 1, 0, whose deviation is √½
    two = torch.tensor([[5.0, 0.0], [0.0, 2.0]])
    assert sslvit.feature_std(two).item() == pytest.approx(1.0)
    assert sslvit.feature_std(torch.ones(9, 4)).item() == 0


# ---- 4. Views ----


class OneImage(list):
    """A data set of one image without labels."""

    def __init__(self, pixels):
        super().__init__([["an image"]])
        self.pixels = pixels

    def load(self, index):
        return Image.fromarray(self.pixels), []


def test_every_view_is_cropped_and_flipped_on_its_own():
    """Red tells the column, green the row: a crop shows where it was cut.

    Contrastive crops have at least 0.2 of the area, the masked one 0.67.
    """
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    image = np.stack([ramp, ramp.T, 0 * ramp], axis=-1)
    views = TrainingViews(OneImage(image), config(crop_min=0.2))
    crops = np.stack([views[epoch, 0]["crops"] for epoch in range(300)]).astype(int)
    reds = crops[:, :, 0, 8]  # (300, 3, 16) along a row
    greens = crops[:, :, 1, :, 8]
    assert (greens[..., 0] < greens[..., -1]).all()
    is_flipped = reds[..., 0] > reds[..., -1]
    assert is_flipped.mean(axis=0) == pytest.approx([0.5, 0.5, 0.5], abs=0.12)
    assert len({tuple(flips) for flips in is_flipped.tolist()}) == 8
    # between the middles of the outer pixels lie 15/16 of a side
    sides = np.ptp(reds, axis=2) * np.ptp(greens, axis=2)
    shares = sides * (16 / 15 / 255) ** 2
    assert shares.min(axis=0) == pytest.approx([0.2, 0.2, 0.67], abs=0.03)
    assert shares.max(axis=0) == pytest.approx([1, 1, 1], abs=0.06)
    # no view copies another's crop
    corners = reds[..., 8] + greens[..., 8]
    assert (corners[:, 0] != corners[:, 1]).mean() > 0.9


def test_crop_boxes_are_uniform_in_area_log_aspect_and_place():
    rng = np.random.default_rng(0)
    boxes = np.array([sslvit.crop_box(60, 60, 0.2, rng) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    width = right - left
    height = bottom - top
    assert boxes.min() >= 0
    assert boxes.max() <= 60
    share = width * height / 3600
    aspect = np.log(width / height) / np.log(4 / 3)  # from -1 to 1
    # whatever its aspect, a box of less than 3/4 of the area fits
    fits = share < 0.75
    quartiles = [0.25, 0.5, 0.75]
    spread = np.quantile(share[fits], quartiles)
    assert spread == pytest.approx([0.3375, 0.475, 0.6125], abs=0.02)
    spread = np.quantile(aspect[fits], quartiles)
    assert spread == pytest.approx([-0.5, 0, 0.5], abs=0.05)
    for place in (left / (60 - width), top / (60 - height)):
        spread = np.quantile(place[fits], quartiles)
        assert spread == pytest.approx(quartiles, abs=0.04)
    # no crop of this share has an allowed aspect: a square instead
    left, top, right, bottom = sslvit.crop_box(400, 4, 1.0, rng)
    assert right - left == bottom - top == 4


def test_samples_depend_on_seed_epoch_and_index_alone():
    def sample(epoch, index, seed=0):
        views = TrainingViews(Stimuli(20, 16), config(seed=seed))
        return {name: np.array(value) for name, value in views[epoch, index].items()}

    first = sample(0, 5)
    again = sample(0, 5)
    assert first["crops"].shape == (3, 3, 16, 16)
    assert first["colours"].shape == (2, 11)
    assert first["mask"].sum() == 10
    for name in first:
        assert np.array_equal(first[name], again[name])
        for other in (sample(1, 5), sample(0, 6), sample(0, 5, seed=1)):
            assert not np.array_equal(first[name], other[name])


@pytest.mark.parametrize("words,crops", zip(METHODS, [2, 1, 3, 2], strict=True))
def test_each_method_is_given_what_it_looks_at(words, crops):
    cfg, _ = sslvit.parse([*QUICK, *words.split()])
    batch = loaded(cfg)
    assert batch["crops"].shape == (8, crops, 3, 16, 16)
    view1, view2, view_mim, mask = sslvit.augment(batch, cfg)
    assert (view1 is None) == (cfg.lam == 0)
    assert (view2 is None) == (cfg.lam == 0 or cfg.one_view)
    assert (view_mim is None) == (cfg.lam == 1)
    assert torch.equal(mask, batch["mask"])
    if cfg.lam < 1:
        # the masked view keeps its colours: ImageNet's mean and deviation of red,
        # green, blue
        for channel, (mean, std) in enumerate(
            [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]
        ):
            expected = (batch["crops"][:, -1, channel] / 255 - mean) / std
            torch.testing.assert_close(view_mim[:, channel], expected)
    # the loader's batch is as it was
    torch.testing.assert_close(sslvit.augment(batch, cfg)[3], mask)
    again = sslvit.augment(batch, cfg)[0]
    assert view1 is None or torch.equal(again, view1)


def test_colours_are_drawn_as_often_as_byol_says():
    cfg = config(hue_shift=0.1, blur=2.0)
    rng = np.random.default_rng(0)
    draws = np.stack([sslvit.draw_colours(rng, cfg) for _ in range(2000)])
    order, factors, sigma, grey, solarised = np.split(draws, [4, 8, 9, 10], axis=2)

    def close(*values):
        return pytest.approx(values, abs=0.04)

    # of view 1, of view 2
    assert (order[:, :, 0] >= 0).mean(axis=0) == close(0.8, 0.8)
    assert grey[..., 0].mean(axis=0) == close(0.2, 0.2)
    assert (sigma[..., 0] > 0).mean(axis=0) == close(1.0, 0.1)
    assert solarised[..., 0].mean(axis=0) == close(0.0, 0.2)
    # each view has its own order, all 24 and none
    for view in (0, 1):
        orders = {tuple(row) for row in order[:, view].tolist()}
        assert len(orders) == 25
    assert (order[:, 0] == order[:, 1]).all(axis=1).mean() < 0.2
    # uniform: quartiles
    spread = np.quantile(sigma[:, 0], [0, 0.5, 1])
    assert spread == pytest.approx([0.1, 1.05, 2.0], abs=0.07)
    for n, reach in enumerate([0.4, 0.4, 0.2, 0.1]):
        middle = 0 if n == 3 else 1
        spread = np.quantile(factors[..., n] - middle, [0, 0.25, 0.5, 0.75, 1])
        expected = [-reach, -reach / 2, 0, reach / 2, reach]
        assert spread == pytest.approx(expected, abs=0.03)


def colour_rows(images):
    """What change_colours() is told where nothing is to change."""
    nothing = [-1.0, -1, -1, -1, 1, 1, 1, 0, 0, 0, 0]
    return torch.tensor([nothing]).repeat(images, 1)


def test_each_image_gets_the_colours_that_were_drawn_for_it():
    x = torch.rand(6, 3, 9, 7)
    factors = [1.4, 0.6, 1.2, 0.3]
    orders = {4: [0, 1, 2, 3], 5: [3, 2, 1, 0]}
    draws = colour_rows(6)
    draws[0, 10] = 1
    draws[2, 9] = 1
    draws[3, 8] = 1.5
    for image, order in orders.items():
        draws[image, :4] = torch.tensor(order)
        draws[image, 4:8] = torch.tensor(factors)
    y = x.clone()
    sslvit.change_colours(y, draws)
    torch.testing.assert_close(y[0], torch.where(x[0] >= 0.5, 1 - x[0], x[0]))
    assert torch.equal(y[1], x[1])
    assert torch.equal(y[2, 0], y[2, 2])
    assert torch.equal(y[3:4], sslvit.gaussian_blur(x[3:4], column([1.5])))
    names = ("brightness", "contrast", "saturation", "hue")
    jitters = [getattr(sslvit, f"adjust_{name}") for name in names]
    for image, order in orders.items():
        z = x[image : image + 1]
        for n in order:
            z = jitters[n](z, torch.tensor(factors[n]))
        torch.testing.assert_close(y[image : image + 1], z)


def test_colour_operations_by_hand():
    red = column([1.0, 0.0, 0.0]).transpose(0, 1).expand(1, 3, 4, 4)
    turned = sslvit.adjust_hue(red, column([1 / 3]))[0, :, 0, 0]
    green = torch.tensor([0.0, 1.0, 0.0])
    torch.testing.assert_close(turned, green, atol=1e-6, rtol=0)
    # brightness of red, for the eye
    assert sslvit.greyscale(red)[0, 0, 0, 0] == pytest.approx(0.299, abs=1e-3)
    x = torch.rand(2, 3, 9, 7)
    unturned = sslvit.adjust_hue(x, column([0.0, 0.0]))
    torch.testing.assert_close(unturned, x, atol=1e-6, rtol=0)
    flat = torch.full((1, 3, 5, 5), 0.3)
    torch.testing.assert_close(sslvit.gaussian_blur(flat, column([1.0])), flat)
    # a point becomes exp(-½ (x/σ)²): at 3 px = 2σ e⁻² of the middle, either way; no
    # matter how much its neighbour in the batch is blurred
    dot = torch.zeros(2, 1, 21, 21)
    dot[..., 10, 10] = 1
    blurred = sslvit.gaussian_blur(dot, column([1.5, 2.0]))[0, 0]
    for point in (blurred[10, 13], blurred[13, 10]):
        assert point / blurred[10, 10] == pytest.approx(math.exp(-2), rel=1e-4)
    alone = sslvit.gaussian_blur(dot[:1], column([1.5]))[0, 0]
    torch.testing.assert_close(blurred, alone, atol=1e-7, rtol=0)


def test_colour_operations_match_torchvision():
    tv = pytest.importorskip("torchvision.transforms.v2.functional")
    x = torch.rand(4, 3, 40, 30)

    def check(ours, theirs, values):
        pairs = zip(x, values, strict=True)
        expected = torch.stack([theirs(image, value) for image, value in pairs])
        torch.testing.assert_close(ours(x, column(values)), expected, atol=1e-3, rtol=0)

    def blur(image, sigma):
        return tv.gaussian_blur(image, [29, 29], [sigma, sigma])

    factors = [0.6, 0.9, 1.3, 1.4]
    check(sslvit.adjust_brightness, tv.adjust_brightness, factors)
    check(sslvit.adjust_contrast, tv.adjust_contrast, factors)
    check(sslvit.adjust_saturation, tv.adjust_saturation, factors)
    check(sslvit.adjust_hue, tv.adjust_hue, [-0.5, -0.1, 0.07, 0.4])
    check(sslvit.gaussian_blur, blur, [0.1, 0.5, 1.2, 2.0])
    grey = tv.rgb_to_grayscale(x)
    torch.testing.assert_close(sslvit.greyscale(x), grey, atol=1e-3, rtol=0)
    torch.testing.assert_close(sslvit.solarise(x), tv.solarize(x, 0.5))


def loaded(cfg, images=8):
    """What a loader gives: one batch of stimuli."""
    views = TrainingViews(Stimuli(images, cfg.image_size), cfg)
    return default_collate([views[0, i] for i in range(images)])


# ---- 5 and 6. Optimiser, schedules, training loop ----

true_augment = sslvit.augment


def views_in_float64(batch, cfg):
    *views, mask = true_augment(batch, cfg)
    return *(None if view is None else view.double() for view in views), mask


def float64():
    """Parts of sslvit.py in float64, so that what differs is no rounding."""
    return {
        "SSL": lambda cfg: SSL(cfg).double(),
        "augment": views_in_float64,
        "finish": lambda *_: None,
    }


@pytest.fixture
def in_float64(monkeypatch):
    for name, value in float64().items():
        monkeypatch.setattr(sslvit, name, value)


@pytest.mark.parametrize("words", METHODS)
def test_four_steps_of_a_run_by_hand(tmp_path, monkeypatch, in_float64, words):
    """Schedules, clipping, AdamW with decay, the average after the step, the log.

    Peak rate 0.32·8/256 = 0.01; two of four steps warm up, then half a cosine. The
    average's momentum rises from 0.6 to 1, likewise.
    """
    rates = [0.005, 0.01, 0.005, 0.0]
    root = math.sqrt(0.5)
    momenta = [1 - 0.2 * (1 + root), 0.8, 1 - 0.2 * (1 - root), 1.0]
    batches = []

    def remember(batch, cfg):
        batches.append(views_in_float64(batch, cfg))
        return batches[-1]

    monkeypatch.setattr(sslvit, "augment", remember)
    words += (
        " --steps 4 --warmup 0.5 --lr 0.32 --momentum 0.6 --weight-decay 0.5 "
        "--clip 0.2 --seed 3 --knn-images 0"
    )
    assert run(words, tmp_path) == 0
    assert len(batches) == 4
    rows = log_of(tmp_path)[1:]
    cfg, _ = sslvit.parse([*QUICK, *words.split()])
    torch.manual_seed(3)
    model = sslvit.SSL(cfg)
    weights = dict(model.named_parameters())
    trained = {name: p for name, p in weights.items() if p.requires_grad}
    first = {name: torch.zeros_like(p) for name, p in trained.items()}
    second = {name: torch.zeros_like(p) for name, p in trained.items()}

    for step in range(1, 5):
        lr = rates[step - 1]
        losses = model(*batches[step - 1])
        loss = (1 - cfg.lam) * losses["mim"] + cfg.lam * losses["cl"]
        gradients = gradients_of(model, loss)
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        assert norm > 0.2
        for name, p in trained.items():
            g = gradients[name] * 0.2 / norm
            is_vector = p.ndim < 2 or "token" in name
            if cfg.lam == 1 or not is_vector:
                p.data *= 1 - lr * 0.5
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            mean = first[name] / (1 - 0.9**step)
            deviation = (second[name] / (1 - 0.999**step)).sqrt()
            p.data -= lr * mean / (deviation + 1e-8)
        for name, key in weights.items():
            if name.startswith("momentum_"):
                query = weights[name.removeprefix("momentum_")]
                m = momenta[step - 1]
                key.data = m * key.data + (1 - m) * query.data
        hand = {"lr": lr, "momentum": momenta[step - 1], "norm": norm, "loss": loss}
        for name, value in (losses | hand).items():
            expected = pytest.approx(float(value), abs=1e-5)
            assert rows[step - 1][name] == expected, (step, name)
    for name, saved in checkpoint_of(tmp_path)["model"].items():
        torch.testing.assert_close(saved, weights[name].data, atol=1e-6, rtol=1e-6)


def test_the_rate_warms_up_in_the_middle_of_steps_too():
    assert sslvit.lr_at(5, 110, 10, 2.0) == 1.0
    assert sslvit.lr_at(60, 110, 10, 2.0) == pytest.approx(1.0)
    assert sslvit.lr_at(1, 1, 1, 2.0) == 2.0
    assert sslvit.lr_at(1, 1, 0.1, 2.0) == pytest.approx(0)


def assert_same_run(one, other):
    """Log and weights are equal but for the last digits of float64."""
    for a, b in zip(log_of(one), log_of(other), strict=True):
        for name in ("step", "lr", "momentum", "cl", "mim", "std", "loss", "norm"):
            assert a.get(name) == pytest.approx(b.get(name), abs=2e-5), name
    one = checkpoint_of(one)
    other = checkpoint_of(other)
    assert one["step"] == other["step"]
    for name, weight in one["model"].items():
        torch.testing.assert_close(
            weight, other["model"][name], atol=1e-10, rtol=1e-10, msg=name
        )


SAME = "--steps 3 --batch-size 16 --knn-images 0 --seed 2"


@pytest.mark.parametrize("words", METHODS)
def test_a_run_in_micro_batches_is_the_same_run(tmp_path, in_float64, words):
    words = f"{words} {SAME}"
    assert run(f"{words} --accum 1", tmp_path / "whole") == 0
    for accum, keep in ((2, 1), (4, 0), (4, 2), (16, 0)):
        out = tmp_path / f"{accum}-{keep}"
        assert run(f"{words} --accum {accum} --keep {keep}", out) == 0
        assert_same_run(tmp_path / "whole", out)


def test_fp16_scales_its_gradients_in_micro_batches_too(tmp_path):
    for accum in (1, 4):
        words = f"--steps 4 --dtype fp16 --accum {accum}"
        assert run(words, tmp_path / str(accum)) == 0
    for whole, parts in zip(
        log_of(tmp_path / "1")[1:], log_of(tmp_path / "4")[1:], strict=True
    ):
        assert parts["norm"] == pytest.approx(whole["norm"], rel=0.05, nan_ok=True)
        assert parts["loss"] == pytest.approx(whole["loss"], rel=0.01)


def start_python(code, *arguments, **environment):
    """Starts `python -c code` with this folder's modules and a tiny model."""
    setup = (
        "import os, sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import sslvit\n"
        f"sslvit.SIZES['micro'] = {TINY}\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", setup + code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


RANK = """
import json
import signal
import test_sslvit as tests
vars(sslvit).update(tests.float64())
rank = os.environ["RANK"]
average = tests.SSL.update_average
steps = []
def stop_at_seven(self, momentum):
    average(self, momentum)
    steps.append(momentum)
    if len(steps) == 7 and rank == "1":
        os.kill(os.getpid(), signal.SIGTERM)
folder, runs = sys.argv[1], json.loads(sys.argv[2])
statuses = []
for port, words in runs:
    os.environ["MASTER_PORT"] = port
    if "stopped" in words:
        tests.SSL.update_average = stop_at_seven
    words = [*tests.QUICK, *words.replace("MY_DATA", folder + "/" + rank).split()]
    statuses.append(sslvit.main(words))
with open(folder + "/statuses" + rank, "w") as file:
    json.dump(statuses, file)
"""


def test_two_ranks_are_one_process(tmp_path, in_float64):
    """Same log, same weights; a signal to one stops both; one set of images for all."""
    runs = {f"method{n}": f"{words} {SAME}" for n, words in enumerate(METHODS)}
    runs["stopped"] = f"{SAME} --steps 20 --objective simmim"
    fill(tmp_path / "0", 20)
    fill(tmp_path / "1", 21)
    runs["differ"] = "--data MY_DATA --steps 1"
    jobs = []
    for name, words in runs.items():
        job = f"{words} --accum 2 --keep 1 --out {tmp_path}/{name}"
        jobs.append((free_port(), job))
    place = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    ranks = []
    for rank in "01":
        arguments = (str(tmp_path), json.dumps(jobs))
        where = {"RANK": rank, "LOCAL_RANK": rank}
        ranks.append(start_python(RANK, *arguments, **where, **place))
    texts = [process.communicate(timeout=100) for process in ranks]
    for rank in "01":
        path = tmp_path / f"statuses{rank}"
        assert path.exists(), texts
        assert json.loads(path.read_text()) == [0, 0, 0, 0, 143, 2], texts
    assert "2 x 2 x 4 images" in texts[0][0]
    # only the first speaks
    assert texts[1][0] == ""
    assert texts[1][1].strip().splitlines()[-1].startswith("sslvit.py: not one train")
    for n, words in enumerate(METHODS):
        assert run(f"{words} {SAME} --accum 1", tmp_path / "alone") == 0
        assert_same_run(tmp_path / "alone", tmp_path / f"method{n}")
        (tmp_path / "alone" / "ckpt.pt").unlink()
        (tmp_path / "alone" / "log.jsonl").unlink()
    assert checkpoint_of(tmp_path / "stopped")["step"] in (7, 8, 9, 10)


def test_the_log_tells_speed_and_time_left(tmp_path, monkeypatch):
    """A step waits 1 s for 8 images and computes for 3 s: 2 images/s, stall 1/4.

    33 of 36 steps after the third take 132 s; saving takes long, but is no step.
    """
    now = [0.0]
    make_loader = sslvit.make_loader

    def slow_loader(*args):
        for batch in make_loader(*args):
            now[0] += 1
            yield batch

    def wait(seconds):
        now[0] += seconds

    monkeypatch.setattr(sslvit, "make_loader", slow_loader)
    monkeypatch.setattr(SSL, "update_average", lambda *_: wait(3))
    monkeypatch.setattr(sslvit, "save_run", lambda *_: wait(1000))
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(sslvit, "time", clock)
    words = "--objective simmim --steps 36 --log-every 12 --save-every 12"
    assert run(words, tmp_path) == 0
    rows = log_of(tmp_path)[1:]
    assert [row["step"] for row in rows] == [3, 12, 24, 36]
    assert [row["images/s"] for row in rows] == [2] * 4
    assert [row["stall"] for row in rows] == [0.25] * 4
    assert [row["minutes left"] for row in rows] == [2.2, 1.6, 0.8, 0]


def test_epochs_are_rounded_to_steps():
    for epochs, steps in ((1.5, 4), (0.01, 1), (0, 1500)):
        cfg = config(epochs=epochs)
        # 30 images in batches of 8
        assert sslvit.number_of_steps(cfg, 20) == steps


def test_batches_cover_each_epoch_and_do_not_depend_on_ranks_or_start():
    def keys(start, accum, rank, world_size):
        cfg = config(batch_size=8, accum=accum)
        return [*sslvit.batch_keys(cfg, 20, range(start, 5), rank, world_size)]

    stream = [key for batch in keys(0, 1, 0, 1) for key in batch]
    twice = [(epoch, index) for epoch in (0, 1) for index in range(20)]
    assert sorted(stream) == twice
    order = [index for _, index in stream]
    assert order[:20] != order[20:]
    assert order[:20] != sorted(order[:20])
    later = [key for batch in keys(3, 1, 0, 1) for key in batch]
    assert later == stream[24:]
    # two ranks with two micro-batches each: the same eight images in each step
    zero = keys(0, 2, 0, 2)
    one = keys(0, 2, 1, 2)
    joint = []
    for step in range(5):
        for batch in zero[2 * step : 2 * step + 2] + one[2 * step : 2 * step + 2]:
            joint += batch
    assert joint == stream


# ---- On a GPU, and as if there were one ----


@pytest.mark.parametrize("words", [*METHODS, "--positions relative --decoder-depth 1"])
@pytest.mark.parametrize("parts", [1, 2])
def test_nothing_is_left_on_the_cpu(monkeypatch, words, parts):
    """Tensors on torch's "meta" device have shapes, but no values.

    As on a GPU, an operation on tensors of two devices fails.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    cfg, _ = sslvit.parse([*QUICK, *words.split()])
    cfg.device = "meta"
    model = SSL(cfg).to("meta")
    views = [sslvit.augment(loaded(cfg), cfg) for _ in range(parts)]
    if parts == 1:
        losses = model(*views[0])
        (losses["mim"] + losses["cl"]).backward()
    else:
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        losses = sslvit.backward_in_parts(model, views, cfg, nullcontext, scaler)
    for tensor in (*views[0], *losses.values()):
        assert tensor is None or tensor.device.type == "meta"
    sslvit.make_optimizer(model, cfg).step()
    model.update_average(0.9)
    # analyze.py and k-NN
    _, records = model.encoder(views[0][0 if cfg.lam else 2], record=True)
    assert records[-1].attn.device.type == "meta"


def test_each_rank_takes_its_gpu_before_it_touches_one(monkeypatch):
    taken = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(device))
    monkeypatch.setattr(torch, "zeros", lambda *_, device: taken.append(device))
    for device in ("auto", "cuda"):
        cfg = config(device=device)
        sslvit.settle(cfg, 1)
        assert taken == ["cuda:3", "cuda:3"]
        taken.clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("words", ["", "--accum 2", "--dtype fp16", "--compile"])
@pytest.mark.parametrize("method", METHODS)
def test_cuda(tmp_path, method, words):
    words = f"--steps 4 --workers 2 --device cuda --dtype auto {method} {words}"
    assert run(words, tmp_path) == 0
    assert run(words + " --resume", tmp_path) == 0


@pytest.mark.parametrize("accum,graphs", [(1, 3), (2, 4)])
def test_compile_has_no_break_and_does_not_compile_again(
    tmp_path, monkeypatch, accum, graphs
):
    """Queries, keys, masked images; queries once more for the part without a graph."""
    torch._dynamo.reset()
    compiled = []

    def backend(graph, example):
        compiled.append(graph)
        return graph

    compile_it = torch.compile

    def compile_whole(function, **options):
        # fullgraph: a break is an error
        return compile_it(function, fullgraph=True, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compile_whole)
    after_step_1 = []
    at_step(monkeypatch, 1, lambda: after_step_1.extend(compiled))
    # the k-NN test between the steps has other sizes
    words = f"--steps 3 --save-every 1 --compile --accum {accum}"
    assert run(words, tmp_path) == 0
    assert len(after_step_1) == len(compiled) == graphs


# ---- Resuming, signals, faults ----


def at_step(monkeypatch, step, action):
    """Does `action` in the middle of training, once `step` steps are taken."""
    average = SSL.update_average
    steps = []

    def update_average(self, momentum):
        average(self, momentum)
        steps.append(momentum)
        if len(steps) == step:
            action()

    monkeypatch.setattr(SSL, "update_average", update_average)


def assert_equal_to_the_bit(a, b):
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        assert np.array_equal(x, y)


@pytest.mark.parametrize(
    "words",
    ["--objective moco", "--objective simmim --workers 1"]
    + ["--accum 2", "--one-view", "--dtype fp16"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, monkeypatch, words):
    """To the bit, and the log has each step once, also after a crash."""
    first = f"{words} --seed 3 --steps 5 --save-every 3"
    assert run(first, tmp_path / "whole") == 0
    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
        assert run(first, cut) == 143
    assert checkpoint_of(cut)["step"] == 4
    with open(cut / "log.jsonl", "a") as log:
        log.write('{"step": 5, "loss": 77}\n')
    # what the checkpoint says need not be said again
    again = f"--resume --device cpu --out {cut} {words if 'accum' in words else ''}"
    assert sslvit.main(again.split()) == 0
    whole = checkpoint_of(tmp_path / "whole")
    resumed = checkpoint_of(cut)
    for part in ("model", "optimizer", "scaler", "step", "data"):
        assert_equal_to_the_bit(whole[part], resumed[part])
    assert resumed["config"]["seed"] == 3
    lines = log_of(cut)
    assert [row["step"] for row in lines] == [0, 1, 2, 3, 4, 5]
    uncut = log_of(tmp_path / "whole")
    for name in ("loss", "norm", "lr"):
        a = [row.get(name, 0) for row in lines]
        assert a == pytest.approx([row.get(name, 0) for row in uncut], nan_ok=True)
    # a run that is complete stays as it is
    assert sslvit.main(again.split()) == 0
    assert_equal_to_the_bit(checkpoint_of(cut)["model"], resumed["model"])


def test_fp16_leaves_out_a_step_whose_gradient_overflows(tmp_path, monkeypatch):
    steps = []
    masked_l1 = sslvit.masked_l1

    def large_at_step_12(*args):
        steps.append(args)
        # times the scaler's 2¹⁶ too large for 16 bits; the loss is not
        return masked_l1(*args) * (1e30 if len(steps) == 12 else 1)

    monkeypatch.setattr(sslvit, "masked_l1", large_at_step_12)
    weights = []
    scales = []
    mixed_precision = sslvit.mixed_precision

    def remember(cfg):
        autocast, scaler = mixed_precision(cfg)

        def update_average(model, momentum):
            weights.append(model.mask_token.detach().clone())
            scales.append(scaler.get_scale())

        monkeypatch.setattr(SSL, "update_average", update_average)
        return autocast, scaler

    monkeypatch.setattr(sslvit, "mixed_precision", remember)
    words = "--objective simmim --dtype fp16 --steps 14"
    assert run(words, tmp_path) == 0
    # step 12, counted from 1
    assert torch.equal(weights[10], weights[11])
    assert scales[11] == scales[10] / 2
    assert not torch.equal(weights[9], weights[10])
    assert not torch.equal(weights[11], weights[12])


@pytest.mark.parametrize("name,status", [("INT", 130), ("TERM", 143), ("HUP", 129)])
def test_a_signal_saves_and_ends(tmp_path, monkeypatch, capfd, name, status):
    number = getattr(signal, f"SIG{name}")
    before = [signal.getsignal(n) for n in (1, 2, 15)]
    at_step(monkeypatch, 2, lambda: signal.raise_signal(number))
    assert run("--steps 5 --log-every 100", tmp_path) == status
    assert checkpoint_of(tmp_path)["step"] == 2
    out, err = capfd.readouterr()
    assert "--resume" in out.splitlines()[-1]
    assert "saves at the end of this step" in err
    assert [signal.getsignal(n) for n in (1, 2, 15)] == before


def test_a_second_ctrl_c_ends_at_once(tmp_path, monkeypatch, capfd):
    def press_twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 2, press_twice)
    assert run("--steps 5", tmp_path) == 130
    assert not (tmp_path / "ckpt.pt").exists()
    assert "Traceback" not in capfd.readouterr().err


def test_ctrl_c_before_the_first_step_ends_at_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sslvit, "SSL", lambda cfg: signal.raise_signal(signal.SIGINT))
    assert run("--steps 5", tmp_path) == 130
    error_line(capfd)


def test_a_run_under_nohup_survives_the_terminal(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGHUP))
    assert run("--steps 3", tmp_path) == 0
    signal.signal(signal.SIGHUP, before)


# as `python sslvit.py` runs, and as it ends
AS_PROGRAM = f"""
import runpy
runpy.run_path({str(ROOT / "sslvit.py")!r}, run_name="__main__")
"""


def test_the_end_of_a_job_saves_although_workers_hear_it_too(tmp_path):
    words = [*QUICK, "--model", "nano", "--steps", "9999", "--workers", "1"]
    process = start_python(AS_PROGRAM, *words, "--out", str(tmp_path))
    while not process.stdout.readline().startswith("step 3 "):
        assert process.poll() is None
    # as torchrun and clusters do: to all processes of the group
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, out + err
    assert checkpoint_of(tmp_path)["step"] == log_of(tmp_path)[-1]["step"]


def test_a_reader_who_goes_away_ends_no_training(tmp_path):
    """sslvit.py | head -1"""
    words = [*QUICK, "--model", "nano", "--steps", "5"]
    process = start_python(AS_PROGRAM, *words, "--out", str(tmp_path))
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 0
    assert checkpoint_of(tmp_path)["step"] == 5


def test_a_killed_worker_is_one_line(tmp_path, monkeypatch, capfd):
    def kill_worker():
        torch.multiprocessing.active_children()[0].kill()

    at_step(monkeypatch, 2, kill_worker)
    assert run("--steps 99 --workers 1", tmp_path) == 2
    error_line(capfd)


def test_one_folder_belongs_to_one_run(tmp_path, monkeypatch, capfd):
    """A second one is refused and disturbs nothing; the log grows line by line."""
    statuses = []
    lengths = []

    def start_another():
        lengths.append(len(log_of(tmp_path)))
        statuses.append(run("--steps 1 --overwrite", tmp_path))

    at_step(monkeypatch, 3, start_another)
    assert run("--steps 4", tmp_path) == 0
    assert statuses == [2]
    assert "another run" in error_line(capfd)
    # the untrained network, steps 1 and 2
    assert lengths == [3]
    assert [row["step"] for row in log_of(tmp_path)] == [0, 1, 2, 3, 4]
    assert checkpoint_of(tmp_path)["step"] == 4


def test_a_save_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    sslvit.save_checkpoint(path, {"step": 1})
    save = torch.save

    def look_on(state, file):
        # while the new one is written, the old one can be read
        assert checkpoint_of(tmp_path) == {"step": 1}
        save(state, file)

    monkeypatch.setattr(torch, "save", look_on)
    sslvit.save_checkpoint(path, {"step": 2})
    assert checkpoint_of(tmp_path) == {"step": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["ckpt.pt"]


def test_a_full_disk_is_one_line_and_keeps_the_last_save(tmp_path, monkeypatch, capfd):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk():
        # a file can have 100 kB; Python ignores SIGXFSZ
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    at_step(monkeypatch, 3, fill_the_disk)
    status = run("--objective simmim --steps 6 --save-every 2 --model nano", tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    line = error_line(capfd)
    assert "not written" in line
    assert "--resume" in line
    assert checkpoint_of(tmp_path)["step"] == 2
    assert not (tmp_path / "ckpt.pt.tmp").exists()


def test_a_damaged_or_foreign_checkpoint_is_not_resumed(tmp_path, capfd):
    path = tmp_path / "ckpt.pt"
    assert run("--steps 1", tmp_path) == 0
    good = path.read_bytes()
    run_state = checkpoint_of(tmp_path)
    capfd.readouterr()
    # one byte of a weight, halfway
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    flipped = bytearray(good)
    flipped[largest.header_offset + 100 + largest.file_size // 2] ^= 1
    for content in (bytes(flipped), good[: len(good) // 2], b"", b"no zip"):
        path.write_bytes(content)
        assert run("--resume", tmp_path) == 2
        error_line(capfd)
    states = [{}, {"weights": 1}, [1, 2], "text", {"config": 1}]
    states.append(run_state | {"config": {"width": 24}})  # of another version
    states.append(run_state | {"config": run_state["config"] | {"steps": "many"}})
    states.append({key: run_state[key] for key in ("config", "model")})
    for state in states:
        sslvit.save_checkpoint(path, state)
        assert run("--resume", tmp_path) == 2, state
        error_line(capfd)


class Attack:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["SSLVIT_ATTACK"],)


def test_a_checkpoint_with_code_is_refused_unrun(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SSLVIT_ATTACK", str(tmp_path / "ran"))
    torch.save({"step": Attack()}, tmp_path / "ckpt.pt")
    assert run("--resume", tmp_path) == 2
    assert not (tmp_path / "ran").exists()
    error_line(capfd)


def test_features_that_collapse_are_told(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sslvit, "feature_std", lambda _: torch.tensor(0.01))
    assert run("--steps 1", tmp_path) == 0
    assert "features collapse" in capfd.readouterr().out


def test_a_bad_number_stops_before_it_is_saved(tmp_path, monkeypatch, capfd):
    masked_l1 = sslvit.masked_l1
    steps = []

    def bad_at_third(*args):
        steps.append(args)
        return masked_l1(*args) * (math.nan if len(steps) == 3 else 1)

    monkeypatch.setattr(sslvit, "masked_l1", bad_at_third)
    words = "--log-every 100 --objective simmim --steps 8 --save-every 2"
    assert run(words, tmp_path) == 1
    assert "not finite" in error_line(capfd)
    assert checkpoint_of(tmp_path)["step"] == 2


# ---- 7. Command line ----


def test_the_loss_falls_and_everything_is_written(tmp_path, capfd):
    words = "--objective simmim --steps 40 --lr 0.1 --log-every 20 --save-every 30"
    assert run(words, tmp_path) == 0
    out = capfd.readouterr().out
    assert "simmim (λ = 0): ViT-micro, 16 px" in out.splitlines()[0]
    assert "chance 0.125" in out
    rows = log_of(tmp_path)
    # the third step is the first that tells the time
    assert [row["step"] for row in rows] == [0, 3, 20, 30, 40]
    assert rows[-1]["mim"] < 0.9 * rows[1]["mim"]
    assert [row["step"] for row in rows if "knn_shape" in row] == [0, 30, 40]
    assert checkpoint_of(tmp_path)["step"] == 40


@pytest.mark.parametrize("objective", ["moco", "hybrid"])
def test_a_run_ends_with_pictures_and_the_next_command(tmp_path, objective, capfd):
    assert run(f"--objective {objective} --steps 2", tmp_path) == 0
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.endswith(f"python analyze.py {tmp_path}/ckpt.pt")
    Image.open(tmp_path / "loss.png").verify()
    # MoCo predicts no pixels
    path = tmp_path / "masked.png"
    assert path.exists() == (objective == "hybrid")
    if path.exists():
        # eight images in a row: as they are, masked, predicted; 18 px with the frame
        image = Image.open(path).convert("RGB")
        side = image.width // 8
        assert image.height == 3 * side
        unmasked = np.asarray(image.resize((144, 54), Image.Resampling.NEAREST))[:18]
        source = Stimuli(5000, 16, 0, "test")
        first = unmasked[1:17, 1:17].astype(int)
        assert abs(first - source[0][0]).max() <= 1


def test_nothing_is_overwritten_and_no_setting_changes(tmp_path, capfd):
    assert run("--steps 1", tmp_path) == 0
    before = (tmp_path / "ckpt.pt").read_bytes()
    capfd.readouterr()
    for words in ("", "--resume --model tiny", "--resume --seed 1"):
        assert run(f"--steps 1 {words}", tmp_path) == 2
        error_line(capfd)
        assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert len(log_of(tmp_path)) == 2
    assert run("--steps 1 --resume --accum 2 --workers 1", tmp_path) == 0
    assert run("--steps 2 --overwrite", tmp_path) == 0
    assert [row["step"] for row in log_of(tmp_path)] == [0, 1, 2]


BAD_INPUT = """
    --no-such-flag
    --lam 1.5
    --lam -0.1
    --lam nan
    --lam 0.5 --objective moco
    --one-view --objective simmim
    --one-view --lam 1
    --image-size 30
    --image-size 0
    --mask-patch-size 6
    --batch-size 0
    --batch-size 1
    --batch-size 6 --accum 4
    --batch-size 32 --data PHOTOS
    --steps -3
    --steps 1.5
    --lr nan
    --lr -1
    --epochs inf
    --objective byol
    --model gigantic
    --preset mega
    --data /no/such/folder
    --data FILE
    --data EMPTY
    --data TEXT
    --data BROKEN
    --data BROKEN --workers 1
    --data ONLY
    --resume
    --device cuda:99
    --dtype int8
    --out FILE/run
    --log-every 0
    --mask-ratio 0
    --seed -1
    --keep -1
""".strip().splitlines()


@pytest.mark.parametrize("bad", [line.strip() for line in BAD_INPUT])
def test_bad_input_is_one_clear_line_and_status_2(tmp_path, bad, capfd):
    (tmp_path / "file").write_text("x")
    for name in ("empty", "text", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    for n in range(9):
        (tmp_path / "broken" / f"{n}.png").write_text("x")
    fill(tmp_path / "photos", 25)
    fill(tmp_path / "only" / "val" / "cat", 2)
    for name in ("file", "empty", "text", "broken", "photos", "only"):
        bad = bad.replace(f" {name.upper()}", f" {tmp_path}/{name}")
    common = ["--steps", "1", "--out", str(tmp_path / "run")]
    assert sslvit.main([*QUICK, *common, *bad.split()]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    if "broken" in bad:  # whose files are named one by one
        lines = [line for line in lines if "replaced by the next" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("sslvit.py: ")
    assert len(lines[0]) > 25


def test_one_process_of_no_torchrun_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("--steps 1", tmp_path) == 2
    assert "torchrun" in error_line(capfd)


def test_full_memory_is_one_line(tmp_path, monkeypatch, capfd):
    for error, advice in (
        (torch.OutOfMemoryError("CUDA out of memory.\nTried ..."), "--accum"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp]\nframe 0"), "alloc_cpu"),
    ):

        def full(*_, error=error):
            raise error

        monkeypatch.setattr(SSL, "forward", full)
        assert run("--steps 1", tmp_path / advice) == 2
        assert advice in error_line(capfd)


def test_a_console_without_lambda(tmp_path, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    assert run("--steps 1", tmp_path) == 0
    with pytest.raises(SystemExit, match="0"):
        sslvit.main(["--help"])
    console.flush()
    assert b"(? = 0.2)" in console.buffer.getvalue()


def test_help_tells_every_flag_and_default(capfd):
    with pytest.raises(SystemExit, match="0"):
        sslvit.main(["--help"])
    out = capfd.readouterr().out
    for name, value in vars(Config()).items():
        assert f"  --{name.replace('_', '-')}" in out
        assert f"  {name}: {type(value).__name__} = " in out


def test_threads_do_not_spin_unless_the_user_says_so(tmp_path):
    """Before torch is imported: a stand-in for torch tells what it sees."""
    stand_in = "import os\nprint(os.environ.get('GOMP_SPINCOUNT'))\nos._exit(0)"
    (tmp_path / "torch.py").write_text(stand_in)
    for own, expected in (
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "None"),
    ):
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            environment.pop(name, None)
        command = [sys.executable, "-u", "-c", "import sslvit"]
        process = subprocess.run(
            command, capture_output=True, text=True, env=environment | own
        )
        assert process.stdout.strip() == expected, process.stderr


@pytest.mark.parametrize(
    "words,settings",
    [
        # what is given goes before the recipe
        ("--preset small32 --steps 7 --blur 1", "steps=7 epochs=0 blur=1 hue_shift=.1"),
        # each run of a loop over λ or seeds has a folder of its own
        ("--lam 0.4 --seed 3", "lam=.4 seed=3 out=runs/micro-hybrid-0.4-seed3"),
        ("--objective moco", "lam=1 seed=0 out=runs/micro-moco"),
        # the papers' recipes: MoCo v3 ...
        (
            "--data x --objective moco",
            "preset=imagenet model=base image_size=224 patch_size=16 epochs=300 clip=0 "
            "batch_size=4096 lr=1.5e-4 weight_decay=.1 temperature=.2 momentum=.99 "
            "proj_hidden=4096 crop_min=.08 hue_shift=.1 blur=2 positions=sincos",
        ),
        # ... and SimMIM, with learning rate 1e-4 for a batch of 512
        (
            "--data x --objective simmim",
            "model=base epochs=100 batch_size=2048 lr=.5e-4 weight_decay=.05 clip=5 "
            "warmup=.1 positions=relative mask_patch_size=32 mask_ratio=.6",
        ),
    ],
)
def test_settings_of_a_command_line(words, settings):
    cfg, _ = sslvit.parse(words.split())
    for setting in settings.split():
        name, value = setting.split("=")
        kind = type(getattr(cfg, name))
        assert getattr(cfg, name) == kind(value), setting


@pytest.mark.parametrize(
    "batch,ranks,parts", [(64, 1, 1), (129, 1, 3), (256, 1, 2), (4096, 8, 4)]
)
def test_micro_batches_have_at_most_128_images_and_divide(batch, ranks, parts):
    cfg = config(batch_size=batch, accum=0)
    sslvit.settle(cfg, ranks)
    assert cfg.accum == parts


@pytest.mark.parametrize("preset", ["micro", "small32"])
def test_objectives_do_equal_work(preset):
    """Encoder passes of all training: MoCo 2·3 + 2 an image, SimMIM 3, hybrid 11."""
    work = {}
    for objective, passes in (("moco", 8), ("simmim", 3), ("hybrid", 11)):
        words = ["--preset", preset, "--objective", objective, "--data", "x"]
        cfg, _ = sslvit.parse(words)
        steps = sslvit.number_of_steps(cfg, 50000)
        work[objective] = steps * cfg.batch_size * passes
    assert work["moco"] == pytest.approx(work["hybrid"], rel=1e-3)
    assert work["simmim"] == pytest.approx(work["hybrid"], rel=1e-3)


# ---- 8. Workshop: stimuli ----


def test_stimuli_are_a_function_of_seed_split_and_index():
    train = Stimuli(50, 32, 0)
    image, shape, texture, mask = train[7]
    assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
    assert (mask.shape, mask.dtype) == ((32, 32), bool)
    assert np.array_equal(image, Stimuli(50, 32, 0)[7][0])
    others = [Stimuli(50, 32, 1), Stimuli(50, 32, 0, "test")]
    pictures = {s[i][0].tobytes() for s in (train, *others) for i in range(50)}
    assert len(pictures) == 150
    # the outline does not tell the texture
    again, outline = train.render(7, shape, (texture + 1) % 8)
    assert np.array_equal(outline, mask)
    assert not np.array_equal(again, image)


def test_shape_and_texture_are_independent():
    source = Stimuli(4000, 8)
    pairs = np.array([source[i][1:3] for i in range(4000)])
    table = np.histogram2d(*pairs.T, bins=8)[0]
    expected = table.sum(1)[:, None] * table.sum(0) / 4000
    # chi² with 49 degrees of freedom, p = 0.001
    assert ((table - expected) ** 2 / expected).sum() < 85


def test_small_images_are_made_once_and_kept(tmp_path):
    stimuli = Stimuli(20, 16)
    image, labels = stimuli.load(5)
    assert stimuli.load(5)[0] is image
    assert labels == [*stimuli[5][1:3]]
    assert np.array_equal(np.asarray(image), stimuli[5][0])
    # 20,000 of 96 px would be 553 MB
    large = Stimuli(20000, 96)
    assert large.load(5)[0] is not large.load(5)[0]
    fill(tmp_path, 3)
    files = sslvit.ImageFolder(tmp_path)
    image, labels = files.load(2)
    (tmp_path / "02.png").unlink()
    assert files.load(2)[0] is image
    assert np.asarray(image)[0, 0].tolist() == [20, 0, 0]
    # 2 million of 9 x 7 px would be 378 MB
    files *= 700_000
    assert files.load(1)[0] is not files.load(1)[0]


# ---- 8. Workshop: image files ----


def test_a_crop_is_the_same_as_pillows(tmp_path):
    """Also of a large JPEG, which is decoded at 1/2, 1/4 or 1/8."""
    y, x = np.mgrid[:800, :1200]
    pattern = np.stack([x % 256, y % 256, (x + y) // 8], -1).astype(np.uint8)
    photo = Image.fromarray(pattern).reduce(4).resize((1200, 800), Image.BICUBIC)
    photo.save(tmp_path / "large.jpg", quality=95)
    box = (160, 80, 800, 560)
    for name, tolerance in ((photo, 1), (tmp_path / "large.jpg", 4)):
        file = name if name is photo else Image.open(name)
        ours = sslvit.cut(file, [box], 32)[0].astype(float)
        pillows = photo.crop(box).resize((32, 32), Image.Resampling.BILINEAR)
        error = abs(ours - np.asarray(pillows).transpose(2, 0, 1))
        assert error.mean() < tolerance
    # decoded at 1/8: 480 px become 32
    assert file.size == (150, 100)


def test_crops_are_rounded_to_whole_pixels_and_keep_one():
    # row, column: 8 · row + column
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    boxes = [
        (2.4, 0.4, 6.4, 4.4),  # nearest whole pixels: 2, 0, 6, 4
        (7.6, 5.6, 7.9, 5.9),  # 8 to 8 and 6 to 6: empty
    ]
    out = sslvit.cut(Image.fromarray(pixels), boxes, 4)
    assert (out[0, 0] == pixels[0:4, 2:6]).all()
    assert (out[1, 0] == pixels[5, 7]).all()


RAMP = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
DEPTHS = {
    "16 bits": ("png", RAMP.astype(np.uint16) * 257),
    "12 of 16 bits": ("png", RAMP.astype(np.uint16) * 16),
    "32 bits, 0 to 255": ("tiff", RAMP.astype(np.int32)),
    "CT": ("tiff", RAMP.astype(np.int32) * 12 - 1024),
    "float, 0 to 1": ("tiff", RAMP.astype(np.float32) / 255),
}


@pytest.mark.parametrize("depth", DEPTHS)
def test_images_of_many_bits_have_contrast(tmp_path, depth):
    ending, values = DEPTHS[depth]
    path = tmp_path / f"x.{ending}"
    Image.fromarray(values).save(path)
    out = sslvit.center_crop(Image.open(path), 16)
    assert abs(out.astype(float) - RAMP).max() <= 1
    # without contrast there is nothing to stretch
    Image.fromarray(np.full_like(values, 9)).save(path)
    assert np.ptp(sslvit.center_crop(Image.open(path), 16)) == 0


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "LA", "RGBA", "P with alpha"])
def test_every_mode_becomes_rgb_on_white(tmp_path, mode):
    rgb = Image.fromarray(np.stack([RAMP, RAMP, RAMP], axis=-1))
    has_alpha = "A" in mode or "alpha" in mode
    if has_alpha:
        # the left half is transparent
        alpha = Image.new("L", (16, 16), 255)
        alpha.paste(0, (0, 0, 8, 16))
        rgb.putalpha(alpha)
    image = rgb.quantize(256) if mode[0] == "P" else rgb.convert(mode)
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    image.save(path)
    out = sslvit.center_crop(Image.open(path), 16).astype(int)
    expected = RAMP.astype(int).copy()
    if has_alpha:
        expected[:, :8] = 255
    assert abs(out - expected).max() < 9


@pytest.mark.parametrize("ending", ["jpg", "tiff", "png"])
def test_the_cameras_orientation_is_obeyed(tmp_path, ending):
    """Shown are a red, a green and a blue third beside each other.

    They are stored below each other, to be turned; cut is what is shown in the middle.
    """
    shown = Image.new("RGB", (96, 32), (0, 255, 0))
    shown.paste((255, 0, 0), (0, 0, 32, 32))
    shown.paste((0, 0, 255), (64, 0, 96, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"x.{ending}"
    shown.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    out = sslvit.center_crop(Image.open(path), 8).astype(int)
    middle = out[:, 4, 1:7].mean(axis=1)
    assert middle == pytest.approx([0, 255, 0], abs=9)
    boxes = [(0, 0, 32, 32), (64, 0, 96, 32)]
    red, blue = sslvit.cut(Image.open(path), boxes, 8)[:, :, 4, 4]
    assert red == pytest.approx([255, 0, 0], abs=9)
    assert blue == pytest.approx([0, 0, 255], abs=9)


def test_a_broken_exif_block_costs_no_pixels(tmp_path):
    picture = io.BytesIO()
    Image.fromarray(RAMP).save(picture, "JPEG")
    jpeg = picture.getvalue()
    for block in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"):
        segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
        path = tmp_path / "x.jpg"
        path.write_bytes(jpeg[:2] + segment + jpeg[2:])
        out = sslvit.center_crop(Image.open(path), 16).astype(int)
        assert abs(out - RAMP).max() < 9


def fill(folder, count, size=(9, 7)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (10 * i % 256, 0, 0)).save(folder / f"{i:02}.png")


@pytest.mark.parametrize("splits", ["train val", "Train Valid", "training TEST"])
def test_splits_are_no_classes_whatever_their_case(tmp_path, splits):
    for split in splits.split():
        fill(tmp_path / split / "cat", 3)
        fill(tmp_path / split / "dog", 2)
    train, test = sslvit.find_data(config(data=str(tmp_path)))
    assert train.classes == test.classes == (["cat", "dog"],)
    assert [labels for _, labels in test] == [[0], [0], [0], [1], [1]]
    assert not {path for path, _ in train} & {path for path, _ in test}


def test_class_folders_and_flat_folders_hold_a_tenth_back(tmp_path):
    fill(tmp_path / "classes" / "cat", 20)
    fill(tmp_path / "classes" / "dog", 20)
    train, test = sslvit.find_data(config(data=str(tmp_path / "classes")))
    assert (len(train), len(test)) == (36, 4)
    assert [labels for _, labels in test] == [[0], [0], [1], [1]]
    assert not {path for path, _ in train} & {path for path, _ in test}
    fill(tmp_path / "flat", 20)
    train, test = sslvit.find_data(config(data=str(tmp_path / "flat")))
    assert (len(train), len(test)) == (18, 2)
    assert train.label_names == ()
    # too few to be divided
    fill(tmp_path / "few", 19)
    train, test = sslvit.find_data(config(data=str(tmp_path / "few")))
    assert len(train) == 19
    assert test is None


def test_masks_hidden_folders_and_other_files_are_left_out(tmp_path, capfd):
    for folder in ("images", "masks", ".thumbnails"):
        fill(tmp_path / folder, 4)
    for name in ("a.heic", "b.HEIC", "notes.txt"):
        (tmp_path / "images" / name).write_text("x")
    images = sslvit.ImageFolder(tmp_path)
    assert len(images) == 4
    assert images.classes == ()
    out = capfd.readouterr().out
    for reason in ("2 x file .heic", "1 x file .txt", "masks", ".thumbnails"):
        assert reason in out


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch, capfd):
    fill(tmp_path / "cat", 20)
    fill(tmp_path / "dog", 20)
    scandir = os.scandir

    def may_not(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", may_not)
    assert run(f"--data {tmp_path} --steps 1", tmp_path / "run") == 2
    assert "dog" in error_line(capfd)


def test_linked_folders_are_followed_and_circles_refused(tmp_path, capfd):
    fill(tmp_path / "store", 3)
    (tmp_path / "data" / "dog").mkdir(parents=True)
    fill(tmp_path / "data" / "dog", 2)
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "store")
    images = sslvit.ImageFolder(tmp_path / "data")
    assert [labels for _, labels in images] == [[0], [0], [0], [1], [1]]
    (tmp_path / "data" / "dog" / "up").symlink_to(tmp_path / "data")
    assert run(f"--data {tmp_path}/data --steps 1", tmp_path / "run") == 2
    error_line(capfd)


# a flat val/ (as ImageNet's comes), one with fewer classes, one with others
@pytest.mark.parametrize("val", [("",), ("dog",), ("cat", "emu")])
def test_no_accuracy_where_the_classes_of_train_and_val_differ(tmp_path, capfd, val):
    for folder in ("train/cat", "train/dog", *(f"val/{name}" for name in val)):
        fill(tmp_path / folder, 20, size=(16, 16))
    assert run(f"--data {tmp_path} --steps 2", tmp_path / "run") == 0
    out = capfd.readouterr().out
    assert "knn" not in out
    assert out.count("classes differ") == 1
    assert out.splitlines()[-1].endswith(f"/run/ckpt.pt --data {tmp_path}")


def test_a_run_goes_on_with_its_own_images_only(tmp_path, capfd):
    photos = tmp_path / "photos"
    words = f"--data {photos} --objective simmim --steps 2"
    fill(photos, 12)
    assert run(words, tmp_path / "run") == 0
    capfd.readouterr()
    fill(photos, 13)
    assert run(f"{words} --resume", tmp_path / "run") == 2
    assert "training set" in error_line(capfd)
    (photos / "12.png").unlink()
    (photos / "03.png").rename(photos / "zz.png")
    assert run(f"{words} --resume", tmp_path / "run") == 2
    assert "training set" in error_line(capfd)
    (photos / "zz.png").rename(photos / "03.png")
    # the whole folder may be elsewhere
    photos.rename(tmp_path / "moved")
    for data in (f"{tmp_path}/moved", f"{tmp_path}/moved/"):
        assert run(f"--resume --data {data}", tmp_path / "run") == 0


def test_unreadable_files_are_named_once_and_replaced(tmp_path, capfd):
    """Zero bytes, half a JPEG, a bomb, a file that is gone; odd names are no harm."""
    good = Image.new("RGB", (20, 20), (200, 0, 0))
    for i in range(6):
        good.save(tmp_path / f"{i}.jpg", quality=30)
    good.save(tmp_path / "new\nline and blank.png")
    good.save(os.fsencode(tmp_path) + b"/\xff\xfe.png", "png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "half.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:300])
    # 2.5 gigapixels in 33 bytes
    size = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(size))
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + size + checksum
    (tmp_path / "bomb.png").write_bytes(bomb)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    words = f"--data {tmp_path} --steps 3 --objective simmim"
    assert run(words, tmp_path / "run") == 0
    err = capfd.readouterr().err
    for name in ("empty.png", "half.jpg", "bomb.png", "gone.png"):
        assert err.count(f"by the next: '{tmp_path}/{name}'") == 1, err
    assert len(err.splitlines()) == 4


# ---- 8. Workshop: k-NN ----


def test_knn_by_hand():
    # 10 times louder: not what the labels follow
    bank = torch.tensor([[10.0, 1], [-10, 1], [10, -1], [-10, -1]])
    labels = torch.tensor([[1, 0], [1, 2], [0, 3], [0, 4]])
    # second nearest of the first: whitened the second row, raw the third
    queries = torch.tensor([[9.0, 1], [-9, -1]])
    assert sslvit.knn(bank, labels[:, :1], queries, k=2).tolist() == [[1], [0]]
    assert sslvit.knn(bank, labels, queries, k=1).tolist() == [[1, 0], [0, 4]]
    layers = bank[None].repeat(3, 1, 1)
    assert sslvit.knn(layers, labels, queries, k=1).shape == (3, 2, 2)
    # the nearest of four says 5, the majority 2
    corners = torch.tensor([[1.0, 0.1], [1.0, 0.3], [1.0, -0.2], [-3.0, -0.2]])
    says = torch.tensor([[5], [2], [2], [5]])
    query = torch.tensor([[1.0, 0.11]])
    assert sslvit.knn(corners, says, query, k=1).tolist() == [[5]]
    assert sslvit.knn(corners, says, query, k=3).tolist() == [[2]]
    # more than are compared at once: each image is its own neighbour
    many = torch.randn(600, 8)
    names = torch.arange(600)[:, None]
    assert torch.equal(sslvit.knn(many, names, many, k=1), names)


class Plain:
    """Plain images of a brightness and a class each."""

    label_names = ("class",)
    classes = (["dark", "light"],)

    def __init__(self, brightness, labels):
        self.brightness = brightness
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def load(self, index):
        grey = self.brightness[index]
        return Image.new("RGB", (16, 16), (grey, grey, grey)), [self.labels[index]]


def test_test_images_look_for_training_images():
    encoder = ViT(16, 4, **TINY).eval()

    def score(train, test):
        cfg = config(knn_images=40)
        return sslvit.knn_scores(encoder, (train, test), cfg, nullcontext)

    # sorted by class, as folders are; 40 of 80 are spread over both
    labels = [0] * 40 + [1] * 40
    train = Plain([200 * label for label in labels], labels)
    # a network that sees anything gets all right, however the test set is made up
    test = Plain([0, 0, 0, 200, 200], [0, 0, 0, 1, 1])
    assert score(train, test) == {"knn_class": 1}
    # its labels are the training set's, also where the test set disagrees
    contrary = Plain([0, 0, 0, 0, 200], [1, 1, 1, 1, 1])
    assert score(train, contrary) == {"knn_class": 0.2}
    assert score(train, None) == {}


# ---- 8. Workshop: plan ----


@pytest.mark.parametrize("words", METHODS)
def test_flops_are_those_that_torch_counts(words):
    """Of ViT-S/16, whose embedding, heads and decoder are some per cent."""
    words = f"--preset imagenet --model small {words} --proj-hidden 16"
    cfg, _ = sslvit.parse([*words.split(), "--positions", "sincos"])
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = SSL(cfg)
        views = torch.empty(3, 2, 3, 224, 224)
        mask = torch.empty(2, 196, dtype=torch.bool)
        losses = model(*views, mask)
        ((1 - cfg.lam) * losses["mim"] + cfg.lam * losses["cl"]).backward()
    counted = counter.get_total_flops() / 2
    assert sslvit.flops_per_image(cfg) == pytest.approx(counted, rel=0.03)


def test_the_plan_of_vit_base_by_hand(tmp_path, monkeypatch, capfd):
    """197 tokens, 12 blocks: 12·197·(24·768² + 4·197·768) = 34.9 GFLOP a pass.

    Where only CLS asks in the last block, 32.5: hybrid 3 · 34.9 + 8 · 32.5 = 364 an
    image. 300 epochs of 1,281,167 images are 3.84e8, as they are 1,000 a second 107 h.
    """
    monkeypatch.setattr(sslvit, "measure_rate", lambda cfg: 1000)
    assert (
        run(
            "--data /no/such --preset imagenet --image-size 224 --dry-run --proj-hidden 4096 --batch-size 4096",
            tmp_path / "none",
        )
        == 0
    )
    assert not (tmp_path / "none").exists()
    first, *gpus, last = capfd.readouterr().out.splitlines()
    assert "3.84" in first and "e+08 images" in first
    assert "364" in first
    assert "1000 images/s, 107 h" in last
    total = 3.8435e8 * 364.3e9
    for line, peak in zip(gpus, (312e12, 989e12), strict=True):
        share = float(line.split("at ")[1].split("%")[0]) / 100
        hours, of_eight = (float(part.split()[-1]) for part in line.split(" h")[:2])
        assert hours == pytest.approx(total / (share * peak) / 3600, rel=0.02)
        assert of_eight == pytest.approx(hours / 8, rel=0.02)
    monkeypatch.undo()
    assert run("--dry-run --steps 9", tmp_path / "none") == 0
    assert "72 images" in capfd.readouterr().out


# ---- tests/pin.py ----


def test_pins_are_compared_to_the_bit(capfd):
    spec = importlib.util.spec_from_file_location("pin", ROOT / "tests" / "pin.py")
    pin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pin)
    old = {"torch": "2", "a": {"log": [{"step": 1, "loss": 0.5}], "encoder": "x"}}
    assert pin.compare(old, old)
    for new in (
        {"a": {"log": [{"step": 1, "loss": 0.50001}], "encoder": "x"}},
        {"a": {"log": [{"step": 1, "loss": 0.5}], "encoder": "y"}},
    ):
        assert not pin.compare(old, new)
    pinned = json.loads((ROOT / "tests" / "pinned.json").read_text())
    assert pin.compare(pinned, pinned)
