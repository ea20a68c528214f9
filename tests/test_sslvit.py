"""Worked examples for sslvit.py: every expected number follows from paper and pencil, or from an independent library."""

import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import analyze
import sslvit
from sslvit import SSL, Config, Stimuli, ViT

TINY = dict(width=24, depth=2, heads=3)
QUICK = "--batch-size 8 --image-size 16 --knn-images 16 --proj-hidden 16 --log-every 1 --device cpu".split()


@pytest.fixture(autouse=True)
def small_and_alone(monkeypatch):
    monkeypatch.setitem(sslvit.SIZES, "micro", TINY)
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    torch.manual_seed(0)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def config(**changes):
    return Config(
        **{**dict(image_size=16, proj_hidden=16, batch_size=8, accum=1, device="cpu", workers=0), **changes}
    )


# ---- 2. ViT ----


def test_tokens_records_and_shapes():
    vit = ViT(16, 4, **TINY).eval()
    x = torch.randn(2, 3, 16, 16)
    tokens, records = vit(x, record=True)
    torch.testing.assert_close(tokens, vit(x))  # the fused and the explicit attention are one function
    assert tokens.shape == (2, 17, 24) and len(records) == 2
    r = records[1]
    assert (
        r.attn.shape == (2, 3, 17, 17)
        and r.heads.shape == (2, 3, 17, 8)
        and r.mid.shape == r.out.shape == (2, 17, 24)
    )
    torch.testing.assert_close(r.attn.sum(-1), torch.ones(2, 3, 17))
    torch.testing.assert_close(vit.norm(r.out), tokens)
    assert vit(torch.randn(1, 3, 24, 8)).shape == (
        1,
        13,
        24,
    )  # another, oblong size: positions are interpolated
    with pytest.raises(ValueError):
        ViT(30, 4, **TINY)


@pytest.mark.parametrize("variant", ["learned", "layer_scale", "no_positions"])
def test_timm_parity(variant):
    timm = pytest.importorskip("timm")
    scale = 0.1 if variant == "layer_scale" else None
    positions, embed = ("none", "none") if variant == "no_positions" else ("learned", "learn")
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=5,
        init_values=scale,
        pos_embed=embed,
    ).eval()
    ours = ViT(32, 8, **TINY, positions=positions, num_classes=5, layer_scale=scale).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs.forward_features(x), atol=1e-5, rtol=1e-4)


def test_sincos_positions_by_hand():
    p = sslvit.sincos_positions(8, 2, 3)[0]  # frequencies 1 and 1/100
    assert p.shape == (7, 8) and p[0].abs().max() == 0  # CLS
    x, y = 2, 1  # the last of 2 × 3 patches
    hand = [
        f(v * w) for v, f in ((x, math.sin), (x, math.cos), (y, math.sin), (y, math.cos)) for w in (1, 0.01)
    ]
    torch.testing.assert_close(p[6], torch.tensor(hand))


def test_relative_position_bias_by_hand():
    vit = ViT(
        8, 4, 24, 1, 3, positions="none", rel_pos_bias=True
    )  # 2 × 2 patches: offsets -1, 0, 1 in y and x
    table = vit.rel_pos_bias["relative_position_bias_table"]
    assert table.shape == (9 + 3, 3) and vit.pos_embed is None
    table.data = torch.arange(12.0)[:, None].repeat(1, 3)
    bias = vit.position_bias(2, 2)
    assert bias.shape == (3, 5, 5) and torch.equal(bias[0], bias[2])
    # row (query) minus column (key), (Δy + 1)·3 + (Δx + 1); 9: CLS to patch, 10: patch to CLS, 11: CLS to CLS
    hand = [[11, 9, 9, 9, 9], [10, 4, 3, 1, 0], [10, 5, 4, 2, 1], [10, 7, 6, 4, 3], [10, 8, 7, 5, 4]]
    assert bias[0].tolist() == hand
    assert vit.position_bias(3, 4).shape == (3, 13, 13)
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(vit(x), vit(x, record=True)[0])  # both attention paths add it
    torch.testing.assert_close(vit(x, first=1), vit(x)[:, :1])  # what is not computed was not needed
    vit.position_bias(2, 2).sum().backward()
    assert table.grad.sum() == 3 * 25


def test_qkv_starts_as_three_xavier_matrices():
    weight = sslvit.Block(96, 3).attn["qkv"].weight
    bound = math.sqrt(6 / (96 + 96))  # of a 96 × 96 matrix; of the (288, 96) matrix it would be 0.125
    for part in weight.chunk(3):
        assert 0.98 * bound < part.abs().max() <= bound


def test_masked_pixels_are_not_seen_and_others_are():
    vit = ViT(16, 4, **TINY).eval()
    x, mask = torch.randn(1, 3, 16, 16), torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True  # patch in row 1, column 1
    hidden, seen = x.clone(), x.clone()
    hidden[..., 4:8, 4:8] = 9
    seen[..., 4:8, 8:12] = 9
    assert torch.equal(vit(x, mask), vit(hidden, mask)) and not torch.allclose(vit(x, mask), vit(seen, mask))
    token = torch.randn(1, 1, 24)
    assert not torch.allclose(vit(x, mask, mask_token=token), vit(x, mask))


# ---- 3. contrastive learning ----


def test_contrastive_loss_against_a_double_loop():
    q, k = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    total = 0.0
    for i in range(6):
        sims = [math.exp(F.cosine_similarity(q[i], k[j], dim=0).item() / 0.2) for j in range(6)]
        total -= math.log(sims[i] / sum(sims)) / 6
    assert sslvit.contrastive_loss(q, k, 0.2).item() == pytest.approx(2 * 0.2 * total, rel=1e-12)


def test_contrastive_loss_by_hand():
    eye = torch.eye(4)  # own key: cosine 1, three others: cosine 0
    assert sslvit.contrastive_loss(3 * eye, eye, 0.5).item() == pytest.approx(math.log(1 + 3 * math.exp(-2)))
    alike = torch.ones(4, 7)
    assert sslvit.contrastive_loss(alike, alike, 0.2).item() == pytest.approx(0.4 * math.log(4))


def test_schedules_by_hand():
    assert sslvit.lr_at(5, 110, 10, 2.0) == 1.0 and sslvit.lr_at(10, 110, 10, 2.0) == 2.0
    assert sslvit.lr_at(60, 110, 10, 2.0) == pytest.approx(1.0) and sslvit.lr_at(
        110, 110, 10, 2.0
    ) == pytest.approx(0)
    assert sslvit.lr_at(1, 1, 1, 2.0) == 2.0 and sslvit.lr_at(1, 1, 0.1, 2.0) == pytest.approx(0, abs=2)
    assert sslvit.momentum_at(0, 8, 0.99) == pytest.approx(0.99) and sslvit.momentum_at(8, 8, 0.99) == 1
    assert sslvit.momentum_at(4, 8, 0.99) == pytest.approx(0.995)


