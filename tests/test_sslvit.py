"""Worked examples for sslvit.py.

Every expected number follows from paper and pencil, or from an independent library.
"""

import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import sslvit
from sslvit import SSL, Config, Stimuli, TrainingViews, ViT

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 3}
QUICK = (
    "--batch-size 8 --image-size 16 --knn-images 16 --proj-hidden 16 "
    "--log-every 1 --device cpu"
).split()


@pytest.fixture(autouse=True)
def small_and_alone(monkeypatch):
    monkeypatch.setitem(sslvit.SIZES, "micro", TINY)
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    torch.manual_seed(0)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def config(**changes):
    small = {"image_size": 16, "proj_hidden": 16, "batch_size": 8}
    here = {"accum": 1, "device": "cpu", "dtype": "fp32", "workers": 0}
    return Config(**(small | here | changes))


def run(*words, out):
    """`python sslvit.py WORDS --out OUT` in this process -> exit status."""
    return sslvit.main([*QUICK, *words, "--out", str(out)])


def checkpoint_of(folder):
    return sslvit.load_checkpoint(folder / "ckpt.pt")


def log_of(folder):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def column(values):
    """One parameter per image, as the colour operations want it: (B, 1, 1, 1)."""
    return torch.tensor(values).view(-1, 1, 1, 1)


# ---- 1. Two questions ----


def test_contrastive_loss_against_a_double_loop():
    q = torch.randn(6, 5, dtype=torch.float64)
    k = torch.randn(6, 5, dtype=torch.float64)
    total = 0.0
    for i in range(6):
        cosines = [F.cosine_similarity(q[i], k[j], dim=0).item() for j in range(6)]
        similar = [math.exp(cosine / 0.2) for cosine in cosines]
        total -= math.log(similar[i] / sum(similar)) / 6
    ours = sslvit.contrastive_loss(q, k, 0.2).item()
    assert ours == pytest.approx(2 * 0.2 * total, rel=1e-12)


def test_contrastive_loss_by_hand():
    # own key: cosine 1, three others: cosine 0
    eye = torch.eye(4)
    loss = sslvit.contrastive_loss(3 * eye, eye, 0.5).item()
    assert loss == pytest.approx(math.log(1 + 3 * math.exp(-2)))
    # nothing is told apart
    alike = torch.ones(4, 7)
    loss = sslvit.contrastive_loss(alike, alike, 0.2).item()
    assert loss == pytest.approx(0.4 * math.log(4))


