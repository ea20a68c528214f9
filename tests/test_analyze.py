"""analyze.py against answers known by hand: metrics, probes, intervals, verdicts."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

# before torch, or beside a busy program its threads wait for each other for minutes
import sslvit
import analyze
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.colors import to_hex

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


def close(a, b, tolerance=1e-5):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return torch.allclose(a, b.expand_as(a), atol=tolerance, rtol=tolerance)


# ==== Metrics =======================================================================
def test_attention_distance_by_hand():
    identity, uniform = torch.eye(4).expand(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.25)
    assert close(analyze.attention_distance(identity, 2, 16), torch.zeros(2, 3), 0)
    # 2 × 2 patches of 16 px: each token is 0 from itself, 16 from two, 16√2 from one
    far = torch.full((2, 3), 16 * (2 + 2**0.5) / 4)
    assert close(analyze.attention_distance(uniform, (2, 2), 16), far)
    # 2 rows, 3 columns: every token looks at the other row; on a line: three steps
    shift = torch.roll(torch.eye(6), 3, dims=1)[None, None]
    assert close(analyze.attention_distance(shift, (2, 3), 8), 8)
    assert close(analyze.attention_distance(shift, (1, 6), 8), 24)


def test_attention_nmi_by_hand():
    def nmi(rows):
        attn = torch.tensor(rows, dtype=torch.float64)
        return analyze.attention_nmi(attn[None, None]).item()

    assert nmi(np.full((5, 5), 0.2)) == pytest.approx(0, abs=1e-12)
    assert nmi(np.eye(7)) == pytest.approx(1, abs=1e-12)
    # one map for all queries, not uniform; and one key for all: 0·log 0 and 0/0
    assert nmi([[0.7, 0.2, 0.1, 0]] * 4) == pytest.approx(0, abs=1e-12)
    assert nmi([[0, 1, 0]] * 3) == 0
    # two blocks of two: I = log 2, H(q) = H(k) = log 4, so NMI = 1/2
    assert nmi(np.kron(np.eye(2), [[0.5, 0.5]] * 2)) == pytest.approx(0.5, abs=1e-12)
    # two queries on key 0, two on key 1: H(q) = log 4, H(k) = I = log 2
    pairs = [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
    assert nmi(pairs) == pytest.approx(1 / math.sqrt(2), abs=1e-12)
    # of each head: the first tells the query, the second does not
    heads = torch.stack([torch.eye(2), torch.tensor([[1.0, 0], [1, 0]])])[None]
    assert close(analyze.attention_nmi(heads), torch.tensor([[1.0, 0]]))


def test_similarities_by_hand():
    e = torch.eye(4)
    # (1, 3, 1, 4): pairs 1, 0, 0
    heads = torch.stack([e[0], 7 * e[0], e[1]])[None, :, None]
    assert close(analyze.head_similarity(heads), 1 / 3)
    assert analyze.head_similarity(heads[:, :1]).isnan().all()
    tokens = torch.stack([2 * e[0], -3 * e[0], e[1]])[None]  # pairs -1, 0, 0
    assert close(analyze.token_similarity(tokens), -1 / 3)
    assert close(analyze.token_similarity(torch.ones(2, 5, 3)), torch.ones(2))
    a = torch.stack([e[0], e[1]])[None]
    assert close(analyze.depth_similarity(a, 5 * a), 1)
    assert close(analyze.depth_similarity(a, torch.stack([e[0], e[2]])[None]), 0.5)


def test_heads_are_compared_by_what_they_add_to_a_token():
    # two heads of width 1, whose columns of the output matrix are (1, 0) and (3, 4):
    # the first adds (1, 0), the second -2·(3, 4), and their cosine is -3/5
    weight = torch.tensor([[1.0, 3], [0, 4]])
    attn = SimpleNamespace(proj=SimpleNamespace(weight=weight))
    scale = sslvit.LayerScale(2, 1.0)
    scale.gamma.data[1] = 3 / 4
    [measure] = analyze.FIGURES["similarity"].measure
    # LayerScale makes (3, 4) a (3, 3), and the cosine -1/√2; CLS does not count
    for ls1, cosine in ((torch.nn.Identity(), -0.6), (scale, -(0.5**0.5))):
        vit = SimpleNamespace(blocks=[SimpleNamespace(attn=attn, ls1=ls1)])
        heads = torch.tensor([1.0, -2]).view(1, 1, 2, 1, 1).expand(1, 1, 2, 4, 1)
        batch = SimpleNamespace(vit=vit, heads=heads, states=torch.randn(1, 3, 5, 2))
        values = measure(batch)
        assert close(values["heads"], cosine)
        batch.states[:, 1, 0] += 99
        assert close(measure(batch)["tokens"], values["tokens"])


@pytest.mark.parametrize("side, bin", [(8, 1), (8, 4), (7, 3), (14, 7)])
def test_fourier_finds_a_diagonal_wave(side, bin):
    y, x = np.mgrid[:side, :side]
    last = side // 2  # π, the Nyquist frequency, on odd grids too
    wave = torch.tensor(np.cos(math.pi * bin / last * (y + x)).reshape(1, -1, 1))
    amplitude = analyze.fourier_amplitude(0.01 + wave, side)
    assert amplitude.shape == (1, last + 1) and amplitude[0].argmax() == bin
    if (side, bin) == (8, 4):  # a checkerboard of ±1 on a mean of 0.01
        assert close(amplitude[0, -1], math.log(1 / 0.01))
        # a second channel of ±3: the mean of logs
        both = analyze.fourier_amplitude(0.01 + torch.cat([wave, 3 * wave], 2), side)
        assert close(both[0, -1], math.log(1 / 0.01) + math.log(3) / 2)
        flat = analyze.fourier_amplitude(torch.ones(1, 64, 2), side)
        assert flat.isfinite().all() and (flat[0, 1:] < -10).all()
    # a checkerboard of ±1 on 5, without the mean: X(π) = 9 - 1/9 where X(0) = 46
    odd = 5 + torch.tensor([1.0, -1] * 4 + [1]).view(1, 9, 1)
    assert close(analyze.fourier_amplitude(odd, 3)[0, 1], math.log((9 - 1 / 9) / 46))


def test_singular_spectrum_and_volume_by_hand():
    x = torch.zeros(1, 4, 3)
    # √18, √8, 0; the same offset for all rows changes nothing
    x[0, 0, 0], x[0, 1, 0], x[0, 2, 1], x[0, 3, 1] = 3, -3, 2, -2
    log = analyze.singular_spectrum(x + torch.tensor([5.0, -1, 7]))
    assert log.shape == (1, 3)
    assert close(log[0, :2], [math.log(18) / 2, math.log(8) / 2]) and log[0, 2] < -15
    assert analyze.singular_spectrum(torch.zeros(1, 3, 3)).isfinite().all()
    # volume: patch tokens ±3 on one axis, ±4 on the other, all moved by 7: singular
    # values 3√2 and 4√2, Frobenius norm √(18 + 32). CLS is far away, and no patch
    box = torch.tensor([[999.0, 999], [10, 7], [4, 7], [7, 11], [7, 3]])
    volume = math.log(3 * 4 * 2) / 2 - math.log(50) / 2
    measure, *_ = analyze.FIGURES["spectra"].measure
    for scale in (1, 100):
        batch = SimpleNamespace(states=scale * box[None, None])
        assert close(measure(batch)["token volume"], volume)
    # three images around their mean: Gram matrix diag(2a², 2b²/3), so that b = 3√3 is
    # as 3 above, and a = 1, b = √3 fill both directions alike: 1/√2 each
    [summarise] = analyze.FIGURES["spectra"].whole
    triangles = [[[a, 0], [-a, 0], [0, b]] for a, b in ((4, 3 * 3**0.5), (1, 3**0.5))]
    pooled = np.float32(triangles).swapaxes(0, 1)  # (3, 2, 2)
    rows = summarise({"features": pooled})
    assert close(rows["image volume"], [volume, -math.log(2) / 2])
    assert close(rows["spectrum"], math.log(2) / 2)  # of the last state: √2 twice
    few = summarise({"features": torch.randn(20, 1, 96).numpy()})  # no rounding
    assert np.ptp(few["spectrum"].numpy()) < 2


def test_pictures_are_of_the_last_attention():
    states = torch.randn(3, 5, 5, 2)
    # four patches before it on one axis, after it on another
    states[:, 2, 1:] = torch.tensor([[3.0, 0], [-3, 0]] * 2)
    states[:, 3, 1:] = torch.tensor([[0.0, 1], [0, -1]] * 2)
    picture = analyze.picture_plane(SimpleNamespace(states=states))
    assert close(picture["plane"].abs(), torch.tensor([[3.0, 0]] * 4 + [[0, 1]] * 4))
    assert close(picture["shares"], [0.9, 0.1])
    # maps: of two queries, in the first and the last layer
    attn = torch.full((3, 3, 2, 4, 4), 0.25)
    attn[:, 2] = torch.eye(4)
    batch = SimpleNamespace(vit=SimpleNamespace(grid=2), attn=attn)
    maps = analyze.picture_maps(batch)["maps"]
    assert (maps[::2] == 1).all()
    assert maps[1].tolist() == [[0, 0], [0, 4]] and maps[3].tolist() == [[4, 0], [0, 0]]


def test_outlines_lie_on_their_objects():
    masks = np.zeros((3, 32, 32))
    masks[:, :8] = 5  # the uppermost quarter is a star
    one = network("CL", {})
    one.pictures = {"maps": np.ones((8, 8, 8)), "labels": masks}
    one.pictures["photographs"] = np.ones((3, 64, 64, 3))
    axis = analyze.draw_maps([one]).axes[0]
    [outline] = axis.collections[0].get_paths()
    assert outline.vertices[:, 1] == pytest.approx(0.25, abs=0.02)
    assert axis.get_ylim() == (1, 0)  # downwards


def test_shape_bias_by_hand():
    # of four decisions two match the shape, one the texture, one neither
    assert analyze.shape_bias([[0.5, 0.25]]) == pytest.approx(2 / 3)
    # two pairings, 3 of 4 and 1 of 2 decisions by shape: not 4 of 6
    assert analyze.shape_bias([[0.3, 0.1], [0.1, 0.1]]) == pytest.approx(0.625)
    assert math.isnan(analyze.shape_bias([[0, 0]]))


def test_iou_is_summed_over_the_set():
    predicted = np.array([[[1, 1], [0, 0]], [[0, 0], [0, 0]]])
    true = np.array([[[1, 0], [0, 0]], [[0, 0], [0, 0]]])
    counts = analyze.overlaps(predicted, true, 3)
    assert counts.tolist() == [[[2, 3], [1, 2], [0, 0]], [[4, 4], [0, 0], [0, 0]]]
    # class 0: 2 + 4 of 3 + 4 pixels, class 1: 1 of 2; class 2 never occurs
    assert analyze.mean_iou(counts.sum(axis=0)) == pytest.approx((6 / 7 + 1 / 2) / 2)


@pytest.mark.parametrize("size", [8, 16, 20, 32])
def test_band_noise_stays_in_its_ring(size):
    frequency = torch.fft.fftfreq(size) * 2  # in π per pixel
    radius = torch.hypot(frequency[:, None], frequency).numpy()
    for low in np.arange(10) / 10:
        generator = torch.Generator().manual_seed(0)
        ends = low * math.pi, (low + 0.1) * math.pi
        noise = analyze.band_noise((2, 3, size, size), *ends, generator)
        # fixed energy in each image, nothing at frequency 0
        assert close(noise.square().mean(dim=(1, 2, 3)), torch.ones(2))
        assert close(noise.mean(dim=(2, 3)), torch.zeros(2, 3))
        power = torch.fft.fft2(noise).abs().square().sum(dim=(0, 1))
        ring = radius[power.numpy() > 1e-6 * power.max().item()]
        assert ring.min() > max(0, low - 1e-6)
        # above it only where it is empty: then the nearest frequencies, of one radius
        assert ring.max() < low + 0.1 + 1e-6 or ring.max() - ring.min() < 1e-3
    again = analyze.band_noise((2, 3, size, size), *ends, generator.manual_seed(0))
    assert torch.equal(noise, again)
    assert analyze.band_noise_drop([0.5, 0.5, 0.25, 0]).tolist() == [0, 0.5, 1]


# ==== One pass ======================================================================

TINY = {"image_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}


def measured(vit, x, *names):
    """What figures measure on a batch -> {key: (B, layers or states, ...)}."""
    values = {}
    with torch.no_grad():
        values["tokens"], batch = analyze.look_inside(vit, x)
        for name in names:
            for measure in analyze.FIGURES[name].measure:
                values |= measure(batch)
    return values


def test_attention_is_among_patches():
    vit = sslvit.ViT(8, 4, 32, 2, 2, positions="none", rel_pos_bias=True).eval()
    with torch.no_grad():
        for block in vit.blocks:
            block.attn.qkv.weight.zero_()
        # every patch looks at CLS, but for four times exp(-35), which is 1e-15
        vit.rel_pos_bias.relative_position_bias_table[-2] = 35
    values = measured(vit, torch.randn(2, 3, 8, 8), "distance", "nmi")
    # rows sum to 1 again: uniform on a 2 × 2 grid
    assert close(values["distance"], torch.full((2, 2, 2), 4 * (2 + 2**0.5) / 4))
    assert close(values["nmi"], torch.zeros(2, 2, 2))


def test_states_begin_with_the_embedding():
    vit, x = sslvit.ViT(**TINY).eval(), torch.randn(2, 3, 16, 16)
    values = measured(vit, x, "spectra", "fourier")
    with torch.no_grad():
        tokens, records = vit(x, record=True)
        states = [vit.embed(x, None, None, 4, 4)]
    for record in records:
        states += [record.mid, record.out]
    assert values["fourier"].shape == (2, 7, 3)
    for place, state in enumerate(states):
        patches = state[:, 1:]
        assert close(values["features"][:, place], patches.mean(dim=1))
        assert close(values["fourier"][:, place], analyze.fourier_amplitude(patches, 4))
    # what probes read of the whole network: mean patch token, and CLS
    output = analyze.pooled_and_cls(values["tokens"])
    assert close(output[:, 0], tokens[:, 1:].mean(dim=1))
    assert close(output[:, 1], tokens[:, 0])


@pytest.fixture
def no_drawing(monkeypatch):
    """Figures are skipped, which costs nothing else."""
    for figure in analyze.FIGURES.values():
        monkeypatch.setattr(figure, "draw", None)


def test_metrics_of_a_shipped_network_are_pinned(tmp_path, no_drawing):
    # computed by NumPy alone, in float64, from the formulas of the paper
    path = str(ROOT / "figures" / "checkpoints" / "micro-moco.pt")
    names = ["distance", "nmi", "similarity", "spectra", "fourier"]
    argv = [path, "--images", "20", "--alone", "--out", str(tmp_path), "--only", *names]
    assert analyze.main(argv) == 0
    network = json.loads((tmp_path / "results.json").read_text())["networks"][1]
    values = {key: np.array(rows)[0] for key, rows in network["values"].items()}
    last = [16.934581, 0.001698, 0.144345, 0.401792, 0.999698, -4.793513, -2.213766]
    keys = ["distance", "nmi", "heads", "depths", "tokens"]
    pinned = dict(zip([*keys, "token volume", "image volume"], last, strict=True))
    measured = {key: float(values[key][-1].mean()) for key in pinned}
    assert measured == pytest.approx(pinned, rel=2e-4)
    assert values["fourier"][-1, -1] == pytest.approx(-4.135546, abs=2e-4)


# ==== Probes ========================================================================
def test_linear_probe_learns_from_three_quarters_and_is_chosen_on_the_rest(monkeypatch):
    labels = torch.arange(300) % 3
    x = torch.randn(300, 6) * torch.tensor([1, 1, 1, 50, 1, 0.01])
    x[:, 4:] += torch.tensor([10, 0.1]) * F.one_hot(labels, 3)[:, 1:]  # small ones too
    predicted, accuracy, _ = analyze.linear_probe(x[:200], labels[:200], x[200:])
    assert accuracy == 1 and (predicted == labels[200:].numpy()).all()
    # another truth in the last quarter: chosen there, not learnt
    other = labels[:200].clone()
    other[150:] = (other[150:] + 1) % 3
    x[199] = math.nan  # nor are means and deviations learnt there
    predicted, accuracy, _ = analyze.linear_probe(x[:200], other, x[200:])
    assert accuracy == 0 and (predicted == labels[200:].numpy()).all()
    # 60 rows in 60 directions: weak regularisation learns noise by heart
    x = torch.randn(80, 60)
    labels = (x[:, 0] + torch.randn(80) > 0).long()
    results = []
    for strengths in ((1.0,), (1e-6,), (1.0, 1e-6), (1e-6, 1.0)):
        monkeypatch.setattr(analyze, "STRENGTHS", strengths)
        results.append(analyze.linear_probe(x, labels, x)[1:])
    best, other = sorted(results[:2], reverse=True)
    assert best[0] > other[0] and results[2:] == [best, best]


def test_pooled_or_cls_is_chosen_on_validation(monkeypatch):
    truth = np.arange(80) % 2
    cue = np.eye(2, dtype=np.float32)[truth]  # (n, 2)
    learnt = np.stack([cue, cue], axis=1)  # (n, 2, D): pooled, CLS
    learnt[60:, 0] = 1 - cue[60:]  # in validation only CLS tells the class
    study = SimpleNamespace(examples=(learnt, truth[:, None]), device="cpu")
    study.vit = SimpleNamespace(facts=network("CL", {}))
    test = np.stack([cue, 1 - cue], axis=1)  # in the test only pooled
    study.rows = {"output": test, "labels": truth[:, None]}
    assert analyze.learn_probe(study)["linear probe"].mean() == 0
    assert "of CLS, strengths (1.0,), 1.0" in study.vit.facts.choices["linear probe"]
    # by the mean of the label sets: 0.5 of pooled, 0.6 of CLS
    one = lambda x, y, t, _: (t, x[0, y[0]], 0.1)  # noqa: E731
    monkeypatch.setattr(analyze, "linear_probe", one)
    x = np.array([[[0.9, 0.1], [0.6, 0.6]]])
    assert analyze.probe(x, np.array([[0, 1]]), x, "cpu")[1] == pytest.approx(0.6)


def test_layers_are_probed_after_each_mlp(monkeypatch):
    truth = np.arange(80) % 2
    features = np.zeros((80, 5, 2), np.float32)  # of all states of two layers
    features[:, [2, 4]] = np.eye(2)[truth][:, None]
    rows = {"features": features, "labels": truth[:, None]}
    monkeypatch.setattr(analyze, "one_pass", lambda *_: rows)
    study = SimpleNamespace(vit=None, train=None, rows=rows, device="cpu")
    assert (analyze.learn_layers(study)[analyze.POOLED] == np.ones((80, 2))).all()


def test_shape_bias_teaches_eight_pairings_and_drops_congruent_images():
    rng = np.random.default_rng(0)
    labels = rng.integers(8, size=(1000, 2))
    cues = np.eye(8)[labels]  # (n, 2, 8): shape, texture
    features = np.stack([np.hstack([2 * cues[:, 0], cues[:, 1]])] * 2, axis=1)
    features = np.float32(features + 0.1 * rng.normal(size=features.shape))
    features[900:, :, 8:] = 0  # the last hundred have no texture
    study = SimpleNamespace(classes=8, device="cpu", options=SimpleNamespace(data=""))
    study.examples = features[:800], labels[:800]
    study.rows = {"output": features[800:], "labels": labels[800:]}
    cues = analyze.learn_bias(study)["cues"]
    assert cues.shape == (200, 8, 2) and not (cues[:, :, 0] & cues[:, :, 1]).any()
    for offset in range(8):  # of one class by both cues
        congruent = (labels[800:, 1] - labels[800:, 0]) % 8 == offset
        assert not cues[congruent, offset].any()
    # standardised, both are as loud
    assert 0.3 < analyze.shape_bias(cues[:100].mean(axis=0)) < 0.7
    assert analyze.shape_bias(cues[100:].mean(axis=0)) > 0.9


def test_fine_tuning_has_crops_one_schedule_and_an_end(monkeypatch):
    vit = sslvit.ViT(**TINY)
    vit.facts = network("CL", {})
    images = analyze.Images(sslvit.Stimuli(64, 16), range(64), 16, 0)
    study = SimpleNamespace(vit=vit, classes=8, device="cpu", test=images)
    crop = Mock(wraps=analyze.random_crop)
    rate = Mock(side_effect=lambda step, total, warmup, peak: peak)
    monkeypatch.setattr(analyze, "random_crop", crop)
    monkeypatch.setattr(sslvit, "lr_at", rate)
    tuned = analyze.fit(analyze.Tuned(study, False, False), images, 3, lr=1e-3)
    assert not tuned.training  # or classes would depend on other test images
    assert {call.kwargs["total"] for call in rate.call_args_list} == {3}
    assert crop.call_count == 3 * 64


def test_segmentation_is_linear_and_fine_tuned(monkeypatch):
    answers = {"mIoU, linear": 0, "mIoU, fine-tuned": 1}  # the truth is 0
    pixels = {key: np.array([[[[x]]], [[[0]]]]) for key, x in answers.items()}
    monkeypatch.setattr(analyze, "tune", lambda _, key, *__, **___: pixels[key])
    study = SimpleNamespace(options=SimpleNamespace(data=""), classes=1)
    overlap = analyze.learn_dense(study)
    shares = [overlap[f"overlap, {head}"][0, 0, 0] for head in ("linear", "fine-tuned")]
    assert shares == [1, 0]


def test_layer_decay_by_hand():
    vit = sslvit.ViT(**TINY, positions="learned")  # three blocks
    network = torch.nn.ModuleDict({"vit": vit, "head": torch.nn.Linear(2, 2)})
    groups = analyze.parameter_groups(network, lr=8, decay=0.5)
    rates = {id(group["params"][0]): group["lr"] for group in groups}
    first, _, last = vit.blocks
    weights = [vit.patch_embed.proj.weight, vit.pos_embed, first.attn.qkv.bias]
    weights += [last.mlp.fc2.weight, vit.norm.weight, network.head.bias]
    assert [rates[id(weight)] for weight in weights] == [1, 1, 2, 8, 8, 8]


# ==== Values stored 21 times ========================================================
def test_each_row_leaves_out_another_twentieth():
    values = analyze.leave_out({"x": np.eye(40)})["x"]  # a direction for each image
    assert values.shape == (21, 40)
    assert close(values[0], np.full(40, 1 / 40))
    absent = [np.flatnonzero(row == 0).tolist() for row in values[1:]]
    assert [len(group) for group in absent] == [2] * 20
    assert sorted(sum(absent, [])) == list(range(40))
    assert close(values[1:].max(axis=1), np.full(20, 1 / 38))
    # what is no mean is computed again
    spread = [lambda rows: {"spread": np.ptp(rows["x"])}]
    values = analyze.leave_out({"x": np.arange(20.0)}, spread)
    # without one image 19 remains, but where the first or the last is absent
    assert sorted(values["spread"]) == [18, 18] + [19] * 19
    # ten images of 1 pixel in 1, ten of 0 in 3: 10 of 40 pixels, not the mean 1/2
    counts = np.array([[[1, 1]], [[0, 3]]] * 10)
    ious = [analyze.mean_iou(x) for x in analyze.leave_out({"x": counts})["x"]]
    assert sorted(ious) == pytest.approx([9 / 39] * 10 + [10 / 40] + [10 / 37] * 10)


def steady(values):
    """Networks whose values no image changes: (21, networks)."""
    return np.tile(np.array(values, dtype=float), (21, 1))


def test_jackknife_of_a_mean_by_hand():
    # images 1 .. 20 in groups of one: the t interval of a mean, 2.09·s/√20, with
    # s² = (20² - 1)/12 · 20/19 = 35
    rows = analyze.leave_out({"x": np.arange(1.0, 21)[:, None]})["x"]
    reach = 2.09 * math.sqrt(35 / 20)
    assert analyze.interval(rows, 0 * rows) == pytest.approx((10.5, reach))
    # what all networks share with their images cancels
    assert analyze.interval(rows + 1, rows) == pytest.approx((1, 0))


def test_welch_by_a_published_example():
    # Student's sleep data; R's t.test(extra ~ group, data = sleep) prints
    # df = 17.776, 95 percent confidence interval -3.3654832 0.2054832
    drug_1 = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    drug_2 = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    difference, reach = analyze.interval(steady(drug_1), steady(drug_2))
    assert difference == pytest.approx(-1.58)
    ends = difference - reach, difference + reach
    assert ends == pytest.approx((-3.3654832, 0.2054832), abs=2e-4)


def test_reach_adds_images_and_networks_as_squares():
    # rows ±0.1 around the mean: √(19/20 · 20 · 0.01) = √0.19, times 2.09
    images = 2.09 * math.sqrt(0.19)
    wiggle = np.array([[0]] + [[0.1], [-0.1]] * 10)
    # two groups of s = 0.04: four degrees of freedom, t = 2.776
    networks = 2.776 * math.sqrt(2 * 0.04**2 / 3)
    cl, mim = steady([0.80, 0.84, 0.88]), steady([0.70, 0.74, 0.78])
    reach = math.sqrt(images**2 + networks**2)
    assert analyze.interval(cl + wiggle, mim) == pytest.approx((0.1, reach), abs=1e-4)
    # two networks on one side: images only
    assert analyze.interval(cl[:, :2] + wiggle, mim) == pytest.approx((0.08, images))


# ==== Verdicts ======================================================================

SHAPE = {"image_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6}
LAMS = {"CL": 1.0, "MIM": 0.0, "MIM with decoder": 0.0, analyze.HYBRID: 0.2}


def network(role, values, seed=0, **facts):
    """As it stands in results.json; no image changes its values."""
    config = {"decoder_depth": 2} if role.endswith("decoder") else {}
    facts = SHAPE | {"images": 0, "config": config} | facts
    name = f"{role}, {facts['embed_dim']} × {facts['depth']}, {facts['images']} images"
    facts |= {"name": name, "lam": LAMS.get(role), "given": "", "seed": seed}
    facts |= {"path": f"{name}/{seed}" if role in LAMS else ""}
    facts |= {"num_heads": 3, "pixels": "imagenet", "label_names": ["shape", "texture"]}
    rows = {key: np.array([value] * 21, dtype=float) for key, value in values.items()}
    return analyze.Network(**facts, values=rows)


def judged(networks, *names):
    """-> the claims; if there are no untrained networks, such of half the values."""
    new = []
    for n in networks:
        shape = {key: getattr(n, key) for key in SHAPE}
        values = {key: rows[0] / 2 for key, rows in n.values.items()}
        new.append(network("untrained", values, **shape))
    has_untrained = any(n.role == "untrained" for n in networks)
    claims = analyze.judge(networks + (not has_untrained) * new, list(names))
    for row in sum([claim["parts"] for claim in claims], []):
        for key in row.keys() & {"values", "gains"}:  # of names, here of roles
            row[key] = {name.partition(",")[0]: x for name, x in row[key].items()}
    return claims


def similarities(heads, depths, tokens):
    return {"heads": [heads] * 6, "depths": [depths] * 5, "tokens": [tokens] * 6}


def test_verdicts():
    for differences, verdict in (
        ((0.1, 0.1, 0.1), "agrees (1 network)"),
        ((0.1, 0.1, 0), "partly (1 network)"),
        ((0.1, -0.1, 0), "mixed (1 network)"),
        ((-0.1, -0.1, 0), "opposed (1 network)"),
        ((0, 0, 0), "undecided (1 network)"),
        ((0.1, 0.1, math.nan), "not testable"),
    ):
        cl = network("CL", similarities(*differences))
        [claim] = judged([cl, network("MIM", similarities(0, 0, 0))], "similarity")
        assert claim["verdict"] == verdict


def test_a_part_holds_with_its_whole_interval():
    # rows ±0.1 around the mean: reach 2.09·√19·0.1 = 0.911, as below
    ends = ((0.9, "undecided"), (0.92, "agrees"), (-0.9, "undec"), (-0.92, "opposed"))
    for difference, verdict in ends:
        pair = [network(role, similarities(1, 1, 1)) for role in ("CL", "MIM")]
        for rows in pair[0].values.values():
            rows += difference
            rows[1:] += 5 + np.array([0.1, -0.1] * 10)[:, None]
        [claim] = judged(pair, "similarity")
        assert claim["verdict"].startswith(verdict)
        assert claim["parts"][0]["values"]["CL"] == 1 + difference


def test_what_is_missing_is_not_testable_and_is_named():
    values = similarities(1, 1, 1)
    coarse = network("MIM", values, patch_size=8)  # other patches: not comparable
    [claim] = judged([network("CL", values), coarse], "similarity")
    assert claim["verdict"] == "not testable"
    assert "MIM" in claim["parts"][0]["outcome"]
    two = [network(role, values, images=x) for role, x in (("CL", 1), ("CL", 2))]
    [claim] = judged([*two, network("MIM", values)], "similarity")
    assert "needs CL, of one name" in claim["parts"][0]["outcome"]
    # half of the claim's figures, half of its parts
    bias = [*biases("CL", [0.8]), *biases("MIM", [0.7])]
    del bias[0].values["noise"]
    assert judged(bias, "bias")[0]["verdict"] == "not testable"
    del values["depths"]
    [claim] = judged([network(role, values) for role in ("CL", "MIM")], "similarity")
    assert claim["verdict"] == "not testable"
    assert "depths" in claim["parts"][1]["outcome"]


def biases(role, numbers, first=0):
    """A network of each shape bias, seeds from `first` on; fine noise hurts MIM."""
    noise = [[1]] * 7 + [[1 - 0.5 * (role == "MIM")]] * 4
    for seed, number in enumerate(numbers, start=first):
        yield network(role, {"cues": [[number, 1 - number]] * 8, "noise": noise}, seed)


def test_all_seeds_count_in_any_order():
    cl = list(biases("CL", [0.80, 0.84, 0.88]))
    mim = list(biases("MIM", [0.70, 0.74, 0.78], first=2))  # not the same seeds
    reach = 2.776 * math.sqrt(2 * 0.04**2 / 3)  # as above
    for networks in (cl + mim, [mim[1], cl[2], mim[2], cl[0], mim[0], cl[1]]):
        [claim] = judged(networks, "bias")
        row, _ = claim["parts"]
        assert claim["verdict"] == "agrees (3 networks)"
        assert row["difference"] == pytest.approx(0.1)
        assert row["reach"] == pytest.approx(reach, abs=1e-4)
        means = [row["values"][role] for role in ("CL", "MIM")]
        assert means == pytest.approx([0.84, 0.74])
    for count, words in ((1, "agrees (1 network)"), (2, "agrees (2 networks)")):
        [claim] = judged(cl[:count] + mim, "bias")
        assert claim["verdict"] == words
        assert claim["parts"][0]["reach"] == pytest.approx(0)


def test_the_distance_from_untrained_stands_in_the_row():
    roles = {"CL": 0.5, "MIM": 0, "untrained": 0.4}
    networks = [network(role, similarities(x, 0, 0)) for role, x in roles.items()]
    gains = judged(networks, "similarity")[0]["parts"][0]["gains"]
    assert [gains["CL"][0], gains["MIM"][0]] == pytest.approx([0.1, -0.4])
    # MIM of another architecture, and its own untrained network
    networks += [network("untrained", similarities(-0.3, 0, 0), look="relative")]
    networks[1].look = "relative"
    row = judged(networks, "similarity")[0]["parts"][0]
    gains = [row["gains"][role][0] for role in ("CL", "MIM")]
    assert gains == pytest.approx([0.1, 0.3]) and row["values"]["untrained"] == 0.4


# ---- What each claim reads: six layers, so that early and late are two ----

POOLED = analyze.POOLED
zeros = [0] * 12  # of all states but the last


def layers(early, middle, late):
    return [early] * 2 + [middle] * 2 + [late] * 2


def states(early, middle, late, trap):
    """After each of six MLPs; `trap` after the embedding and each attention."""
    return [trap] + [x for value in layers(early, middle, late) for x in (trap, value)]


def at_pi(early, late):
    """(13, 5): of π in the last bin; nothing is to be read of the one before."""
    return [[0, 9, 9, 9, x] for x in states(early, 0, late, trap=9)]


def overlap(share):
    """Nine classes of 100 pixels each."""
    return [[100 * share, 100]] * 9


def rings(low, high):
    """Accuracy 0.8 without noise; of ten rings four are a third, rounded up."""
    means = [0.8] + [low] * 4 + [0.1] * 2 + [high] * 4
    return [[x + 0.1, x - 0.1] for x in means]  # of two label sets


@pytest.mark.parametrize(
    "name, key, cl, mim, differences",
    [
        # 7 - 5 px; late - early 4 - (-1)
        ("distance", "distance", [5, 5, 7, 7, 8, 10], layers(4, 8, 3), [2, 5]),
        # CL's own fall; seven layers have thirds of three
        ("nmi", "nmi", [0.2, 0.3, 0.4, 9] + [0.1] * 3, [0] * 4 + [0.6] * 3, [0.5, 0.2]),
        ("similarity", "heads", layers(0, 0, 0.9), layers(1, 1, 0.5), [0.4]),
        ("similarity", "depths", [0, 0, 0, 0.7, 0.9], [1, 1, 1, 0.2, 0.2], [0.6]),
        ("similarity", "tokens", layers(0, 0, 0.9), layers(1, 1, 0.4), [0.5]),
        ("spectra", "token volume", zeros + [-3], zeros + [-1], [2]),
        ("spectra", "image volume", zeros + [-2], zeros + [-5], [3]),
        ("fourier", "fourier", at_pi(0, -4), at_pi(0, -1.5), [2.5]),
        # shape, texture; photographs have one label set
        ("accuracy", "linear probe", [0.9, 0.5], [0.7, 0.6], [0.2, -0.1]),
        ("accuracy", "fine-tuned", [0.5, 0.5], [0.8, 0.4], [0.3, -0.1]),
        ("accuracy", "fine-tuned", [0.5], [0.8], [0.3]),
        ("dense", "overlap, linear", overlap(0.2), overlap(0.4), [0.2]),
        ("dense", "overlap, fine-tuned", overlap(0.5), overlap(0.9), [0.4]),
        ("bias", "cues", [[0.3, 0.1]] * 8, [[0.1, 0.3]] * 8, [0.75 - 0.25]),
        # drops of MIM 1/4 and 1, of CL 0 and 1/2
        ("noise", "noise", rings(0.8, 0.4), rings(0.6, 0), [0.75 - 0.5]),
        # early; last layer; MIM's middle - last
        ("layers", POOLED, layers(3, 5, 8), layers(5, 7, 6), [5 - 3, 8 - 6, 7 - 6]),
    ],
)
def test_what_a_claim_reads(name, key, cl, mim, differences):
    pair = [network("CL", {key: cl}), network("MIM", {key: mim})]
    [claim] = judged(pair, name)
    assert claim["claim"] == analyze.FIGURES[name].claim
    rows = [row["difference"] for row in claim["parts"] if "difference" in row]
    assert rows == pytest.approx(differences)


def test_lines_lie_at_their_layers_and_lambdas():
    # attention outputs have a neighbour from layer 2 on; states begin with layer 0
    for x in ([1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6], [n / 2 for n in range(13)]):
        rows = {y: {"distance": [[y - 1, y + 1]] * len(x)} for y in (1, 4)}
        seeds = [network(analyze.HYBRID, rows[y], image_size=8) for y in (1, 4, 4)]
        seeds[2].values["distance"] = seeds[2].values["distance"][..., ::-1]
        for seed in seeds:  # what leaves images out is not drawn
            seed.values["distance"][1:] = 9
        _, [[axis]] = analyze.canvas(1)
        analyze.plot_distance(axis, seeds)
        *thin, thick, uniform = axis.lines
        assert [line.get_ydata()[0] for line in thin] == [1, 4, 4]
        assert thick.get_ydata()[0] == 3 and thick.get_linestyle() == "--"
        assert thick.get_xdata().tolist() == x
        band = axis.collections[0].get_paths()[0].vertices[:, 1]
        # the lowest and the highest head of each, whatever their numbers
        assert (band.min(), band.max()) == (2, 4)
        # 2 × 2 patches of 4 px
        assert uniform.get_ydata()[0] == pytest.approx(2 + 2**0.5)
    analyze.plot_distance(axis, [*seeds, network("CL", rows[1], image_size=16)])
    dotted = [line for line in axis.lines if line.get_linestyle() == ":"]
    assert len({line.get_ydata()[0] for line in dotted}) == 2  # as there are two grids
    networks = [network(role, tuned(0.5)) for role in ("CL", "MIM", analyze.HYBRID)]
    networks[1].images = 9
    networks.append(network("CL", tuned(0.7)))
    # not drawn: another size, the same with a decoder, as deep as both
    networks += [network(x, tuned(0.9), embed_dim=192) for x in ("CL", "untrained")]
    networks.append(network("MIM with decoder", tuned(0.9)))
    networks.append(network("MIM", tuned(0.9), depth=8))
    networks += [network("untrained", tuned(x), x) for x in (0.1, 0.2)]
    for axis in analyze.draw_sweep(networks).axes:
        lams, means = axis.lines[-1].get_data()
        assert lams.tolist() == [0, 0.2, 1] and close(means, [0.5, 0.5, 0.6])
        assert axis.lines[0].get_ydata()[0] == pytest.approx(0.15)
        assert to_hex(axis.lines[1].get_color()) == "#0072b2"  # MIM is blue
        assert axis.get_xlabel() == "λ (0: MIM, 1: CL)"


def test_panels_show_what_their_labels_say():
    values = {"linear probe": [0.1, 0.2], "fine-tuned": [0.3, 0.5]}
    values |= {"nmi": layers(0, 0, 0), "fourier": at_pi(0, -4)}
    networks = [network(role, values) for role in ("CL", analyze.HYBRID)]

    def shown(fig):
        return [axis.lines[0].get_ydata()[-1] for axis in fig.axes]

    assert shown(analyze.draw_accuracy(networks)) == [0.1, 0.2, 0.3, 0.5]
    sweep = analyze.draw_sweep([*networks, network("untrained", values)])
    assert shown(sweep) == pytest.approx([0.15, 0.4])
    assert shown(analyze.draw_fourier(networks)) == [-4, -4 - 9, -4]
    networks[1] = network("CL", values, embed_dim=192)
    assert shown(analyze.draw_scaling(networks)) == [0.4]
    networks[0].pictures = {"plane": [[[0, 0], [5, 6]]] * 3, "shares": [0.9, 0.1]}
    networks[1].pictures = {"maps": 0}  # measured for another figure, then joined
    [axis] = analyze.draw_plane(networks).axes
    assert (axis.get_xlabel()[:3], axis.get_ylabel()[:3]) == ("90%", "10%")
    assert axis.lines[-1].get_xydata().tolist() == [[5, 6]]  # after: full
    pair = [network(role, similarities(1, 1, 1) | {"nmi": [[1]] * 6}) for role in LAMS]
    title = analyze.title_of("similarity", judged(pair, "similarity", "nmi"))
    assert "heads, late: CL: 1" in title and "tokens, late undecided" in title
    assert analyze.between(0.5, 0.25) == "+0.500\xa0[+0.250,\xa0+0.750]"


# ---- Which networks are compared ----
def tuned(number):
    return {"fine-tuned": [number] * 2, "linear probe": [number] * 2}


def test_claims_2_and_3_need_networks_that_are_better_than_new_ones():
    numbers = {  # of CL, MIM and a new network of three widths
        48: (0.6, 0.5, 0.4),
        96: (0.6, 0.6, 0.4),
        192: (0.7, 0.9, 0.8),
        384: (None, 0.9, 0.8),  # not the largest size, as CL has none of it
    }
    networks = []
    for width, row in numbers.items():
        for role, number in zip(("CL", "MIM", "untrained"), row, strict=True):
            # the smallest has the largest patches
            facts = {"embed_dim": width, "images": 10, "patch_size": 400 // width}
            networks += [network(role, tuned(number), **facts)] if number else []
    [claim] = judged(networks, "scaling")
    small, large = claim["parts"]
    assert small["difference"] == pytest.approx(0.1) and small["outcome"] == "holds"
    assert large["difference"] == pytest.approx(0.2)
    assert "not above a new network" in large["outcome"]
    assert claim["verdict"] == "not testable"
    # above by 0.05, but no further than the images scatter
    cl = networks[6].values["fine-tuned"]
    cl += 0.15
    cl[1:] += np.array([0.1, -0.1] * 10)[:, None]
    [claim] = judged(networks, "scaling")
    assert "not above a new network" in claim["parts"][1]["outcome"]
    # half of the pixels, as in an untrained network here, is the same IoU
    dense = {"overlap, linear": overlap(0.5), "overlap, fine-tuned": overlap(0.5)}
    [claim] = judged([network(role, dense) for role in ("CL", "MIM")], "dense")
    assert all("not above a new" in row["outcome"] for row in claim["parts"])


def test_claim_12_reads_where_the_hybrid_changes():
    def values(nmi, early, late):
        return tuned(0.5) | {"nmi": [[x] for x in nmi], "fourier": at_pi(early, late)}

    # NMI of the hybrid: 0.8 and 0.6 in the middle, 0.2 in the last layer
    hybrid = values([0, 0, 0.8, 0.6, 1, 0.2], -2, -5)
    hybrid = network(analyze.HYBRID, hybrid, images=100)
    cl = network("CL", values([0] * 6, -3, 0), images=100)
    mim = network("MIM", values([0] * 6, 0, -1), images=100)
    [claim] = judged([cl, mim, hybrid], "sweep")
    rows = [row["difference"] for row in claim["parts"][-3:]]
    assert rows == pytest.approx([0.7 - 0.2, -2 - -3, -1 - -5])


def test_claim_11_has_a_control_of_equal_depth():
    def values(middle, last, nmi):
        return {POOLED: layers(0, middle, last), "nmi": [[0]] * 5 + [[nmi]]}

    deep = values(0, 0, 0.9) | {POOLED: [0, 0, 9, 0.8, 0.8, 9, 9, 0.7]}
    networks = [
        network("MIM", values(0.8, 0.5, 0.1)),
        network("MIM with decoder", values(0.8, 0.9, 0.3)),
        network("CL", values(0, 0, 0)),
        # as deep as encoder and decoder together
        network("MIM", deep, depth=8),
    ]
    networks += networks[:2]  # two seeds each, but one control
    [claim] = judged(networks, "decoder")
    rows = [row["difference"] for row in claim["parts"]]
    assert rows == pytest.approx([0.1 - -0.3, 0.1 - -0.1, 0.3 - 0.1])
    assert claim["verdict"] == "agrees (1 network)"
    parts = judged(networks[:3], "decoder")[0]["parts"]
    assert "MIM as deep" in parts[1]["outcome"]