def test_average_by_hand():
    model = SSL(config(lam=1.0))
    key, query = model.key_encoder.norm.weight, model.encoder.norm.weight
    key.data.fill_(3.0), query.data.fill_(1.0)
    model.update_average(0.75)
    assert torch.all(key == 2.5) and not any(p.requires_grad for p in model.key_encoder.parameters())


def test_heads_end_in_a_batchnorm_without_affine():
    head = sslvit.mlp_head(8, 16, 16, 4)
    kinds = [type(m).__name__ for m in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear", "BatchNorm1d"]
    assert (
        not head[-1].affine
        and head[1].affine
        and all(m.bias is None for m in head if isinstance(m, nn.Linear))
    )
    y = head(torch.randn(32, 8))
    torch.testing.assert_close(y.mean(0), torch.zeros(4), atol=1e-5, rtol=0)


# ---- 4. masked image modelling ----


@pytest.mark.parametrize(
    "size,patch,unit,ratio,masked", [(224, 16, 32, 0.6, 120), (32, 4, 4, 0.6, 39), (40, 4, 8, 0.28, 28)]
)
def test_mask_counts(size, patch, unit, ratio, masked):
    mask = sslvit.random_mask(5, size, patch, unit, ratio, torch.Generator().manual_seed(1))
    assert mask.dtype == torch.bool and mask.shape == (5, (size // patch) ** 2)
    assert (
        mask.sum(1).tolist() == [masked] * 5
    )  # 30 of 49 units × 4, 39 of 64 × 1, 7 of 25 (0.28 × 25 = 7.0…01) × 4
    side, k = size // unit, unit // patch
    units = mask.reshape(5, side, k, side, k)
    assert torch.equal(units.any(4).any(2), units.all(4).all(2))  # a unit is masked as a whole
    assert not torch.equal(mask[0], mask[1])
    again = sslvit.random_mask(5, size, patch, unit, ratio, torch.Generator().manual_seed(1))
    assert torch.equal(mask, again)


def test_mask_units_must_fit():
    for sizes in ((224, 16, 24), (224, 16, 48)):
        with pytest.raises(ValueError):
            sslvit.random_mask(1, *sizes, 0.6)


def test_masked_l1_by_hand():
    pred, target = torch.zeros(1, 3, 2), torch.tensor([[[1.0, 3.0], [5.0, -7.0], [100.0, 100.0]]])
    assert (
        sslvit.masked_l1(pred, target, torch.tensor([[True, True, False]])).item() == 4.0
    )  # (1 + 3 + 5 + 7) / 4


def test_patchify_takes_each_patch_once_and_back():
    image = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    patches = sslvit.patchify(image, 2)
    assert patches.shape == (2, 6, 12)
    assert sorted(patches[1, 4].tolist()) == sorted(
        image[1, :, 2:4, 2:4].flatten().tolist()
    )  # row 1, column 1
    assert torch.equal(F.fold(patches.mT, (4, 6), 2, stride=2), image)


# ---- 5. the hybrid ----


def inputs(dtype=torch.float32):
    views = [torch.randn(8, 3, 16, 16, dtype=dtype) for _ in range(3)]
    return *views, sslvit.random_mask(8, 16, 4, 4, 0.6)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.encoder.named_parameters() if p.grad is not None}


def test_simmim_is_the_paper_spelt_out():
    model, (_, _, x, mask) = SSL(config(lam=0.0)), inputs()
    assert not hasattr(model, "projector") and not hasattr(model, "key_encoder")
    out = model(None, None, x, mask)
    pixels = model.decoder(model.encoder(x, mask, mask_token=model.mask_token))[:, 1:]
    recon = F.fold(pixels.mT, (16, 16), 4, stride=4)
    pixel_mask = (
        mask.reshape(8, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand(-1, 3, -1, -1)
    )
    assert out["mim"].item() == pytest.approx((recon - x).abs()[pixel_mask].mean().item(), rel=1e-5)
    assert out["cl"] == 0 and 0 < out["std"] < 2


def test_moco_is_the_paper_spelt_out():
    model, (x1, x2, _, mask) = SSL(config(lam=1.0)).double(), inputs(torch.float64)
    assert not hasattr(model, "decoder") and not hasattr(model, "mask_token")
    assert not model.encoder.patch_embed["proj"].weight.requires_grad  # frozen at its random start
    for p in model.key_encoder.parameters():
        p.data += 0.01 * torch.randn_like(p)
    out = model(x1, x2, None, mask)
    q1, q2 = (model.predictor(model.projector(model.encoder(x)[:, 0])) for x in (x1, x2))
    k1, k2 = (model.key_projector(model.key_encoder(x)[:, 0]).detach() for x in (x1, x2))

    def ctr(q, k):
        logits = F.normalize(q) @ F.normalize(k).T / 0.2
        return 2 * 0.2 * F.cross_entropy(logits, torch.arange(8))

    loss = ctr(q1, k2) + ctr(q2, k1)
    torch.testing.assert_close(out["cl"], loss)
    ours = gradients(model, out["cl"])
    theirs = gradients(model, loss)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-9, rtol=1e-7)
    assert out["mim"] == 0


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_hybrid_is_the_weighted_sum_of_the_pure_methods(lam):
    torch.manual_seed(1)
    hybrid, batch = SSL(config(lam=0.3, freeze_patch="no")).double(), inputs(torch.float64)
    pure = {end: SSL(config(lam=end, freeze_patch="no")).double() for end in (0.0, 1.0)}
    grads = {}
    for end, name in ((0.0, "mim"), (1.0, "cl")):
        own = pure[end].state_dict()
        pure[end].load_state_dict({k: v for k, v in hybrid.state_dict().items() if k in own})
        out = pure[end](*batch)
        torch.testing.assert_close(out[name], hybrid(*batch)[name])
        grads[name] = gradients(pure[end], out[name])
    out = hybrid(*batch)
    total = gradients(hybrid, (1 - lam) * out["mim"] + lam * out["cl"])
    for name, gradient in total.items():
        mim, cl = (grads[branch].get(name, 0) for branch in ("mim", "cl"))
        torch.testing.assert_close(gradient, (1 - lam) * mim + lam * cl, atol=1e-9, rtol=1e-7)


def test_hybrid_trains_the_patch_embedding_unless_told_otherwise():
    frozen = {(lam, how): not SSL(config(lam=lam, freeze_patch=how)).encoder.patch_embed["proj"].weight.requires_grad
              for lam in (0.0, 0.2, 1.0) for how in ("auto", "yes", "no")}  # fmt: skip
    assert frozen == {(lam, how): how == "yes" or (how, lam) == ("auto", 1.0) for lam, how in frozen}


def test_decoder_depth_and_simmim_positions():
    model, batch = SSL(config(decoder_depth=2, positions="relative")), inputs()
    assert [type(m).__name__ for m in model.decoder] == ["Block", "Block", "LayerNorm", "Linear"]
    assert model.encoder.pos_embed is None and model.encoder.blocks[0].ls1["gamma"][
        0
    ].item() == pytest.approx(0.1)
    out = model(*batch)
    (out["mim"] + out["cl"]).backward()
    assert model.encoder.rel_pos_bias["relative_position_bias_table"].grad.abs().sum() > 0


def test_checkpointing_changes_nothing():
    model, batch = SSL(config(lam=0.0)), inputs()
    plain = gradients(model, model(*batch)["mim"])
    model.encoder.checkpointing = True
    again = gradients(model, model(*batch)["mim"])
    for name in plain:
        torch.testing.assert_close(plain[name], again[name])


def test_decay_spares_vectors_and_tokens_except_in_moco():
    for lam, spared in ((0.0, True), (0.2, True), (1.0, False)):
        model = SSL(config(lam=lam))
        groups = sslvit.make_optimizer(model, config(lam=lam)).param_groups
        assert [g["weight_decay"] for g in groups] == [0.05, 0.0]
        counts = [len(g["params"]) for g in groups]
        assert sum(counts) == sum(p.requires_grad for p in model.parameters())
        assert (counts[1] > 0) == spared and all(p.squeeze().ndim > 1 for p in groups[0]["params"] if spared)


# ---- 6. data ----


def test_stimuli_are_a_function_of_seed_split_and_index():
    train, again, test = Stimuli(50, 32, 0), Stimuli(50, 32, 0), Stimuli(50, 32, 0, "test")
    image, shape, texture, mask = train[7]
    assert (
        image.shape == (32, 32, 3)
        and image.dtype == np.uint8
        and mask.shape == (32, 32)
        and mask.dtype == bool
    )
    assert np.array_equal(image, again[7][0]) and not np.array_equal(image, Stimuli(50, 32, 1)[7][0])
    seen = {train[i][0].tobytes() for i in range(50)}
    assert len(seen) == 50 and not seen & {test[i][0].tobytes() for i in range(50)}
    assert np.array_equal(train.render(7, shape, texture)[0], image)
    assert np.array_equal(
        train.render(7, shape, (texture + 1) % 8)[1], mask
    )  # the outline does not tell the texture
    assert 0.05 < np.mean([train[i][3].mean() for i in range(50)]) < 0.7


def test_shape_and_texture_are_independent():
    pairs = np.array([Stimuli(4000, 8)[i][1:3] for i in range(4000)])
    table = np.histogram2d(*pairs.T, bins=8)[0]
    expected = table.sum(1)[:, None] * table.sum(0) / 4000
    assert ((table - expected) ** 2 / expected).sum() < 85  # chi² with 49 degrees of freedom, p = 0.001


def as_image(mode):
    ramp = np.tile(np.linspace(0, 255, 24).astype(np.uint8), (16, 1))
    rgb = np.stack([ramp, 255 - ramp, ramp // 2], -1)
    return {
        "L": lambda: Image.fromarray(ramp),
        "1": lambda: Image.fromarray(ramp).convert("1"),
        "I;16": lambda: Image.fromarray(ramp.astype(np.uint16) * 257),
        "CMYK": lambda: Image.fromarray(rgb).convert("CMYK"),
        "P": lambda: Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE),
        "RGBA": lambda: Image.fromarray(np.dstack([rgb, np.where(ramp > 127, 255, 0).astype(np.uint8)])),
        "LA": lambda: Image.fromarray(rgb).convert("LA"),
        "F": lambda: Image.fromarray(ramp.astype(np.float32)),
    }[mode]()


@pytest.mark.parametrize("mode,suffix", [("L", "jpg"), ("L", "png"), ("1", "png"), ("I;16", "png"), ("CMYK", "jpg"),
                                         ("P", "png"), ("RGBA", "png"), ("LA", "png"), ("F", "tiff")])  # fmt: skip
def test_every_mode_becomes_rgb(tmp_path, mode, suffix):
    as_image(mode).save(tmp_path / f"x.{suffix}")
    out = sslvit.cut(Image.open(tmp_path / f"x.{suffix}"), 16)
    assert out.shape == (1, 3, 16, 16) and out.dtype == np.uint8
    ramp = np.tile(np.linspace(0, 255, 24)[4:20], (16, 1))  # the centred square
    red = out[0, 0].astype(float)
    if mode in ("L", "I;16", "F"):
        assert abs(out[0].astype(float) - ramp).max() < 6
    if mode in ("P", "CMYK"):
        assert abs(red - ramp).mean() < 12
    if mode == "RGBA":
        assert (out[0, :, :, :7] == 255).all() and abs(
            red[:, 9:] - ramp[:, 9:]
        ).max() < 3  # transparent is white


def test_exif_orientation_one_pixel_and_large_jpegs(tmp_path):
    tall = Image.new("RGB", (20, 40))
    tall.paste((255, 0, 0), (0, 0, 20, 20))  # stored with red on top
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: red comes to the right
    tall.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    out = sslvit.cut(Image.open(tmp_path / "turned.jpg"), 8)[0]
    assert out[0, 4, 6] > 200 and out[0, 4, 1] < 50
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "dot.png")
    out = sslvit.cut(Image.open(tmp_path / "dot.png"), 8, [0.08, 1.0], np.random.default_rng(0))
    assert out.shape == (2, 3, 8, 8) and (out[:, 0] == 9).all()
    y, x = np.mgrid[:800, :1200]
    photo = Image.fromarray(np.stack([x % 256, y % 256, (x + y) // 8], -1).astype(np.uint8)).resize(
        (1200, 800)
    )
    photo = photo.reduce(4).resize((1200, 800), Image.BICUBIC)
    photo.save(tmp_path / "large.jpg", quality=95)
    fast = sslvit.cut(Image.open(tmp_path / "large.jpg"), 32, [0.5], np.random.default_rng(3))
    full = sslvit.cut(Image.open(tmp_path / "large.jpg").convert("RGB"), 32, [0.5], np.random.default_rng(3))
    assert abs(fast.astype(float) - full).mean() < 4  # decoded at 1/8: the same crop


def test_crops_are_rounded_to_whole_pixels_and_keep_one(monkeypatch):
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8)  # row, column: 8 · row + column
    monkeypatch.setattr(
        sslvit, "crop_box", lambda *_: (2.4, 0.4, 6.4, 4.4)
    )  # nearest whole pixels: 2, 0, 6, 4
    assert (sslvit.cut(Image.fromarray(pixels), 4, [0.5])[0, 0] == pixels[0:4, 2:6]).all()
    monkeypatch.setattr(sslvit, "crop_box", lambda *_: (7.6, 5.6, 7.9, 5.9))  # 8 to 8 and 6 to 6: empty
    assert (sslvit.cut(Image.fromarray(pixels), 4, [0.5])[0, 0] == pixels[5, 7]).all()


def test_crop_boxes():
    rng = np.random.default_rng(0)
    boxes = np.array([sslvit.crop_box(50, 40, 0.2, rng) for _ in range(2000)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 50 and boxes[:, 3].max() <= 40
    assert (
        (w * h / 2000).min() >= 0.2 - 1e-9 and (w / h).min() >= 0.75 - 1e-9 and (w / h).max() <= 4 / 3 + 1e-9
    )
    assert 0.5 < (w * h / 2000).mean() < 0.62  # uniform in 0.2 … 1, less what does not fit
    wide = sslvit.crop_box(400, 4, 1.0, rng)  # no crop of this share has an allowed aspect: a square instead
    assert wide[2] - wide[0] == wide[3] - wide[1] == 4


@pytest.mark.parametrize("layout", ["train+val", "train+test", "classes", "flat"])
def test_folder_layouts(tmp_path, layout):
    roots = {"train+val": ("train", "val"), "train+test": ("train", "test")}.get(layout, ("",))
    names = ("",) if layout == "flat" else ("cat", "dog")
    for folder in [tmp_path / root / name for root in roots for name in names]:
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(20):
            Image.new("RGB", (9, 7), (i, 0, 0)).save(folder / f"{i:02}.png")
    (tmp_path / "readme.txt").write_text("not an image")
    train, test = sslvit.find_data(config(data=str(tmp_path)))
    if layout.startswith("train"):
        assert (
            len(train) == len(test) == 40 and train.classes == (["cat", "dog"],) and test.load(39)[1] == [1]
        )
    if layout == "classes":
        assert len(train) == 36 and len(test) == 4 and not {p for p, _ in train} & {p for p, _ in test}
    if layout == "flat":
        assert len(train) == 18 and train.label_names == ()


def test_linked_folders_are_followed_once(tmp_path):
    """cat is a link (as in subsets of ImageNet), dog links to a folder above it and to a folder that links back."""
    store, root = tmp_path / "store" / "felines", tmp_path / "root"
    for folder in (store, root / "dog", tmp_path / "aside"):
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / "0.png")
    (root / "cat").symlink_to(store)
    (root / "dog" / "up").symlink_to(root)
    (root / "dog" / "aside").symlink_to(tmp_path / "aside")
    (tmp_path / "aside" / "back").symlink_to(root / "dog")
    whole = sslvit.ImageFolder(root)
    assert whole.classes == (["cat", "dog"],) and [labels for _, labels in whole] == [[0], [1], [1]]
    assert [os.path.relpath(path, root) for path, _ in whole] == ["cat/0.png", "dog/0.png", "dog/aside/0.png"]
    for (
        name
    ) in "abcdefgh":  # one folder linked from eight belongs to the first, in every process: ranks must agree
        (tmp_path / "many" / name).mkdir(parents=True)
        (tmp_path / "many" / name / "link").symlink_to(store)
    assert [
        os.path.basename(os.path.dirname(os.path.dirname(path)))
        for path, _ in sslvit.ImageFolder(tmp_path / "many")
    ] == ["a"]


@pytest.mark.parametrize("val", [("",), ("dog",), ("cat", "emu")])
def test_no_accuracy_where_the_classes_of_train_and_val_differ(tmp_path, capfd, val):
    """A flat val/ (as ImageNet's comes), one with fewer classes, one with others: numbers would not match."""
    for folder in ["train/cat", "train/dog", *(f"val/{name}" for name in val)]:
        (tmp_path / folder).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (16, 16), (10 * i, 0, 0)).save(tmp_path / folder / f"{i:02}.png")
    out = str(tmp_path / "run")
    argv = [*QUICK, "--data", str(tmp_path), "--preset", "micro", "--steps", "2", "--knn-images", "20"]
    assert sslvit.main([*argv, "--out", out]) == 0 and "knn" not in capfd.readouterr().out
    assert analyze.main([f"{out}/ckpt.pt", "--data", str(tmp_path), "--images", "20", "--out", out]) == 0
    assert "skipped layers: needs labels" in capfd.readouterr().out


def test_a_broken_image_is_named_counted_and_replaced(tmp_path, capfd):
    for i in range(12):
        Image.new("RGB", (20, 20), (i * 20, 0, 0)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "03.png").write_bytes(b"no image")
    argv = [*QUICK, "--data", str(tmp_path), "--preset", "micro", "--steps", "3", "--objective", "simmim"]
    assert sslvit.main([*argv, "--out", str(tmp_path / "run")]) == 0
    out, err = capfd.readouterr()
    assert err.count("03.png") == 1 and "broken 1" in out
    (tmp_path / "07.png").write_bytes((tmp_path / "08.png").read_bytes()[:40])  # truncated
    assert sslvit.main([*argv, "--out", str(tmp_path / "run2")]) == 2  # two of twelve are more than 1 %
    assert "mend the folder" in capfd.readouterr().err


def test_hostile_files_are_named_once_counted_and_replaced(tmp_path, capfd):
    """Zero bytes, half a JPEG, a bomb, a file that is gone: four of 420; odd names and a circle of links are no harm."""
    good = Image.new("RGB", (20, 20), (200, 0, 0))
    for i in range(416):
        good.save(tmp_path / f"{i:03}.jpg", quality=30)
    good.save(tmp_path / "new\nline and blank.png")
    good.save(os.fsencode(tmp_path) + b"/\xff\xfe.png", "png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "half.jpg").write_bytes((tmp_path / "000.jpg").read_bytes()[:300])
    size = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)  # 2.5 gigapixels in 33 bytes
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + size + struct.pack(">I", zlib.crc32(size))
    (tmp_path / "bomb.png").write_bytes(bomb)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path)
    argv = [*QUICK, "--data", str(tmp_path), "--preset", "micro", "--steps", "48", "--objective", "simmim"]
    assert (
        sslvit.main([*argv, "--out", str(tmp_path / "run")]) == 0
    )  # 48 · 8 = 384: all but the held-out tenth
    out, err = capfd.readouterr()
    named = [name for name in ("empty.png", "half.jpg", "bomb.png", "gone.png") if err.count(name)]
    assert len(named) >= 3 and all(err.count(name) == 1 for name in named) and f"broken {len(named)}" in out


def test_samples_depend_on_seed_epoch_and_index_alone():
    views = sslvit.Views(Stimuli(20, 16), config())
    a, b, c = views[(0, 5)], views[(0, 5)], views[(1, 5)]
    assert all(np.array_equal(a[k], b[k]) for k in a) and not np.array_equal(a["crops"], c["crops"])
    assert a["crops"].shape == (3, 3, 16, 16) and a["mask"].sum() == 10
    kept, labels = views.source.load(5)  # a scene is drawn once and kept as it was
    assert kept is views.source.load(5)[0] and labels == [*Stimuli(20, 16)[5][1:3]]
    assert np.array_equal(np.asarray(kept), Stimuli(20, 16)[5][0])
    large = Stimuli(20, 96)
    assert large.load(5)[0].size == (96, 96) and not large.drawn  # 20,000 of 224 px would be 3 GB
    assert sslvit.Views(Stimuli(20, 16), config(lam=0.0))[(0, 5)]["crops"].shape == (1, 3, 16, 16)
    assert sslvit.Views(Stimuli(20, 16), config())[(None, 5)]["crops"].shape == (1, 3, 16, 16)


def test_batches_cover_each_epoch_and_do_not_depend_on_ranks_or_start():
    cfg = config(batch_size=8, accum=1)
    stream = [key for batch in sslvit.batches(cfg, 20, range(0, 5), 0, 1) for key in batch]
    assert sorted(stream) == sorted((e, i) for e in (0, 1) for i in range(20))
    assert [i for _, i in stream[:20]] != [i for _, i in stream[20:]]
    later = list(sslvit.batches(cfg, 20, range(3, 5), 0, 1))
    assert [k for b in later for k in b] == stream[24:]
    ranks = [list(sslvit.batches(config(batch_size=8, accum=2), 20, range(0, 5), r, 2)) for r in (0, 1)]
    assert [k for pair in zip(*ranks) for b in pair for k in b] == stream


def test_colour_operations_by_hand():
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    turned = sslvit.adjust_hue(red, torch.full((1, 1, 1, 1), 1 / 3))
    torch.testing.assert_close(turned[0, :, 0, 0], torch.tensor([0.0, 1, 0]), atol=1e-6, rtol=0)
    x = torch.rand(2, 3, 9, 7)
    torch.testing.assert_close(sslvit.adjust_hue(x, torch.zeros(2, 1, 1, 1)), x, atol=1e-6, rtol=0)
    flat = torch.full((1, 3, 5, 5), 0.3)
    torch.testing.assert_close(sslvit.gaussian_blur(flat, torch.ones(1, 1, 1, 1)), flat)
    dot = torch.zeros(1, 1, 21, 21)
    dot[..., 10, 10] = 1
    blurred = sslvit.gaussian_blur(dot, torch.full((1, 1, 1, 1), 1.5))
    assert blurred[0, 0, 10, 13] / blurred[0, 0, 10, 10] == pytest.approx(
        math.exp(-2), rel=1e-4
    )  # 3 px = 2 σ
    colours = np.zeros((3, 12), np.float32)
    colours[:, :4] = -1
    colours[0, 10], colours[1, 11], colours[2, 8] = 1, 1, 1  # solarise, flip, grey
    y = sslvit.photometric(torch.cat([x, x[:1]]).clone(), torch.from_numpy(colours))
    torch.testing.assert_close(y[0], torch.where(x[0] >= 0.5, 1 - x[0], x[0]))
    assert torch.equal(y[1], x[1].flip(-1)) and torch.equal(y[2, 0], y[2, 2])


def test_operations_match_torchvision():
    tv = pytest.importorskip("torchvision.transforms.v2.functional")
    x = torch.rand(4, 3, 40, 30)
    factors = [0.6, 0.9, 1.3, 1.4]
    theirs = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for ours, function in zip(sslvit.OPERATIONS, theirs):
        expected = torch.stack([function(image, f) for image, f in zip(x, factors)])
        torch.testing.assert_close(
            ours(x, torch.tensor(factors).view(4, 1, 1, 1)), expected, atol=1e-3, rtol=0
        )
    turns = [-0.5, -0.1, 0.07, 0.4]
    expected = torch.stack([tv.adjust_hue(image, f) for image, f in zip(x, turns)])
    torch.testing.assert_close(
        sslvit.adjust_hue(x, torch.tensor(turns).view(4, 1, 1, 1)), expected, atol=1e-3, rtol=0
    )
    sigmas = [0.1, 0.5, 1.2, 2.0]
    expected = torch.stack([tv.gaussian_blur(image, [29, 29], [s, s]) for image, s in zip(x, sigmas)])
    torch.testing.assert_close(
        sslvit.gaussian_blur(x, torch.tensor(sigmas).view(4, 1, 1, 1)), expected, atol=1e-3, rtol=0
    )
    torch.testing.assert_close(sslvit.greyscale(x), tv.rgb_to_grayscale(x), atol=1e-3, rtol=0)
    torch.testing.assert_close(sslvit.OPERATIONS[6](x, None), tv.solarize(x, 0.5), atol=1e-3, rtol=0)


def test_jitters_run_in_each_images_own_order():
    x = torch.rand(2, 3, 4, 4)
    colours = np.zeros((2, 12), np.float32)
    colours[:, 4:8] = (1.4, 0.6, 1.2, 0.3)
    colours[:, :4] = (0, 1, 2, 3), (3, 2, 1, 0)
    y = sslvit.photometric(x.clone(), torch.from_numpy(colours))
    for image, order in ((0, (0, 1, 2, 3)), (1, (3, 2, 1, 0))):
        z = x[image : image + 1]
        for n in order:
            z = sslvit.OPERATIONS[n](z, torch.tensor((1.4, 0.6, 1.2, 0.3)[n]))
        torch.testing.assert_close(y[image : image + 1], z)


# ---- 8. training ----


class Colours:
    """Ten plain images per class; the class is the brightness, so a network that sees anything gets all right."""

    label_names, classes = ("class",), (["dark", "light"],)

    def __len__(self):
        return 20

    def load(self, i):
        return Image.new("RGB", (16, 16), (i % 2 * 200,) * 3), [i % 2]


def test_knn_hears_a_quiet_direction_beside_a_loud_one():
    bank = torch.tensor(
        [[10.0, 1], [-10, 1], [10, -1], [-10, -1]]
    )  # 10 times louder: not what the labels follow
    known = torch.tensor([[1, 0], [1, 2], [0, 3], [0, 4]])
    queries = torch.tensor(
        [[9.0, 1], [-9, -1]]
    )  # second nearest of the first: whitened the second row, raw the third
    assert sslvit.knn(bank, known[:, :1], queries, k=2).tolist() == [[1], [0]]
    assert sslvit.knn(bank, known, queries, k=1).tolist() == [[1, 0], [0, 4]]
    assert sslvit.knn(bank[None].repeat(3, 1, 1), known, queries, k=1).shape == (3, 2, 2)


def test_knn_on_separable_and_on_meaningless_labels(monkeypatch):
    cfg, encoder = config(knn_images=20), ViT(16, 4, **TINY).eval()
    autocast = lambda: torch.autocast("cpu", enabled=False)  # noqa: E731
    monkeypatch.setattr(Colours, "__len__", lambda self: 80)
    assert sslvit.knn_scores(encoder, (Colours(), Colours()), config(knn_images=80), autocast) == {
        "knn_class": 1
    }
    monkeypatch.setattr(Colours, "__len__", lambda self: 20)
    monkeypatch.setattr(Colours, "load", lambda self, i: (Image.new("RGB", (16, 16)), [int(i % 4 > 0)]))
    blind = sslvit.knn_scores(encoder, (Colours(), Colours()), cfg, autocast)["knn_class"]
    assert blind == 0.8333  # 15 of 20 neighbours say 1 to all six queries, whose labels are 0 1 1 1 1 1
    assert sslvit.knn_scores(encoder, (Colours(), None), cfg, autocast) == {}


def flat(state, prefix=""):
    """{path: tensor or number} of a nested checkpoint."""
    items = (
        state.items()
        if isinstance(state, dict)
        else enumerate(state)
        if isinstance(state, (list, tuple))
        else None
    )
    if items is None:
        return {prefix: state}
    return {k: v for name, part in items for k, v in flat(part, f"{prefix}/{name}").items()}


def same(a, b, skip=("images/s", "stall", "/config")):
    a, b = ({k: v for k, v in flat(c).items() if not any(s in k for s in skip)} for c in (a, b))
    assert a.keys() == b.keys()
    return [
        k
        for k in a
        if not (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] or a[k] != a[k])
    ]


@pytest.mark.parametrize("objective,workers", [("moco", 0), ("simmim", 0), ("hybrid", 0), ("hybrid", 2)])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path, objective, workers, monkeypatch, capfd
):
    argv = [*QUICK, "--objective", objective, "--steps", "5", "--save-every", "3", "--workers", str(workers)]
    assert sslvit.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    save = sslvit.save_checkpoint

    def save_and_be_stopped(path, state):
        save(path, state)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(sslvit, "save_checkpoint", save_and_be_stopped)
    assert sslvit.main([*argv, "--out", str(tmp_path / "cut")]) == 143
    monkeypatch.setattr(sslvit, "save_checkpoint", save)
    assert "--resume" in capfd.readouterr().out
    assert sslvit.load_checkpoint(tmp_path / "cut" / "ckpt.pt")["step"] == 4
    assert sslvit.main([*argv, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    whole, cut = (torch.load(tmp_path / n / "ckpt.pt", weights_only=True) for n in ("whole", "cut"))
    assert whole["config"]["lam"] == {"moco": 1, "simmim": 0, "hybrid": 0.2}[objective]
    for part in ("model", "optimizer", "rng", "step"):
        assert same({"": whole[part]}, {"": cut[part]}) == []
    lines = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == [0, 1, 2, 3, 4, 5] and (tmp_path / "cut" / "loss.png").exists()
    full = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row.get("loss") for row in lines] == [row.get("loss") for row in full]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_python(code, *arguments, **environment):
    setup = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r}); import sslvit; sslvit.SIZES['micro'] = {TINY}\n"
    return subprocess.Popen([sys.executable, "-c", setup + code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})  # fmt: skip