@pytest.mark.parametrize(
    "size,patch,unit,ratio,masked",
    [
        (224, 16, 32, 0.6, 120),  # 30 of 49 units × 4 patches
        (32, 4, 4, 0.6, 39),  # 39 of 64 × 1
        (40, 4, 8, 0.28, 28),  # 7 of 25 × 4: 0.28 × 25 is 7.000000000000001
    ],
)
def test_mask_counts(size, patch, unit, ratio, masked):
    def draw():
        generator = torch.Generator().manual_seed(1)
        return sslvit.random_mask(5, size, patch, unit, ratio, generator)

    mask = draw()
    assert mask.dtype == torch.bool
    assert mask.shape == (5, (size // patch) ** 2)
    assert mask.sum(1).tolist() == [masked] * 5
    # a unit is masked as a whole
    side = size // unit
    patches = unit // patch
    units = mask.reshape(5, side, patches, side, patches)
    assert torch.equal(units.any(4).any(2), units.all(4).all(2))
    assert not torch.equal(mask[0], mask[1])
    assert torch.equal(mask, draw())


def test_mask_units_must_fit():
    for sizes in ((224, 16, 24), (224, 16, 48)):
        with pytest.raises(ValueError):
            sslvit.random_mask(1, *sizes, 0.6)


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
    assert sorted(patches[1, 4].tolist()) == sorted(pixels.tolist())
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
    # another, oblong size: positions are interpolated
    assert vit(torch.randn(1, 3, 24, 8)).shape == (1, 13, 24)
    with pytest.raises(ValueError):
        ViT(30, 4, **TINY)


def test_the_largest_path_is_the_same_function_in_bf16():
    # on a CPU bf16 takes the explicit attention, fp32 the fused one
    vit = ViT(16, 4, **TINY).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        rough = vit(x).float()
    torch.testing.assert_close(rough, vit(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("variant", ["learned", "layer_scale", "no_positions"])
def test_timm_parity(variant):
    timm = pytest.importorskip("timm")
    scale = 0.1 if variant == "layer_scale" else None
    positions = "none" if variant == "no_positions" else "learned"
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=5,
        init_values=scale,
        pos_embed={"none": "none", "learned": "learn"}[positions],
    ).eval()
    ours = ViT(
        32, 8, **TINY, positions=positions, num_classes=5, layer_scale=scale
    ).eval()
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
    # the last of 2 × 3 patches; frequencies 1 and 1/100
    x = 2
    y = 1
    hand = []
    for value in (x, y):
        hand += [math.sin(value), math.sin(0.01 * value)]
        hand += [math.cos(value), math.cos(0.01 * value)]
    torch.testing.assert_close(positions[6], torch.tensor(hand))


def test_relative_position_bias_by_hand():
    # 2 × 2 patches: offsets -1, 0, 1 in y and x
    vit = ViT(8, 4, 24, 1, 3, positions="none", rel_pos_bias=True)
    table = vit.rel_pos_bias.relative_position_bias_table
    assert table.shape == (9 + 3, 3)
    assert vit.pos_embed is None
    table.data = torch.arange(12.0)[:, None].repeat(1, 3)
    bias = vit.rel_pos_bias(2, 2)
    assert bias.shape == (3, 5, 5)
    assert torch.equal(bias[0], bias[2])
    # row (query) minus column (key): (Δy + 1)·3 + (Δx + 1);
    # 9: CLS to patch, 10: patch to CLS, 11: CLS to CLS
    assert bias[0].tolist() == [
        [11, 9, 9, 9, 9],
        [10, 4, 3, 1, 0],
        [10, 5, 4, 2, 1],
        [10, 7, 6, 4, 3],
        [10, 8, 7, 5, 4],
    ]
    assert vit.rel_pos_bias(3, 4).shape == (3, 13, 13)
    # both attention paths add it
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(vit(x), vit(x, record=True)[0])
    # what is not computed was not needed
    torch.testing.assert_close(vit(x, cls_only=True), vit(x)[:, :1])
    vit.rel_pos_bias(2, 2).sum().backward()
    assert table.grad.sum() == 3 * 25


def test_qkv_starts_as_three_xavier_matrices():
    weight = sslvit.Block(96, 3).attn.qkv.weight
    # of a 96 × 96 matrix; of the (288, 96) matrix it would be 0.125
    bound = math.sqrt(6 / (96 + 96))
    for part in weight.chunk(3):
        assert 0.98 * bound < part.abs().max() <= bound


def test_masked_pixels_are_not_seen_and_others_are():
    vit = ViT(16, 4, **TINY).eval()
    x = torch.randn(1, 3, 16, 16)
    # the patch in row 1, column 1
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    hidden = x.clone()
    hidden[..., 4:8, 4:8] = 9
    assert torch.equal(vit(x, mask), vit(hidden, mask))
    seen = x.clone()
    seen[..., 4:8, 8:12] = 9
    assert not torch.allclose(vit(x, mask), vit(seen, mask))
    token = torch.randn(1, 1, 24)
    assert not torch.allclose(vit(x, mask, mask_token=token), vit(x, mask))


# ---- 3. Both questions, one encoder ----


def inputs(dtype=torch.float32):
    views = [torch.randn(8, 3, 16, 16, dtype=dtype) for _ in range(3)]
    return *views, sslvit.random_mask(8, 16, 4, 4, 0.6)


def gradients_of(model):
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            found[name] = p.grad.clone()
    return found


def encoder_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return gradients_of(model.encoder)


def test_heads_end_in_a_batchnorm_without_affine():
    head = sslvit.mlp_head(8, 16, 16, 4)
    kinds = [type(layer).__name__ for layer in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert head[1].affine
    assert not head[-1].affine
    assert all(layer.bias is None for layer in head if isinstance(layer, nn.Linear))
    y = head(torch.randn(32, 8))
    torch.testing.assert_close(y.mean(0), torch.zeros(4), atol=1e-5, rtol=0)


def test_simmim_is_the_paper_spelt_out():
    model = SSL(config(lam=0.0))
    _, _, x, mask = inputs()
    assert not hasattr(model, "projector")
    assert not hasattr(model, "momentum_encoder")
    out = model(None, None, x, mask)
    tokens = model.encoder(x, mask, mask_token=model.mask_token)
    pixels = model.decoder(tokens)[:, 1:]
    recon = F.fold(pixels.mT, (16, 16), 4, stride=4)
    pixel_mask = mask.reshape(8, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)
    pixel_mask = pixel_mask[:, None].expand(-1, 3, -1, -1)
    expected = (recon - x).abs()[pixel_mask].mean().item()
    assert out["mim"].item() == pytest.approx(expected, rel=1e-5)
    assert out["cl"] == 0
    assert 0 < out["std"] < 2


def test_moco_is_the_paper_spelt_out():
    model = SSL(config(lam=1.0)).double()
    x1, x2, _, mask = inputs(torch.float64)
    assert not hasattr(model, "decoder")
    assert not hasattr(model, "mask_token")
    # frozen at its random start
    assert not model.encoder.patch_embed.proj.weight.requires_grad
    for p in model.momentum_encoder.parameters():
        p.data += 0.01 * torch.randn_like(p)
    out = model(x1, x2, None, mask)

    def query(x):
        return model.predictor(model.projector(model.encoder(x)[:, 0]))

    def key(x):
        return model.momentum_projector(model.momentum_encoder(x)[:, 0]).detach()

    def ctr(q, k):
        logits = F.normalize(q) @ F.normalize(k).T / 0.2
        return 2 * 0.2 * F.cross_entropy(logits, torch.arange(8))

    loss = ctr(query(x1), key(x2)) + ctr(query(x2), key(x1))
    torch.testing.assert_close(out["cl"], loss)
    ours = encoder_gradients(model, out["cl"])
    theirs = encoder_gradients(model, loss)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-9, rtol=1e-7)
    assert out["mim"] == 0


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_hybrid_is_the_weighted_sum_of_the_pure_methods(lam):
    torch.manual_seed(1)
    hybrid = SSL(config(lam=0.3, freeze_patch_embed="no")).double()
    batch = inputs(torch.float64)
    grads = {}
    for end, name in ((0.0, "mim"), (1.0, "cl")):
        pure = SSL(config(lam=end, freeze_patch_embed="no")).double()
        weights = hybrid.state_dict()
        pure.load_state_dict({key: weights[key] for key in pure.state_dict()})
        loss = pure(*batch)[name]
        torch.testing.assert_close(loss, hybrid(*batch)[name])
        grads[name] = encoder_gradients(pure, loss)
    out = hybrid(*batch)
    total = encoder_gradients(hybrid, (1 - lam) * out["mim"] + lam * out["cl"])
    for name, gradient in total.items():
        mim = grads["mim"].get(name, 0)
        cl = grads["cl"].get(name, 0)
        expected = (1 - lam) * mim + lam * cl
        torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize(
    "how,lam,is_frozen",
    [
        ("auto", 0.0, False),
        ("auto", 0.2, False),
        ("auto", 1.0, True),
        ("yes", 0.0, True),
        ("yes", 0.2, True),
        ("yes", 1.0, True),
        ("no", 0.0, False),
        ("no", 0.2, False),
        ("no", 1.0, False),
    ],
)
def test_only_moco_freezes_the_patch_embedding_unless_told(how, lam, is_frozen):
    model = SSL(config(lam=lam, freeze_patch_embed=how))
    assert model.encoder.patch_embed.proj.weight.requires_grad != is_frozen


def test_decoder_depth_and_simmim_positions():
    model = SSL(config(decoder_depth=2, positions="relative"))
    kinds = [type(layer).__name__ for layer in model.decoder]
    assert kinds == ["Block", "Block", "LayerNorm", "Linear"]
    assert model.encoder.pos_embed is None
    first = model.encoder.blocks[0]
    assert first.ls1.gamma[0].item() == pytest.approx(0.1)
    out = model(*inputs())
    (out["mim"] + out["cl"]).backward()
    table = model.encoder.rel_pos_bias.relative_position_bias_table
    assert table.grad.abs().sum() > 0


def test_checkpointing_changes_nothing():
    model = SSL(config(lam=0.0))
    batch = inputs()
    plain = encoder_gradients(model, model(*batch)["mim"])
    model.encoder.checkpointing = True
    again = encoder_gradients(model, model(*batch)["mim"])
    for name in plain:
        torch.testing.assert_close(plain[name], again[name])


def test_average_by_hand():
    model = SSL(config(lam=1.0))
    key = model.momentum_encoder.norm.weight
    query = model.encoder.norm.weight
    key.data.fill_(3.0)
    query.data.fill_(1.0)
    model.update_average(0.75)
    assert torch.all(key == 2.5)
    assert torch.all(query == 1.0)
    averaged = [*model.momentum_encoder.parameters()]
    averaged += [*model.momentum_projector.parameters()]
    assert not any(p.requires_grad for p in averaged)


def test_feature_std_by_hand():
    # unit vectors e1 and e2: each channel has values 1, 0, whose deviation is √½
    two = torch.tensor([[5.0, 0.0], [0.0, 2.0]])
    assert sslvit.feature_std(two).item() == pytest.approx(1.0)
    assert sslvit.feature_std(torch.ones(9, 4)).item() == 0


# ---- 4. Views ----


def no_colours(images):
    """What change_colours() is told where nothing is to change."""
    return {
        "order": torch.full((images, 4), -1),
        "factors": torch.tensor([[1.0, 1.0, 1.0, 0.0]]).repeat(images, 1),
        "grey": torch.zeros(images, dtype=torch.bool),
        "blur": torch.zeros(images),
        "solarise": torch.zeros(images, dtype=torch.bool),
    }


def test_colour_operations_by_hand():
    red = column([1.0, 0.0, 0.0]).transpose(0, 1).expand(1, 3, 4, 4)
    turned = sslvit.adjust_hue(red, column([1 / 3]))[0, :, 0, 0]
    green = torch.tensor([0.0, 1.0, 0.0])
    torch.testing.assert_close(turned, green, atol=1e-6, rtol=0)
    x = torch.rand(2, 3, 9, 7)
    unturned = sslvit.adjust_hue(x, column([0.0, 0.0]))
    torch.testing.assert_close(unturned, x, atol=1e-6, rtol=0)
    flat = torch.full((1, 3, 5, 5), 0.3)
    torch.testing.assert_close(sslvit.gaussian_blur(flat, column([1.0])), flat)
    # a point becomes exp(-½ (x/σ)²): at 3 px = 2σ e⁻² of the middle
    dot = torch.zeros(1, 1, 21, 21)
    dot[..., 10, 10] = 1
    blurred = sslvit.gaussian_blur(dot, column([1.5]))[0, 0, 10]
    assert blurred[13] / blurred[10] == pytest.approx(math.exp(-2), rel=1e-4)


def test_each_image_gets_the_colours_that_were_drawn_for_it():
    x = torch.rand(5, 3, 9, 7)
    colours = no_colours(5)
    colours["solarise"][0] = True
    colours["grey"][2] = True
    colours["blur"][3] = 1.5
    y = x.clone()
    sslvit.change_colours(y, colours)
    torch.testing.assert_close(y[0], torch.where(x[0] >= 0.5, 1 - x[0], x[0]))
    assert torch.equal(y[1], x[1])
    assert torch.equal(y[2, 0], y[2, 2])
    assert torch.equal(y[3:4], sslvit.gaussian_blur(x[3:4], column([1.5])))
    assert torch.equal(y[4], x[4])


def test_jitters_run_in_each_images_own_order():
    x = torch.rand(2, 3, 4, 4)
    factors = [1.4, 0.6, 1.2, 0.3]
    orders = [[0, 1, 2, 3], [3, 2, 1, 0]]
    colours = no_colours(2)
    colours["factors"] = torch.tensor([factors, factors])
    colours["order"] = torch.tensor(orders)
    y = x.clone()
    sslvit.change_colours(y, colours)
    for image, order in enumerate(orders):
        z = x[image : image + 1]
        for n in order:
            z = sslvit.JITTERS[n](z, torch.tensor(factors[n]))
        torch.testing.assert_close(y[image : image + 1], z)


def test_an_images_blur_does_not_depend_on_the_others():
    x = torch.rand(3, 3, 24, 20, dtype=torch.float64)
    sigmas = column([0.1, 0.7, 2.0]).double()
    together = sslvit.gaussian_blur(x, sigmas)
    for i in range(3):
        alone = sslvit.gaussian_blur(x[i : i + 1], sigmas[i : i + 1])
        # a kernel that the widest one lengthens would differ by 1e-8
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-12, rtol=0)


def test_operations_match_torchvision():
    tv = pytest.importorskip("torchvision.transforms.v2.functional")
    x = torch.rand(4, 3, 40, 30)

    def check(ours, theirs, values):
        pairs = zip(x, values, strict=True)
        expected = torch.stack([theirs(image, value) for image, value in pairs])
        found = ours(x, column(values))
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)

    factors = [0.6, 0.9, 1.3, 1.4]
    check(sslvit.adjust_brightness, tv.adjust_brightness, factors)
    check(sslvit.adjust_contrast, tv.adjust_contrast, factors)
    check(sslvit.adjust_saturation, tv.adjust_saturation, factors)
    check(sslvit.adjust_hue, tv.adjust_hue, [-0.5, -0.1, 0.07, 0.4])

    def blur(image, sigma):
        return tv.gaussian_blur(image, [29, 29], [sigma, sigma])

    check(sslvit.gaussian_blur, blur, [0.1, 0.5, 1.2, 2.0])
    grey = tv.rgb_to_grayscale(x)
    torch.testing.assert_close(sslvit.greyscale(x), grey, atol=1e-3, rtol=0)
    solar = tv.solarize(x, 0.5)
    torch.testing.assert_close(sslvit.solarise(x), solar, atol=1e-3, rtol=0)


def loaded(cfg, images=8):
    """What a loader gives: one batch of stimuli."""
    views = TrainingViews(Stimuli(images, cfg.image_size), cfg)
    return default_collate([views[0, i] for i in range(images)])


def test_views_of_a_batch_are_made_twice_and_are_equal():
    cfg = config()
    batch = loaded(cfg)
    before = batch["crops"].clone()
    first = sslvit.augment(batch, cfg, "cpu")
    second = sslvit.augment(batch, cfg, "cpu")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(batch["crops"], before)
    assert not torch.equal(first[0], first[1])
    # the masked view is the third crop in ImageNet's units, and no more
    expected = (batch["crops"][:, 2] / 255 - sslvit.MEAN) / sslvit.STD
    torch.testing.assert_close(first[2], expected)


# ---- 5. Optimiser and schedules ----


def test_schedules_by_hand():
    assert sslvit.lr_at(5, 110, 10, 2.0) == 1.0
    assert sslvit.lr_at(10, 110, 10, 2.0) == 2.0
    assert sslvit.lr_at(60, 110, 10, 2.0) == pytest.approx(1.0)
    assert sslvit.lr_at(110, 110, 10, 2.0) == pytest.approx(0)
    assert sslvit.lr_at(1, 1, 1, 2.0) == 2.0
    assert sslvit.lr_at(1, 1, 0.1, 2.0) == pytest.approx(0)
    assert sslvit.momentum_at(0, 8, 0.99) == pytest.approx(0.99)
    assert sslvit.momentum_at(4, 8, 0.99) == pytest.approx(0.995)
    assert sslvit.momentum_at(8, 8, 0.99) == 1


@pytest.mark.parametrize("lam,is_spared", [(0.0, True), (0.2, True), (1.0, False)])
def test_decay_spares_vectors_and_tokens_except_in_moco(lam, is_spared):
    model = SSL(config(lam=lam))
    decayed, spared = sslvit.make_optimizer(model, config(lam=lam)).param_groups
    assert decayed["weight_decay"] == 0.05
    assert spared["weight_decay"] == 0.0
    trained = sum(p.requires_grad for p in model.parameters())
    assert len(decayed["params"]) + len(spared["params"]) == trained
    assert bool(spared["params"]) == is_spared
    vectors = [p for p in decayed["params"] if p.squeeze().ndim < 2]
    assert bool(vectors) != is_spared


# ---- 6. Training loop: a batch means the same on any machine ----


def part_of(batch, start, stop):
    """Images start..stop of a loader's batch."""
    part = {}
    for name, value in batch.items():
        if isinstance(value, dict):
            part[name] = part_of(value, start, stop)
        else:
            part[name] = value[start:stop]
    return part


def double_views(batch, cfg, device, augment=sslvit.augment):
    """augment() in fp64, so that what differs is the method and not rounding."""
    views = augment(batch, cfg, device)
    doubled = []
    for view in views[:3]:
        doubled.append(None if view is None else view.double())
    return *doubled, views[3]


def double_model(cfg):
    """The same weights in every process, the averages a little behind them."""
    torch.manual_seed(0)
    model = SSL(cfg).double()
    if model.use_cl:
        for p in model.momentum_encoder.parameters():
            p.data += 0.01 * torch.randn_like(p)
    return model


def plain_gradients(cfg, batch):
    """One forward pass of the whole batch, one backward pass -> losses, gradients."""
    model = double_model(cfg)
    losses = model(*double_views(batch, cfg, "cpu"))
    ((1 - cfg.lam) * losses["mim"] + cfg.lam * losses["cl"]).backward()
    return losses, gradients_of(model)


def gradients_in_parts(cfg, batch, parts):
    """The same with `parts` micro-batches of what this process has of the batch."""
    model = double_model(cfg)
    images = len(batch["mask"]) // parts
    micro_batches = []
    for part in range(parts):
        micro_batches.append(part_of(batch, part * images, (part + 1) * images))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    sslvit.augment = double_views
    losses = sslvit.backward_in_parts(model, micro_batches, cfg, nullcontext, scaler)
    return losses, gradients_of(model)


def assert_same_batch(found, expected):
    """Losses and gradients are those of one plain pass over the whole batch."""
    losses, gradients = found
    plain_losses, plain = expected
    for name in ("cl", "mim", "std"):
        value = plain_losses[name].item()
        assert losses[name].item() == pytest.approx(value, rel=1e-6), name
    assert gradients.keys() == plain.keys()
    largest = max(gradient.norm() for gradient in plain.values())
    for name, gradient in plain.items():
        error = (gradients[name] - gradient).norm()
        # MoCo's last bias has the gradient 0: heads begin with a BatchNorm
        assert error <= 1e-10 * gradient.norm() + 1e-13 * largest, name


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("parts", [1, 4, 16])
def test_micro_batches_have_the_gradients_of_the_whole(lam, parts, monkeypatch):
    monkeypatch.setattr(sslvit, "augment", sslvit.augment)  # so that it comes back
    cfg = config(lam=lam, batch_size=16)
    batch = loaded(cfg, 16)
    found = gradients_in_parts(cfg, batch, parts)
    assert_same_batch(found, plain_gradients(cfg, batch))


def test_a_run_in_micro_batches_is_the_same_run(tmp_path):
    for accum in ("1", "2", "8"):
        words = ["--steps", "2", "--dtype", "fp32", "--accum", accum]
        assert run(*words, out=tmp_path / accum) == 0
    whole = log_of(tmp_path / "1")[1:]
    for accum in ("2", "8"):
        parts = log_of(tmp_path / accum)[1:]
        for name in ("norm", "cl", "mim", "std"):
            expected = [row[name] for row in whole]
            assert [row[name] for row in parts] == pytest.approx(expected, rel=1e-3)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_python(code, *arguments, **environment):
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
    )


