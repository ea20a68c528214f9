"""analyze.py against answers known by hand, and against bad input."""

import json
import math
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import analyze  # noqa: E402
import sslvit  # noqa: E402

torch.manual_seed(0)


def close(a, b, tolerance=1e-5):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return torch.allclose(a, b, atol=tolerance, rtol=tolerance)


# ==== metrics =========================================================================


def test_attention_distance_by_hand():
    identity, uniform = torch.eye(4).expand(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.25)
    assert close(analyze.attention_distance(identity, 2, 16), torch.zeros(2, 3), 0)
    # 2 × 2 patches of 16 px: each token is 0 from itself, 16 from two, 16√2 from one
    assert close(
        analyze.attention_distance(uniform, (2, 2), 16),
        torch.full((2, 3), 16 * (2 + 2**0.5) / 4),
    )
    # 2 rows, 3 columns: looks at the other row
    shift = torch.roll(torch.eye(6), 3, dims=1)[None, None]
    assert close(analyze.attention_distance(shift, (2, 3), 8), 8)
    # the same matrix on a line: three steps
    assert close(analyze.attention_distance(shift, (1, 6), 8), 24)
    assert close(
        analyze.attention_distance(shift, (3, 2), 1), (2 * 2**0.5 + 5**0.5) / 3
    )  # √2, √5, √2 and back