def test_kill_9_while_saving_leaves_the_last_checkpoint(tmp_path):
    code = """
import os, signal, torch
save, count = torch.save, [0]
def dying(state, file):
    count[0] += 1
    if count[0] == 2:
        file.write(b'half a checkpoint'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)
torch.save = dying
sslvit.main(sys.argv[1:])"""
    argv = [*QUICK, "--objective", "simmim", "--steps", "6", "--save-every", "2", "--out", str(tmp_path)]
    process = run_python(code, *argv)
    process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL and (tmp_path / "ckpt.pt.tmp").exists()
    assert sslvit.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 2
    assert sslvit.main([*argv, "--resume"]) == 0
    assert sslvit.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 6


def test_kill_9_at_twenty_random_moments_loses_at_most_one_save_interval(tmp_path):
    code = """
import os, random, signal, time, torch
random.seed(0)
path, lost = sys.argv[-1] + '/ckpt.pt', []
sslvit.main([*sys.argv[1:-1], sys.argv[-1] + '.warm', '--steps', '1'])  # so that what is forked starts at once
for trial in range(20):
    console = f'{sys.argv[-1]}.{trial}'
    if (child := os.fork()) == 0:
        os.dup2(os.open(console, os.O_CREAT | os.O_WRONLY), 1)
        os._exit(sslvit.main(sys.argv[1:] + ['--resume'] * os.path.exists(path)))
    while not (os.path.exists(console) and '\\nstep ' in open(console).read()):
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    said = [int(line.split()[1]) for line in open(console) if line.startswith('step ')]
    saved = torch.load(path)['step'] if os.path.exists(path) else 0
    lost += [said[-1] - saved] if said else []
print('saved', saved, len(lost), max(lost, default=-1))"""
    argv = [
        *QUICK,
        "--objective",
        "simmim",
        "--steps",
        "100000",
        "--save-every",
        "2",
        "--out",
        str(tmp_path / "run"),
    ]
    process = run_python(code, *argv)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    saved, runs, lost = map(int, out.split("saved")[1].split())
    assert saved > 0 and runs == 20 and 0 <= lost <= 2


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    sslvit.save_checkpoint(tmp_path / "ckpt.pt", {"step": 1})
    monkeypatch.setattr(
        torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):  # which main() prints as one line
        sslvit.save_checkpoint(tmp_path / "ckpt.pt", {"step": 2})
    assert sslvit.load_checkpoint(tmp_path / "ckpt.pt") == {"step": 1}