def run_two_ranks(code, *arguments):
    """-> [(exit status, stdout, stderr)] of both ranks."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    place |= {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    ranks = [run_python(code, *arguments, RANK=rank, **place) for rank in "01"]
    results = []
    for process in ranks:
        out, err = process.communicate(timeout=100)
        results.append((process.returncode, out, err))
    return results


def test_two_ranks_of_four_micro_batches_equal_one_process(tmp_path):
    """Images 0..7 are rank 0's, 8..15 rank 1's; BatchNorm and InfoNCE see all 16."""
    code = """
import torch, torch.distributed as dist
import test_sslvit as tests
dist.init_process_group("gloo")
rank = dist.get_rank()
results = []
for lam, batch in torch.load(sys.argv[1] + "/batches.pt"):
    cfg = tests.config(lam=lam, batch_size=16, accum=4)
    share = tests.part_of(batch, 8 * rank, 8 * rank + 8)
    results.append(tests.gradients_in_parts(cfg, share, parts=4))
torch.save(results, f"{sys.argv[1]}/rank{rank}.pt")
dist.destroy_process_group()
"""
    batches = []
    for lam in (0.0, 0.3, 1.0):
        batches.append((lam, loaded(config(lam=lam), 16)))
    torch.save(batches, tmp_path / "batches.pt")
    for status, _, err in run_two_ranks(code, str(tmp_path)):
        assert status == 0, err
    zero = torch.load(tmp_path / "rank0.pt")
    one = torch.load(tmp_path / "rank1.pt")
    for (lam, batch), first, second in zip(batches, zero, one, strict=True):
        expected = plain_gradients(config(lam=lam, batch_size=16), batch)
        assert_same_batch(first, expected)
        assert_same_batch(second, expected)
        for name, gradient in first[1].items():
            assert torch.equal(gradient, second[1][name])


# as `python sslvit.py` runs, and as it ends
AS_PROGRAM = f"""
import runpy
runpy.run_path({str(ROOT / "sslvit.py")!r}, run_name="__main__")
"""


def test_two_ranks_train_and_only_the_first_speaks(tmp_path):
    argv = [*QUICK, "--model", "nano", "--steps", "2", "--out", str(tmp_path)]
    zero, one = run_two_ranks(AS_PROGRAM, *argv)
    assert zero[0] == one[0] == 0, zero[2] + one[2]
    assert "2 x 1 x 4" in zero[1]
    assert "next, every figure" in zero[1]
    assert one[1] == ""
    assert checkpoint_of(tmp_path)["step"] == 2


def test_two_ranks_stay_identical_and_one_can_go_on(tmp_path):
    """A signal to one rank stops both after the same step.

    One process goes on with the same weights and batches.
    """
    code = """