def test_attention_nmi_by_hand():
    assert close(analyze.attention_nmi(torch.full((1, 1, 5, 5), 0.2)), 0, 1e-6)
    assert close(analyze.attention_nmi(torch.eye(7)[None, None]), 1, 1e-6)
    one_key = torch.zeros(1, 1, 5, 5)
    one_key[..., 2] = 1  # every query looks at the same key: 0·log 0 and 0/0
    assert analyze.attention_nmi(one_key).item() == 0
    # one map for all queries, not uniform
    same = torch.tensor([0.7, 0.2, 0.1, 0.0]).expand(1, 1, 4, 4)
    assert close(analyze.attention_nmi(same), 0, 1e-6)
    # two blocks of two: I = log 2, H(q) = H(k) = log 4, so NMI = 1/2 exactly
    blocks = torch.block_diag(
        torch.full((2, 2), 0.5), torch.full((2, 2), 0.5)
    ).double()[None, None]
    assert close(analyze.attention_nmi(blocks), 0.5, 1e-12)
    # two queries on key 0, two on key 1: H(q) = log 4, H(k) = I = log 2
    pairs = torch.tensor(
        [[1.0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
    ).double()[None, None]
    assert close(analyze.attention_nmi(pairs), 1 / math.sqrt(2), 1e-12)


def test_similarities_by_hand():
    e = torch.eye(4)
    # (1, 3, 1, 4): pairs 1, 0, 0
    heads = torch.stack([e[0], e[0], e[1]])[None, :, None]
    assert close(analyze.head_similarity(heads), 1 / 3)
    assert close(analyze.head_similarity(7 * heads), 1 / 3)
    assert analyze.head_similarity(heads[:, :1]).isnan().all()
    tokens = torch.stack([2 * e[0], -3 * e[0], e[1]])[None]  # pairs -1, 0, 0
    assert close(analyze.token_similarity(tokens), -1 / 3)
    assert close(analyze.token_similarity(torch.ones(2, 5, 3)), torch.ones(2))
    a = torch.stack([e[0], e[1]])[None]
    assert close(analyze.depth_similarity(a, 5 * a), 1)
    assert close(analyze.depth_similarity(a, torch.stack([e[0], e[2]])[None]), 0.5)
    x = torch.randn(2, 3, 5, 4)  # against every pair, one after the other
    cosine = torch.nn.functional.cosine_similarity
    pairs = [
        cosine(x[:, i], x[:, j], dim=-1).mean(-1)
        for i in range(3)
        for j in range(3)
        if i != j
    ]
    assert close(analyze.head_similarity(x), torch.stack(pairs).mean(0))


@pytest.mark.parametrize(
    "grid, bin", [((8, 8), 1), ((8, 8), 4), ((7, 7), 3), ((8, 12), 4), ((14, 14), 7)]
)
def test_fourier_finds_a_diagonal_wave(grid, bin):
    rows, cols = grid
    F = min(grid) // 2 + 1
    omega = math.pi * bin / (F - 1)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    wave = 0.01 + torch.cos(omega * (y + x)).flatten()[None, :, None].expand(
        1, rows * cols, 3
    )
    amplitude = analyze.fourier_amplitude(wave, grid)
    assert amplitude.shape == (1, F) and amplitude[0, 0] == 0
    # bin F - 1 is π: the Nyquist frequency is there, on odd grids too
    assert amplitude[0].argmax() == bin
    if (grid, bin) == ((8, 8), 4):
        assert close(amplitude[0, -1], math.log(1 / 0.01), 1e-4)


def test_fourier_is_the_diagonal_of_the_fft():
    tokens = torch.randn(2, 36, 5)
    fft = torch.fft.fft2(tokens.reshape(2, 6, 6, 5), dim=(1, 2)).abs().log().mean(-1)
    diagonal = torch.stack([fft[:, k, k] for k in range(4)], dim=1)
    assert close(analyze.fourier_amplitude(tokens, 6), diagonal - diagonal[:, :1], 1e-4)
    flat = analyze.fourier_amplitude(torch.ones(1, 16, 2), (4, 4))
    assert flat.isfinite().all() and (flat[0, 1:] < -10).all()


def test_singular_spectrum_by_hand():
    x = torch.zeros(1, 4, 3)
    # columns already centred: √18, √8, 0
    x[0, 0, 0], x[0, 1, 0], x[0, 2, 1], x[0, 3, 1] = 3, -3, 2, -2
    log = analyze.singular_spectrum(
        x + torch.tensor([5.0, -1, 7])
    )  # the same offset for all rows changes nothing
    assert log.shape == (1, 3)
    assert close(log[0, :2], [math.log(18) / 2, math.log(8) / 2]) and log[0, 2] < -15
    for n, D in ((5, 9), (9, 5)):
        y = torch.randn(2, n, D)
        exact = torch.linalg.svdvals((y - y.mean(1, keepdim=True)).double()).log()
        rank = min(n - 1, D)
        assert close(analyze.singular_spectrum(y)[:, :rank], exact[:, :rank], 1e-6)
    assert analyze.singular_spectrum(torch.zeros(1, 3, 3)).isfinite().all()


def test_volume_of_a_box_by_hand():
    # rows ±a on the first axis, ±b on the second: singular values a√2 and b√2
    a, b = 3.0, 0.5
    box = torch.tensor([[a, 0], [-a, 0], [0, b], [0, -b]]) + 7
    volume, free = analyze.log_volume(box)
    assert float(volume) == pytest.approx(math.log(2 * a * b) / 2)
    norm = math.sqrt(2 * (a**2 + b**2))
    assert float(free) == pytest.approx(float(volume) - math.log(norm))


@pytest.mark.parametrize("n,width", [(20, 30), (30, 20), (20, 20), (1, 4)])
def test_volume_is_the_mean_log_singular_value(n, width):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, n, width, generator=random) * torch.logspace(0, -3, width)
    x[2, n // 2 :] = x[2, 0]  # directions that nothing fills
    volume, free = analyze.log_volume(x)
    for image in range(3):
        rows = x[image].double().numpy()
        values = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
        values = values[: min(n - 1, width)]
        if n == 1:
            assert volume.isnan().all()
            continue
        floor = np.maximum(values, 1e-8 * values.max())
        assert float(volume[image]) == pytest.approx(np.log(floor).mean(), abs=1e-3)
        if image < 2:
            norm = np.log(np.sqrt((values**2).sum()))
            assert float(free[image] - volume[image]) == pytest.approx(-norm, abs=1e-6)


def test_image_growth_counts_directions_that_the_embedding_fills():
    rng = np.random.default_rng(0)
    entered = np.zeros((40, 1, 6), np.float32)
    entered[:, 0, :2] = rng.normal(size=(40, 2)) * (3, 0.2) + 5
    left = math.e**2 * entered
    # what enters three directions is rounding, what leaves them is small
    entered[:, 0, 2:5] = 1e-7 * rng.normal(size=(40, 3))
    left[:, 0, 2:] = 0.01 * rng.normal(size=(40, 4))
    assert analyze.image_growth(entered, left) == pytest.approx(2, abs=1e-3)
    # the same in other axes, where half precision rounds in every direction
    axes = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    rows = {"images, entered": entered @ axes, "images, left": left @ axes}
    kept = analyze.lean(rows, analyze.FIGURES)
    assert kept["images, left"].dtype == np.float16
    assert analyze.image_growth(*kept.values()) == pytest.approx(2, abs=1e-3)
    # a direction has a column of its own, and rounding has none
    turned = kept["images, entered"][:, 0].astype(float)
    gram = turned.T @ turned
    centred = entered[:, 0, :2] - entered[:, 0, :2].mean(axis=0)
    values = np.linalg.svd(centred, compute_uv=False)
    np.testing.assert_allclose(np.sqrt(np.diag(gram))[:2], values, rtol=1e-3)
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-2)
    assert not turned[:, 2:].any()


def test_samples_keep_what_claims_read():
    rows = {
        "pooled": np.ones((9, 2, 2, 4), np.float32),
        "nmi": np.tile([0.1, 0.2, 0.6], (9, 2, 1)),
        "token volume": np.arange(36.0).reshape(9, 2, 2),
        "fourier": np.arange(90, dtype=np.float32).reshape(9, 1, 2, 5),
        "labels": np.arange(9),
        "images, left": np.arange(600)[:, None, None] * [[[0.0, 3, 0, 4]]],
    }
    kept = analyze.lean(rows, analyze.FIGURES)
    assert list(kept) == ["nmi", "token volume", "fourier", "labels", "images, left"]
    # means over heads, what leaves the last layer, π after each MLP
    np.testing.assert_allclose(kept["nmi"], np.full((9, 2), 0.3), rtol=1e-3)
    assert analyze.token_growth([1.0], kept["token volume"][0]) == 3 - 1
    assert analyze.late_high(kept["fourier"][0]) == 9
    assert kept["fourier"].shape == (9, 1, 1, 1)
    assert kept["images, left"].shape == (500, 1, 4)
    # 500 numbers along one axis, 5 apart, about their mean
    along = 5 * (np.arange(500) - 249.5)
    found = kept["images, left"][:, 0].astype(float)
    np.testing.assert_allclose(np.abs(found[:, 0]), np.abs(along), rtol=1e-3)
    assert np.abs(found[:, 1:]).max() < 1e-6


def test_scale_free_spectra_by_hand():
    log = torch.tensor([3.0, 4.0]).log()  # Frobenius norm 5
    assert close(analyze.scale_free(log), torch.tensor([0.6, 0.8]).log())
    assert close(analyze.scale_free(log + 7), analyze.scale_free(log))


def test_heads_in_shared_coordinates():
    # two heads of width 1 with output 1, whose columns of W_O are (1, 0) and (3, 4)
    weight = torch.tensor([[1.0, 3], [0, 4]])
    heads = torch.ones(1, 2, 3, 1)
    assert close(analyze.shared_head_similarity(heads, weight), 0.6)
    heads[:, 1] = -2  # only the direction counts
    assert close(analyze.shared_head_similarity(heads, weight), -0.6)
    # against the heads' outputs, written out
    heads, weight = torch.randn(2, 3, 5, 4), torch.randn(12, 12)
    slices = weight.split(4, dim=1)
    outputs = torch.stack([heads[:, h] @ slices[h].T for h in range(3)], dim=1)
    assert close(
        analyze.shared_head_similarity(heads, weight), analyze.head_similarity(outputs)
    )
    assert analyze.shared_head_similarity(heads[:, :1], weight[:, :4]).isnan().all()


def test_cka_by_hand():
    x = torch.randn(50, 4)
    turn = torch.linalg.qr(torch.randn(4, 4))[0]
    assert close(analyze.cka([x, 3 * x @ turn + 1]), torch.ones(2, 2))
    # unbiased: unrelated features have mean 0, though wider than images are many
    unrelated = [torch.randn(20, 60) for _ in range(40)]
    assert abs(analyze.cka(unrelated).triu(1).sum() / (40 * 39 / 2)) < 0.01
    # Song et al.'s formula, term by term
    x, y = torch.randn(9, 3).double(), torch.randn(9, 5).double()
    n = 9

    def hsic(a, b):
        k, m = (a @ a.T).fill_diagonal_(0), (b @ b.T).fill_diagonal_(0)
        total = (k @ m).trace() + k.sum() * m.sum() / ((n - 1) * (n - 2))
        return (total - 2 / (n - 2) * (k @ m).sum()) / (n * (n - 3))

    expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()
    assert close(analyze.cka([x, y])[0, 1], expected, 1e-6)


def test_shape_bias_by_hand():
    # of four decisions two match the shape, one the texture, one neither
    assert analyze.shape_bias([[2, 1]]) == pytest.approx(2 / 3)
    assert math.isnan(analyze.shape_bias([[0, 0]]))
    # two pairings, 3 of 4 and 1 of 4 decisions by shape
    assert analyze.shape_bias([[0.3, 0.1], [0.1, 0.3]]) == pytest.approx(0.5)
    assert math.isnan(analyze.shape_bias([[0.3, 0.1], [0, 0]]))


def test_iou_is_summed_over_the_set():
    pred = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 0]]])
    target = torch.tensor([[[1, 0], [0, 0]], [[0, 0], [0, 0]]])
    counts = analyze.overlap(pred, target, 2)
    assert counts.tolist() == [[[2, 3], [1, 2]], [[4, 4], [0, 0]]]
    # class 0: 2 + 4 of 3 + 4 pixels, class 1: 1 + 0 of 2 + 0
    assert analyze.mean_iou(counts.sum(0)) == pytest.approx((6 / 7 + 1 / 2) / 2)
    # classes that never occur do not count
    same = analyze.overlap(target, target, 5).sum(0)
    assert analyze.mean_iou(same) == 1
    void = torch.tensor([[[1, 255], [0, 0]]])  # where nobody knows, nothing counts
    assert analyze.mean_iou(analyze.overlap(pred[:1], void, 2).sum(0)) == 1
    assert analyze.mean_iou(analyze.overlap(1 - pred[:1], void, 2).sum(0)) == 0


def test_band_noise_stays_in_its_band():
    noise = analyze.band_noise(
        (4, 3, 32, 32), 0.4 * math.pi, 0.5 * math.pi, torch.Generator().manual_seed(0)
    )
    assert close(noise.square().mean(dim=(1, 2, 3)), torch.ones(4))
    power = torch.fft.fft2(noise).abs().square()
    f = torch.fft.fftfreq(32) * 2
    radius = (f[:, None] ** 2 + f**2).sqrt()
    inside = (radius >= 0.4) & (radius < 0.5)
    assert power[..., ~inside].sum() < 1e-6 * power.sum()
    lowest = analyze.band_noise((4, 3, 32, 32), 0, 0.1 * math.pi)
    assert close(lowest.mean(dim=(2, 3)), torch.zeros(4, 3))  # without the mean
    drop = analyze.band_noise_drop(np.array([0.5, 0.5, 0.25, 0]))
    assert drop.tolist() == [0, 0.5, 1]
    assert math.isnan(analyze.band_noise_drop(np.array([0.0, 0.5]))[0])
    assert analyze.pixels_per_wave(1.0) == 2  # π per pixel: one dark, one bright