@pytest.mark.parametrize("on_full,status,last", [("stop", 2, 2), ("go", 0, 6)])
def test_a_full_disk_stops_or_not_and_keeps_the_old_checkpoint(
    tmp_path, monkeypatch, capfd, on_full, status, last
):
    true = sslvit.save_checkpoint

    def full_at_four(path, state):
        if state["step"] == 4:
            raise OSError("No space left on device")
        true(path, state)

    monkeypatch.setattr(sslvit, "save_checkpoint", full_at_four)
    argv = [*QUICK, "--objective", "simmim", "--steps", "6", "--save-every", "2", "--on-full", on_full]
    assert sslvit.main([*argv, "--out", str(tmp_path)]) == status
    out, err = capfd.readouterr()
    assert "step 4 could not be saved" in out and ("--on-full" in err) == (on_full == "stop")
    assert sslvit.load_checkpoint(tmp_path / "ckpt.pt")["step"] == last


def test_collapse_is_said_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(F, "normalize", lambda x, dim: torch.ones_like(x))  # all features alike
    assert (
        sslvit.main(
            [*QUICK, "--objective", "simmim", "--steps", "5", "--log-every", "1", "--out", str(tmp_path)]
        )
        == 0
    )
    assert capfd.readouterr().out.count("features collapse") == 1