import signal, torch
true = sslvit.SSL.update_average
calls = []
def stop_at_five(self, momentum):
    true(self, momentum)
    calls.append(momentum)
    if len(calls) == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    torch.save(self.state_dict(), f"{sys.argv[-1]}/rank{os.environ['RANK']}.pt")
sslvit.SSL.update_average = stop_at_five
sys.exit(sslvit.main(sys.argv[1:]))
"""
    words = "--steps 12 --log-every 3 --dtype fp32".split()
    results = run_two_ranks(code, *QUICK, *words, "--out", str(tmp_path))
    assert [status for status, _, _ in results] == [143, 143], results
    zero = torch.load(tmp_path / "rank0.pt")
    one = torch.load(tmp_path / "rank1.pt")
    assert all(torch.equal(zero[name], one[name]) for name in zero)
    # at once for both, though only one has had the signal and no log line is due
    assert checkpoint_of(tmp_path)["step"] == 5
    assert run(*words, "--resume", out=tmp_path) == 0
    # never more than one rank
    assert run(*words, out=tmp_path / "alone") == 0
    both = checkpoint_of(tmp_path)["model"]
    alone = checkpoint_of(tmp_path / "alone")["model"]
    for name in both:
        torch.testing.assert_close(both[name], alone[name], atol=2e-4, rtol=1e-3)


def test_what_ranks_tell_each_other_when_there_is_one():
    assert sslvit.share_news([], {3}) == (None, {3})
    assert sslvit.share_news([15, 2], set()) == (15, set())


# ---- On a GPU, and as if there were one ----


class FakeCuda(TorchDispatchMode):
    """Tensors on "cuda" have a shape and no values; those on the CPU are real.

    So code that chooses by values on the CPU runs as it is, and an operation on tensors
    of both devices fails as it would on a GPU.
    """

    def __init__(self, fake_mode):
        super().__init__()
        self.fake_mode = fake_mode

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        is_fake = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        goes_there = "cuda" in str(kwargs.get("device"))
        if is_fake or goes_there:
            with self.fake_mode:
                return func(*args, **kwargs)
        with _disable_current_modes():
            return func(*args, **kwargs)


def pretend_backward(loss, gradient=None):
    """Fills the gradients of a loss with zeros: autograd itself wants a real GPU."""
    if gradient is not None:
        assert gradient.device == loss.device
    waiting = [loss.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            node.variable.grad = torch.zeros_like(node.variable)
        waiting += [following for following, _ in node.next_functions]


@pytest.fixture
def fake_cuda(monkeypatch):
    if not torch.backends.cuda.is_built():
        pytest.skip("a torch without CUDA cannot pretend either")
    # .to() on a module must not copy into the old tensors
    monkeypatch.setattr(torch.Tensor, "backward", pretend_backward)
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode, FakeCuda(fake_mode):
        yield
    torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("positions", ["sincos", "relative"])
def test_nothing_is_left_on_the_cpu(fake_cuda, lam, positions):
    """A training step as train() makes it: views, losses, gradients, step, average."""
    cfg = config(lam=lam, positions=positions, device="cuda", decoder_depth=1)
    model = SSL(cfg).to("cuda")
    optimizer = sslvit.make_optimizer(model, cfg)
    assert optimizer.defaults["fused"]
    views = sslvit.augment(loaded(cfg), cfg, "cuda")
    losses = model(*views)
    for tensor in (*views, *losses.values(), *model.parameters()):
        assert tensor is None or tensor.device.type == "cuda"
    loss = (1 - cfg.lam) * losses["mim"] + cfg.lam * losses["cl"]
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
    optimizer.step()
    model.update_average(0.9)
    # analyze.py and k-NN
    _, records = model.encoder(views[0] if cfg.lam else views[2], record=True)
    assert records[-1].attn.device.type == "cuda"


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_micro_batches_leave_nothing_on_the_cpu(fake_cuda, lam):
    cfg = config(lam=lam, device="cuda")
    model = SSL(cfg).to("cuda")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    micro_batches = [loaded(cfg), loaded(cfg)]
    losses = sslvit.backward_in_parts(model, micro_batches, cfg, nullcontext, scaler)
    for tensor in losses.values():
        assert tensor.device.type == "cuda"
    for p in model.parameters():
        assert not p.requires_grad or p.grad.device.type == "cuda"


def test_a_full_gpu_is_one_line_that_helps(tmp_path, monkeypatch, capfd):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    monkeypatch.setattr(sslvit.SSL, "forward", full)
    assert run("--steps", "1", out=tmp_path) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert "--accum" in err
    assert "--checkpointing" in err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("words", ["", "--accum 2", "--dtype fp16", "--compile"])
@pytest.mark.parametrize("objective", ["moco", "simmim", "hybrid"])
def test_cuda(tmp_path, objective, words):
    common = ["--steps", "4", "--workers", "2", "--device", "cuda"]
    words = [*common, *words.split(), "--objective", objective]
    assert run(*words, out=tmp_path) == 0
    assert run(*words, "--resume", out=tmp_path) == 0


@pytest.mark.parametrize("parts", [1, 4])
def test_compile_has_no_graph_break_and_does_not_compile_again(parts, monkeypatch):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    true = torch.compile

    def compile_whole(function, **options):
        # fullgraph: a break is an error
        return true(function, fullgraph=True, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compile_whole)
    cfg = config(lam=0.5)
    model = SSL(cfg)
    sslvit.compile_encoders(model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batch = [loaded(cfg)] * parts
    counts = []
    for _ in range(3):
        if parts == 1:
            losses = model(*sslvit.augment(batch[0], cfg, "cpu"))
            (losses["mim"] + losses["cl"]).backward()
        else:
            sslvit.backward_in_parts(model, batch, cfg, nullcontext, scaler)
        model.update_average(0.9)
        # k-NN between the steps runs the encoder as it was written
        with torch.no_grad():
            model.encoder.forward(torch.randn(5, 3, 16, 16), record=True)
        counts.append(len(graphs))
    # queries, keys, masked images; queries once more for the pass without gradient
    assert counts[0] == (3 if parts == 1 else 4)
    assert counts[2] == counts[0]


# ---- Resuming, signals, faults ----


def flat(state, prefix=""):
    """{path: tensor or number} of a nested checkpoint."""
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, (list, tuple)):
        items = enumerate(state)
    else:
        return {prefix: state}
    found = {}
    for name, part in items:
        found |= flat(part, f"{prefix}/{name}")
    return found


def assert_equal_to_the_bit(a, b):
    a = flat(a)
    b = flat(b)
    assert a.keys() == b.keys()
    for name in a:
        if torch.is_tensor(a[name]):
            assert torch.equal(a[name], b[name]), name
        else:
            assert a[name] == b[name], name


@pytest.mark.parametrize(
    "objective,words",
    [
        ("moco", []),
        ("simmim", []),
        ("hybrid", []),
        ("hybrid", ["--workers", "2"]),
        ("hybrid", ["--accum", "2"]),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path, objective, words, monkeypatch, capfd
):
    words = ["--objective", objective, "--steps", "5", "--save-every", "3", *words]
    assert run(*words, out=tmp_path / "whole") == 0
    save = sslvit.save_checkpoint

    def save_and_be_stopped(path, state):
        save(path, state)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(sslvit, "save_checkpoint", save_and_be_stopped)
    assert run(*words, out=tmp_path / "cut") == 143
    monkeypatch.setattr(sslvit, "save_checkpoint", save)
    assert "--resume" in capfd.readouterr().out
    assert checkpoint_of(tmp_path / "cut")["step"] == 4
    assert run(*words, "--resume", out=tmp_path / "cut") == 0
    whole = checkpoint_of(tmp_path / "whole")
    cut = checkpoint_of(tmp_path / "cut")
    assert whole["config"]["lam"] == {"moco": 1, "simmim": 0, "hybrid": 0.2}[objective]
    for part in ("model", "optimizer", "rng", "step"):
        assert_equal_to_the_bit(whole[part], cut[part])
    lines = log_of(tmp_path / "cut")
    assert [row["step"] for row in lines] == [0, 1, 2, 3, 4, 5]
    full = log_of(tmp_path / "whole")
    assert [row.get("loss") for row in lines] == [row.get("loss") for row in full]
    assert (tmp_path / "cut" / "loss.png").exists()


def test_kill_9_while_saving_leaves_the_last_checkpoint(tmp_path):
    code = """
