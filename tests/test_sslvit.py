"""Worked examples for sslvit.py.

Every expected number follows from paper and pencil, or from an independent library.
"""

import io
import json
import math
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
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
    loss = sslvit.contrastive_loss(3 * torch.eye(4), torch.eye(4), 0.5)
    assert loss.item() == pytest.approx(math.log(1 + 3 * math.exp(-2)))
    # queries e1, e1 and keys e1, e2: each query finds the first key, which for the
    # second is wrong. Keys that look for queries would be undecided both times.
    q = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    loss = sslvit.contrastive_loss(q, torch.eye(2), 1.0)
    expected = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))
    assert loss.item() == pytest.approx(expected)


# 30 of 49 units of 4 patches; 39 of 64; 7 of 25 of 4: 0.28 × 25 is 7.000000000000001
@pytest.mark.parametrize(
    "sizes,ratio,masked",
    [((224, 16, 32), 0.6, 120), ((32, 4, 4), 0.6, 39), ((40, 4, 8), 0.28, 28)],
)
def test_masks_are_whole_units_at_random(sizes, ratio, masked):
    size, patch, unit = sizes
    mask = sslvit.random_mask(200, *sizes, ratio)
    assert mask.shape == (200, (size // patch) ** 2)
    assert (mask.sum(dim=1) == masked).all()
    side = size // unit
    units = mask.reshape(200, side, unit // patch, side, unit // patch)
    assert torch.equal(units.any(4).any(2), units.all(4).all(2))
    # every unit alike, within four standard deviations
    assert (mask.float().mean(dim=0) - masked / mask.shape[1]).abs().max() < 0.14
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
    # what is not computed was not needed
    torch.testing.assert_close(vit(x, cls_only=True), tokens[:, :1])
    assert tokens.shape == (2, 17, 24)
    assert len(records) == 2
    last = records[1]
    assert last.attn.shape == (2, 3, 17, 17)
    assert last.heads.shape == (2, 3, 17, 8)
    assert last.mid.shape == last.out.shape == (2, 17, 24)
    torch.testing.assert_close(last.attn.sum(-1), torch.ones(2, 3, 17))
    torch.testing.assert_close(vit.norm(last.out), tokens)
    # another, oblong size: positions are interpolated
    assert vit(torch.randn(1, 3, 24, 8)).shape == (1, 13, 24)
    with torch.autocast("cpu", torch.bfloat16):  # which takes the explicit attention
        torch.testing.assert_close(vit(x).float(), tokens, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    "positions,scale", [("learned", None), ("learned", 0.1), ("none", None)]
)
def test_timm_parity(positions, scale):
    timm = pytest.importorskip("timm")
    how = {"pos_embed": positions.removesuffix("ed"), "init_values": scale}
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, num_classes=5, **how, **TINY
    ).eval()
    how = {"positions": positions, "layer_scale": scale}
    ours = ViT(32, 8, num_classes=5, **how, **TINY).eval()
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
    table.data = torch.arange(12.0)[:, None] + torch.tensor([0.0, 100.0, 200.0])
    # row (query) minus column (key): (Δy + 1)·3 + (Δx + 1);
    # 9: CLS to patch, 10: patch to CLS, 11: CLS to CLS
    rows = "11 9 9 9 9, 10 4 3 1 0, 10 5 4 2 1, 10 7 6 4 3, 10 8 7 5 4".split(",")
    hand = torch.tensor([[float(n) for n in row.split()] for row in rows])
    bias = vit.rel_pos_bias(2, 2)
    assert torch.equal(bias, torch.stack([hand, hand + 100, hand + 200]))
    assert vit.rel_pos_bias(3, 4).shape == (3, 13, 13)
    # all ways through attention add it
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(vit(x), vit(x, record=True)[0])
    torch.testing.assert_close(vit(x, cls_only=True), vit(x)[:, :1])
    bias.sum().backward()
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
    # its own pixels do not count, all others do
    x[..., 4:8, 8:12] = 9
    assert torch.equal(vit(x, mask, mask_token=token)[0], out)
    x[..., 8:12, 4:8] = 9
    is_other = (vit(x, mask, mask_token=token)[0] != out).any(dim=1)
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


def test_heads_spread_their_channels_without_a_learned_scale():
    head = sslvit.mlp_head(8, 16, 16, 4)
    kinds = [type(layer).__name__ for layer in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert head[1].affine
    assert not head[-1].affine
    assert [layer.bias for layer in (head[0], head[3], head[6])] == [None] * 3


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
        return TrainingViews(Stimuli(20, 16), config(seed=seed))[epoch, index]

    first = sample(0, 5)
    assert first["mask"].sum() == 10
    for name in ("crops", "mask", "colours"):
        assert np.array_equal(first[name], sample(0, 5)[name])
        for other in (sample(1, 5), sample(0, 6), sample(0, 5, seed=1)):
            assert not np.array_equal(first[name], other[name])


@pytest.mark.parametrize(
    "words,crops,given",
    zip(METHODS, (2, 1, 3, 2), ("12", "m", "12m", "1m"), strict=True),
)
def test_each_method_is_given_what_it_looks_at(words, crops, given):
    cfg, _ = sslvit.parse([*QUICK, *words.split()])
    batch = loaded(cfg)
    assert batch["crops"].shape == (8, crops, 3, 16, 16)
    *views, mask = sslvit.augment(batch, cfg)
    assert [view is not None for view in views] == [name in given for name in "12m"]
    assert torch.equal(mask, batch["mask"])
    # in ImageNet's units of red, green, blue; the masked view keeps its colours
    means = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviations = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    if "m" in given:
        pixels = views[2] * deviations + means
        torch.testing.assert_close(pixels, batch["crops"][:, -1] / 255)
    if "1" in given:  # nothing is drawn here, and crops are not changed
        assert torch.equal(sslvit.augment(batch, cfg)[0], views[0])


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


def test_each_image_gets_the_colours_that_were_drawn_for_it():
    x = torch.rand(6, 3, 9, 7)
    factors = [1.4, 0.6, 1.2, 0.3]
    orders = {4: [0, 1, 2, 3], 5: [3, 2, 1, 0]}
    # order, factors, blur, grey, solarise
    nothing = [-1.0, -1, -1, -1, 1, 1, 1, 0, 0, 0, 0]
    draws = torch.tensor([nothing] * 6)
    draws[0, 10] = 1
    draws[2, 9] = 1
    draws[3, 8] = 1.5
    for image, order in orders.items():
        draws[image, :8] = torch.tensor(order + factors)
    y = x.clone()
    sslvit.change_colours(y, draws)
    torch.testing.assert_close(y[0], torch.where(x[0] >= 0.5, 1 - x[0], x[0]))
    assert torch.equal(y[1], x[1])
    assert torch.equal(y[2, 0], y[2, 2])
    assert torch.equal(y[3:4], sslvit.gaussian_blur(x[3:4], column([1.5])))
    names = ("brightness", "contrast", "saturation", "hue")
    for image, order in orders.items():
        z = x[image : image + 1]
        for n in order:
            z = getattr(sslvit, f"adjust_{names[n]}")(z, torch.tensor(factors[n]))
        torch.testing.assert_close(y[image : image + 1], z)


def test_colour_operations_by_hand():
    red = column([1.0, 0.0, 0.0]).transpose(0, 1).expand(1, 3, 4, 4)
    turned = sslvit.adjust_hue(red, column([1 / 3]))[0, :, 0, 0]
    assert turned.tolist() == pytest.approx([0, 1, 0], abs=1e-6)
    # a point becomes exp(-½ (x/σ)²): at 3 px = 2σ e⁻² of the middle, either way; no
    # matter how much its neighbour in the batch is blurred
    dot = torch.zeros(2, 3, 21, 21)
    dot[..., 10, 10] = 1
    blurred = sslvit.gaussian_blur(dot, column([1.5, 2.0]))[0, 0]
    for point in (blurred[10, 13], blurred[13, 10]):
        assert point / blurred[10, 10] == pytest.approx(math.exp(-2), rel=1e-4)
    alone = sslvit.gaussian_blur(dot[:1], column([1.5]))[0, 0]
    torch.testing.assert_close(blurred, alone, atol=1e-7, rtol=0)


def test_colour_operations_match_torchvision():
    tv = pytest.importorskip("torchvision.transforms.v2.functional")
    x = torch.rand(4, 3, 40, 30)

    def blur(image, sigma):
        return tv.gaussian_blur(image, [29, 29], [sigma, sigma])

    factors = [0.6, 0.9, 1.3, 1.4]
    for ours, theirs, values in (
        (sslvit.adjust_brightness, tv.adjust_brightness, factors),
        (sslvit.adjust_contrast, tv.adjust_contrast, factors),
        (sslvit.adjust_saturation, tv.adjust_saturation, factors),
        (sslvit.adjust_hue, tv.adjust_hue, [-0.5, -0.1, 0.07, 0.4]),
        (sslvit.gaussian_blur, blur, [0.1, 0.5, 1.2, 2.0]),
    ):
        expected = torch.stack([theirs(x[i], values[i]) for i in range(4)])
        torch.testing.assert_close(ours(x, column(values)), expected, atol=1e-3, rtol=0)
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
            value = float(torch.as_tensor(value).detach())
            assert rows[step - 1][name] == pytest.approx(value, abs=1e-5), name
    for name, saved in checkpoint_of(tmp_path)["model"].items():
        torch.testing.assert_close(saved, weights[name].data, atol=1e-6, rtol=1e-6)


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
    """A step waits 1 s for 8 images and computes for 3 s: 2 images/s.

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
    assert [row["minutes left"] for row in rows] == [2.2, 1.6, 0.8, 0]


def test_epochs_are_rounded_to_steps():
    for epochs, steps in ((1.5, 4), (0.01, 1), (0, 1500)):
        cfg = config(epochs=epochs)
        # 30 images in batches of 8
        assert sslvit.number_of_steps(cfg, 20) == steps


def test_batches_cover_each_epoch_and_do_not_depend_on_ranks_or_start():
    def keys(start, accum=1, rank=0, world_size=1):
        cfg = config(batch_size=8, accum=accum)
        return [*sslvit.batch_keys(cfg, 20, range(start, 5), rank, world_size)]

    stream = sum(keys(0), [])
    assert sorted(stream) == [(epoch, index) for epoch in (0, 1) for index in range(20)]
    order = [index for _, index in stream]
    assert order[:20] != order[20:]
    assert order[:20] != sorted(order[:20])
    assert sum(keys(3), []) == stream[24:]
    # two ranks with two micro-batches each: the same eight images in each step
    ranks = [keys(0, accum=2, rank=rank, world_size=2) for rank in (0, 1)]
    steps = [ranks[0][i : i + 2] + ranks[1][i : i + 2] for i in range(0, 10, 2)]
    assert sum(sum(steps, []), []) == stream


# ---- On a GPU, and as if there were one ----


@pytest.mark.parametrize("words", [*METHODS, "--positions relative --decoder-depth 1"])
def test_nothing_is_left_on_the_cpu(monkeypatch, words):
    """Torch's device "meta" has shapes, but no values; as on a GPU, an operation on
    tensors of two devices fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    cfg, _ = sslvit.parse([*QUICK, *words.split()])
    cfg.device = "meta"
    model = SSL(cfg).to("meta")
    views = sslvit.augment(loaded(cfg), cfg)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    in_parts = sslvit.backward_in_parts(model, [views] * 2, cfg, nullcontext, scaler)
    for tensor in (*views, *in_parts.values(), *model(*views).values()):
        assert tensor is None or tensor.device.type == "meta"
    adamw = torch.optim.AdamW  # of which the fused one has no "meta"
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, fused, **how: adamw(p, **how))
    sslvit.make_optimizer(model, cfg).step()
    model.update_average(0.9)
    model.encoder(views[0 if cfg.lam else 2], record=True)


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


def test_fp16_leaves_out_steps_whose_gradients_overflow(tmp_path, monkeypatch):
    """And halves the scale, 2¹⁶ at first."""
    masked_l1 = sslvit.masked_l1
    monkeypatch.setattr(sslvit, "masked_l1", lambda *args: 1e30 * masked_l1(*args))
    words = "--objective simmim --dtype fp16 --steps 3"
    assert run(words, tmp_path / "too large") == 0
    assert run(f"{words} --lr 0", tmp_path / "at rest") == 0
    state = checkpoint_of(tmp_path / "too large")
    assert_equal_to_the_bit(
        state["model"], checkpoint_of(tmp_path / "at rest")["model"]
    )
    assert state["scaler"]["scale"] == 2**13


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


def test_ctrl_c_twice_or_before_the_first_step_ends_at_once(
    tmp_path, monkeypatch, capfd
):
    def press(*_):
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: (press(), press()))
        assert run("--steps 5", tmp_path) == 130
    assert not (tmp_path / "ckpt.pt").exists()
    capfd.readouterr()
    monkeypatch.setattr(sslvit, "SSL", press)
    assert run("--steps 5 --overwrite", tmp_path) == 130
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
    sslvit.save_checkpoint(tmp_path / "ckpt.pt", {"step": 1})
    save = torch.save

    def look_on(state, file):
        # while the new one is written, the old one can be read
        assert checkpoint_of(tmp_path) == {"step": 1}
        save(state, file)

    monkeypatch.setattr(torch, "save", look_on)
    sslvit.save_checkpoint(tmp_path / "ckpt.pt", {"step": 2})
    assert checkpoint_of(tmp_path) == {"step": 2}


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


def test_a_damaged_or_foreign_checkpoint_is_not_resumed(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt.pt"
    assert run("--steps 1", tmp_path) == 0
    good = path.read_bytes()
    ours = checkpoint_of(tmp_path)
    # one bit of a weight
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    flipped = bytearray(good)
    flipped[largest.header_offset + 100 + largest.file_size // 2] ^= 1
    contents = [bytes(flipped), good[: len(good) // 2], b"", b"no zip"]
    states = [{}, [1, 2], "text", {"config": 1}, Attack()]
    states.append(ours | {"config": {"width": 24}})  # of another version
    states.append(ours | {"config": ours["config"] | {"steps": "many"}})
    states.append({key: ours[key] for key in ("config", "model")})
    for state in states:
        torch.save(state, path)
        contents.append(path.read_bytes())
    capfd.readouterr()
    for content in contents:
        path.write_bytes(content)
        assert run("--resume", tmp_path) == 2
        error_line(capfd)
    assert not os.path.exists("attacked")


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


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
    assert re.search(r"\nknn_shape 0\.\d{3}, untrained 0\.\d{3}\n", out)
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
    path = tmp_path / "masked.png"
    # MoCo predicts no pixels
    assert path.exists() == (objective == "hybrid")
    if path.exists():
        # three rows of eight test images, 16 px enlarged ten times; on top as they are
        picture = np.asarray(Image.open(path))[5::10, 5::10].astype(int)
        assert picture.shape == (3 * 16, 8 * 16, 3)
        first = Stimuli(5000, 16, 0, "test")[0][0]
        assert abs(picture[:16, :16] - first).max() <= 1


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
    --no-such-flag ; --lam 1.5 ; --lam -0.1 ; --lam nan ; --lam 0.5 --objective moco
    --one-view --objective simmim ; --one-view --lam 1 ; --image-size 30
    --image-size 0 ; --mask-patch-size 6 ; --batch-size 0 ; --batch-size 1
    --batch-size 6 --accum 4 ; --batch-size 32 --data PHOTOS ; --steps -3
    --steps 1.5 ; --lr nan ; --lr -1 ; --epochs inf ; --objective byol
    --model gigantic ; --preset mega ; --data /no/such/folder ; --data FILE
    --data EMPTY ; --data TEXT ; --data BROKEN ; --data BROKEN --workers 1
    --data ONLY ; --resume ; --device cuda:99 ; --dtype int8 ; --out FILE/run
    --log-every 0 ; --mask-ratio 0 ; --seed -1 ; --keep -1
""".strip().replace("\n", ";")


@pytest.mark.parametrize("bad", [words.strip() for words in BAD_INPUT.split(";")])
def test_bad_input_is_one_clear_line_and_status_2(tmp_path, bad, capfd):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, files in (("text", ["a.txt"]), ("broken", ["1.png", "2.png"])):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("x")
    fill(tmp_path / "photos", 25)
    fill(tmp_path / "only" / "val" / "cat", 2)
    words = re.sub("[A-Z]{4,}", lambda name: f"{tmp_path}/{name[0].lower()}", bad)
    words = ["--steps", "1", "--out", str(tmp_path / "run"), *words.split()]
    assert sslvit.main([*QUICK, *words]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    # broken files are also named one by one
    lines = [line for line in lines if "replaced by the next" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("sslvit.py: ")
    assert len(lines[0]) > 25


def test_one_process_of_no_torchrun_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("--steps 1", tmp_path) == 2
    assert "variable RANK" in error_line(capfd)


def test_full_memory_is_one_line(tmp_path, monkeypatch, capfd):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate ...")

    monkeypatch.setattr(SSL, "forward", full)
    assert run("--steps 1", tmp_path) == 2
    assert "--accum" in error_line(capfd)


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
        ("--lam 0.4 --seed 3", "lam=.4 seed=3 out=runs/micro-hybrid-lam0.4-seed3"),
        # equal work: 64 · 1500 · 11 encoder passes, 128 · 1032 · 8, 64 · 5500 · 3
        ("", "lam=.2 batch_size=64 steps=1500 out=runs/micro-hybrid"),
        ("--objective moco", "lam=1 batch_size=128 steps=1032"),
        ("--objective simmim", "lam=0 batch_size=64 steps=5500"),
        # the papers' recipes; SimMIM's rate is 1e-4 for a batch of 512
        (
            "--data x --objective moco",
            "preset=imagenet model=base image_size=224 patch_size=16 epochs=300 clip=0 "
            "batch_size=4096 lr=1.5e-4 weight_decay=.1 temperature=.2 momentum=.99 "
            "proj_hidden=4096 crop_min=.08 hue_shift=.1 blur=2 positions=sincos",
        ),
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
        assert getattr(cfg, name) == type(getattr(cfg, name))(value), setting


@pytest.mark.parametrize(
    "batch,ranks,parts", [(64, 1, 1), (129, 1, 3), (256, 1, 2), (4096, 8, 4)]
)
def test_micro_batches_have_at_most_128_images_and_divide(batch, ranks, parts):
    cfg = config(batch_size=batch, accum=0)
    sslvit.settle(cfg, ranks)
    assert cfg.accum == parts


# ---- 8. Workshop: stimuli ----


def test_stimuli_are_a_function_of_seed_split_and_index():
    sets = [Stimuli(50), Stimuli(50, seed=1), Stimuli(50, split="test")]
    pictures = {source[i][0].tobytes() for source in sets for i in range(50)}
    assert len(pictures) == 150
    image, shape, texture, mask = sets[0][7]
    assert np.array_equal(image, Stimuli(50)[7][0])
    assert image.shape == (*mask.shape, 3) == (32, 32, 3)
    # the outline does not tell the texture
    again, outline = sets[0].render(7, shape, (texture + 1) % 8)
    assert np.array_equal(outline, mask)
    assert not np.array_equal(again, image)


def test_shape_and_texture_are_independent():
    source = Stimuli(4000, 8)
    pairs = np.array([source[i][1:3] for i in range(4000)])
    table = np.histogram2d(*pairs.T, bins=8)[0]
    expected = table.sum(1)[:, None] * table.sum(0) / 4000
    # chi² with 49 degrees of freedom, p = 0.001
    assert ((table - expected) ** 2 / expected).sum() < 85


# ---- 8. Workshop: image files ----


def test_a_crop_is_the_same_as_pillows(tmp_path):
    """Also of a large JPEG, which is decoded at 1/8: 480 px become 32."""
    y, x = np.mgrid[:800, :1200]
    waves = [np.sin(x / 50), np.sin(y / 70), np.sin((x + y) / 90)]
    photo = Image.fromarray((127 + 100 * np.stack(waves, -1)).astype(np.uint8))
    photo.save(tmp_path / "large.jpg", quality=95)
    file = Image.open(tmp_path / "large.jpg")
    box = (160, 80, 800, 560)
    pillows = np.asarray(photo.crop(box).resize((32, 32), Image.Resampling.BILINEAR))
    for image in (photo, file):
        ours = sslvit.cut(image, [box], 32)[0].transpose(1, 2, 0)
        assert abs(ours.astype(float) - pillows).max() < 4
    assert file.size == (150, 100)
    # rounded to whole pixels, of which one is kept
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    boxes = [(2.4, 0.4, 6.4, 4.4), (7.6, 5.6, 7.9, 5.9)]
    whole, corner = sslvit.cut(Image.fromarray(pixels), boxes, 4)[:, 0]
    assert (whole == pixels[0:4, 2:6]).all()
    assert (corner == pixels[5, 7]).all()


RAMP = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
# shown between two grey thirds
SHOWN = Image.fromarray(np.pad(RAMP, ((0, 0), (16, 16)), constant_values=99))


def write_kind(kind, path):
    """Writes SHOWN as a file of some kind -> its path."""
    values = np.asarray(SHOWN)
    if kind in ("P", "LA", "RGBA", "CMYK", "1"):
        path = path.with_suffix(".tiff" if kind == "CMYK" else ".png")
        SHOWN.convert(kind).save(path)
    elif kind == "transparent":
        # black, to lie on white: a ramp again
        black = Image.new("L", SHOWN.size, 0)
        black.putalpha(Image.fromarray(255 - values))
        black.save(path := path.with_suffix(".png"))
    elif "bits" in kind:
        many = {
            "16 bits": values.astype(np.uint16) * 257,
            "12 of 16 bits": values.astype(np.uint16) * 16,
            "32 bits, 0 to 255": values.astype(np.int32),
            "32 bits, CT": values.astype(np.int32) * 12 - 1024,
            "float bits": values.astype(np.float32) / 255,
        }
        Image.fromarray(many[kind]).save(path := path.with_suffix(".tiff"))
    elif "turned" in kind:
        exif = Image.Exif()
        exif[0x0112] = 6
        stored = SHOWN.transpose(Image.Transpose.ROTATE_90)
        path = path.with_suffix(kind.split()[1])
        # (uncompressed ones Pillow 13 itself reads wrongly)
        stored.save(path, exif=exif, compression="tiff_lzw")
    else:  # a JPEG that is to be turned; its resolution is a text, where Pillow raises
        path = path.with_suffix(".jpg")
        SHOWN.transpose(Image.Transpose.ROTATE_90).save(path, quality=95)
        jpeg = path.read_bytes()
        entries = struct.pack("<HHHIIHHII", 2, 0x112, 3, 1, 6, 0x11A, 2, 1, 0)
        block = b"Exif\0\0II*\0\x08\0\0\0" + entries + bytes(4)
        segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
        path.write_bytes(jpeg[:2] + segment + jpeg[2:])
    return path


KINDS = "P LA RGBA CMYK transparent".split()
KINDS += ["16 bits", "12 of 16 bits", "32 bits, 0 to 255", "32 bits, CT", "float bits"]
KINDS += ["turned .jpg", "turned .tiff", "turned .png", "broken EXIF"]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_what_its_file_shows(tmp_path, kind):
    """With contrast, transparent on white, upright, and cropped where it shows."""
    path = write_kind(kind, tmp_path / "x")
    out = sslvit.center_crop(Image.open(path), 16).astype(int)
    tolerance = 12 if kind in ("turned .jpg", "broken EXIF") else 2
    assert abs(out - RAMP).max() <= tolerance


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
    train, test = sslvit.find_data(config(data=f"{tmp_path}/classes"))
    assert [labels for _, labels in test] == [[0], [0], [1], [1]]
    assert len({path for path, _ in [*train, *test]}) == 36 + 4
    fill(tmp_path / "flat", 20)
    train, test = sslvit.find_data(config(data=f"{tmp_path}/flat"))
    assert (len(train), len(test), train.label_names) == (18, 2, ())
    # too few to be divided
    fill(tmp_path / "few", 19)
    train, test = sslvit.find_data(config(data=f"{tmp_path}/few"))
    assert (len(train), test) == (19, None)


def test_masks_hidden_folders_and_other_files_are_left_out(tmp_path, capfd):
    for folder in ("images", "masks", ".thumbnails"):
        fill(tmp_path / folder, 4)
    for name in ("a.heic", "b.HEIC", "notes.txt"):
        (tmp_path / "images" / name).write_text("x")
    images = sslvit.ImageFolder(tmp_path)
    assert len(images) == 4
    assert images.classes == ()
    out = capfd.readouterr().out
    hidden = "8 x file in hidden folders or among masks"
    for reason in ("2 x file .heic", "1 x file .txt", hidden):
        assert reason in out


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch, capfd):
    fill(tmp_path / "cat", 20)
    fill(tmp_path / "dog", 20)
    scandir = os.scandir

    def may_not(path):
        # without a right to read it, which a test as root always has
        return scandir("/no/such/dog" if path.endswith("dog") else path)

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
    assert run(f"--resume --data {tmp_path}/moved", tmp_path / "run") == 0


def test_a_slash_behind_the_folders_name_means_nothing(tmp_path):
    fill(tmp_path / "photos", 3)
    names = (f"{tmp_path}/photos", f"{tmp_path}/photos/")
    one, other = [sslvit.find_data(config(data=name))[0] for name in names]
    assert one.identity() == other.identity()


def test_unreadable_files_are_named_once_and_replaced(tmp_path, capfd):
    """Zero bytes, half a JPEG, a bomb, a file that is gone; odd names are no harm."""
    fill(tmp_path, 7)
    (tmp_path / "00.png").rename(tmp_path / "new\nline and blank.png")
    os.rename(tmp_path / "01.png", os.fsencode(tmp_path) + b"/\xff\xfe.png")
    (tmp_path / "empty.png").touch()
    SHOWN.save(tmp_path / "half.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "half.jpg").read_bytes()[:300])
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    assert run(f"--data {tmp_path} --steps 3 --objective simmim", tmp_path / "run") == 0
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
    # the nearest of four says 5, the majority of three 2
    corners = torch.tensor([[1.0, 0.1], [1.0, 0.3], [1.0, -0.2], [-3.0, -0.2]])
    says = torch.tensor([[5], [2], [2], [5]])
    query = torch.tensor([[1.0, 0.11]])
    assert sslvit.knn(corners, says, query, k=1).tolist() == [[5]]
    assert sslvit.knn(corners, says, query, k=3).tolist() == [[2]]
    # more than are compared at once, of two layers: each image is its own neighbour
    many = torch.randn(2, 600, 8)
    names = torch.arange(600)[:, None]
    assert torch.equal(sslvit.knn(many, names, many, k=1), torch.stack([names, names]))


class Plain(list):
    """Plain images of a brightness and a class each: a list of (brightness, class)."""

    label_names = ("class",)
    classes = (["dark", "light"],)

    def load(self, index):
        grey, label = self[index]
        return Image.new("RGB", (16, 16), (grey, grey, grey)), [label]


def test_test_images_look_for_training_images():
    encoder = ViT(16, 4, **TINY).eval()

    def score(train, test):
        cfg = config(knn_images=40)
        return sslvit.knn_scores(encoder, (train, test), cfg, nullcontext)

    # sorted by class, as folders are; 40 of 80 are spread over both
    train = Plain([(0, 0)] * 40 + [(200, 1)] * 40)
    # a network that sees anything gets all right, however the test set is made up
    test = Plain([(0, 0)] * 3 + [(200, 1)] * 2)
    assert score(train, test) == {"knn_class": 1}
    # the labels are the training set's, also where the test set disagrees
    contrary = Plain([(0, 1)] * 4 + [(200, 1)])
    assert score(train, contrary) == {"knn_class": 0.2}
    assert score(train, None) == {}


# ---- 8. Workshop: plan ----


@pytest.mark.parametrize("words", METHODS)
def test_flops_are_those_that_torch_counts(words):
    """Of ViT-Ti/16 at 96 px, whose embedding, heads and decoder are some per cent."""
    words = f"--preset imagenet --model tiny --image-size 96 --proj-hidden 16 {words}"
    cfg, _ = sslvit.parse([*words.split(), "--positions", "sincos"])
    model = SSL(cfg)
    mask = sslvit.random_mask(2, 96, 16, 32, 0.6)
    with FlopCounterMode(display=False) as counter:
        losses = model(*torch.randn(3, 2, 3, 96, 96), mask)
        ((1 - cfg.lam) * losses["mim"] + cfg.lam * losses["cl"]).backward()
    counted = counter.get_total_flops() / 2
    assert sslvit.flops_per_image(cfg) == pytest.approx(counted, rel=0.05)


def test_the_plan_of_vit_base_by_hand(tmp_path, monkeypatch, capfd):
    """300 epochs of 1,281,167 images are 3.84e8. Each costs (3 · 34.9 + 8 · 32.5) GFLOP
    = 364, in all 1.4e20, for which 0.26 · 989e12 a second need 151 h.

    110 million weights are trained, 107 averaged: 16 and 4 bytes. Here five images, of
    2 TFLOP in all, take 1 s.
    """
    now = []

    def forward(self, *views):
        now.append(1)
        return {"cl": self.mask_token.sum(), "mim": 0, "std": torch.ones(())}

    clock = SimpleNamespace(perf_counter=lambda: float(len(now)))
    monkeypatch.setattr(sslvit, "time", clock)
    monkeypatch.setattr(SSL, "forward", forward)
    out = ["--out", str(tmp_path / "none"), "--dry-run", "--device", "cpu"]
    assert sslvit.main(["--data", "/imagenet", *out]) == 0
    first, gpu, here = capfd.readouterr().out.splitlines()
    assert "ViT-base" in first
    assert "3.843e+08 images of 364.3 GFLOP, 2 GiB" in first
    assert gpu.endswith(": 151 h")
    assert "5 images/s, 2.14e+04 h" in here
    assert sslvit.main([*QUICK, "--steps", "9", *out]) == 0
    assert "72 images" in capfd.readouterr().out
    assert not (tmp_path / "none").exists()


# ---- tests/pin.py ----


def test_pins_are_compared_to_the_bit():
    import pin

    old = {"torch": "2", "a": {"log": [{"step": 1, "loss": 0.5}], "encoder": "x"}}
    assert pin.compare(old, old)
    for log, encoder in (([{"step": 1, "loss": 0.51}], "x"), (old["a"]["log"], "y")):
        assert not pin.compare(old, {"a": {"log": log, "encoder": encoder}})