def test_a_bad_number_stops_with_its_step(tmp_path, monkeypatch, capfd):
    calls, true = [], sslvit.masked_l1

    def bad_at_third(*args):
        calls.append(1)
        return true(*args) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(sslvit, "masked_l1", bad_at_third)
    argv = [*QUICK, "--log-every", "4", "--objective", "simmim", "--steps", "8", "--save-every", "2"]
    assert sslvit.main([*argv, "--out", str(tmp_path)]) == 1
    err = capfd.readouterr().err
    assert "not finite at step 3" in err and "ckpt.pt" in err
    assert sslvit.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 2  # no bad weights were saved


def test_accumulation_is_exact_for_simmim(tmp_path):
    for accum in ("1", "2"):
        argv = [*QUICK, "--objective", "simmim", "--steps", "2", "--dtype", "fp32", "--accum", accum]
        assert sslvit.main([*argv, "--out", str(tmp_path / accum)]) == 0
    one, two = (sslvit.load_checkpoint(tmp_path / n / "ckpt.pt")["log"] for n in ("1", "2"))
    assert [row["norm"] for row in one[1:]] == pytest.approx([row["norm"] for row in two[1:]], rel=1e-4)


RANKS = """
import torch, torch.nn as nn, torch.distributed as dist
rank, folder = int(os.environ['RANK']), sys.argv[1]
dist.init_process_group('gloo')
torch.manual_seed(0)
model = sslvit.SSL(sslvit.Config(lam=0.5, image_size=16, proj_hidden=16)).double()
for name, module in list(model.named_modules()):   # batch statistics differ between half batches by their nature
    if isinstance(module, nn.Sequential):
        for i, layer in enumerate(module):
            if isinstance(layer, nn.BatchNorm1d): module[i] = nn.Identity()
state, batch = torch.load(folder + '/start.pt')
model.load_state_dict(state, strict=False)
half = slice(rank * 4, rank * 4 + 4)
net = nn.parallel.DistributedDataParallel(model)
out = net(*(x[half] for x in batch))
(0.5 * out['mim'] + 0.5 * out['cl']).backward()
torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, f'{folder}/grad{rank}.pt')
dist.barrier()
os._exit(0)  # as sslvit.py itself ends: gloo's threads may abort an interpreter that shuts down
"""