import signal, torch
save = torch.save
calls = []
def dying(state, file):
    calls.append(file)
    if len(calls) == 2:
        file.write(b'half a checkpoint')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)
torch.save = dying
sslvit.main(sys.argv[1:])
"""
    words = "--objective simmim --steps 6 --save-every 2".split()
    process = run_python(code, *QUICK, *words, "--out", str(tmp_path))
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / "ckpt.pt.tmp").exists()
    assert checkpoint_of(tmp_path)["step"] == 2
    assert run(*words, "--resume", out=tmp_path) == 0
    assert checkpoint_of(tmp_path)["step"] == 6


def test_kill_9_at_twenty_random_moments_loses_at_most_one_save_interval(tmp_path):
    code = """
import random, signal, time, torch
random.seed(0)
run = sys.argv[-1]
path = run + '/ckpt.pt'
lost = []
# so that what is forked starts at once
sslvit.main([*sys.argv[1:-1], run + '.warm', '--steps', '1'])
for trial in range(20):
    console = f'{run}.{trial}'
    argv = sys.argv[1:]
    if os.path.exists(path):
        argv = [*argv, '--resume']
    child = os.fork()
    if child == 0:
        os.dup2(os.open(console, os.O_CREAT | os.O_WRONLY), 1)
        os._exit(sslvit.main(argv))
    while not (os.path.exists(console) and '\\nstep ' in open(console).read()):
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    lines = [line for line in open(console) if line.startswith('step ')]
    saved = 0
    if os.path.exists(path):
        saved = torch.load(path)['step']
    lost.append(int(lines[-1].split()[1]) - saved)
print('saved', saved, len(lost), max(lost))
"""
    words = "--objective simmim --steps 100000 --save-every 2".split()
    process = run_python(code, *QUICK, *words, "--out", str(tmp_path / "run"))
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    saved, runs, lost = map(int, out.split("saved")[1].split())
    assert saved > 0
    assert runs == 20
    assert 0 <= lost <= 2


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    sslvit.save_checkpoint(tmp_path / "ckpt.pt", {"step": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        sslvit.save_checkpoint(tmp_path / "ckpt.pt", {"step": 2})
    assert checkpoint_of(tmp_path) == {"step": 1}


def test_a_full_disk_stops_and_keeps_the_old_checkpoint(tmp_path, monkeypatch, capfd):
    true = sslvit.save_checkpoint

    def full_at_four(path, state):
        if state["step"] == 4:
            raise OSError("No space left on device")
        true(path, state)

    monkeypatch.setattr(sslvit, "save_checkpoint", full_at_four)
    words = "--objective simmim --steps 6 --save-every 2".split()
    assert run(*words, out=tmp_path) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert "step 4 was not saved" in err
    assert "--resume" in err
    assert checkpoint_of(tmp_path)["step"] == 2


def test_collapse_is_said_once(tmp_path, monkeypatch, capfd):
    # all features alike
    monkeypatch.setattr(F, "normalize", lambda x, dim: torch.ones_like(x))
    assert run("--objective", "simmim", "--steps", "5", out=tmp_path) == 0
    assert capfd.readouterr().out.count("features collapse") == 1


def test_a_bad_number_stops_with_its_step(tmp_path, monkeypatch, capfd):
    true = sslvit.masked_l1
    calls = []

    def bad_at_third(*args):
        calls.append(args)
        if len(calls) == 3:
            return true(*args) * math.nan
        return true(*args)

    monkeypatch.setattr(sslvit, "masked_l1", bad_at_third)
    words = "--log-every 4 --objective simmim --steps 8 --save-every 2".split()
    assert run(*words, out=tmp_path) == 1
    err = capfd.readouterr().err
    assert "not finite by step 3" in err
    assert "ckpt.pt" in err
    # no bad weights were saved
    assert checkpoint_of(tmp_path)["step"] == 2


@pytest.mark.parametrize(
    "dtype,loss,norm,is_fine",
    [
        ("fp32", 1.0, 1.0, True),
        ("fp32", math.nan, 1.0, False),
        ("fp32", 1.0, math.inf, False),
        # the scaler leaves such a step out
        ("fp16", 1.0, math.inf, True),
        ("fp16", math.inf, 1.0, False),
    ],
)
def test_which_numbers_stop_a_run(dtype, loss, norm, is_fine):
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == "fp16")
    row = {"step": 7, "loss": loss, "norm": norm}
    if is_fine:
        sslvit.stop_if_not_finite(row, {"step": 6}, scaler)
    else:
        with pytest.raises(FloatingPointError, match="step 7"):
            sslvit.stop_if_not_finite(row, {"step": 6}, scaler)


# ---- 7. Command line ----


def test_the_loss_falls_and_everything_is_written(tmp_path, capfd):
    words = "--objective simmim --steps 40 --lr 0.1 --log-every 20".split()
    assert run(*words, out=tmp_path) == 0
    out = capfd.readouterr().out
    first, second = out.splitlines()[:2]
    assert "simmim (λ = 0): ViT-micro, 16 px" in first
    assert "minutes left" in second
    assert "chance 0.125" in out
    rows = log_of(tmp_path)
    assert rows[-1]["mim"] < 0.9 * rows[1]["mim"]
    names = {"lr", "momentum", "norm", "std", "images/s", "stall", "broken"}
    assert names <= set(rows[-1])
    # step 20 is 16 of the 36 steps after a warm-up of 4
    half = 0.1 * 8 / 256 * 0.5 * (1 + math.cos(math.pi * 16 / 36))
    assert [row["lr"] for row in rows[2:]] == pytest.approx([half, 0])
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert {"config", "model", "optimizer", "scaler", "step", "rng", "log"} <= set(
        state
    )


@pytest.mark.parametrize("objective", ["moco", "simmim", "hybrid"])
def test_a_run_ends_with_pictures_and_the_next_command(tmp_path, objective, capfd):
    assert run("--objective", objective, "--steps", "1", out=tmp_path) == 0
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.endswith(f"python analyze.py {tmp_path}/ckpt.pt")
    Image.open(tmp_path / "loss.png").verify()
    # MoCo predicts no pixels
    picture = tmp_path / "reconstruction.png"
    assert picture.exists() == (objective != "moco")
    if picture.exists():
        image = np.asarray(Image.open(picture).convert("RGB"))
        assert image.shape[0] > 500
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 500


def test_nothing_is_overwritten(tmp_path, capfd):
    words = ["--objective", "simmim", "--steps", "1"]
    assert run(*words, out=tmp_path) == 0
    before = (tmp_path / "ckpt.pt").read_bytes()
    assert run(*words, out=tmp_path) == 2
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert "--overwrite" in capfd.readouterr().err
    assert run(*words, "--resume", "--model", "tiny", out=tmp_path) == 2
    assert "cannot change at --resume" in capfd.readouterr().err
    assert run(*words, "--overwrite", out=tmp_path) == 0


@pytest.mark.parametrize(
    "state",
    [
        {"weights": 1},
        {"optimizer": {}, "config": {"width": 24}},  # of another version
        [1, 2],
    ],
)
def test_a_foreign_checkpoint_is_not_resumed(tmp_path, state, capfd):
    sslvit.save_checkpoint(tmp_path / "ckpt.pt", state)
    assert run("--resume", out=tmp_path) == 2
    assert "not a run of this version" in capfd.readouterr().err


class Attack:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["SSLVIT_ATTACK"],)


def test_a_checkpoint_with_code_is_refused_unrun(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SSLVIT_ATTACK", str(tmp_path / "ran"))
    torch.save({"step": Attack()}, tmp_path / "ckpt.pt")
    assert run("--resume", out=tmp_path) == 2
    assert not (tmp_path / "ran").exists()
    assert "not a checkpoint" in capfd.readouterr().err


BAD_INPUT = """
    --no-such-flag
    --lam 1.5
    --lam -0.1
    --lam nan
    --lam 0.5 --objective moco
    --image-size 30
    --image-size 0
    --mask-patch-size 6
    --batch-size 0
    --batch-size 1
    --batch-size 6 --accum 4
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
    --resume
    --device cuda:99
    --dtype int8
    --out FILE/run
    --log-every 0
    --mask-ratio 0
    --seed -1
