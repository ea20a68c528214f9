"""sslvit.py, in its order, against paper and pencil or an independent library."""

import json
import math
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import zipfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import sslvit  # before torch
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

from sslvit import SSL, Config, Stimuli, TrainingViews, ViT

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 3}
QUICK = (
    "--preset micro --batch-size 8 --image-size 16 --knn-images 16 --proj-hidden 16 "
    "--log-every 1 --device cpu --dtype fp32"
).split()
METHODS = ["--objective moco", "--objective simmim", "--lam .3"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(sslvit.SIZES, "micro", TINY)
    torch.manual_seed(0)
    # as in a terminal: a shell ignores Ctrl-C for what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def config(**changes):
    tiny = {"image_size": 16, "proj_hidden": 16, "batch_size": 8}
    here = {"accum": 1, "device": "cpu", "dtype": "fp32", "workers": 0}
    return Config(**(tiny | here | changes))


def run(words, out):
    """`python sslvit.py --out OUT WORDS` in this process -> exit status."""
    return sslvit.main([*QUICK, "--out", str(out), *words.split()])


def refusal(words, out, capfd, status=2):
    """The one line that a run says which ends with this status."""
    capfd.readouterr()
    assert run(words, out) == status
    lines = capfd.readouterr().err.strip().splitlines()
    # broken files are also told one by one
    [line] = [line for line in lines if "next one used" not in line]
    assert line.startswith("sslvit.py: ")
    return line


def checkpoint_of(folder):
    return sslvit.load_checkpoint(folder / "ckpt.pt")


def log_of(folder):
    return [json.loads(row) for row in (folder / "log.jsonl").read_text().splitlines()]


def column(values):
    return torch.tensor(values).view(-1, 1, 1, 1)  # a parameter for each image


def test_feature_std_by_hand():
    # unit vectors e1 and e2: each channel has values 1, 0, whose deviation is √½
    assert sslvit.feature_std(torch.tensor([[5.0, 0], [0, 2]])) == pytest.approx(1)
    assert sslvit.feature_std(torch.ones(9, 4)).item() == 0


# 30 of 49 units of 4 patches; 39 of 64; 7 of 25 of 4: 0.28 × 25 is 7.000000000000001
@pytest.mark.parametrize(
    "size,patch,unit,ratio,masked",
    [(224, 16, 32, 0.6, 120), (32, 4, 4, 0.6, 39), (40, 4, 8, 0.28, 28)],
)
def test_masks_are_whole_units_at_random(size, patch, unit, ratio, masked):
    mask = sslvit.random_mask(200, size, patch, unit, ratio)
    assert mask.shape == (200, (size // patch) ** 2)
    assert (mask.sum(dim=1) == masked).all()
    side = size // unit
    units = mask.reshape(200, side, unit // patch, side, unit // patch)
    assert torch.equal(units.any(4).any(2), units.all(4).all(2))
    # every unit alike, within four standard deviations
    assert (mask.float().mean(dim=0) - masked / mask.shape[1]).abs().max() < 0.14
    with pytest.raises(ValueError):
        sslvit.random_mask(1, size, patch, unit + 1, ratio)


def test_tokens_records_and_shapes():
    vit = ViT(16, 4, **TINY).eval()
    x = torch.randn(2, 3, 16, 16)
    tokens, records = vit(x, record=True)
    # the fused and the explicit attention are one function
    assert_close(tokens, vit(x))
    assert_close(vit(x, cls_only=True), tokens[:, :1])
    assert [len(records), *tokens.shape] == [2, 2, 17, 24]
    shapes = [list(part.shape) for part in records[1]]
    assert shapes == [[2, 3, 17, 17], [2, 3, 17, 8], [2, 17, 24], [2, 17, 24]]
    assert_close(records[1].attn.sum(-1), torch.ones(2, 3, 17))
    assert_close(vit.norm(records[1].out), tokens)
    # another, oblong size: positions are interpolated
    assert vit(torch.randn(1, 3, 24, 8)).shape == (1, 13, 24)
    with torch.autocast("cpu", torch.bfloat16):  # which takes the explicit attention
        assert_close(vit(x).float(), tokens, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    "positions,scale", [("learn", None), ("learn", 0.1), ("none", 0.5)]
)
def test_timm_parity(positions, scale):
    timm = pytest.importorskip("timm").models.vision_transformer
    size = {"img_size": 32, "patch_size": 8, "num_classes": 5} | TINY
    size |= {"pos_embed": positions, "init_values": scale}
    theirs = timm.VisionTransformer(**size).eval()
    how = {"positions": positions.replace("learn", "learned"), "layer_scale": scale}
    ours = ViT(32, 8, num_classes=5, **how, **TINY).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    assert_close(ours(x), theirs.forward_features(x), atol=1e-5, rtol=1e-4)


def test_positions_by_hand():
    positions = sslvit.sincos_positions(8, 2, 3)[0]
    assert positions.shape == (7, 8)
    assert positions[0].abs().max() == 0  # CLS
    # the last of 2 × 3 patches, x = 2 and y = 1; frequencies 1 and 1/100
    hand = [f(n * w) for n in (2, 1) for f in (math.sin, math.cos) for w in (1, 0.01)]
    assert_close(positions[6], torch.tensor(hand))
    # biases of 2 × 2 patches: offsets -1, 0, 1 in y and x
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
    # bicubic: steps overshoot
    assert sslvit.resize_grid(torch.eye(16)[:, 5:6], 8, 8).min() < 0
    x = torch.randn(1, 3, 8, 8)
    assert_close(vit(x), vit(x, record=True)[0])
    assert_close(vit(x, cls_only=True), vit(x)[:, :1])


def test_a_masked_patch_becomes_the_mask_token_at_its_place():
    # without blocks a token is what is embedded, after the norm
    vit = ViT(16, 4, 24, 0, 3)
    x, token = torch.randn(1, 3, 16, 16), torch.randn(1, 1, 24)
    mask = torch.arange(16)[None] == 6  # the patch in row 1, column 2
    out = vit(x, mask, mask_token=token)[0]
    place = sslvit.sincos_positions(24, 4, 4)[0, 7]
    assert_close(out[7], F.layer_norm(token[0, 0] + place, [24]))
    # its own pixels do not count, all others do
    x[..., 4:8, 8:12] = x[..., 8:12, 4:8] = 9
    is_other = (vit(x, mask, mask_token=token)[0] != out).any(dim=1)
    assert is_other.nonzero().flatten().tolist() == [1 + 9]


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
        tokens = model.encoder(x_mim, mask, mask_token=model.mask_token)
        pixels = model.decoder(tokens)[:, 1:]
        image = F.fold(pixels.mT, (16, 16), 4, stride=4)
        hidden = mask.reshape(8, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)
        mim = (image - x_mim).abs()[hidden[:, None].expand(-1, 3, -1, -1)].mean()
    if cfg.lam > 0:
        features = query(model.encoder(x1))
        cl = ctr(features, key(x2)) + ctr(query(model.encoder(x2)), key(x1))
    losses = model(x1, x2, x_mim, mask)
    assert_close(losses["mim"], mim, check_dtype=False)
    assert_close(losses["cl"], cl, check_dtype=False)
    assert ("std" in losses) == (cfg.lam > 0)
    assert cfg.lam == 0 or losses["std"] == sslvit.feature_std(features)
    ours = gradients_of(model, losses["mim"] + losses["cl"])
    theirs = gradients_of(model, mim + cl)
    assert ours.keys() == theirs.keys()
    # MoCo's patch embedding is frozen at its random start
    assert ("encoder.patch_embed.proj.weight" in ours) == (cfg.lam < 1)
    for name in ours:
        assert_close(ours[name], theirs[name], atol=1e-9, rtol=1e-7)


def test_layers_and_how_they_start():
    model = SSL(config(decoder_depth=2, positions="relative"))
    kinds = [type(layer).__name__ for layer in model.decoder]
    assert kinds == ["Block", "Block", "LayerNorm", "Linear"]
    assert model.encoder.pos_embed is None is not model.encoder.rel_pos_bias
    assert model.encoder.blocks[0].ls1.gamma[0].item() == pytest.approx(0.1)
    for head, hidden in ((model.projector, 2), (model.predictor, 1)):
        layers = ["Linear", "BatchNorm1d", "ReLU"]
        assert [type(layer).__name__ for layer in head] == layers * hidden + layers[:2]
        assert [layer.bias for layer in head[::3]] == [None] * (hidden + 1)
        # no learned scale at the end
        assert [layer.affine for layer in head[1::3]] == [True] * hidden + [False]
    # Xavier for Q, K and V, 96 × 96 each; for all in one it would be 0.125
    bound = math.sqrt(6 / (96 + 96))
    for part in sslvit.Block(96, 3).attn.qkv.weight.chunk(3):
        assert 0.98 * bound < part.abs().max() <= bound


class Pictures(list):
    """A data set of arrays: a list of (pixels, class)."""

    label_names = ("class",)
    classes = (["dark", "light"],)

    def load(self, index):
        pixels, label = self[index]
        return Image.fromarray(pixels), [label]


def test_every_view_is_cropped_and_flipped_on_its_own():
    """Red tells the column, green the row: a crop shows where it was cut. Contrastive
    crops have at least 0.2 of the area, the masked one 0.67."""
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    image = np.stack([ramp, ramp.T, 0 * ramp], axis=-1)
    views = TrainingViews(Pictures([(image, 0)]), config(crop_min=0.2))
    crops = np.stack([views[epoch, 0]["crops"] for epoch in range(300)]).astype(int)
    reds, greens = crops[:, :, 0, 8], crops[:, :, 1, :, 8]  # (300, 3, 16)
    assert (greens[..., 0] < greens[..., -1]).all()
    is_flipped = reds[..., 0] > reds[..., -1]
    assert is_flipped.mean(axis=0) == pytest.approx([0.5, 0.5, 0.5], abs=0.12)
    assert len({tuple(flips) for flips in is_flipped.tolist()}) == 8
    # between the middles of the outer pixels lie 15/16 of a side
    shares = np.ptp(reds, axis=2) * np.ptp(greens, axis=2) * (16 / 15 / 255) ** 2
    assert shares.min(axis=0) == pytest.approx([0.2, 0.2, 0.67], abs=0.03)
    assert shares.max(axis=0) == pytest.approx([1, 1, 1], abs=0.06)
    # no view copies another's crop
    corners = reds[..., 8] + greens[..., 8]
    assert (corners[:, 0] != corners[:, 1]).mean() > 0.9


def test_crop_boxes_are_uniform_in_area_log_aspect_and_place():
    rng = np.random.default_rng(0)
    boxes = np.array([sslvit.crop_box(60, 60, 0.2, rng) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    assert 0 <= boxes.min() < boxes.max() <= 60
    share = width * height / 3600
    # whatever its aspect, a box of less than 3/4 of the area fits
    for values, lowest, highest in (
        (share, 0.2, 0.75),
        (np.log(width / height), -math.log(4 / 3), math.log(4 / 3)),
        (left / (60 - width), 0, 1),
        (top / (60 - height), 0, 1),
    ):
        spread = (values[share < 0.75] - lowest) / (highest - lowest)
        spread = np.quantile(spread, [0.25, 0.5, 0.75])
        assert spread == pytest.approx([0.25, 0.5, 0.75], abs=0.04)
    # no crop of this share has an allowed aspect: a square instead
    left, top, right, bottom = sslvit.crop_box(400, 4, 1.0, rng)
    assert right - left == bottom - top == 4


def loaded(cfg):
    """What a loader gives: one batch of stimuli."""
    views = TrainingViews(Stimuli(8, cfg.image_size), cfg)
    return default_collate([views[0, i] for i in range(8)])


def test_samples_depend_on_seed_epoch_and_index_alone():
    def sample(epoch, index, seed=0):
        sample = TrainingViews(Stimuli(20, 16), config(seed=seed))[epoch, index]
        return [sample[name] for name in ("crops", "mask", "colours")]

    keys = ((0, 5), (0, 5), (1, 5), (0, 6), (0, 5, 1))
    for value, same, *others in zip(*[sample(*key) for key in keys], strict=True):
        assert np.array_equal(value, same)
        assert not any(np.array_equal(value, other) for other in others)


@pytest.mark.parametrize("method,given", enumerate(("12", "m", "12m")))
def test_each_method_is_given_what_it_looks_at(method, given):
    cfg, _ = sslvit.parse([*QUICK, *METHODS[method].split()])
    batch = loaded(cfg)
    assert batch["crops"].shape == (8, len(given), 3, 16, 16)
    *views, mask = sslvit.augment(batch, cfg)
    assert [view is not None for view in views] == [name in given for name in "12m"]
    assert torch.equal(mask, batch["mask"])
    # in ImageNet's units of red, green, blue; the masked view keeps its colours
    means = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviations = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    if "m" in given:
        assert_close(views[2] * deviations + means, batch["crops"][:, -1] / 255)
    if "1" in given:  # nothing is drawn here, and crops are not changed
        assert torch.equal(sslvit.augment(batch, cfg)[0], views[0])


def test_colours_are_drawn_as_often_as_byol_says():
    cfg = config(hue_shift=0.1, blur=2.0)
    rng = np.random.default_rng(0)
    draws = np.stack([sslvit.draw_colours(rng, cfg) for _ in range(2000)])
    order, others, factors, sigma, _ = np.split(draws, [4, 7, 11, 12], axis=2)
    # of view 1, of view 2; blur is operation 4, grey 5, solarise 6
    shares = (np.concatenate([order[:, :, :1], others], axis=2) >= 0).mean(axis=0).T
    most = {tuple(row) for row in others.max(axis=0).tolist()}
    assert most <= {(5, 4, 6), (5, 4, -1)}
    hand = np.array([[0.8, 0.8], [0.2, 0.2], [1.0, 0.1], [0.0, 0.2]])
    assert shares == pytest.approx(hand, abs=0.04)
    # each view has its own order, all 24 and none
    for view in (0, 1):
        assert len({tuple(row) for row in order[:, view].tolist()}) == 25
    assert (order[:, 0] == order[:, 1]).all(axis=1).mean() < 0.2
    # uniform: quartiles
    quarters = np.linspace(0, 1, 5)
    spread = np.quantile(sigma[:, 0], quarters)
    assert spread == pytest.approx(0.1 + 1.9 * quarters, abs=0.1)
    for n, reach in enumerate([0.4, 0.4, 0.2, 0.1]):
        spread = np.quantile(factors[..., n], quarters) - (n < 3)
        assert spread == pytest.approx(reach * (2 * quarters - 1), abs=0.03)


def test_each_image_gets_the_colours_that_were_drawn_for_it():
    x = torch.rand(6, 3, 9, 7)
    factors = [1.4, 0.6, 1.2, 0.3]
    # order of operations, of which nothing happens; their parameters
    draws = torch.tensor([[-1.0] * 7 + factors + [1.5, 0, 0.5]] * 6)
    draws[[0, 2, 3], 4] = torch.tensor([6.0, 5, 4])
    expected = x.clone()
    expected[0] = torch.where(x[0] >= 0.5, 1 - x[0], x[0])
    expected[2] = sslvit.greyscale(x)[2]
    expected[3:4] = sslvit.gaussian_blur(x[3:4], column([1.5]))
    names = ("brightness", "contrast", "saturation", "hue")
    for i, order in ((4, [0, 1, 2, 3]), (5, [3, 2, 1, 0])):
        draws[i, :4] = torch.tensor(order)
        for n in order:
            adjust = getattr(sslvit, f"adjust_{names[n]}")
            expected[i : i + 1] = adjust(expected[i : i + 1], torch.tensor(factors[n]))
    sslvit.change_colours(x, draws)
    assert_close(x, expected)


def test_blur_by_hand():
    # a point becomes exp(-½ (x/σ)²): at 3 px = 2σ e⁻² of the middle; it ends at 4σ
    dot = torch.zeros(2, 3, 21, 21)
    dot[..., 10, 10] = 1
    blurred = sslvit.gaussian_blur(dot, column([1.5, 2.0]))[0, 0]
    for point in (blurred[10, 13], blurred[13, 10]):
        assert point / blurred[10, 10] == pytest.approx(math.exp(-2), rel=1e-4)
    # --blur 0 draws a σ that changes nothing
    sigma = sslvit.draw_colours(np.random.default_rng(0), config(blur=0.0))[:, 11]
    assert_close(sslvit.gaussian_blur(dot, column(sigma.tolist())), dot)
    assert blurred[10, 17] > 0 == blurred[10, 18]


def test_colour_operations_match_torchvision():
    tv = pytest.importorskip("torchvision.transforms.v2.functional")
    x = torch.rand(4, 3, 40, 30)
    blur = lambda image, sigma: tv.gaussian_blur(image, [29, 29], [sigma, sigma])  # noqa
    factors = [0.6, 0.9, 1.3, 1.4]
    for ours, theirs, values in (
        (sslvit.adjust_brightness, tv.adjust_brightness, factors),
        (sslvit.adjust_contrast, tv.adjust_contrast, factors),
        (sslvit.adjust_saturation, tv.adjust_saturation, factors),
        (sslvit.adjust_hue, tv.adjust_hue, [-0.5, -0.1, 0.07, 0.4]),
        (sslvit.gaussian_blur, blur, [0.1, 0.5, 1.2, 2.0]),
    ):
        expected = torch.stack([theirs(x[i], values[i]) for i in range(4)])
        assert_close(ours(x, column(values)), expected, atol=1e-3, rtol=0)
    assert_close(sslvit.greyscale(x), tv.rgb_to_grayscale(x), atol=1e-3, rtol=0)
    assert_close(sslvit.solarise(x, 0.5), tv.solarize(x, 0.5))


def views_in_float64(batch, cfg, augment=sslvit.augment):
    """float32's blur rounds by how many images it gets, on some processors."""
    names = ["crops", "colours"] if cfg.lam > 0 else ["crops"]
    return augment(batch | {name: batch[name].double() for name in names}, cfg)


def float64(monkeypatch):
    """Parts of sslvit.py in float64, so that what differs is no rounding."""
    monkeypatch.setattr(sslvit, "SSL", lambda cfg: SSL(cfg).double())
    monkeypatch.setattr(sslvit, "augment", views_in_float64)
    monkeypatch.setattr(sslvit, "finish", lambda *_: None)


in_float64 = pytest.fixture(name="in_float64")(float64)


@pytest.mark.parametrize("words", METHODS)
def test_four_steps_of_a_run_by_hand(tmp_path, monkeypatch, in_float64, words):
    """Schedules, clipping, AdamW with decay, the average after the step, the log. Peak
    rate 0.32·8/256 = 0.01; two of four steps warm up, then half a cosine. The average's
    momentum rises from 0.6 to 1, likewise."""
    rates = [0.005, 0.01, 0.005, 0.0]
    root = math.sqrt(0.5)
    momenta = [1 - 0.2 * (1 + root), 0.8, 1 - 0.2 * (1 - root), 1.0]
    batches = []

    def remember(batch, cfg):
        batches.append(views_in_float64(batch, cfg))
        return batches[-1]

    monkeypatch.setattr(sslvit, "augment", remember)
    words += " --epochs 0.0016 --warmup 0.5 --lr 0.32 --momentum 0.6 --clip 0.2"
    words += " --weight-decay 0.5 --knn-images 0 --seed 3"
    assert run(words, tmp_path) == 0
    cfg, _ = sslvit.parse([*QUICK, *words.split()])
    torch.manual_seed(3)
    model = sslvit.SSL(cfg)
    weights = dict(model.named_parameters())
    trained = {name: p for name, p in weights.items() if p.requires_grad}
    first, second = dict.fromkeys(trained, 0.0), dict.fromkeys(trained, 0.0)
    rows = log_of(tmp_path)[1:]
    steps = zip(rows, rates, momenta, batches, strict=True)
    for n, (row, lr, m, batch) in enumerate(steps, 1):
        losses = model(*batch)
        loss = (1 - cfg.lam) * losses["mim"] + cfg.lam * losses["cl"]
        gradients = gradients_of(model, loss)
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        assert norm > 0.2
        for name, p in trained.items():
            g = gradients[name] * 0.2 / norm
            if cfg.lam == 1 or (p.ndim > 1 and "token" not in name):
                p.data *= 1 - lr * 0.5
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            deviation = (second[name] / (1 - 0.999**n)).sqrt()
            p.data -= lr * first[name] / (1 - 0.9**n) / (deviation + 1e-8)
        for name, key in weights.items():
            if name.startswith("momentum_"):
                query = weights[name.removeprefix("momentum_")]
                key.data = m * key.data + (1 - m) * query.data
        hand = losses | {"lr": lr, "momentum": m, "norm": norm, "loss": loss}
        for name, value in hand.items():
            value = float(torch.as_tensor(value).detach())
            assert row[name] == pytest.approx(value, abs=1e-5), name
    for name, saved in checkpoint_of(tmp_path)["model"].items():
        assert_close(saved, weights[name].data, atol=1e-6, rtol=1e-6)


def assert_same_run(one, other):
    """Log and weights are equal but for the last digits of float64."""
    for a, b in zip(log_of(one), log_of(other), strict=True):
        for name in ("step", "lr", "momentum", "cl", "mim", "std", "loss", "norm"):
            assert a.get(name) == pytest.approx(b.get(name), abs=2e-5), name
    ours, theirs = checkpoint_of(one)["model"], checkpoint_of(other)["model"]
    assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


SAME = "--steps 3 --batch-size 16 --knn-images 0 --seed 2"


@pytest.mark.parametrize("words", METHODS)
def test_a_run_in_micro_batches_is_the_same_run(tmp_path, in_float64, words):
    assert run(f"{words} {SAME} --accum 1", tmp_path / "whole") == 0
    for parts in ("2", "4 --keep 0", "4 --keep 2", "16"):
        assert run(f"{words} {SAME} --accum {parts}", tmp_path / parts) == 0
        assert_same_run(tmp_path / "whole", tmp_path / parts)


def as_rank(rank, folder, jobs):
    """Runs `jobs` as one of two processes; leaves their statuses and what is said."""
    torch.set_num_threads(1)
    sslvit.SIZES["micro"] = TINY
    sslvit.RANK, sslvit.WORLD_SIZE = int(rank), 2
    patch = pytest.MonkeyPatch()
    float64(patch)
    os.environ |= {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    sys.stdout = sys.stderr = open(f"{folder}/said{rank}", "w", buffering=1)  # noqa
    for port, words in jobs:
        os.environ["MASTER_PORT"] = port
        if "stopped" in words:
            patch.setattr(os, "fsync", lambda _: time.sleep(2))  # a slow disk
        if "stopped" in words and rank == "1":
            at_step(patch, 7, lambda: signal.raise_signal(signal.SIGTERM))
        words = words.replace("MY_DATA", f"{folder}/{rank}").split()
        status, saved = sslvit.main([*QUICK, *words]), Path(words[-1]).glob("ckpt.pt")
        print("status", status, *saved, file=sys.stderr)


def test_two_ranks_are_one_process(tmp_path, in_float64):
    """Same log, same weights; a signal to one stops both; one set of images for all."""
    runs = {f"method{n}": f"{words} {SAME}" for n, words in enumerate(METHODS)}
    runs["stopped"] = f"{SAME} --steps 20 --objective simmim"
    runs["differ"] = "--data MY_DATA --steps 1"
    fill(tmp_path / "0", 20)
    fill(tmp_path / "1", 21)
    jobs = []
    for name, words in runs.items():
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        jobs.append((port, f"{words} --accum 2 --out {tmp_path}/{name}"))
    start = multiprocessing.get_context("spawn").Process
    ranks = [start(target=as_rank, args=(rank, str(tmp_path), jobs)) for rank in "01"]
    [process.start() for process in ranks]
    [process.join(100) or process.kill() for process in ranks]
    texts = [(tmp_path / f"said{rank}").read_text() for rank in "01"]
    for text in texts:
        assert re.findall(r"status (\d+)", text) == "0 0 0 143".split(), texts
        assert f"status 143 {tmp_path}/stopped/ckpt.pt" in text  # the first has saved
    assert [process.exitcode for process in ranks] == [2, 2]
    assert "2 x 2 x 4 images" in texts[0]
    assert "steps of" not in texts[1]  # only the first speaks
    assert "sslvit.py: not one training set" in texts[1]
    for n, words in enumerate(METHODS):
        assert run(f"{words} {SAME} --accum 1", tmp_path / f"alone{n}") == 0
        assert_same_run(tmp_path / f"alone{n}", tmp_path / f"method{n}")
    assert checkpoint_of(tmp_path / "stopped")["step"] in (7, 8, 9, 10)
    cfg, _ = sslvit.resume(Config(out=f"{tmp_path}/stopped"), {})  # by one rank
    assert (cfg.accum, cfg.keep) == (0, 1)


def test_the_log_tells_speed_and_time_left(tmp_path, monkeypatch):
    """4 s for 8 images: 2 images/s; 33 of 36 steps: 132 s. Saving is no step, and the
    first step, which compiles, is not counted."""
    now = [0.0]

    def wait(seconds):
        now[0] += seconds

    monkeypatch.setattr(SSL, "update_average", lambda *_: wait(4 if now[0] else 99))
    monkeypatch.setattr(sslvit, "save_run", lambda *_: wait(1000))
    monkeypatch.setattr(sslvit, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    words = "--objective simmim --steps 36 --log-every 12 --save-every 12"
    assert run(f"{words} --knn-images 0", tmp_path) == 0
    rows = log_of(tmp_path)[1:]
    assert [row["step"] for row in rows] == [3, 12, 24, 36]
    assert [row["images/s"] for row in rows] == [2] * 4
    assert [row["minutes left"] for row in rows] == pytest.approx([2.2, 1.6, 0.8, 0])


def test_batches_cover_each_epoch_and_do_not_depend_on_ranks_or_start(monkeypatch):
    # 20 images in batches of 8
    for epochs, steps in ((1.5, 4), (0.01, 1), (0, 1500)):
        assert sslvit.number_of_steps(config(epochs=epochs), 20) == steps

    def keys(start, rank=0, ranks=1):
        monkeypatch.setattr(sslvit, "RANK", rank)
        monkeypatch.setattr(sslvit, "WORLD_SIZE", ranks)
        return [*sslvit.image_keys(config(batch_size=8), 20, range(start, 5))]

    stream = keys(0)
    assert sorted(stream) == [(epoch, index) for epoch in (0, 1) for index in range(20)]
    order = [index for _, index in stream]
    assert order[:20] not in (order[20:], sorted(order[:20]))
    assert keys(3) == stream[24:]
    # two ranks: the same eight images in each step
    one, other = keys(0, 0, 2), keys(0, 1, 2)
    steps = [one[i : i + 4] + other[i : i + 4] for i in range(0, 20, 4)]
    assert sum(steps, []) == stream


@pytest.mark.parametrize("words", [*METHODS, "--positions relative --decoder-depth 1"])
def test_nothing_is_left_on_the_cpu(monkeypatch, words):
    """Device "meta" has no values; as on a GPU, tensors of two devices do not mix."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    cfg, _ = sslvit.parse([*QUICK, *words.split()])
    cfg.device = "meta"
    model = SSL(cfg).to("meta")
    views = sslvit.augment(loaded(cfg), cfg)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    in_parts = sslvit.backward_in_parts(model, [views] * 2, cfg, scaler)
    for tensor in (*views, *in_parts.values(), *model(*views).values()):
        assert tensor is None or tensor.device.type == "meta"
    adamw = torch.optim.AdamW  # of which the fused one has no "meta"
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, fused, **how: adamw(p, **how))
    sslvit.make_optimizer(model, cfg).step()
    model.update_average(0.9)
    model.encoder(views[0 if cfg.lam else 2], record=True)


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:3"])
def test_each_rank_takes_its_gpu_before_it_touches_one(monkeypatch, device):
    taken = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(device))
    monkeypatch.setattr(torch, "zeros", lambda *_, device: taken.append(device))
    sslvit.settle(config(device=device))
    assert taken == ["cuda:3", "cuda:3"]
    assert not torch.backends.cudnn.allow_tf32 | torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "words", ["", "--accum 2", "--dtype fp16", "--compile --accum 4 --keep 2"]
)
@pytest.mark.parametrize("method", [*METHODS, "--lam .3 --positions relative"])
def test_cuda(tmp_path, method, words, monkeypatch):
    torch.compiler.reset()  # after eight versions of a function it compiles no more
    words = f"--steps 4 --workers 2 --device cuda --dtype auto {method} {words}"
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        assert run(words, tmp_path) == 143
    assert run(words.replace("--dtype auto", "--resume"), tmp_path) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", [*METHODS, "--lam .3 --positions relative"])
def test_cuda_takes_a_cpus_first_step(tmp_path, method):
    rows = []
    for device in ("cpu", "cuda"):
        assert run(f"--steps 1 --device {device} {method}", tmp_path / device) == 0
        rows.append([log_of(tmp_path / device)[1][key] for key in ("loss", "norm")])
    assert rows[1] == pytest.approx(rows[0], rel=0.01)


def at_step(monkeypatch, step, action):
    """Does `action` in the middle of training, once `step` steps are taken."""
    average, steps = SSL.update_average, []

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
    ["--objective moco", "--objective simmim --workers 1", "--accum 2", "--dtype fp16"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, monkeypatch, words):
    """To the bit, and the log has each step once, also after a crash."""
    first = f"{words} --seed 3 --steps 5 --save-every 3"
    assert run(first, tmp_path / "whole") == 0
    whole, cut = checkpoint_of(tmp_path / "whole"), tmp_path / "cut"
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
        assert run(first, cut) == 143
    assert checkpoint_of(cut)["step"] == 4
    with open(cut / "log.jsonl", "a") as log:
        log.write('{"step": 5, "loss": 77}\n')
    # what the checkpoint says need not be said again; a complete run stays as it is
    again = f"--resume --device cpu --out {cut}"
    for _ in range(2):
        assert sslvit.main(again.split()) == 0
        resumed = checkpoint_of(cut)
        for part in ("model", "optimizer", "scaler", "step", "data"):
            assert_equal_to_the_bit(whole[part], resumed[part])
        assert resumed["config"]["seed"] == 3
        assert [row["step"] for row in log_of(cut)] == [0, 1, 2, 3, 4, 5]
        for a, b in zip(log_of(cut)[1:], log_of(tmp_path / "whole")[1:], strict=True):
            for name in ("loss", "norm", "lr"):
                assert a[name] == pytest.approx(b[name], nan_ok=True)


def test_fp16_scales_gradients_and_leaves_out_what_overflows(tmp_path, monkeypatch):
    """In micro-batches, too; then it halves the scale, 2¹⁶ at first."""
    kinds = ("fp32 --accum 1", "fp16 --accum 1", "fp16 --accum 4")
    for kind in kinds:
        words = f"--steps 4 --lr 0 --knn-images 0 --dtype {kind}"
        assert run(words, tmp_path / kind) == 0
    logs = [log_of(tmp_path / kind)[1:] for kind in kinds]
    for exact, *others in zip(*logs, strict=True):
        for row in others:
            assert row["norm"] == pytest.approx(exact["norm"], rel=0.05)
            assert row["loss"] == pytest.approx(exact["loss"], rel=0.01)
    masked_l1 = sslvit.masked_l1
    monkeypatch.setattr(sslvit, "masked_l1", lambda *args: 1e30 * masked_l1(*args))
    words = "--objective simmim --dtype fp16 --steps 3"
    assert run(words, tmp_path / "too large") == 0
    assert run(f"{words} --lr 0", tmp_path / "at rest") == 0
    state, rest = [checkpoint_of(tmp_path / name) for name in ("too large", "at rest")]
    assert_equal_to_the_bit(state["model"], rest["model"])
    assert state["scaler"]["scale"] == 2**13


@pytest.mark.parametrize(
    "name,status", [("INT", 130), ("TERM", 143), ("HUP", 129), ("HUP ignored", 0)]
)
def test_a_signal_saves_and_ends(tmp_path, monkeypatch, capfd, name, status):
    """Unless it is ignored, as nohup makes it."""
    number = getattr(signal, f"SIG{name.split()[0]}")
    handler = signal.SIG_DFL if status else signal.SIG_IGN
    before = signal.signal(number, handler)
    at_step(monkeypatch, 2, lambda: signal.raise_signal(number))
    assert run("--steps 5 --log-every 100", tmp_path) == status
    assert signal.signal(number, before) == handler
    assert checkpoint_of(tmp_path)["step"] == (2 if status else 5)
    out, err = capfd.readouterr()
    assert ("--resume goes on" in out.splitlines()[-1]) == (status > 0)
    assert ("saves at the end of this step" in err) == (status > 0)


def test_ctrl_c_twice_ends_at_once(tmp_path, monkeypatch):
    at_step(monkeypatch, 2, lambda: [signal.raise_signal(2) for _ in range(2)])
    assert run("--steps 5", tmp_path) == 130
    assert not (tmp_path / "ckpt.pt").exists()


def test_the_end_of_a_job_saves_whoever_hears_it_or_reads_no_more(tmp_path):
    """sslvit.py | head -1; then a signal to all processes, as torchrun sends it."""
    words = "--model nano --steps 9999 --accum 8 --workers 1 --knn-images 0"
    code = "import multiprocessing as m, runpy; m.set_start_method('forkserver'); "
    code += f"runpy.run_path({sslvit.__file__!r}, run_name='__main__')"  # as of 3.14
    command = [sys.executable, "-c", code, *QUICK, *words.split(), "--out", tmp_path]
    how = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, text=True, start_new_session=True, **how)
    assert process.stdout.readline().startswith("hybrid")
    process.stdout.close()
    log = tmp_path / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 5:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    err = process.stderr.read()
    assert process.wait(timeout=60) == 143, err
    assert re.fullmatch(".*at the end of this step.*", err.strip())  # one line
    assert checkpoint_of(tmp_path)["step"] == log_of(tmp_path)[-1]["step"] > 3


def test_one_folder_belongs_to_one_run(tmp_path, monkeypatch, capfd):
    """A second one is refused and disturbs nothing; the log grows line by line."""
    lines = []
    another = partial(refusal, "--steps 1 --overwrite", tmp_path, capfd)
    at_step(monkeypatch, 3, lambda: lines.extend([another(), len(log_of(tmp_path))]))
    assert run("--steps 4", tmp_path) == 0
    assert "another run" in lines[0] and lines[1] == 3
    assert [row["step"] for row in log_of(tmp_path)] == [0, 1, 2, 3, 4]
    assert checkpoint_of(tmp_path)["step"] == 4
    monkeypatch.setattr("fcntl.flock", lambda *_: os.close(-1))  # an OSError: no locks
    assert run("--steps 4 --resume", tmp_path) == 0


class Attack:
    __reduce__ = lambda self: (os.mkdir, ("attacked",))  # noqa: E731


def test_a_damaged_or_foreign_checkpoint_is_not_resumed(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt.pt"
    assert run("--steps 1", tmp_path) == 0
    good, ours = path.read_bytes(), checkpoint_of(tmp_path)
    with zipfile.ZipFile(path) as archive:
        weights = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    largest = max(weights, key=lambda entry: entry.file_size)
    flipped = bytearray(good)
    flipped[largest.header_offset + 100 + largest.file_size // 2] ^= 1  # one bit
    contents = [flipped, good[: len(good) // 2], b"", b"no zip"]
    other_config = ours["config"] | {"steps": "many"}  # of another version
    only = {key: ours[key] for key in ("config", "model")}
    for state in ({}, [1, 2], "text", Attack(), only, ours | {"config": other_config}):
        torch.save(state, path)
        contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        assert "ckpt.pt" in refusal("--resume", tmp_path, capfd)
    assert not os.path.exists("attacked")


TROUBLES = [("disk", "not written; --resume goes on")]
TROUBLES += [("memory", "out of memory"), ("worker", ""), ("number", "not finite")]


@pytest.mark.parametrize("trouble,said", TROUBLES)
def test_trouble_is_one_line(tmp_path, monkeypatch, capfd, trouble, said):
    """And leaves the last save as it is."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate ...")

    def act():
        if trouble == "disk":  # a file can have 10 kB; Python ignores SIGXFSZ
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        elif trouble == "memory":
            monkeypatch.setattr(SSL, "reconstruct", Mock(side_effect=full))
        elif trouble == "worker":
            multiprocessing.active_children()[0].kill()
        else:
            monkeypatch.setattr(sslvit, "masked_l1", lambda x, *_: math.nan * x.sum())

    at_step(monkeypatch, 3, act)
    workers = int(trouble == "worker")
    words = "--steps 9 --save-every 2 --log-every 99 --knn-images 0 --workers"
    try:
        assert said in refusal(f"{words} {workers}", tmp_path, capfd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint_of(tmp_path)["step"] == 2
    assert not (tmp_path / "ckpt.pt.tmp").exists()


@pytest.mark.parametrize("objective,lam", [("simmim", 0), ("moco", 1)])
def test_the_loss_falls_and_everything_is_written(tmp_path, capfd, objective, lam):
    words = f"--objective {objective} --steps 40 --log-every 20 --save-every 30"
    assert run(f"{words} --lr 0.1", tmp_path) == 0
    out = capfd.readouterr().out
    assert f"{objective} (λ = {lam}): ViT-micro, 16 px" in out.splitlines()[0]
    assert re.search(r"\nknn_shape 0\.\d{3}, untrained 0\.\d{3}\n", out)
    assert out.splitlines()[-1].endswith(f"python analyze.py {tmp_path}/ckpt.pt")
    sslvit.finish(config(lam=1.0), None, [{"knn_a": 0.1}, {"knn_a": 0.9}], None)
    assert "knn_a 0.900, untrained 0.100" in capfd.readouterr().out
    rows = log_of(tmp_path)
    assert [row["step"] for row in rows] == [0, 3, 20, 30, 40]
    assert lam or rows[-1]["loss"] < 0.9 * rows[1]["loss"]
    assert [row["step"] for row in rows if "knn_shape" in row] == [0, 30, 40]
    assert checkpoint_of(tmp_path)["step"] == 40
    assert (tmp_path / "masked.png").exists() == (lam < 1)
    if lam < 1:
        # rows of eight test images, 16 px and a black line, enlarged ten times: as they
        # are, with 10 of 16 patches white, and what is predicted there
        picture = np.asarray(Image.open(tmp_path / "masked.png"))[5::10, 5::10]
        picture = picture.reshape(3, 17, 8, 17, 3).swapaxes(1, 2)
        assert not picture[:, :, 16].any() and not picture[:, :, :, 16].any()
        whole, masked, filled = picture[:, :, :16, :16]
        images = Stimuli(5000, 16, 0, "test")
        spread = [0, 714, 1428, 2142, 2856, 3570, 4284, 4999]
        assert abs(whole - np.stack([1.0 * images[i][0] for i in spread])).max() <= 1
        is_hidden = (masked == 255).all(axis=-1)
        assert is_hidden.sum() == 8 * 10 * 16
        assert (filled == whole)[~is_hidden].all()
        assert not (filled == masked)[is_hidden].all()


def test_nothing_is_overwritten_and_no_setting_changes(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sslvit, "feature_std", lambda _: torch.tensor(0.01))
    assert run("--steps 1", tmp_path) == 0
    assert "features collapse" in capfd.readouterr().out
    before = (tmp_path / "ckpt.pt").read_bytes()
    for words in ("", "--resume --model tiny", "--resume --seed 1", "--resume --lr 1"):
        refusal(f"--steps 1 {words}", tmp_path, capfd)
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert len(log_of(tmp_path)) == 2
    assert run("--steps 1 --resume --accum 2 --workers 1", tmp_path) == 0
    # a signal in the last step: nothing is left to do
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        assert run("--steps 2 --overwrite", tmp_path) == 143
    assert run("--steps 2 --resume", tmp_path) == 0
    assert [row["step"] for row in log_of(tmp_path)] == [0, 1, 2]
    # a run that was to be overwritten is not resumed
    monkeypatch.setattr(sslvit, "masked_l1", lambda x, *_: math.nan * x.sum())
    refusal("--steps 2 --overwrite", tmp_path, capfd)
    assert "no such file" in refusal("--resume", tmp_path, capfd)


BAD_INPUT = """
    --no-such-flag ; --lam 1.5 ; --lam -0.1 ; --lam nan ; --lam 0.5 --objective moco
    --image-size 30 ; --image-size 0 ; --mask-patch-size 6 ; --batch-size 0
    --batch-size 1 ; --batch-size 6 --accum 4 ; --batch-size 32 --data PHOTOS
    --steps -3 ; --steps 1.5 ; --lr nan ; --lr -1 ; --epochs inf ; --objective byol
    --model gigantic ; --preset mega ; --data /no/such/folder ; --data FILE
    --data EMPTY ; --data TEXT ; --data ONLY ; --resume ; --device cuda:99
    --data BROKEN --lam 0 ; --data BROKEN --lam 0 --workers 1 ; --dtype int8
    --out FILE/run ; --log-every 0 ; --mask-ratio 0 ; --seed -1 ; WORLD_SIZE=2
    --decoder-depth -1
""".strip().replace("\n", ";")


@pytest.mark.parametrize("bad", [words.strip() for words in BAD_INPUT.split(";")])
def test_bad_input_is_one_clear_line_and_status_2(tmp_path, bad, capfd, monkeypatch):
    if bad == "WORLD_SIZE=2":  # but no torchrun
        monkeypatch.setattr(sslvit, "WORLD_SIZE", 2)
        bad = ""
    for file in "file empty/.a/1.png text/a.txt broken/1.png broken/2.png".split():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("x")
    fill(tmp_path / "photos", 25)
    fill(tmp_path / "only" / "val" / "cat", 2)
    words = re.sub("[A-Z]{4,}", lambda name: f"{tmp_path}/{name[0].lower()}", bad)
    line = refusal(f"--steps 1 {words}", tmp_path / "run", capfd)
    assert len(line) > 25 and (bad != "--lam 1.5" or "not in 0 .. 1" in line)


@pytest.mark.parametrize("program", ["sslvit", "analyze"])
def test_threads_do_not_spin_unless_the_user_says_so(tmp_path, program):
    stand_in = "import os\nprint(os.environ.get('GOMP_SPINCOUNT'))\nos._exit(0)"
    (tmp_path / "torch.py").write_text(stand_in)
    path = f"PYTHONPATH={tmp_path}:{Path(sslvit.__file__).parent}"
    for flag, spins in {"A=": 1000, "OMP_WAIT_POLICY=x": None}.items():
        command = ["env", "-u", "GOMP_SPINCOUNT", "-u", "OMP_WAIT_POLICY", path, flag]
        command += [sys.executable, "-u", "-c", f"import {program}"]
        assert subprocess.check_output(command, text=True) == f"{spins}\n"


SETTINGS = """
    --preset small32 --steps 7 --blur 1 : steps=7 epochs=0 blur=1 hue_shift=.1 lr=4e-3
    --preset small32 --objective moco : epochs=137.5 batch_size=128 blur=.3 momentum=.99
    --lam 0.4 --seed 3 : lam=.4 seed=3 out=runs/micro-hybrid-seed3
    : lam=.2 batch_size=64 steps=1500 lr=6e-3 out=runs/micro-hybrid momentum=.97 blur=1
        warmup=.1 weight_decay=.05 clip=5 crop_min=.2 hue_shift=.5 mask_patch_size=4
    --objective moco : lam=1 batch_size=128 steps=1032 lr=2e-3
    --objective simmim : lam=0 batch_size=64 steps=5500
    --data x --objective moco : preset=imagenet model=base image_size=224 patch_size=16
        epochs=300 clip=0 batch_size=4096 lr=1.5e-4 weight_decay=.1 temperature=.2
        momentum=.99 proj_hidden=4096 crop_min=.08 hue_shift=.1 blur=2 positions=sincos
    --data x --objective simmim : model=base epochs=100 batch_size=2048 lr=.5e-4 clip=5
        weight_decay=.05 warmup=.1 positions=relative mask_patch_size=32 mask_ratio=.6
""".replace("\n        ", " ")


@pytest.mark.parametrize("line", SETTINGS.strip().splitlines())
def test_settings_of_a_command_line(line):
    words, settings = line.split(":")
    cfg, _ = sslvit.parse(words.split())
    for setting in settings.split():
        name, value = setting.split("=")
        assert getattr(cfg, name) == type(getattr(cfg, name))(value), setting


def test_micro_batches_have_at_most_128_images_and_divide(monkeypatch):
    for batch, ranks, parts in ((64, 1, 1), (129, 1, 3), (256, 1, 2), (4096, 8, 4)):
        cfg = config(batch_size=batch, accum=0)
        monkeypatch.setattr(sslvit, "WORLD_SIZE", ranks)
        sslvit.settle(cfg)
        assert cfg.accum == parts


def test_stimuli_are_a_function_of_seed_split_and_index():
    sets = [Stimuli(50), Stimuli(50, seed=1), Stimuli(50, split="test")]
    assert len({source[i][0].tobytes() for source in sets for i in range(50)}) == 150
    image, shape, texture, mask = sets[0][7]
    assert np.array_equal(image, sslvit.find_data(config(image_size=32))[0][7][0])
    both = [sslvit.find_data(Config(seed=n)) for n in (0, 1)]
    for one, other in zip(*both, strict=True):
        assert not np.array_equal(one[7][0], other[7][0])
    # the outline does not tell the texture
    again, outline = sets[0].render(7, shape, (texture + 1) % 8)
    assert np.array_equal(outline, mask)
    assert not np.array_equal(again, image)
    stripes, mask = sets[0].render(7, shape, 1)  # of 0.3 and all of the light
    dark, bright = np.quantile(stripes.max(axis=2)[mask], [0.2, 0.8])
    assert dark / bright == pytest.approx(0.3, abs=0.02)
    # nor does the shape: chi² with 49 degrees of freedom, p = 0.001
    source = Stimuli(4000, 8)
    pairs = np.array([source[i][1:3] for i in range(4000)])
    table = np.histogram2d(*pairs.T, bins=8)[0]
    expected = table.sum(1)[:, None] * table.sum(0) / 4000
    assert ((table - expected) ** 2 / expected).sum() < 85


def test_areas_of_stimuli_by_hand():
    # what a crescent's two circles share: radii 0.95 and 0.7, centres 0.5 apart
    wide = 0.95**2 * math.acos((0.5**2 + 0.95**2 - 0.7**2) / 0.95)
    narrow = 0.7**2 * math.acos((0.5**2 + 0.7**2 - 0.95**2) / 0.7)
    kite = math.sqrt(2.15 * 1.15 * 0.75 * 0.25) / 2  # Heron, for two triangles
    areas = {
        "circle": math.pi * 0.9**2,
        "square": 1.5**2,
        "triangle": 3 * 3**0.5 * 0.5**2,  # 0.5 is its inner radius
        "star": math.pi * (0.65**2 + 0.35**2 / 2),
        "cross": 2 * 0.6 * 1.9 - 0.6**2,
        "ring": math.pi * (0.95**2 - 0.45**2),
        "bar": 0.8 * 1.9,
        "crescent": math.pi * 0.95**2 - (wide + narrow - kite),
    }
    x = np.arange(-1.1, 1.1, 0.004)
    for shape in sslvit.SHAPES:
        inside = sslvit.shape_level(shape, x, x[:, None]) < 0
        assert inside.sum() * 0.004**2 == pytest.approx(areas[shape], rel=0.01)
    # squares of 0.75 to 1 of that, on average (1 - 0.75³) / 0.75 of the area
    scales = [Stimuli(1).render(i, 1, 0)[1].mean() * 4 / 1.5**2 for i in range(400)]
    assert np.mean(scales) == pytest.approx((1 - 0.75**3) / 0.75, abs=0.02)


def test_a_crop_is_the_same_as_pillows(tmp_path, monkeypatch):
    y, x = np.mgrid[:800, :1200]
    waves = np.sin(np.stack([x / 50, y / 70, (x + y) / 90], axis=-1))
    photo = Image.fromarray((127 + 100 * waves).astype(np.uint8))
    photo.save(tmp_path / "large.jpg", quality=95)
    file = Image.open(tmp_path / "large.jpg")
    box = (160, 80, 800, 560)
    pillows = np.asarray(photo.crop(box).resize((32, 32), Image.Resampling.BILINEAR))
    monkeypatch.setattr(sslvit, "crop_box", lambda *_: box)
    for image in (photo, file):
        ours = sslvit.random_crops(image, 32, [1], None)[0].transpose(1, 2, 0)
        assert abs(ours.astype(float) - pillows).max() < 4
    assert file.size == (150, 100)
    boxes = iter([(0, 0, 32, 32), box])  # of which the small one needs every pixel
    monkeypatch.setattr(sslvit, "crop_box", lambda *_: next(boxes))
    file = Image.open(tmp_path / "large.jpg")
    sslvit.random_crops(file, 32, [1, 1], None)
    assert file.size == (1200, 800)
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    monkeypatch.setattr(sslvit, "crop_box", lambda *_: (2.4, 0.4, 6.4, 4.4))
    [whole] = sslvit.random_crops(Image.fromarray(pixels), 4, [1], None)[:, 0]
    assert (whole == pixels[0:4, 2:6]).all()  # rounded to whole pixels
    monkeypatch.undo()  # shrinking averages pixels
    image = Image.fromarray(np.tile(np.uint8([255, 0, 0, 0]), (64, 16)))
    crops = sslvit.random_crops(image, 16, [1.0], np.random.default_rng(0))
    for crop in (*crops, sslvit.center_crop(image, 16)):
        assert abs(crop[:, :, 1:-1] - 63.75).max() < 2


RAMP = np.tile(np.linspace(0, 255, 16).astype(np.uint8), (16, 1))
VALUES = np.pad(RAMP, ((0, 0), (16, 16)), constant_values=99)
SHOWN = Image.fromarray(VALUES)
KINDS = {
    "16 bits.tiff": VALUES.astype(np.uint16) * 257,
    "32 bits, 0 to 255.tiff": VALUES.astype(np.int32),
    "32 bits, CT.tiff": VALUES.astype(np.int32) * 12 - 1024,
    "float.tiff": VALUES.astype(np.float32) / 255,
}
for kind in ("P.png", "LA.png", "RGBA.png", "CMYK.tiff", "transparent.png"):
    KINDS[kind] = np.zeros_like(VALUES)
KINDS |= dict.fromkeys(("turned.jpg", "turned.tiff", "turned.png"), np.rot90(VALUES))


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_what_its_file_shows(tmp_path, kind):
    """With contrast, transparent on white, upright."""
    image = Image.fromarray(KINDS[kind])
    exif = Image.Exif()
    if image.height > image.width:
        exif[0x0112] = 6
    if kind == "transparent.png":  # black, to lie on white: a ramp again
        image.putalpha(Image.fromarray(255 - VALUES))
    elif not image.getbbox():
        image = SHOWN.convert(kind.split(".")[0])
    how = {"quality": 95} if ".jpg" in kind else {"compression": "tiff_lzw"}
    image.save(tmp_path / kind, exif=exif, **how)
    image, _ = sslvit.ImageFolder(tmp_path).load(0)
    out = sslvit.center_crop(image, 16).astype(int)
    assert abs(out - RAMP).max() <= (12 if ".jpg" in kind else 2)


def fill(folder, count, size=(9, 7)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (10 * i % 256, 0, 0)).save(folder / f"{i:02}.png")


@pytest.mark.parametrize(
    "layout,train,test,classes",
    [
        ("train/cat=3 train/dog=2 val/cat=1 val/dog=1", "00011", "01", "cat dog"),
        ("Training/a=1 Training/b=1 VALID/a=1 VALID/b=2", "01", "011", "a b"),
        # without a test set every tenth image is held back
        ("cat=20 dog=20", "0" * 18 + "1" * 18, "0011", "cat dog"),
        (".=20", "0" * 18, "00", ""),
        (".=9", "0" * 9, "", ""),
        ("images=3 masks=4 .thumbnails=4", "000", "", ""),
        ("cat/a=2 cat/b=1 dog/a=1", "0001", "", "cat dog"),
    ],
)
def test_folders_are_splits_and_classes(tmp_path, layout, train, test, classes):
    for words in layout.split():
        folder, count = words.split("=")
        fill(tmp_path / folder, int(count))
    sets = sslvit.find_data(config(data=str(tmp_path)))
    for data, labels in zip(sets, (train, test), strict=True):
        assert "".join(str(label) for _, [label] in data or []) == labels
    paths = [path for data in sets for path, _ in data or []]
    assert len({*paths}) == len(paths)
    assert sets[0].classes == ((classes.split(),) if classes else ())
    assert sets[1] is None or sets[1].classes == sets[0].classes


@pytest.mark.parametrize("val", [("",), ("dog",), ("cat", "emu")])
def test_no_accuracy_where_the_classes_of_train_and_val_differ(tmp_path, capfd, val):
    for folder in ("train/cat", "train/dog", *(f"val/{name}" for name in val)):
        fill(tmp_path / folder, 20, size=(16, 16))
    assert run(f"--data {tmp_path} --steps 2", tmp_path / "run") == 0
    out = capfd.readouterr().out
    assert "knn" not in out
    assert out.count("classes differ") == 1 and "/train: 40 images, 2 class" in out
    assert out.splitlines()[-1].endswith(f"/run/ckpt.pt --data {tmp_path}")


def test_a_run_goes_on_with_its_own_images_only(tmp_path, capfd):
    photos, out = tmp_path / "photos", tmp_path / "run"
    words = f"--data {photos} --objective simmim --steps 2"
    fill(photos, 12)
    assert run(words, out) == 0
    fill(photos, 13)
    assert "training set" in refusal(f"{words} --resume", out, capfd)
    (photos / "12.png").unlink()
    (photos / "03.png").rename(photos / "zz.png")
    assert "training set" in refusal(f"{words} --resume", out, capfd)
    (photos / "zz.png").rename(photos / "03.png")
    # the whole folder may be elsewhere, and its name may end with a slash
    photos.rename(tmp_path / "moved")
    assert run(f"--resume --data {tmp_path}/moved/", out) == 0


def test_unreadable_files_are_named_once_and_replaced(tmp_path, capfd):
    """Zero bytes, half a JPEG, a bomb, a file that is gone; the rest is counted."""
    fill(tmp_path, 7)
    (tmp_path / "00.png").rename(tmp_path / "new\nline and blank.png")
    os.rename(tmp_path / "01.png", os.fsencode(tmp_path) + b"/\xff\xfe.png")
    for name in ("empty.png", "a.heic", "b.HEIC", "notes.txt"):
        (tmp_path / name).touch()
    SHOWN.save(tmp_path / "half.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "half.jpg").read_bytes()[:300])
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    fill(tmp_path / "Masks", 4)
    words = f"--data {tmp_path} --steps 3 --objective simmim --knn-images 0"
    assert run(words, tmp_path / ".run") == 0
    out, err = capfd.readouterr()
    for name in ("empty.png", "half.jpg", "bomb.png", "gone.png"):
        assert err.count(f"next one used: '{tmp_path}/{name}'") == 1, err
    assert len(err.splitlines()) == 4
    for reason in ("2 x file .heic", "1 x file .txt", "2 x hidden, or named mask"):
        assert reason in out


def test_knn_by_hand():
    # the nearest of four says 5, the majority of three 2; lengths do not count
    corners = torch.tensor([[1.0, 0.1], [5.0, 1.5], [1.0, -0.2], [-3.0, -0.2]])
    says = torch.tensor([[5, 0], [2, 1], [2, 1], [5, 0]])
    for k, labels in ((1, [5, 0]), (3, [2, 1])):
        query = torch.tensor([[0.1, 0.011]])
        assert sslvit.knn(corners, says, query, k).tolist() == [labels]
    fan = torch.stack([torch.ones(40), torch.arange(40)], dim=1)
    says = torch.tensor([0] * 9 + [1] * 11 + [2] * 20)[:, None]  # most of 20: 1
    assert sslvit.knn(fan, says, fan[:1]) == 1
    # more than are compared at once: each image is its own neighbour
    many = torch.randn(600, 8)
    names = torch.arange(600)[:, None]
    assert torch.equal(sslvit.knn(many, names, many, k=1), names)


def test_test_images_look_for_training_images():
    # of an image its last patch alone tells; what counts is the mean of all patches
    encoder = ViT(16, 4, **TINY)
    tokens = torch.tensor([[-1], [0], [1]])  # CLS says the opposite
    encoder.forward = lambda x: tokens * F.pad(x[:, 0, :1, :1], (1, 0))

    def plain(*kinds):
        """(how many, brightness, class): sorted by class, as folders are."""
        grey = [[(np.full((16, 16), g, np.uint8), c)] * n for n, g, c in kinds]
        return Pictures(sum(grey, []))

    def score(train, test):
        return sslvit.knn_scores(encoder, (train, test), config(knn_images=40))

    # 40 of 80 are spread over both classes
    train = plain((40, 0, 0), (40, 200, 1))
    # all are right, however the test set is made up
    assert score(train, plain((3, 0, 0), (2, 200, 1))) == {"knn_class": 1}
    # the labels are the training set's, also where the test set disagrees
    assert score(train, plain((4, 0, 1), (1, 200, 1))) == {"knn_class": 0.2}
    assert score(train, None) == {}


def test_the_plan_of_vit_base_by_hand(tmp_path, monkeypatch, capfd):
    """Twelve blocks of 197 · (24 · 768² + 4 · 197 · 768) FLOP are 34.9e9, 32.5e9 where
    only CLS asks in the last. 300 epochs of 1,281,167 images are 3.84e8. Each costs
    3 · 34.9 + 8 · 32.5 GFLOP = 364 where all is kept. Of 32 parts one is, for others
    2 · 32.5 are added: 427, in all 1.64e20, 177 h at 0.26 · 989e12 a second. 110
    million weights are trained, of 16 bytes. Here 6 images take 1 s."""
    done = []

    def forward(self, *views):
        done.append(1)
        return {"cl": self.mask_token.sum(), "mim": 0, "std": torch.ones(())}

    monkeypatch.setattr(sslvit, "time", SimpleNamespace(perf_counter=lambda: len(done)))
    monkeypatch.setattr(SSL, "forward", forward)
    out = f"--device cpu --dry-run --out {tmp_path}/none".split()
    assert sslvit.main(["--data", "/imagenet", *out]) == 0
    _, first, gpu, here = capfd.readouterr().out.splitlines()
    assert "3.843e+08 images of 427.2 GFLOP, 1.6 GiB" in first
    assert gpu.startswith("1 x H100") and gpu.endswith(": 177 h")
    assert "6 images/s, 1.78e+04 h" in here
    for objective, flops in (("moco", 8 * 32.45e9), ("simmim", 3 * 34.895e9)):
        cfg, _ = sslvit.parse(["--data", "/imagenet", "--objective", objective])
        assert sslvit.flops_per_image(cfg) == pytest.approx(flops, rel=1e-4)
    assert not (tmp_path / "none").exists()