def test_two_ranks_equal_one_process_with_the_joint_batch(tmp_path):
    model, batch = SSL(config(lam=0.5)).double(), inputs(torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for i, layer in enumerate(module):
                if isinstance(layer, nn.BatchNorm1d):
                    module[i] = nn.Identity()
    torch.save((model.state_dict(), batch), tmp_path / "start.pt")
    out = model(*batch)
    (0.5 * out["mim"] + 0.5 * out["cl"]).backward()
    where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE="2")
    ranks = [run_python("import os" + RANKS, str(tmp_path), RANK=str(r), **where) for r in (0, 1)]
    for process in ranks:
        assert process.wait(100) == 0, process.stderr.read()
    grads = [torch.load(tmp_path / f"grad{r}.pt") for r in (0, 1)]
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[0][name], p.grad, atol=1e-9, rtol=1e-7)
            assert torch.equal(grads[0][name], grads[1][name])


def test_two_ranks_train_save_and_resume_from_the_command_line(tmp_path):
    where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE="2", LOCAL_RANK="0")
    argv = [*QUICK, "--steps", "2", "--out", str(tmp_path)]
    # as `python sslvit.py` does, with its way to end
    entry = f"import runpy; runpy.run_path({sslvit.__file__!r}, run_name='__main__')"
    ranks = [run_python(entry, *argv, RANK=str(r), **where) for r in (0, 1)]
    outputs = [process.communicate(timeout=100) for process in ranks]
    assert [p.returncode for p in ranks] == [0, 0], outputs
    assert "2 x 1 x 4" in outputs[0][0] and outputs[1][0] == ""
    assert sslvit.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 2