""".strip().splitlines()


@pytest.mark.parametrize("bad", [line.strip() for line in BAD_INPUT])
def test_bad_input_is_one_clear_line_and_status_2(tmp_path, bad, capfd):
    (tmp_path / "file").write_text("x")
    for name in ("empty", "text", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    (tmp_path / "broken" / "a.png").write_text("x")
    words = bad.split()
    for name in ("file", "empty", "text", "broken"):
        words = [word.replace(name.upper(), str(tmp_path / name)) for word in words]
    common = ["--steps", "1", "--preset", "micro", "--out", str(tmp_path / "run")]
    assert sslvit.main([*QUICK, *common, *words]) == 2
    err = capfd.readouterr().err.strip()
    assert len(err.splitlines()) == 1, err
    assert err.startswith("sslvit.py: ")
    assert len(err) > 25


def test_help_tells_every_flag_and_default(capfd):
    with pytest.raises(SystemExit, match="0"):
        sslvit.main(["--help"])
    out = " ".join(capfd.readouterr().out.split())
    for name, value in vars(Config()).items():
        assert f"{sslvit.flag_of(name)} " in out
        assert f"[{value}]" in out
    for name in ("--lam", "--mask-patch-size", "--freeze-patch-embed", "--hue-shift"):
        assert name in out


def test_presets_are_the_papers_recipes():
    moco = sslvit.parse(["--data", "x", "--objective", "moco"])[0]
    assert moco.preset == "imagenet"
    assert (moco.model, moco.image_size, moco.patch_size) == ("base", 224, 16)
    assert (moco.batch_size, moco.lr, moco.weight_decay) == (4096, 1.5e-4, 0.1)
    assert (moco.epochs, moco.temperature, moco.proj_hidden) == (300, 0.2, 4096)
    assert moco.warmup * moco.epochs == pytest.approx(40)
    assert (moco.crop_min, moco.hue_shift, moco.blur) == (0.08, 0.1, 2.0)
    assert (moco.lam, moco.clip, moco.momentum) == (1.0, 0.0, 0.99)
    simmim = sslvit.parse(["--data", "x", "--objective", "simmim"])[0]
    assert simmim.lr * 512 / 256 == 1e-4
    assert (simmim.weight_decay, simmim.positions) == (0.05, "relative")
    assert simmim.warmup * simmim.epochs == 10
    assert (simmim.lam, simmim.clip) == (0.0, 5.0)
    assert (simmim.mask_patch_size, simmim.mask_ratio) == (32, 0.6)
    assert sslvit.SIZES["small"]["num_heads"] == 12


def test_what_is_given_goes_before_the_recipe():
    cfg, given = sslvit.parse("--preset small32 --steps 7 --blur 1 --lam 0.4".split())
    assert (cfg.steps, cfg.epochs, cfg.blur, cfg.lam) == (7, 0, 1.0, 0.4)
    assert (cfg.hue_shift, cfg.out) == (0.1, "runs/small32-hybrid-0.4")
    assert given == {"preset": "small32", "steps": 7, "blur": 1.0, "lam": 0.4}


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
    test = Stimuli(50, 32, 0, "test")
    image, shape, texture, mask = train[7]
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert mask.shape == (32, 32)
    assert mask.dtype == bool
    assert np.array_equal(image, Stimuli(50, 32, 0)[7][0])
    assert not np.array_equal(image, Stimuli(50, 32, 1)[7][0])
    seen = {train[i][0].tobytes() for i in range(50)}
    assert len(seen) == 50
    assert not seen & {test[i][0].tobytes() for i in range(50)}
    assert np.array_equal(train.render(7, shape, texture)[0], image)
    # the outline does not tell the texture
    assert np.array_equal(train.render(7, shape, (texture + 1) % 8)[1], mask)
    area = np.mean([train[i][3].mean() for i in range(50)])
    assert 0.05 < area < 0.7


def test_shape_and_texture_are_independent():
    source = Stimuli(4000, 8)
    pairs = np.array([source[i][1:3] for i in range(4000)])
    table = np.histogram2d(*pairs.T, bins=8)[0]
    expected = table.sum(1)[:, None] * table.sum(0) / 4000
    # chi² with 49 degrees of freedom, p = 0.001
    assert ((table - expected) ** 2 / expected).sum() < 85


def test_small_image_files_are_decoded_once_and_kept(tmp_path):
    for name, side in (("small", 32), ("large", 8000)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (side, 16), "red").save(tmp_path / name / "a.png")
    source = sslvit.ImageFolder(tmp_path / "small")
    image, labels = source.load(0)
    (tmp_path / "small" / "a.png").unlink()
    assert source.load(0)[0] is image
    assert labels == [0]
    assert np.array_equal(np.asarray(image)[0, 0], [255, 0, 0])
    # 1,000 of them would be 384 MB
    large = sslvit.ImageFolder(tmp_path / "large")
    large *= 1000
    large.load(0)
    assert not large.kept


def test_small_stimuli_are_drawn_once_and_kept():
    source = Stimuli(20, 16)
    kept, labels = source.load(5)
    assert kept is source.load(5)[0]
    assert labels == [*source[5][1:3]]
    assert np.array_equal(np.asarray(kept), source[5][0])
    # 20,000 of 96 px would be 553 MB
    large = Stimuli(20000, 96)
    assert large.load(5)[0].size == (96, 96)
    assert not large.kept


# ---- 8. Workshop: image files ----


def as_image(mode):
    ramp = np.tile(np.linspace(0, 255, 24).astype(np.uint8), (16, 1))
    rgb = np.stack([ramp, 255 - ramp, ramp // 2], -1)
    alpha = np.where(ramp > 127, 255, 0).astype(np.uint8)
    if mode == "L":
        return Image.fromarray(ramp)
    if mode == "1":
        return Image.fromarray(ramp).convert("1")
    if mode == "I;16":
        return Image.fromarray(ramp.astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(ramp.astype(np.float32))
    if mode == "RGBA":
        return Image.fromarray(np.dstack([rgb, alpha]))
    if mode == "P":
        return Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE)
    return Image.fromarray(rgb).convert(mode)


@pytest.mark.parametrize(
    "mode,suffix",
    [
        ("L", "jpg"),
        ("L", "png"),
        ("1", "png"),
        ("I;16", "png"),
        ("CMYK", "jpg"),
        ("P", "png"),
        ("RGBA", "png"),
        ("LA", "png"),
        ("F", "tiff"),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"x.{suffix}"
    as_image(mode).save(path)
    out = sslvit.center_crop(Image.open(path), 16)
    assert out.shape == (3, 16, 16)
    assert out.dtype == np.uint8
    # the centred square
    ramp = np.tile(np.linspace(0, 255, 24)[4:20], (16, 1))
    red = out[0].astype(float)
    if mode in ("L", "I;16", "F"):
        assert abs(out.astype(float) - ramp).max() < 6
    if mode in ("P", "CMYK"):
        assert abs(red - ramp).mean() < 12
    if mode == "RGBA":
        # transparent is white
        assert (out[:, :, :7] == 255).all()
        assert abs(red[:, 9:] - ramp[:, 9:]).max() < 3


def test_the_cameras_orientation_is_obeyed(tmp_path):
    # stored with red on top, to be turned clockwise: red comes to the right
    tall = Image.new("RGB", (20, 40))
    tall.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    tall.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    out = sslvit.center_crop(Image.open(tmp_path / "turned.jpg"), 8)
    assert out[0, 4, 6] > 200
    assert out[0, 4, 1] < 50


def test_a_picture_of_one_pixel_can_be_cropped():
    dot = Image.new("RGB", (1, 1), (9, 8, 7))
    out = sslvit.random_crops(dot, 8, [0.08, 1.0], np.random.default_rng(0))
    assert out.shape == (2, 3, 8, 8)
    assert (out[:, 0] == 9).all()


def test_a_large_jpeg_is_decoded_small_and_gives_the_same_crop(tmp_path):
    y, x = np.mgrid[:800, :1200]
    pattern = np.stack([x % 256, y % 256, (x + y) // 8], -1).astype(np.uint8)
    photo = Image.fromarray(pattern).reduce(4).resize((1200, 800), Image.BICUBIC)
    photo.save(tmp_path / "large.jpg", quality=95)

    def crop(image):
        crops = sslvit.random_crops(image, 32, [0.5], np.random.default_rng(3))
        return crops.astype(float)

    file = Image.open(tmp_path / "large.jpg")
    fast = crop(file)
    # decoded at 1/8
    assert file.size[0] < 600
    full = crop(Image.open(tmp_path / "large.jpg").convert("RGB"))
    assert abs(fast - full).mean() < 4


def test_crops_are_rounded_to_whole_pixels_and_keep_one():
    # row, column: 8 · row + column
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    image = Image.fromarray(pixels)
    boxes = [
        (2.4, 0.4, 6.4, 4.4),  # nearest whole pixels: 2, 0, 6, 4
        (7.6, 5.6, 7.9, 5.9),  # 8 to 8 and 6 to 6: empty
    ]
    out = sslvit.cut(image, boxes, 4)
    assert (out[0, 0] == pixels[0:4, 2:6]).all()
    assert (out[1, 0] == pixels[5, 7]).all()


def test_crop_boxes():
    rng = np.random.default_rng(0)
    boxes = np.array([sslvit.crop_box(50, 40, 0.2, rng) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    width = right - left
    height = bottom - top
    assert boxes.min() >= 0
    assert right.max() <= 50
    assert bottom.max() <= 40
    share = width * height / 2000
    assert share.min() >= 0.2 - 1e-9
    assert (width / height).min() >= 0.75 - 1e-9
    assert (width / height).max() <= 4 / 3 + 1e-9
    # uniform in 0.2 … 1, less what does not fit
    assert 0.5 < share.mean() < 0.62
    # no crop of this share has an allowed aspect: a square instead
    left, top, right, bottom = sslvit.crop_box(400, 4, 1.0, rng)
    assert right - left == bottom - top == 4


def fill(folder, count, size=(9, 7)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (10 * i % 256, 0, 0)).save(folder / f"{i:02}.png")


@pytest.mark.parametrize("tested", ["val", "test"])
def test_a_folder_with_train_and_val_or_test(tmp_path, tested):
    for split in ("train", tested):
        fill(tmp_path / split / "cat", 20)
        fill(tmp_path / split / "dog", 20)
    (tmp_path / "readme.txt").write_text("not an image")
    train, test = sslvit.find_data(config(data=str(tmp_path)))
    assert len(train) == len(test) == 40
    assert train.classes == (["cat", "dog"],)
    assert test.load(39)[1] == [1]


def test_a_test_folder_beside_val_is_not_looked_at(tmp_path, capfd):
    for split in ("train", "val"):
        fill(tmp_path / split / "cat", 10)
        fill(tmp_path / split / "dog", 10)
    (tmp_path / "test").mkdir()
    train, test = sslvit.find_data(config(data=str(tmp_path)))
    assert len(train) == len(test) == 20
    assert "/val/" in test[0][0]
    words = ["--data", str(tmp_path), "--preset", "micro", "--steps", "1"]
    assert run(*words, out=tmp_path / "run") == 0
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.endswith(f"{tmp_path}/run/ckpt.pt --data {tmp_path}")


def test_class_folders_and_flat_folders_hold_a_tenth_back(tmp_path):
    fill(tmp_path / "classes" / "cat", 20)
    fill(tmp_path / "classes" / "dog", 20)
    train, test = sslvit.find_data(config(data=str(tmp_path / "classes")))
    assert len(train) == 36
    assert len(test) == 4
    assert not {path for path, _ in train} & {path for path, _ in test}
    fill(tmp_path / "flat", 20)
    train, test = sslvit.find_data(config(data=str(tmp_path / "flat")))
    assert len(train) == 18
    assert train.label_names == ()
    # too few to be divided
    fill(tmp_path / "few", 19)
    train, test = sslvit.find_data(config(data=str(tmp_path / "few")))
    assert len(train) == 19
    assert test is None


def test_linked_folders_are_followed_once(tmp_path):
    """cat is a link (as in subsets of ImageNet).

    dog links to a folder above it and to a folder that links back.
    """
    store = tmp_path / "store" / "felines"
    root = tmp_path / "root"
    aside = tmp_path / "aside"
    for folder in (store, root / "dog", aside):
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / "0.png")
    (root / "cat").symlink_to(store)
    (root / "dog" / "up").symlink_to(root)
    (root / "dog" / "aside").symlink_to(aside)
    (aside / "back").symlink_to(root / "dog")
    whole = sslvit.ImageFolder(root)
    assert whole.classes == (["cat", "dog"],)
    assert [labels for _, labels in whole] == [[0], [1], [1]]
    names = [os.path.relpath(path, root) for path, _ in whole]
    assert names == ["cat/0.png", "dog/0.png", "dog/aside/0.png"]


def test_a_folder_with_eight_links_belongs_to_the_first(tmp_path):
    """In every process: ranks must agree."""
    store = tmp_path / "store"
    fill(store, 1)
    for name in "hgfedcba":
        (tmp_path / "many" / name).mkdir(parents=True)
        (tmp_path / "many" / name / "link").symlink_to(store)
    found = sslvit.list_images(tmp_path / "many")
    assert found == [("a", str(tmp_path / "many" / "a" / "link" / "00.png"))]


OTHER_CLASSES = [("",), ("dog",), ("cat", "emu")]


def write_splits(tmp_path, val):
    """A flat val/ (as ImageNet's comes), one with fewer classes, one with others."""
    for folder in ("train/cat", "train/dog", *(f"val/{name}" for name in val)):
        fill(tmp_path / folder, 20, size=(16, 16))
    return ["--data", str(tmp_path), "--preset", "micro", "--knn-images", "20"]


@pytest.mark.parametrize("val", OTHER_CLASSES)
def test_no_accuracy_where_the_classes_of_train_and_val_differ(tmp_path, capfd, val):
    words = write_splits(tmp_path, val)
    assert run(*words, "--steps", "2", out=tmp_path / "run") == 0
    assert "knn" not in capfd.readouterr().out


@pytest.mark.parametrize("val", OTHER_CLASSES)
def test_no_analysis_of_labels_where_the_classes_differ(tmp_path, capfd, val):
    import analyze

    words = write_splits(tmp_path, val)
    out = tmp_path / "run"
    assert run(*words, "--steps", "1", out=out) == 0
    argv = [f"{out}/ckpt.pt", *words[:2], "--images", "20", "--out", str(out)]
    assert analyze.main(argv) == 0
    assert "skipped layers: needs labels" in capfd.readouterr().out


def test_a_broken_image_is_named_counted_and_replaced(tmp_path, capfd):
    data = tmp_path / "data"
    fill(data, 12, size=(20, 20))
    (data / "03.png").write_bytes(b"no image")
    words = f"--data {data} --preset micro --steps 3 --objective simmim".split()
    assert run(*words, out=tmp_path / "run") == 0
    out, err = capfd.readouterr()
    assert err.count("03.png") == 1
    assert "broken 1" in out
    # truncated; two of twelve are more than 1 %
    (data / "07.png").write_bytes((data / "08.png").read_bytes()[:40])
    assert run(*words, out=tmp_path / "run2") == 2
    assert "mend the folder" in capfd.readouterr().err


def test_hostile_files_are_named_once_counted_and_replaced(tmp_path, capfd):
    """Zero bytes, half a JPEG, a bomb, a file that is gone: four of 422.

    Odd names and a circle of links are no harm.
    """
    good = Image.new("RGB", (20, 20), (200, 0, 0))
    for i in range(416):
        good.save(tmp_path / f"{i:03}.jpg", quality=30)
    good.save(tmp_path / "new\nline and blank.png")
    good.save(os.fsencode(tmp_path) + b"/\xff\xfe.png", "png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "half.jpg").write_bytes((tmp_path / "000.jpg").read_bytes()[:300])
    # 2.5 gigapixels in 33 bytes
    size = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(size))
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + size + checksum
    (tmp_path / "bomb.png").write_bytes(bomb)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path)
    # 48 · 8 = 384: all but the held-out tenth
    words = f"--data {tmp_path} --preset micro --steps 48 --objective simmim".split()
    assert run(*words, out=tmp_path / "run") == 0
    out, err = capfd.readouterr()
    names = ("empty.png", "half.jpg", "bomb.png", "gone.png")
    named = [name for name in names if name in err]
    assert len(named) >= 3
    assert all(err.count(name) == 1 for name in named)
    assert f"broken {len(named)}" in out