# ==== one pass ========================================================================

TINY = {"image_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
EVERYTHING = [f for figure in analyze.FIGURES.values() for f in figure.measure]
EVERYTHING = list(dict.fromkeys(EVERYTHING))


def stimuli(count, size=16):
    return analyze.Source(sslvit.Stimuli(count, size), list(range(count)), size)


def test_collect_does_not_depend_on_the_batches():
    vit = sslvit.ViT(**TINY).eval()
    source = stimuli(10)
    a = analyze.collect(vit, source.batches(10), EVERYTHING, 10)
    b = analyze.collect(vit, source.batches(3), EVERYTHING, 10)
    assert a["distance"].shape == (10, 3, 2) and a["depths"].shape == (10, 2)
    assert a["fourier"].shape == (10, 3, 2, 3) and a["pooled"].shape == (10, 3, 2, 32)
    assert a["token volume"].shape == (10, 3, 2) and a["token spectrum"].shape == (
        10,
        1,
        15,
    )
    assert a["output"].shape == (10, 2, 32) and a["images, entered"].shape == (
        10,
        1,
        32,
    )
    assert set(a) == set(b) and all(np.allclose(a[k], b[k], atol=1e-4) for k in a)
    assert a["labels"].tolist() == [list(source.images[i][1:3]) for i in range(10)]
    half = analyze.collect(
        vit, source.batches(3), [analyze.measure_tokens], 10, half=True
    )
    assert half["pooled"].dtype == np.float16 and half["output"].dtype == np.float16
    assert np.allclose(half["pooled"], a["pooled"], atol=2e-3)
    wide = {
        "images": torch.zeros(2, 3, 16, 24, dtype=torch.uint8),
        "labels": torch.zeros(2, 1),
    }
    wide["index"] = torch.arange(2)
    assert analyze.collect(vit, [wide], [analyze.measure_nmi], 2)["nmi"].shape == (
        2,
        3,
        2,
    )


def test_images_do_not_stay_in_memory():
    vit, alive, most = sslvit.ViT(**TINY).eval(), [], []

    def watched(batches):
        for found in batches:
            alive.append(weakref.ref(found["images"]))
            most.append(sum(image() is not None for image in alive))
            yield found

    analyze.collect(vit, watched(stimuli(60).batches(4)), EVERYTHING, 60)
    assert len(most) == 15 and max(most) <= 2, most


def test_what_attention_adds_includes_layer_scale():
    vit = sslvit.ViT(**TINY, layer_scale=0.5).eval()
    with torch.no_grad():
        for block in vit.blocks:
            block.ls1.gamma.copy_(torch.linspace(-1, 2, 32))
    x, seen = torch.randn(2, 3, 16, 16), []

    def look(layer):
        seen.append(layer.added)
        return {"entered": layer.entered.mean(dim=(1, 2))}

    with torch.no_grad():
        found = analyze.measure_batch(vit, x, [look])
        _, records = vit(x, record=True)
        for block, record, added in zip(vit.blocks, records, seen, strict=True):
            written = block.attn.proj(record.heads.transpose(1, 2).flatten(2))
            assert close(added, (written * block.ls1.gamma)[:, 1:], 1e-4)
        tokens = vit.embed(x, None, None, 4, 4)  # what enters the first layer
        assert close(found["entered"][:, 0], tokens[:, 1:].mean(dim=(1, 2)))


# ==== probes, fine-tuning =============================================================


def three_classes():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    x = torch.randn(300, 6, generator=g) * torch.tensor([1, 1, 1, 50, 1, 0.01])
    # the class shows in the smallest direction only: standardisation must find it
    x[:, 5] += 0.1 * y
    return [(x[a:b], y[a:b]) for a, b in ((0, 150), (150, 225), (225, 300))]


def test_linear_probe():
    split, g = three_classes(), torch.Generator().manual_seed(0)
    probe = analyze.linear_probe(*split)
    assert probe["accuracy"] > 0.98
    assert probe["classify"](split[2][0]).tolist() == probe["predicted"].tolist()
    noise = [(torch.randn(len(b), 6, generator=g), b) for _, b in split]
    random = analyze.linear_probe(*noise)
    assert random["accuracy"] < 0.55 and random["predicted"].shape == (75,)
    wrong = split[:2] + [(split[2][0], (split[2][1] + 1) % 3)]
    # the test labels are scored, never learnt
    assert analyze.linear_probe(*wrong)["accuracy"] < 0.02


def test_a_set_in_pieces_has_the_same_optimum(monkeypatch):
    split = three_classes()
    noise = torch.randn(150, 6, generator=torch.Generator().manual_seed(0))
    split[0] = (split[0][0] + noise, split[0][1])
    whole = analyze.linear_probe(*split)
    monkeypatch.setattr(analyze, "ROWS_AT_ONCE", 17)
    pieces = analyze.linear_probe(*split)
    assert close(pieces["weight"], whole["weight"], 1e-3)
    assert (pieces["predicted"] == whole["predicted"]).mean() > 0.98


@pytest.fixture(scope="module")
def red_or_black(tmp_path_factory):
    """128 images of 16 px, red or black, and masks: the upper half of red."""
    root = tmp_path_factory.mktemp("colours")
    for i in range(128):
        name = ("black", "red")[i % 2]
        for folder in ("images", "masks"):
            (root / folder / name).mkdir(parents=True, exist_ok=True)
        image, mask = np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8)
        if name == "red":
            image[..., 0], image[:8, :, 1], mask[:8] = 255, 255, 1
        mask[3:5, 3:5] = 255  # void
        Image.fromarray(image).save(root / "images" / name / f"{i}.png")
        Image.fromarray(mask).save(root / "masks" / name / f"{i}.png")
    images = sslvit.ImageFolder(root / "images")
    masks, root = str(root / "masks"), str(root / "images")
    return analyze.Source(images, list(range(128)), 16, masks=masks, root=root)


def test_fine_tuning_learns_and_leaves_the_encoder_alone(red_or_black):
    torch.manual_seed(0)
    vit = sslvit.ViT(16, 8, 32, 1, 1).requires_grad_(False)
    before = [p.clone() for p in vit.parameters()]
    settings = [{"lr": 1e-6}, {"lr": 1e-2, "decay": 0.5}]
    source = red_or_black
    right, val_right, setting = analyze.fine_tune(
        vit, [source] * 3, [2], epochs=6, settings=settings
    )
    assert right.shape == (128, 1) and right.mean() == 1 and val_right.mean() == 1
    assert setting == settings[1]  # chosen on validation
    masked = analyze.replace(source, with_masks=True)
    for tune in (False, True):
        counts, _, _ = analyze.dense_probe(
            vit, [masked] * 3, 2, epochs=30, tune=tune, settings=[{"lr": 1e-2}]
        )
        assert counts.shape == (128, 2, 2) and analyze.mean_iou(counts.sum(0)) > 0.9, (
            tune
        )
        # the void counts for nobody
        assert counts[:, :, 1].sum(1).max() <= 2 * (256 - 4)
    assert all(torch.equal(a, b) for a, b in zip(before, vit.parameters(), strict=True))