def test_two_ranks_stay_identical_and_another_number_of_ranks_can_go_on(tmp_path):
    """A signal to one rank stops both after the same step; one process goes on with the same weights and batches."""
    code = """
import torch, signal, os
true, rank = sslvit.SSL.update_average, int(os.environ['RANK'])
def stop_at_five(self, m, calls=[]):
    true(self, m); calls.append(1)
    if len(calls) == 5 and rank == 1: os.kill(os.getpid(), signal.SIGTERM)
    torch.save(self.state_dict(), f'{sys.argv[-1]}/rank{rank}.pt')
sslvit.SSL.update_average = stop_at_five
os._exit(sslvit.main(sys.argv[1:]))  # as sslvit.py itself ends"""
    argv = [
        *QUICK,
        "--objective",
        "simmim",
        "--steps",
        "12",
        "--log-every",
        "3",
        "--dtype",
        "fp32",
        "--out",
        str(tmp_path),
    ]
    where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE="2", LOCAL_RANK="0")
    ranks = [run_python(code, *argv, RANK=str(r), **where) for r in (0, 1)]
    outputs = [process.communicate(timeout=100) for process in ranks]
    assert [p.returncode for p in ranks] == [143, 143], outputs
    zero, one = (torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1))
    assert all(torch.equal(zero[name], one[name]) for name in zero)
    assert sslvit.load_checkpoint(tmp_path / "ckpt.pt")["step"] == 6  # the next log line, for both
    assert sslvit.main([*argv, "--resume"]) == 0
    assert (
        sslvit.main([*argv, "--overwrite", "--out", str(tmp_path / "alone")]) == 0
    )  # never more than one rank
    both, alone = (
        sslvit.load_checkpoint(folder / "ckpt.pt")["model"] for folder in (tmp_path, tmp_path / "alone")
    )
    for name in both:
        torch.testing.assert_close(both[name], alone[name], atol=1e-4, rtol=1e-3)


def test_the_plan_of_vit_base_by_hand(tmp_path, capfd):
    """197 tokens, 12 blocks: 12 · 197 · (24 · 768² + 4 · 197 · 768) = 34.9 GFLOP a pass; hybrid 3 · 3 + 2 = 11 passes."""
    argv = ["--preset", "imagenet", "--dry-run", "--rate", "1000", "--out", str(tmp_path / "none")]
    assert (
        sslvit.main([*argv, "--steps", "93835"]) == 0
    )  # 300 epochs of 1.28 million images in batches of 4096
    out = capfd.readouterr().out
    assert "85.8 M parameters" in out and "384 GFLOP" in out and not (tmp_path / "none").exists()
    assert "107 h on 1, 13.3 h on 8, 1.67 h on 64" in out  # 3.84e8 images / 1000 / 3600


def test_the_plan_times_three_steps_and_leaves_nothing(tmp_path, capfd):
    assert sslvit.main([*QUICK, "--dry-run", "--steps", "9", "--out", str(tmp_path / "none")]) == 0
    said = capfd.readouterr().out.splitlines()
    assert len(said) == 3 and said[2].startswith("72 images at ") and not (tmp_path / "none").exists()