# ---- 8. Workshop: what a loader gives ----


def test_samples_depend_on_seed_epoch_and_index_alone():
    views = TrainingViews(Stimuli(20, 16), config())
    first = flat(views[0, 5])
    again = flat(views[0, 5])
    assert all(np.array_equal(first[name], again[name]) for name in first)
    next_epoch = views[1, 5]
    assert not np.array_equal(first["/crops"], next_epoch["crops"])
    assert first["/crops"].shape == (3, 3, 16, 16)
    assert first["/mask"].sum() == 10
    assert first["/broken"] == -1
    other_seed = TrainingViews(Stimuli(20, 16), config(seed=1))[0, 5]
    assert not np.array_equal(first["/crops"], other_seed["crops"])


def test_each_method_is_given_what_it_looks_at():
    both = TrainingViews(Stimuli(20, 16), config(lam=0.2))[0, 5]
    assert both["crops"].shape == (3, 3, 16, 16)
    moco = TrainingViews(Stimuli(20, 16), config(lam=1.0))[0, 5]
    assert moco["crops"].shape == (2, 3, 16, 16)
    assert {name: len(value) for name, value in moco["colours"].items()} == {
        "order": 2,
        "factors": 2,
        "grey": 2,
        "blur": 2,
        "solarise": 2,
    }
    # SimMIM sees the colours as they are
    simmim = TrainingViews(Stimuli(20, 16), config(lam=0.0))[0, 5]
    assert simmim["crops"].shape == (1, 3, 16, 16)
    assert simmim["colours"] == {}