def test_rates_decays_and_what_stays_fixed():
    vit = sslvit.ViT(**TINY, rel_pos_bias=True)
    network = analyze.Tuned(vit, 3, pooled=True, tune=True)
    groups = analyze.parameter_groups(network, lr=1.0, decay=0.5)
    names = {id(p): name for name, p in network.named_parameters()}
    found = {names[id(g["params"][0])]: (g["lr"], g["weight_decay"]) for g in groups}
    assert found["vit.patch_embed.proj.weight"] == (1 / 8, 0.05)
    assert found["vit.blocks.0.mlp.fc1.weight"] == (1 / 4, 0.05)
    assert found["vit.blocks.2.attn.qkv.weight"] == (1, 0.05)
    assert found["vit.blocks.2.attn.qkv.bias"] == (1, 0)
    assert found["vit.blocks.1.norm1.weight"] == (1 / 2, 0)
    assert found["vit.rel_pos_bias.relative_position_bias_table"] == (1, 0)
    assert found["head.weight"] == (1, 0.05)
    assert "vit.pos_embed" not in found  # sines and cosines
    learned = sslvit.ViT(**TINY, positions="learned")
    learned.pos_embed.requires_grad_(False)
    network = analyze.Tuned(learned, 3, pooled=True, tune=True)
    assert network.vit.pos_embed.requires_grad


def test_training_images_are_cropped_and_flipped_anew(red_or_black):
    source = stimuli(12, 32)
    first = [found["images"] for found in source.augmented(2, 5)]
    assert [len(images) for images in first] == [5, 5, 5, 5]  # whole batches only
    again = [found["images"] for found in source.augmented(2, 5)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    centre = {
        image.numpy().tobytes()
        for found in source.batches(12)
        for image in found["images"]
    }
    assert not any(
        image.numpy().tobytes() in centre for images in first for image in images
    )
    masked = analyze.replace(red_or_black, with_masks=True)
    found = next(masked.augmented(1, 64))
    red = found["labels"][:, 0] == 1
    assert (found["masks"][red, :3] == 1).all()  # image and mask agree
    voids = {tuple(m.eq(255).nonzero()[0].tolist()) for m in found["masks"]}
    assert voids == {(3, 3), (3, 11)}  # some are flipped, their masks too


def test_the_taught_pairing():
    rng = np.random.default_rng(0)
    shapes, textures = rng.integers(8, size=(2, 4000))
    features = np.zeros((4000, 2, 16), np.float32)
    features[np.arange(4000), :, shapes] = 2  # shape is the louder cue
    features[np.arange(4000), :, 8 + textures] = 1
    features += 0.1 * rng.normal(size=features.shape).astype(np.float32)
    study = analyze.Study.__new__(analyze.Study)
    study.on_stimuli = True
    study.seen = {"output": features[:3000]}
    study.rows = {"output": features[3000:]}
    labels = np.stack([shapes, textures], axis=1)
    study.seen_labels, study.labels = labels[:3000], labels[3000:]
    cues = analyze.learn_bias(study)["cues"]
    assert cues.shape == (1000, 8, 2) and not (cues[:, :, 0] & cues[:, :, 1]).any()
    for offset in range(8):  # images whose two cues are of one class are not asked
        congruent = (study.labels[:, 1] - study.labels[:, 0]) % 8 == offset
        assert not cues[congruent, offset].any()
    # standardised: both are as loud
    assert 0.4 < analyze.shape_bias(cues.mean(axis=0)) < 0.6
    study.rows["output"] = study.rows["output"] * ([1] * 8 + [0] * 8)
    assert analyze.shape_bias(analyze.learn_bias(study)["cues"].mean(axis=0)) > 0.9


def test_cue_conflict_images():
    seen = torch.arange(60) % 3
    features = torch.eye(3)[:, None].expand(3, 2, 3).numpy()
    study = analyze.Study.__new__(analyze.Study)
    study.on_stimuli = False
    study.seen, study.seen_labels = {"output": features[seen]}, seen[:, None].numpy()
    # shown: the class of the shape, of the texture, of neither
    labels = np.array([[0, 1], [2, 1], [2, 0]])
    study.cues = {"output": features[[0, 1, 1]], "labels": labels}
    cues = analyze.learn_bias(study)["cues"]
    assert cues.tolist() == [[[True, False]], [[False, True]], [[False, False]]]
    assert analyze.shape_bias(cues.mean(axis=0)) == 0.5


# ==== verdicts ========================================================================

FACTS = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 96,
    "depth": 6,
    "decoder_depth": 0,
}
LAMS = {"CL": 1.0, "MIM": 0.0, "hybrid": 0.2, "untrained": None}


def model(role, rows, seed=0, **changes):
    facts = {"role": role, "name": role, "lam": LAMS[role], "seed": seed, "run": seed}
    return FACTS | facts | {"rows": rows} | changes


def nmi_rows(value, n=50, spread=0.0):
    noise = spread * np.random.default_rng(0).normal(size=(n, 1, 1))
    return {"nmi": np.full((n, 6, 2), value) + noise}


def row(difference, low, high):
    return {"difference": difference, "holds": low > 0, "opposed": high < 0}


def test_verdict_rules():
    holds, opposed = row(1, 0.5, 1.5), row(-1, -1.5, -0.5)
    right, wrong = row(0.1, -1, 1), row(-0.1, -1, 1)
    for rows, verdict in (
        ([holds, holds], "agrees"),
        ([holds, opposed], "mixed"),
        ([opposed, right], "opposed"),
        ([opposed, opposed], "opposed"),
        ([right, right], "weak"),
        ([holds, wrong], "weak"),
        ([holds, wrong, wrong], "open"),
        ([right, wrong], "open"),
        ([holds, {"why": "needs masks"}], "not testable"),
    ):
        assert analyze.verdict_of(rows) == verdict, rows