def test_compile_has_no_graph_break_and_does_not_compile_again():
    torch._dynamo.reset()
    model, count = SSL(config(lam=0.5)), []

    def backend(graph, inputs_):
        count.append(1)
        return graph

    net = torch.compile(model, fullgraph=True, backend=backend)  # fullgraph: a break is an error
    for _ in range(3):
        out = net(*inputs())
        (out["mim"] + out["cl"]).backward()
        model.update_average(0.9)
    assert len(count) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("objective", ["moco", "simmim", "hybrid"])
def test_cuda(tmp_path, objective):
    argv = [*QUICK, "--objective", objective, "--steps", "4", "--workers", "2", "--device", "cuda"]
    assert sslvit.main([*argv, "--out", str(tmp_path)]) == 0


# ---- 9. command line ----


def test_the_loss_falls_and_everything_is_written(tmp_path, capfd):
    argv = [
        *QUICK,
        "--objective",
        "simmim",
        "--steps",
        "40",
        "--lr",
        "0.1",
        "--log-every",
        "20",
        "--out",
        str(tmp_path),
    ]
    assert sslvit.main(argv) == 0
    out = capfd.readouterr().out
    assert (
        "simmim (λ = 0): ViT-micro, 16 px" in out.splitlines()[0]
        and "left" in out.splitlines()[1]
        and "chance 0.125" in out
    )
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["mim"] < 0.9 * rows[1]["mim"] and {
        "lr",
        "momentum",
        "norm",
        "std",
        "images/s",
        "stall",
    } <= set(rows[-1])
    half = 0.1 * 8 / 256 * 0.5 * (1 + math.cos(math.pi * 16 / 36))  # 16 of the 36 steps after a warm-up of 4
    assert [row["lr"] for row in rows[2:]] == pytest.approx([half, 0])
    state = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert {"config", "model", "optimizer", "scaler", "step", "rng", "log"} <= set(state)


def test_nothing_is_overwritten(tmp_path, capfd):
    argv = [*QUICK, "--objective", "simmim", "--steps", "1", "--out", str(tmp_path)]
    assert sslvit.main(argv) == 0
    before = (tmp_path / "ckpt.pt").read_bytes()
    assert sslvit.main(argv) == 2 and (tmp_path / "ckpt.pt").read_bytes() == before
    assert "--overwrite" in capfd.readouterr().err
    assert sslvit.main([*argv, "--resume", "--model", "tiny"]) == 2
    assert "cannot change at --resume" in capfd.readouterr().err
    sslvit.save_checkpoint(tmp_path / "foreign.pt", {"weights": 1})
    (tmp_path / "other").mkdir()
    (tmp_path / "foreign.pt").rename(tmp_path / "other" / "ckpt.pt")
    assert sslvit.main([*QUICK, "--resume", "--out", str(tmp_path / "other")]) == 2
    assert "not a run of this program" in capfd.readouterr().err
    assert sslvit.main([*argv, "--overwrite"]) == 0


class Attack:
    def __reduce__(self):
        return os.system, ("touch " + os.environ["SSLVIT_ATTACK"],)


def test_a_checkpoint_with_code_is_refused_unrun(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SSLVIT_ATTACK", str(tmp_path / "ran"))
    torch.save({"step": Attack()}, tmp_path / "ckpt.pt")
    assert sslvit.main([*QUICK, "--resume", "--out", str(tmp_path)]) == 2
    assert not (tmp_path / "ran").exists() and "not a checkpoint" in capfd.readouterr().err


def folder_with(tmp_path, **files):
    (tmp_path / "data").mkdir()
    for name, content in files.items():
        (tmp_path / "data" / name.replace("_", ".")).write_bytes(content)
    return str(tmp_path / "data")


@pytest.mark.parametrize("bad", [
    "--no-such-flag", "--lam 1.5", "--lam -0.1", "--lam nan", "--lam 0.5 --objective moco", "--image-size 30",
    "--image-size 0", "--mask-unit 6", "--batch-size 0", "--batch-size 1", "--batch-size 6 --accum 4", "--steps -3",
    "--lr nan", "--lr -1", "--epochs inf", "--objective byol", "--model gigantic", "--preset mega", "--steps 1.5",
    "--data /no/such/folder", "--data FILE", "--data EMPTY", "--data TEXT", "--data BROKEN", "--resume",
    "--device cuda:99", "--dtype int8", "--out FILE/run", "--log-every 0", "--mask-ratio 0", "--seed -1",
])  # fmt: skip
def test_bad_input_is_one_clear_line_and_status_2(tmp_path, bad, capfd):
    (tmp_path / "file").write_text("x")
    for name, content in (("empty", None), ("text", "a.txt"), ("broken", "a.png")):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / content).write_text("x")
    places = dict(FILE="file", EMPTY="empty", TEXT="text", BROKEN="broken")
    words = bad.split()
    for name, place in places.items():
        words = [word.replace(name, str(tmp_path / place)) for word in words]
    out = [] if "--out" in words else ["--out", str(tmp_path / "run")]
    assert sslvit.main([*QUICK, "--steps", "1", "--preset", "micro", *out, *words]) == 2
    err = capfd.readouterr().err.strip()
    assert len(err.splitlines()) == 1 and err.startswith("sslvit.py: ") and len(err) > 25, err


def test_help_tells_every_flag_and_default(capfd):
    with pytest.raises(SystemExit, match="0"):
        sslvit.main(["--help"])
    out = capfd.readouterr().out
    for name, value in vars(Config()).items():
        assert "--" + name.replace("_", "-") in out and f"[{value}]" in out.replace("\n", " ").replace(
            "  ", ""
        )


def test_presets_are_the_papers_recipes():
    moco = sslvit.parse(["--data", "x", "--objective", "moco"])[0]
    assert (moco.preset, moco.model, moco.image_size, moco.patch_size, moco.batch_size) == (
        "imagenet",
        "base",
        224,
        16,
        4096,
    )
    assert (moco.lr, moco.weight_decay, moco.epochs, moco.temperature) == (1.5e-4, 0.1, 300, 0.2)
    assert moco.warmup * moco.epochs == pytest.approx(40) and (moco.crop_min, moco.hue, moco.blur) == (
        0.08,
        0.1,
        2.0,
    )
    simmim = sslvit.parse(["--data", "x", "--objective", "simmim"])[0]
    assert (
        simmim.lr * 512 / 256 == 1e-4 and simmim.weight_decay == 0.05 and simmim.warmup * simmim.epochs == 10
    )
    assert (simmim.positions, simmim.clip, simmim.mask_unit, simmim.mask_ratio) == ("relative", 5.0, 32, 0.6)
    assert sslvit.SIZES["small"]["heads"] == 12