def test_every_view_is_flipped_half_of_the_time():
    """An image whose left half is black tells on which side a crop saw it."""
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:, 16:] = 255
    source = OneImage(pixels)
    views = TrainingViews(source, config(lam=0.2, crop_min=1.0))
    black_is_left = []
    for epoch in range(200):
        crops = views[epoch, 0]["crops"].astype(float)
        black_is_left.append(
            crops[..., :8].mean((1, 2, 3)) < crops[..., 8:].mean((1, 2, 3))
        )
    shares = np.mean(black_is_left, axis=0)
    assert shares == pytest.approx([0.5, 0.5, 0.5], abs=0.12)


class OneImage(list):
    """A data set of one image without labels."""

    def __init__(self, pixels):
        super().__init__([pixels])

    def load(self, index):
        return Image.fromarray(self[0]), []


def test_colours_are_drawn_as_often_as_byol_says():
    cfg = config(hue_shift=0.1, blur=2.0)
    views = TrainingViews(Stimuli(1, 16), cfg)
    colours = default_collate([views[epoch, 0] for epoch in range(1000)])["colours"]

    def shares(chosen):
        return chosen.float().mean(dim=0).tolist()

    def close(*values):
        return pytest.approx(values, abs=0.05)

    # of view 1, of view 2
    assert shares(colours["order"][:, :, 0] >= 0) == close(0.8, 0.8)
    assert shares(colours["grey"]) == close(0.2, 0.2)
    assert shares(colours["blur"] > 0) == close(1.0, 0.1)
    assert shares(colours["solarise"]) == close(0.0, 0.2)
    sigma = colours["blur"][:, 0]
    assert 0.1 <= sigma.min() < 0.15
    assert 1.95 < sigma.max() <= 2.0
    reach = (colours["factors"] - torch.tensor([1, 1, 1, 0])).abs().amax(dim=(0, 1))
    torch.testing.assert_close(
        reach, torch.tensor([0.4, 0.4, 0.2, 0.1]), atol=0.01, rtol=0
    )


def test_centre_crops_are_the_middle_of_each_image():
    class Wide:
        def __len__(self):
            return 2

        def load(self, index):
            if index == 0:
                raise OSError("broken")
            # red, green, blue thirds
            image = Image.new("RGB", (24, 8), (0, 255, 0))
            image.paste((255, 0, 0), (0, 0, 8, 8))
            image.paste((0, 0, 255), (16, 0, 24, 8))
            return image, [3]

    crops = sslvit.CenterCrops(Wide(), 8)
    # the next one that can be read
    for index in (0, 1):
        crop, labels = crops[index]
        assert crop.shape == (3, 8, 8)
        assert (crop[1] == 255).all()
        assert labels.tolist() == [3]


def test_batches_cover_each_epoch_and_do_not_depend_on_ranks_or_start():
    def keys(start, accum, rank, world_size):
        cfg = config(batch_size=8, accum=accum)
        return [*sslvit.batch_keys(cfg, 20, range(start, 5), rank, world_size)]

    stream = [key for batch in keys(0, 1, 0, 1) for key in batch]
    twice = [(epoch, index) for epoch in (0, 1) for index in range(20)]
    assert sorted(stream) == twice
    order = [index for _, index in stream]
    assert order[:20] != order[20:]
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


# ---- 8. Workshop: k-NN ----


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


def test_knn_hears_a_quiet_direction_beside_a_loud_one():
    # 10 times louder: not what the labels follow
    bank = torch.tensor([[10.0, 1], [-10, 1], [10, -1], [-10, -1]])
    known = torch.tensor([[1, 0], [1, 2], [0, 3], [0, 4]])
    # second nearest of the first: whitened the second row, raw the third
    queries = torch.tensor([[9.0, 1], [-9, -1]])
    assert sslvit.knn(bank, known[:, :1], queries, k=2).tolist() == [[1], [0]]
    assert sslvit.knn(bank, known, queries, k=1).tolist() == [[1, 0], [0, 4]]
    layers = bank[None].repeat(3, 1, 1)
    assert sslvit.knn(layers, known, queries, k=1).shape == (3, 2, 2)


def test_knn_on_separable_and_on_meaningless_labels():
    encoder = ViT(16, 4, **TINY).eval()

    def score(train, test):
        cfg = config(knn_images=len(train))
        return sslvit.knn_scores(encoder, (train, test), cfg, nullcontext)

    # the class is the brightness: a network that sees anything gets all right
    labels = [i % 2 for i in range(80)]
    colours = Plain([200 * label for label in labels], labels)
    assert score(colours, colours) == {"knn_class": 1}
    # 15 of 20 neighbours say 1 to all six queries, whose labels are 0 1 1 1 1 1
    blind = Plain([0] * 20, [int(i % 4 > 0) for i in range(20)])
    assert score(blind, blind) == {"knn_class": 0.8333}
    assert score(blind, None) == {}


# ---- 8. Workshop: plan ----


def test_the_plan_of_vit_base_by_hand(tmp_path, monkeypatch, capfd):
    """197 tokens, 12 blocks: 12·197·(24·768² + 4·197·768) = 34.9 GFLOP a pass.

    Hybrid: 3 · 3 + 2 = 11 passes, in micro-batches two more. 300 epochs of 1.28 million
    images are 3.84e8: 1.74e20 FLOP, at 28 % of an A100's 312 TFLOP/s 555 hours.
    """
    monkeypatch.setattr(sslvit, "measure_rate", lambda cfg: 1000)
    argv = ["--preset", "imagenet", "--dry-run", "--steps", "93835"]
    assert sslvit.main([*argv, "--out", str(tmp_path / "none")]) == 0
    assert not (tmp_path / "none").exists()
    lines = capfd.readouterr().out.splitlines()
    table = {line.split()[0]: line.split() for line in lines}
    weights, flops = table["base"][1:3]
    assert (weights, flops) == ("85.8", "454")
    # 1 and 8 A100, 1, 8 and 64 H100
    hours = [float(word) for word in table["base"][-5:]]
    assert hours == pytest.approx([555, 69.3, 175, 21.9, 2.31], rel=0.01)
    # 3.84e8 images / 1000 / 3600
    assert lines[-1].endswith("1000 images/s, 107 h")


def test_the_plan_has_every_size_and_leaves_nothing(tmp_path, capfd):
    out = tmp_path / "none"
    assert run("--dry-run", "--steps", "9", out=out) == 0
    lines = capfd.readouterr().out.splitlines()
    assert "72 images" in lines[0]
    assert [line.split()[0] for line in lines[2:-1]] == [*sslvit.SIZES]
    assert "with ViT-micro: measured" in lines[-1]
    assert not out.exists()


def test_the_plan_counts_imagenet_where_it_is_not_there(monkeypatch, capfd):
    monkeypatch.setattr(sslvit, "measure_rate", lambda cfg: 1000)
    assert sslvit.main(["--data", "/no/such/imagenet", "--dry-run"]) == 0
    # 300 · 1,281,167
    assert "3.84e+08 images" in capfd.readouterr().out.splitlines()[0]


def test_loaders_count_the_cpus_that_a_job_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert sslvit.usable_cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert sslvit.usable_cpus() == 1