def test_intervals_by_hand():
    # three seeds differ by 1, 2, 3, images do not vary: t(2) = 4.303, s = 1
    numbers = np.tile([1.0, 2, 3], (5, 1))
    (low, high), kind = analyze.interval_of(numbers)
    assert (low, high) == pytest.approx(
        (2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3
    )
    assert kind == "seeds and images"
    # images that vary: draws of variance 4/3 around the mean add to s²/n = 1/3
    numbers = np.array([[1.0, 2, 3], [0, 1, 2], [2, 3, 4], [0, 1, 2], [2, 3, 4]])
    (low, high), _ = analyze.interval_of(numbers)
    assert high - 2 == pytest.approx(4.303 * (1 / 3 + 4 / 3) ** 0.5, abs=1e-3)
    (low, high), kind = analyze.interval_of(numbers[:, :1])  # one seed: images only
    assert (
        high - low == pytest.approx(2 * 1.96 * (4 / 3) ** 0.5)
        and kind == "images only, one seed"
    )
    assert analyze.t_quantile(4) == 2.776 and analyze.t_quantile(20) == pytest.approx(
        2.086, abs=1e-3
    )
    # resampled rows are as many as there are, halves are halves without copies
    weights = analyze.resampled(30)
    assert np.allclose(weights.sum(axis=1), 1) and np.allclose(weights[0], 1 / 30)
    assert [len(set(take)) for take in analyze.halves(31)[:3]] == [31, 15, 15]


def test_bootstrap_variance_is_that_of_the_mean():
    x = np.random.default_rng(1).normal(size=(400, 1))
    part = analyze.Part("mean", ("x",), np.mean, ("CL",))
    drawn = analyze.numbers_of(part, {"x": x})
    assert drawn[0] == pytest.approx(x.mean())
    assert drawn[1:].std() == pytest.approx(x.std() / 20, rel=0.15)
    part.of_matrices = True
    halves = analyze.numbers_of(part, {"x": x})  # as wide, though of half the images
    assert halves[1:].std() == pytest.approx(x.std() / 20, rel=0.25)


def judged(models, claim, **options):
    table = analyze.judge(models, **options)
    return next(entry for entry in table if entry["claim"] == claim)


def test_seeds_are_paired_and_counted():
    cl = [
        model("CL", nmi_rows(value), seed)
        for value, seed in ((0.1, 2), (0.2, 0), (0.3, 1))
    ]
    mim = [
        model("MIM", nmi_rows(value), seed)
        for value, seed in ((0.8, 0), (1.0, 1), (0.6, 2))
    ]
    claim = judged(cl + mim, 5)
    part = claim["parts"][0]
    # MIM / 2 - CL of seeds 0, 1, 2: 0.2, 0.2, 0.2: no spread at all
    assert part["interval"] == pytest.approx([0.2, 0.2]) and part["holds"]
    assert (part["CL"], part["MIM"], part["untrained"]) == (
        pytest.approx(0.2),
        pytest.approx(0.8),
        None,
    )
    assert claim["verdict"] == "agrees" and claim["seeds"] == 3
    one = judged(cl[:1] + mim[2:], 5)
    assert (
        one["verdict"] == "agrees (one seed)"
        and "one seed" in one["parts"][0]["interval_kind"]
    )
    # below MIM, but not half of it
    two = judged(cl[1:] + mim[:2], 5)  # seeds 0 and 1: too few for a t
    assert two["verdict"] == "agrees (2 seeds)"
    assert two["parts"][0]["interval_kind"] == "images only, 2 seeds"
    twice = judged([cl[0], mim[2], model("CL", nmi_rows(0.4))], 5)
    assert twice["parts"][0]["MIM"] == pytest.approx(0.6)
    opposed = judged([model("CL", nmi_rows(0.4)), model("MIM", nmi_rows(0.6))], 5)
    assert opposed["verdict"] == "opposed"
    grey = judged(cl + mim + [model("untrained", nmi_rows(0.05))], 5)
    assert grey["parts"][0]["untrained"] == pytest.approx(0.05)


def test_claim_4_asks_where_the_gap_is():
    def distance(early, late):
        return {
            "distance": np.tile(
                np.repeat([early, early, late, late], 2)[None, :, None], (9, 1, 1)
            )
        }

    far, near = distance(5.0, 9.0), distance(4.0, 3.0)
    parts = judged([model("CL", far), model("MIM", near)], 4)["parts"]
    # late layers: the last third of eight, rounded up, 9 - 3; early: 5 - 4
    assert parts[0]["difference"] == pytest.approx(3.5)
    assert parts[1]["difference"] == pytest.approx(6 - 1)


def test_only_equal_sizes_are_compared():
    cl = [model("CL", nmi_rows(0.1)), model("CL", nmi_rows(0.2), 1)]
    other_shape = model("MIM", nmi_rows(0.9), name="coarse", patch_size=8)
    claim = judged([*cl, other_shape], 5)
    assert claim["verdict"] == "not testable" and "MIM" in claim["parts"][0]["why"]
    left_out = "not compared, of another shape or not the first of it: "
    assert claim["note"] == left_out + "coarse"
    # of a shape the first name is compared: 0.6 / 2 - mean of 0.1 and 0.2
    first = model("MIM", nmi_rows(0.6), name="first")
    second = model("MIM", nmi_rows(0.9), name="second")
    claim = judged([first, *cl, second, other_shape], 5)
    assert claim["parts"][0]["MIM"] == pytest.approx(0.6)
    assert claim["note"] == left_out + "second; coarse"
    # sizes, of which there is one: its rows say so
    assert judged([first, *cl, second], 2)["note"] == ""


def tuned(value, n=40):
    return {"fine-tuned": np.full((n, 2), value)}


def test_claim_2_needs_networks_that_are_better_than_new_ones():
    models = [
        model(role, tuned(value), embed_dim=width)
        for role, width, value in (
            ("CL", 48, 0.6), ("MIM", 48, 0.5), ("untrained", 48, 0.4),
            ("CL", 192, 0.7), ("MIM", 192, 0.9), ("untrained", 192, 0.8),
            # only one of the two has this size: no comparison, and not the largest
            ("MIM", 384, 0.9),
        )
    ]  # fmt: skip
    small, large = judged(models, 2)["parts"]
    assert (small["CL"], small["MIM"], small["untrained"]) == pytest.approx(
        (0.6, 0.5, 0.4)
    )
    assert small["difference"] == pytest.approx(0.1) and small["holds"]
    assert "not trained enough" in large["why"] and "0.8" in large["why"]


def test_claim_12_can_be_read_off_its_row():
    rows = {"linear probe val": np.full((9, 2), 0.5)}

    def probed(value, chosen):
        right = np.full((9, 2), value)
        return (
            rows
            | tuned(value, 9)
            | {"linear probe": right, "linear probe val": right * 0 + chosen}
        )

    models = [model("CL", probed(0.7, 0.5)), model("MIM", probed(0.6, 0.5))]
    for lam, value, chosen in ((0.2, 0.75, 0.6), (0.5, 0.8, 0.9), (0.8, 0.9, 0.1)):
        hybrid = model("hybrid", probed(value, chosen), lam=lam, name=f"hybrid {lam}")
        models.append(hybrid)
    part = judged(models, 12)["parts"][0]
    # λ = 0.5 is best on validation, not on test
    assert part["hybrid"] == pytest.approx(0.8)
    assert part["difference"] == pytest.approx(0.8 - 0.7)
    groups = analyze.groups_of(models)
    assert groups["hybrid"][0]["lam"] == 0.2 and groups["best hybrid"][0]["lam"] == 0.5


def test_claim_11_has_a_control_of_equal_depth():
    models = [
        model("MIM", {}, name="decoder", decoder_depth=2),
        model("MIM", {}, name="plain"),
        model("MIM", {}, name="deep", depth=8),
        model("CL", {}),
    ]
    groups = analyze.groups_of(models)
    names = {role: [m["name"] for m in group] for role, group in groups.items()}
    assert names["MIM"] == ["plain"] and names["MIM with decoder"] == ["decoder"]
    assert names["MIM as deep"] == ["deep"]
    # the decoder's encoder counts: there are two of six layers
    alone = analyze.groups_of(models[:3])
    assert [m["name"] for m in alone["MIM"]] == ["plain"]
    # right at the last of three layers: 0.6, at the best on validation 0.8
    layers, validated = np.array([0.5, 0.8, 0.6]), np.array([0.2, 0.9, 0.3])
    assert analyze.last_minus_best(layers, validated) == pytest.approx(-0.2)
    assert analyze.best_layer(validated) == 2


def test_one_head_has_no_similarity():
    rows = {key: np.full((9, 6), 0.5) for key in ("heads", "depths", "tokens")}
    rows["heads"] = rows["heads"] * math.nan
    claim = judged([model("CL", rows), model("MIM", rows)], 6)
    assert (
        claim["verdict"] == "not testable" and "two heads" in claim["parts"][0]["why"]
    )
    assert "difference" in claim["parts"][2]


def test_thirds_of_layers():
    x = np.array([1.0, 2, 4, 8, 16, 32, 64])
    assert analyze.early(x) == pytest.approx(7 / 3) and analyze.late(
        x
    ) == pytest.approx(112 / 3)
    assert analyze.middle(x) == 8 and analyze.middle(x[:2]) == 1.5  # no middle: all
    heads = np.stack([x, 3 * x], axis=1)
    assert analyze.late(heads) == pytest.approx(2 * 112 / 3)


# ==== the command line ================================================================


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Three objectives, a decoder and another size, untrained: 2 layers, 16 tokens."""
    folder, old = tmp_path_factory.mktemp("runs"), dict(sslvit.SIZES)
    sslvit.SIZES["micro"] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    sslvit.SIZES["tiny"] = {"embed_dim": 48, "depth": 2, "num_heads": 2}
    for name, change in {
        "moco": {"lam": 1.0},
        "moco1": {"lam": 1.0, "seed": 1},
        "simmim": {"lam": 0.0},
        "decoder": {"lam": 0.0, "decoder_depth": 1},
        "large": {"lam": 0.0, "model": "tiny"},
        "hybrid": {"lam": 0.2},
    }.items():
        cfg = sslvit.Config(**{"image_size": 16, "proj_hidden": 16, **change})
        torch.manual_seed(cfg.seed)
        (folder / name).mkdir()
        config = {field.name: getattr(cfg, field.name) for field in analyze.fields(cfg)}
        state = {
            "config": config,
            "model": sslvit.SSL(cfg).state_dict(),
            "step": 1,
            "log": [],
        }
        torch.save(state, folder / name / "ckpt.pt")
    yield folder
    sslvit.SIZES.update(old)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few resamples, one setting, no shipped networks unless a test asks for them."""
    monkeypatch.setattr(analyze, "DRAWS", 20)
    monkeypatch.setattr(analyze, "COMPANIONS", Path("nowhere"))
    monkeypatch.setattr(analyze, "FINE_TUNING", analyze.FINE_TUNING[:1])
    analyze.resampled.cache_clear()
    yield
    analyze.resampled.cache_clear()


def run(checkpoints, names, out, *flags):
    files = [str(checkpoints / name / "ckpt.pt") for name in names]
    argv = [*files, "--images", "24", "--epochs", "1", "--out", str(out), *flags]
    assert analyze.main(argv) == 0
    return json.loads((out / "results.json").read_text())


def test_end_to_end(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(analyze.linear_probe, "__defaults__", ((0.1,), "cpu"))
    names = "moco", "simmim", "hybrid", "decoder", "large", "moco1"
    results = run(checkpoints, names, tmp_path / "a")
    printed = capsys.readouterr().out
    assert results["edition"] == 2
    assert [c["claim"] for c in results["claims"]] == list(range(1, 13))
    kinds = {c["verdict"].split(" (")[0] for c in results["claims"]}
    assert kinds <= {"agrees", "opposed", "mixed", "weak", "open", "not testable"}
    roles = [m["role"] for m in results["models"]]
    assert roles == [
        "CL",
        "MIM",
        "hybrid",
        "MIM",
        "MIM",
        "CL",
        "untrained",
        "untrained",
    ]
    shown = [m["name"] for m in results["models"]]
    assert (
        shown[0] == shown[5] == "CL (MoCo v3), 32 wide"
        and results["models"][5]["run"] == 1
    )
    assert (
        shown[2] == "hybrid, λ = 0.2, 32 wide"
        and shown[3] == "MIM (SimMIM), 32 wide, decoder of 1"
    )
    drawn = {f.name for f in (tmp_path / "a").glob("*.png")}
    assert len(drawn) == len(analyze.FIGURES), (drawn, printed)
    assert "skipped " not in printed.replace("skipped: ", "") and "few-shot" in printed
    assert {Image.open(f).width for f in (tmp_path / "a").glob("*.png")} == {1600}
    report = (tmp_path / "a" / "report.html").read_text()
    assert report.count("<figure>") == len(drawn) and len(report) < 5e6
    # the untrained network is the one that training began with
    first = torch.load(checkpoints / "moco" / "ckpt.pt")["model"][
        "encoder.blocks.0.attn.qkv.weight"
    ]
    vit = analyze.load_encoder(checkpoints / "moco" / "ckpt.pt")
    assert torch.equal(analyze.untrained_like(vit).blocks[0].attn.qkv.weight, first)
    # everything again from the files alone, judged by rows of images
    again = tmp_path / "b"
    assert (
        analyze.main(
            ["--from", str(tmp_path / "a" / "results.json"), "--out", str(again)]
        )
        == 0
    )
    assert json.loads((again / "results.json").read_text()) == results
    assert all(
        (again / n).read_bytes() == (tmp_path / "a" / n).read_bytes() for n in drawn
    )


def test_from_judges_again(checkpoints, tmp_path):
    results = run(checkpoints, ["moco", "simmim"], tmp_path, "--only", "nmi")
    with np.load(tmp_path / "samples.npz") as file:
        arrays = dict(file)
    assert arrays["0/nmi"].shape == (24, 2) and arrays["0/labels"].shape == (24, 2)
    # the test images are everybody's, and stand there once
    assert "1/labels" not in arrays and "1/index" not in arrays
    _, samples = analyze.read_results(tmp_path / "results.json")
    assert all(rows["labels"].shape == (24, 2) for rows in samples)
    arrays["0/nmi"][:], arrays["1/nmi"][:] = 0.01, 0.5
    np.savez(tmp_path / "samples.npz", **arrays)
    assert (
        analyze.main(["--from", str(tmp_path / "results.json"), "--only", "nmi"]) == 0
    )
    claim = json.loads((tmp_path / "results.json").read_text())["claims"][0]
    assert claim["verdict"] == "agrees (one seed)" and claim != results["claims"][0]
    assert claim["parts"][0]["difference"] == pytest.approx(0.24)


def test_seeds_of_two_analyses_are_joined(checkpoints, tmp_path, capsys):
    only = ["--only", "nmi"]
    together = run(checkpoints, ["moco", "simmim", "moco1"], tmp_path / "c", *only)
    run(checkpoints, ["moco", "simmim"], tmp_path / "a", *only)
    run(checkpoints, ["moco1", "simmim"], tmp_path / "b", *only)
    files = [str(tmp_path / name / "results.json") for name in "ab"]
    assert analyze.main(["--from", *files, "--out", str(tmp_path / "d")]) == 0
    joined = json.loads((tmp_path / "d" / "results.json").read_text())
    part, expected = (r["claims"][0]["parts"][0] for r in (joined, together))
    for key in ("CL", "MIM", "difference", "interval", "seeds"):
        assert part[key] == expected[key]
    roles = [model["role"] for model in joined["models"]]
    # SimMIM's seed 0 counts once; each analysis had an untrained network of its own
    assert roles == ["CL", "MIM", "untrained", "CL", "untrained"]
    assert [model["run"] for model in joined["models"]] == [0, 0, 0, 1, 1]
    run(checkpoints, ["moco1"], tmp_path / "b", *only, "--images", "30")
    assert "--images" in fails(capsys, "--from", *files, "--out", tmp_path / "e")


def test_only_of_results_keeps_what_it_judges(checkpoints, tmp_path, capsys):
    whole = tmp_path / "a"
    run(checkpoints, ["moco", "simmim"], whole, "--only", "nmi", "distance")
    before = (whole / "results.json").read_bytes(), (whole / "samples.npz").read_bytes()
    again = ["--from", whole / "results.json", "--only", "nmi"]
    # into the same folder it would lose the distances
    assert "another --out" in fails(capsys, *again)
    after = (whole / "results.json").read_bytes(), (whole / "samples.npz").read_bytes()
    assert after == before
    assert analyze.main([str(word) for word in again] + ["--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [claim["claim"] for claim in results["claims"]] == [5]
    with np.load(tmp_path / "samples.npz") as arrays:
        assert {name.split("/")[1] for name in arrays} == {"nmi", "labels", "index"}
    again = ["--from", tmp_path / "results.json", "--only", "noise"]
    assert "have nmi" in fails(capsys, *again, "--out", tmp_path / "e")


def test_a_size_that_comes_later_is_another_network(checkpoints, tmp_path):
    only = ["--only", "nmi"]
    run(checkpoints, ["moco", "simmim"], tmp_path / "a", *only)
    large = run(checkpoints, ["large"], tmp_path / "b", *only)
    # alone its width needs no saying
    assert large["models"][0]["name"] == "MIM (SimMIM)"
    files = [str(tmp_path / name / "results.json") for name in "ab"]
    assert analyze.main(["--from", *files, "--out", str(tmp_path / "d")]) == 0
    joined = json.loads((tmp_path / "d" / "results.json").read_text())["models"]
    shown = [(model["name"], model["run"]) for model in joined]
    assert shown == [
        ("CL (MoCo v3), 32 wide", 0),
        ("MIM (SimMIM), 32 wide", 0),
        ("untrained, 32 wide", 0),
        ("MIM (SimMIM), 48 wide", 0),
        ("untrained, 48 wide", 0),
    ]


def named(*networks):
    """(role, settings, what else is given) of each -> their names."""
    lams = {"CL": 1.0, "MIM": 0.0, "hybrid": 0.2, "untrained": None}
    all_facts = []
    for n, (role, config, changes) in enumerate(networks):
        facts = {"image_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6}
        facts |= {"role": role, "lam": lams[role], "family": "sslvit", "given": ""}
        facts |= {"decoder_depth": 0, "seed": 0, "path": f"runs/{n}/ckpt.pt"}
        facts |= {"config": config}
        if role == "untrained":
            facts["path"] = ""
        all_facts.append(facts | changes)
    analyze.name_networks(all_facts)
    return [facts["name"] for facts in all_facts]


def test_names_say_which_shapes_differ():
    names = named(("CL", {"seed": 0}, {}), ("MIM", {"seed": 0}, {}))
    assert names == ["CL (MoCo v3)", "MIM (SimMIM)"]
    small = {"embed_dim": 48}
    names = named(("CL", {"seed": 0}, {}), ("MIM", {"seed": 0}, small))
    assert names == ["CL (MoCo v3), 96 wide", "MIM (SimMIM), 48 wide"]


def test_networks_that_were_trained_differently_are_not_seeds_of_one():
    third = {"steps": 1833, "lr": 0.012, "seed": 1, "device": "cpu", "out": "a"}
    all_of_it = third | {"steps": 5500, "seed": 0, "device": "cuda", "out": "b"}
    other = third | {"lr": 0.006, "clip": 3.0}
    cl = {"steps": 1032, "lr": 0.004, "seed": 0}
    untrained = ("untrained", {}, {})
    given = [("MIM", third, {}), ("MIM", all_of_it, {}), ("CL", cl, {}), untrained]
    assert named(*given) == [
        "MIM (SimMIM), 1833 steps",
        "MIM (SimMIM), 5500 steps",
        "CL (MoCo v3)",  # alone: equal work is other steps for other objectives
        "untrained",
    ]
    # what only one file tells, as older ones lack a setting, is not known to differ
    assert named(("MIM", third, {}), ("MIM", other, {})) == [
        "MIM (SimMIM), lr 0.012",
        "MIM (SimMIM), lr 0.006",
    ]
    where = third | {"data": "/scratch/cifar10/"}
    assert named(("MIM", third | {"data": ""}, {}), ("MIM", where, {})) == [
        "MIM (SimMIM), data stimuli",
        "MIM (SimMIM), data cifar10",
    ]
    # seed, machine and folder make seeds; a name that was given is the user's word
    machine = third | {"seed": 7, "device": "mps", "out": "c", "log_every": 9}
    assert named(("MIM", third, {}), ("MIM", machine, {})) == ["MIM (SimMIM)"] * 2
    mine = {"given": "mine"}
    assert named(("MIM", third, mine), ("MIM", other, mine)) == ["mine"] * 2


def test_files_that_do_not_tell_their_settings_have_their_own_names():
    mae = {"family": "MAE", "seed": None}
    files = [mae | {"path": f"/ckpts/mae_{epochs}/model.pth"} for epochs in (800, 1600)]
    assert named(*(("MIM", {}, facts) for facts in files)) == [
        "MIM (MAE), mae_800/model",
        "MIM (MAE), mae_1600/model",
    ]
    assert named(("MIM", {}, files[0])) == ["MIM (MAE)"]
    untrained = [("untrained", {}, {"seed": seed}) for seed in (0, 1)]
    assert named(*untrained) == ["untrained"] * 2


def test_a_run_counts_once(checkpoints, tmp_path, capsys):
    path = checkpoints / "moco" / "ckpt.pt"
    fault = f"{path} and {path} are one run of CL (MoCo v3)"
    assert fault in fails(capsys, path, path, "--out", tmp_path, "--only", "nmi")


def test_a_new_figure_is_one_section(checkpoints, tmp_path, monkeypatch, capsys):
    def measure_largest(layer):
        return {"largest": layer.attn.amax(dim=(-2, -1))}

    toy = analyze.Figure(
        number="13",
        claim=13,
        text="CL looks hardest somewhere",
        lesson="A toy.",
        measure=(measure_largest,),
        parts=(
            analyze.Part("largest weight", ("largest",), analyze.late, ("CL", "MIM")),
        ),
        panels=(analyze.Panel("largest", "largest weight"),),
        finding="CL looks harder",
        otherwise="CL looks no harder",
        numbers="{CL:.2f} against {MIM:.2f}",
    )
    monkeypatch.setitem(analyze.FIGURES, "toy", toy)
    with pytest.raises(SystemExit):
        analyze.main(["--help"])
    assert "CL looks hardest somewhere (13)" in capsys.readouterr().out
    results = run(checkpoints, ["moco", "simmim"], tmp_path, "--only", "toy")
    assert [c["claim"] for c in results["claims"]] == [13] and results["models"][0][
        "values"
    ]["largest"]
    assert "CL looks hardest somewhere (figure 13)" in capsys.readouterr().out
    report = (tmp_path / "report.html").read_text()
    assert "A toy." in report and (tmp_path / "fig13_toy.png").exists()


def test_companions(checkpoints, tmp_path, monkeypatch, capsys):
    shipped = tmp_path / "checkpoints"
    shipped.mkdir()
    for name in ("moco", "moco1", "simmim", "large", "decoder", "photos"):
        state = torch.load(checkpoints / name.replace("photos", "hybrid") / "ckpt.pt")
        if name == "photos":
            state["config"]["data"] = "cifar10"
        model = {
            k: v.half() for k, v in state["model"].items() if not k.startswith("key_")
        }
        state = {"config": state["config"], "step": 1, "model": model}
        torch.save(state, shipped / f"{name}.pt")
    monkeypatch.setattr(analyze, "COMPANIONS", shipped)
    results = run(checkpoints, ["simmim"], tmp_path, "--only", "nmi")
    # one CL; no second MIM, no other size, no decoder, no photographs
    assert [m["role"] for m in results["models"]] == ["MIM", "CL", "untrained"]
    assert "beside it the shipped moco.pt; --alone" in capsys.readouterr().out
    results = run(checkpoints, ["simmim"], tmp_path, "--only", "nmi", "--alone")
    assert [m["role"] for m in results["models"]] == ["MIM", "untrained"]


def test_output_is_beside_the_first_file(checkpoints, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "ckpt.pt").write_bytes((checkpoints / "moco" / "ckpt.pt").read_bytes())
    argv = [f"cl={folder / 'ckpt.pt'}", "--images", "20", "--only", "distance"]
    assert (
        analyze.main(argv) == 0 and (folder / "figures" / "fig03_distance.png").exists()
    )


def test_seeds_are_thin_lines_and_heads_a_band():
    facts = {"name": "a", "role": "CL", "lam": 1.0, "nth": 0, "depth": 2}
    models = [
        {**facts, "values": {"nmi": [[0.0, 0.2], [0.5, 0.5]]}},  # layers, heads
        {**facts, "values": {"nmi": [[0.2, 0.4], [0.7, 0.9]]}},
    ]
    axis = analyze.draw_panels(models, (analyze.Panel("nmi", "NMI"),)).axes[0]
    *seeds, mean = axis.lines
    assert list(mean.get_ydata()) == pytest.approx([0.2, 0.65])
    assert [list(line.get_ydata()) for line in seeds] == [
        pytest.approx([0.1, 0.5]),
        pytest.approx([0.3, 0.8]),
    ]
    assert mean.get_linewidth() > 2 * seeds[0].get_linewidth()
    band = axis.collections[0].get_paths()[0].vertices
    assert {(x, round(y, 3)) for x, y in band} >= {
        (1.0, 0.1),
        (1.0, 0.3),
        (2.0, 0.6),
        (2.0, 0.7),
    }
    assert analyze.colour_of({"role": "MIM", "lam": 0.0})[:3] == pytest.approx(
        (0, 0x72 / 255, 0xB2 / 255), abs=0.01
    )
    analyze.plt.close("all")


def test_titles_say_what_was_found():
    models = [model("CL", nmi_rows(0.4), seed) for seed in range(3)]
    models += [model("MIM", nmi_rows(0.6), seed) for seed in range(3)]
    claims = analyze.judge(models, ["nmi"])
    title = analyze.title_of(analyze.FIGURES["nmi"], claims)
    assert (
        title == "CL's late attention does ask who looks: "
        "NMI 0.400 against 0.600 (opposed, 3 seeds)"
    )
    # MIM / 2 - CL = -0.1, 0.1, 0.1: more often than not is not a finding
    models = [model("CL", nmi_rows(x), seed) for seed, x in enumerate((0.4, 0.2, 0.2))]
    models += [model("MIM", nmi_rows(0.6), seed) for seed in range(3)]
    claims = analyze.judge(models, ["nmi"])
    title = analyze.title_of(analyze.FIGURES["nmi"], claims)
    assert (
        title == "CL's late attention hardly asks who looks? "
        "Undecided: NMI 0.267 against 0.600 (weak, 3 seeds)"
    )


@pytest.fixture
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 10)):
        for c in ("cat", "dog"):
            for root in ("data", "masks"):
                (tmp_path / root / split / c).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(
                    rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
                )
                image.save(tmp_path / "data" / split / c / f"{i}.jpg")
                mask = Image.fromarray(rng.integers(0, 3, (20, 30), dtype=np.uint8))
                mask.save(tmp_path / "masks" / split / c / f"{i}.png")
    (tmp_path / "cues").mkdir()
    for name in ("cat1-dog1", "cat2-dog2", "dog1-cat1", "dog2-dog3"):
        image = Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8))
        image.save(tmp_path / "cues" / f"{name}.png")
    return tmp_path


def test_photographs(checkpoints, photographs, capsys):
    (photographs / "data" / "val" / "cat" / "broken.jpg").write_bytes(b"no image")
    (photographs / "cues" / "cat3-dog3.png").write_bytes(b"no image")
    out = photographs / "out"
    flags = ["--data", str(photographs / "data"), "--masks", str(photographs / "masks")]
    flags += ["--cue-conflict", str(photographs / "cues"), "--images", "0"]
    run(
        checkpoints,
        ["simmim"],
        out,
        *flags,
        "--only",
        "dense",
        "bias",
        "noise",
        "accuracy",
    )
    printed = capsys.readouterr().out
    assert len(list(out.glob("*.png"))) == 4
    assert "broken.jpg" in printed and "cat3-dog3.png" in printed
    with np.load(out / "samples.npz") as arrays:
        # the congruent dog2-dog3 is not asked, the broken one not read
        assert arrays["0/cues"].shape == (3, 1, 2) and arrays["0/fine-tuned"].shape == (
            20,
            1,
        )
    flat = photographs / "data" / "val" / "dog"  # no classes, no test set
    argv = ["--data", str(flat), "--out", str(out), "--only", "layers", "distance"]
    assert analyze.main([str(checkpoints / "moco" / "ckpt.pt"), *argv]) == 0
    assert "skipped layers: needs labels" in capsys.readouterr().out


def fails(capsys, *argv):
    status = analyze.main([str(word) for word in argv])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and "Traceback" not in error, (
        argv,
        error,
    )
    return error


def test_bad_photographs(checkpoints, photographs, capsys, monkeypatch):
    good, data = checkpoints / "simmim" / "ckpt.pt", photographs / "data"
    flags = [
        "--images",
        "0",
        "--epochs",
        "1",
        "--out",
        photographs / "out",
        "--data",
        data,
    ]
    png = photographs / "masks" / "val" / "cat" / "0.png"
    masks = ["--masks", photographs / "masks", "--only", "dense"]
    Image.new("RGB", (30, 20)).save(png)
    assert "class numbers" in fails(capsys, good, *flags, *masks)
    Image.new("L", (20, 30)).save(png)
    assert "size" in fails(capsys, good, *flags, *masks)
    cues = ["--cue-conflict", photographs / "cues", "--only", "bias"]
    Image.new("L", (20, 20)).save(photographs / "cues" / "cat1-cow1.png")
    assert "cow" in fails(capsys, good, *flags, *cues)
    (photographs / "cues" / "cat1-cow1.png").rename(
        photographs / "cues" / "picture.png"
    )
    assert "picture.png" in fails(capsys, good, *flags, *cues)
    one = photographs / "one"
    for split in ("train", "val"):
        (one / split / "cat").mkdir(parents=True)
        for i in range(20):
            Image.new("L", (20, 20)).save(one / split / "cat" / f"{i}.png")
    flags = ["--images", "0", "--out", photographs / "out", "--data", one]
    assert "one class" in fails(capsys, good, *flags, "--only", "accuracy")
    assert (
        analyze.main([str(x) for x in (good, *flags, "--only", "nmi", "accuracy")]) == 0
    )


def test_bad_input_is_one_line_and_status_2(checkpoints, tmp_path, capsys, monkeypatch):
    good = checkpoints / "simmim" / "ckpt.pt"
    out = ["--out", tmp_path / "out"]
    (tmp_path / "text.pt").write_text('{"model": 1}')
    (tmp_path / "empty").mkdir()
    for argv in (
        [],
        ["--images", "5", good],
        ["--only", "everything", good],
        ["--nonsense"],
        [tmp_path / "missing.pt"],
        [tmp_path / "text.pt"],
        [good, "--data", tmp_path / "empty"],
        [good, "--data", tmp_path / "nowhere"],
        ["--from", tmp_path / "text.pt"],
        ["--from", good],
        [good, "--masks", "nowhere"],
        # one name for two networks
        [f"a={good}", f"a={checkpoints / 'moco' / 'ckpt.pt'}"],
        [good, "--device", "abacus"],
        [good, "--workers", "-1"],
    ):
        fails(capsys, *argv, *out)
    (tmp_path / "results.json").write_text(
        '{"settings": {}, "models": [], "claims": []}'
    )
    assert "first edition" in fails(capsys, "--from", tmp_path / "results.json", *out)
    state = torch.load(good)
    state["model"]["encoder.blocks.1.mlp.fc1.weight"][0, 0] = math.nan
    torch.save(state, tmp_path / "nan.pt")
    assert "blocks.1.mlp.fc1.weight" in fails(capsys, tmp_path / "nan.pt", *out)


def test_a_full_disk_takes_the_pictures_only(
    checkpoints, tmp_path, capsys, monkeypatch
):
    def no_room(fig, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(analyze, "save", no_room)
    argv = [
        checkpoints / "moco" / "ckpt.pt",
        "--images",
        "20",
        "--only",
        "nmi",
        "--out",
        tmp_path,
    ]
    assert "No space" in fails(capsys, *argv)
    assert json.loads((tmp_path / "results.json").read_text())["claims"]
