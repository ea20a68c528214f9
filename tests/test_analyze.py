"""analyze.py against answers known by hand, against timm's modules, and against bad input."""

import argparse
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import analyze  # noqa: E402
import sslvit  # noqa: E402

torch.manual_seed(0)


def close(a, b, tolerance=1e-5):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return torch.allclose(a, b, atol=tolerance, rtol=tolerance)


# ==== metrics ==============================================================================================


def test_attention_distance_by_hand():
    identity, uniform = torch.eye(4).expand(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.25)
    assert close(analyze.attention_distance(identity, 2, 16), torch.zeros(2, 3), 0)
    # 2 × 2 grid of 16-px patches: from each token to itself 0, to two sides 16, across the diagonal 16√2
    assert close(analyze.attention_distance(uniform, (2, 2), 16), torch.full((2, 3), 16 * (2 + 2**0.5) / 4))
    shift = torch.roll(torch.eye(6), 3, dims=1)[None, None]  # 2 rows, 3 columns: looks at the other row
    assert close(analyze.attention_distance(shift, (2, 3), 8), 8)
    assert close(analyze.attention_distance(shift, (1, 6), 8), 24)  # the same matrix on a line: three steps
    assert close(
        analyze.attention_distance(shift, (3, 2), 1), (2 * 2**0.5 + 5**0.5) / 3
    )  # √2, √5, √2 and back


def test_attention_nmi_by_hand():
    assert close(analyze.attention_nmi(torch.full((1, 1, 5, 5), 0.2)), 0, 1e-6)
    assert close(analyze.attention_nmi(torch.eye(7)[None, None]), 1, 1e-6)
    one_key = torch.zeros(1, 1, 5, 5)
    one_key[..., 2] = 1  # every query looks at the same key: 0·log 0 and 0/0
    assert analyze.attention_nmi(one_key).item() == 0
    same = torch.tensor([0.7, 0.2, 0.1, 0.0]).expand(1, 1, 4, 4)  # one map for all queries, not uniform
    assert close(analyze.attention_nmi(same), 0, 1e-6)
    # two blocks of two: I = log 2, H(q) = H(k) = log 4, NMI = 1/2 exactly, in float64 without any epsilon
    blocks = torch.block_diag(torch.full((2, 2), 0.5), torch.full((2, 2), 0.5)).double()[None, None]
    assert close(analyze.attention_nmi(blocks), 0.5, 1e-12)
    # two queries on key 0, two on key 1: H(q) = log 4, H(k) = I = log 2
    pairs = torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]).double()[None, None]
    assert close(analyze.attention_nmi(pairs), 1 / math.sqrt(2), 1e-12)


def test_similarities_by_hand():
    e = torch.eye(4)
    heads = torch.stack([e[0], e[0], e[1]])[None, :, None]  # (1, 3, 1, 4): pairs 1, 0, 0
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
    pairs = [cosine(x[:, i], x[:, j], dim=-1).mean(-1) for i in range(3) for j in range(3) if i != j]
    assert close(analyze.head_similarity(x), torch.stack(pairs).mean(0))


@pytest.mark.parametrize("grid, bin", [((8, 8), 1), ((8, 8), 4), ((7, 7), 3), ((8, 12), 4), ((14, 14), 7)])
def test_fourier_finds_a_diagonal_wave(grid, bin):
    rows, cols = grid
    F = min(grid) // 2 + 1
    omega = math.pi * bin / (F - 1)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    wave = 0.01 + torch.cos(omega * (y + x)).flatten()[None, :, None].expand(1, rows * cols, 3)
    amplitude = analyze.fourier_amplitude(wave, grid)
    assert amplitude.shape == (1, F) and amplitude[0, 0] == 0
    assert amplitude[0].argmax() == bin  # bin F - 1 is π: the Nyquist frequency is there, on odd grids too
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
    x[0, 0, 0], x[0, 1, 0], x[0, 2, 1], x[0, 3, 1] = 3, -3, 2, -2  # columns already centred: √18, √8, 0
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


def test_cka_by_hand():
    x = torch.randn(50, 4)
    turn = torch.linalg.qr(torch.randn(4, 4))[0]
    assert close(analyze.cka(x, 3 * x @ turn + 1), 1)
    a, b = torch.tensor([[1.0], [-1], [1], [-1]]), torch.tensor([[1.0], [1], [-1], [-1]])
    assert close(analyze.cka(a, b), 0)
    assert close(analyze.cka(a, torch.cat([a, b], 1)), 1 / math.sqrt(2))  # 16 / (4·√32)


def test_purity_iou_bias_by_hand():
    islands = torch.arange(3.0)[:, None, None] * 100 + torch.rand(3, 4, 2)
    assert analyze.nearest_purity(islands) == 1
    mixed = torch.tensor([[[0.0], [10]], [[0.1], [10.1]]])  # every neighbour is of the other image
    assert analyze.nearest_purity(mixed) == 0
    pred, target = torch.tensor([[[1, 1], [0, 0]]]), torch.tensor([[[1, 0], [0, 0]]])
    assert close(analyze.mean_iou(pred, target, 2), (1 / 2 + 2 / 3) / 2)
    assert close(analyze.mean_iou(target, target, 5), 1)  # classes that neither map holds do not count
    void = torch.tensor([[[1, 255], [0, 0]]])  # where nobody knows, nothing counts
    assert close(analyze.mean_iou(pred, void, 2), 1) and close(analyze.mean_iou(1 - pred, void, 2), 0)
    decisions, shapes, textures = np.array([0, 0, 1, 5]), np.array([0, 0, 2, 3]), np.array([1, 1, 1, 4])
    assert analyze.shape_bias(decisions, shapes, textures) == pytest.approx(2 / 3)
    assert math.isnan(analyze.shape_bias(decisions, shapes + 10, textures + 10))


def test_band_noise_stays_in_its_band():
    noise = analyze.band_noise((4, 3, 32, 32), 0.4 * math.pi, 0.5 * math.pi, torch.Generator().manual_seed(0))
    assert close(noise.square().mean(dim=(1, 2, 3)), torch.ones(4))
    power = torch.fft.fft2(noise).abs().square()
    f = torch.fft.fftfreq(32) * 2
    radius = (f[:, None] ** 2 + f**2).sqrt()
    inside = (radius >= 0.4) & (radius < 0.5)
    assert power[..., ~inside].sum() < 1e-6 * power.sum()
    drop = analyze.band_noise_drop(
        np.array([1, 1, 0, 0.0]), np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0.0]])
    )
    assert drop.tolist() == [0, 0.5, 1]


# ==== files ================================================================================================

SIZE, PATCH, WIDTH, DEPTH = 32, 8, 128, 2  # 128 wide: the assumption is 2 heads


def timm_vit(**options):
    timm = pytest.importorskip("timm")
    options |= {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2}
    options |= {"num_classes": 0}
    model = timm.models.vision_transformer.VisionTransformer(**options).eval()
    for p in model.parameters():
        p.data = 0.2 * torch.randn_like(p) + (p.ndim == 1)
    return model


def timm_beit(**options):
    timm = pytest.importorskip("timm")
    options |= {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2}
    options |= {"num_classes": 0, "use_abs_pos_emb": False}
    model = timm.models.beit.Beit(**options).eval()
    for p in model.parameters():
        p.data = 0.2 * torch.randn_like(p)
    return model


def write(tmp_path, content):
    path = tmp_path / "file.pth"
    torch.save(content, path)
    return path


def rename(state, prefix, **extra):
    return {prefix + k: v for k, v in state.items()} | extra


class CfgNode(dict):  # stands for yacs's class: a dict that pickles by name
    pass


def namings(state):
    """The same weights as the official files hold them: name -> (content, words the report must hold)."""
    D, p = WIDTH, PATCH
    noise = torch.zeros(1, 1, D)
    head = {"head.weight": torch.zeros(5, D), "head.bias": torch.zeros(5)}
    wrong = {k: v + 1 for k, v in state.items()}
    args = argparse.Namespace(lr=1.0)
    momentum, base = rename(wrong, "module.momentum_encoder."), rename(state, "module.base_encoder.")
    moco = momentum | base | {"module.predictor.0.weight": noise, "module.base_encoder.head.0.weight": noise}
    words = (
        "mask_token decoder_pos_embed decoder_embed.weight decoder_blocks.0.norm1.weight decoder_norm.bias"
    )
    mae = state | dict.fromkeys(words.split(), noise)
    teacher = rename(state, "backbone.", **{"head.mlp.0.weight": noise})
    ours = rename(state, "encoder.") | rename(wrong, "key_encoder.") | {"mask_token": noise}
    ours |= {"decoder.0.weight": torch.zeros(3 * p * p, D), "decoder.0.bias": torch.zeros(3 * p * p)}
    folded = "key_encoder.blocks.*.norm1.bias (2)"
    return {
        "timm": (state | head, ["head.weight"]),
        "moco": ({"epoch": 3, "optimizer": {}, "state_dict": moco}, ["module.predictor.0.weight", "CL"]),
        "moco momentum": ({"state_dict": rename(state, "module.momentum_encoder.")}, ["CL"]),
        "moco probed": ({"state_dict": rename(state | head, "module.")}, ["module.head.bias"]),
        "mae": ({"model": state}, []),
        "mae decoder": (
            {"model": mae, "args": args},
            ["decoder_blocks.*.norm1.weight (1)", "mask_token", "MIM", "no reconstructions"],
        ),
        "dino": (
            {"student": rename(wrong, "module.backbone."), "args": args, "teacher": teacher},
            ["head.mlp.0"],
        ),
        "dino student": ({"student": rename(teacher, "module.")}, ["module.head.mlp.0.weight"]),
        "ibot": ({"state_dict": state | {"masked_embed": noise}}, ["masked_embed"]),
        "dinov2": (state | {"mask_token": noise}, ["mask_token"]),
        "sslvit": ({"model": ours}, ["key_encoder.cls_token", folded, "decoder.0.bias"]),
    }


@pytest.mark.parametrize("naming", list(namings({})))
def test_published_vits_equal_timm(naming, tmp_path, capsys):
    oracle = timm_vit(init_values=1.0 if naming == "dinov2" else None)
    content, words = namings(oracle.state_dict())[naming]
    vit = analyze.load_encoder(write(tmp_path, content))
    x, report = torch.randn(2, 3, SIZE, SIZE), capsys.readouterr().out
    with torch.no_grad():
        assert close(vit(x), oracle.forward_features(x), 1e-4)
    assert not vit.training and all(word in report for word in words), report
    assert "missing: 0 keys" in report and "unexpected, not used: 0 keys" in report


def test_fine_tuned_mae_and_registers_equal_timm(tmp_path, capsys):
    x = torch.randn(2, 3, SIZE, SIZE)
    pooled = timm_vit(global_pool="avg", fc_norm=True)
    vit = analyze.load_encoder(write(tmp_path, {"model": pooled.state_dict()}))
    with torch.no_grad():
        records = vit(x, record=True)[1]
        assert close(vit.norm(records[-1].out[:, 1:].mean(1)), pooled(x), 1e-4)
    for no_class in (True, False):  # DINOv2's registers have no place, timm can give them one
        oracle = timm_vit(reg_tokens=3, no_embed_class=no_class)
        vit = analyze.load_encoder(write(tmp_path, oracle.state_dict()))
        with torch.no_grad():
            tokens, records = vit(x, record=True)
            want = oracle.forward_features(x)
            assert close(tokens, want[:, [0, *range(4, 20)]], 1e-4) and close(vit(x), tokens, 1e-4)
            assert records[0].attn.shape == (2, 2, 17, 17) and records[1].mid.shape == (2, 17, WIDTH)


@pytest.mark.parametrize("shared, gammas", [(True, 0.1), (False, 0.1), (False, None)])
def test_simmim_and_beit_equal_timm(shared, gammas, tmp_path):
    oracle = timm_beit(use_shared_rel_pos_bias=shared, use_rel_pos_bias=not shared, init_values=gammas)
    state = {"encoder." * shared + k: v for k, v in oracle.state_dict().items()}
    if shared:  # a SimMIM pre-training file
        conv = {"weight": torch.zeros(3 * PATCH**2, WIDTH, 1, 1), "bias": torch.zeros(3 * PATCH**2)}
        state |= {"encoder.mask_token": torch.zeros(1, 1, WIDTH)} | {
            f"decoder.0.{k}": v for k, v in conv.items()
        }
        config = CfgNode(lr=1)
        config.__dict__["_immutable"] = True
        state = {"model": state, "config": config, "optimizer": {}, "lr_scheduler": argparse.Namespace(a=1)}
    vit = analyze.load_encoder(write(tmp_path, state))
    x, seen = torch.randn(2, 3, SIZE, SIZE), []
    oracle.blocks[-1].register_forward_hook(lambda module, args, result: seen.append(result))
    with torch.no_grad():
        oracle.forward_features(x)
        assert close(vit(x, record=True)[1][-1].out, seen[0], 1e-4)
    assert vit(torch.randn(1, 3, 24, 40)).shape == (1, 16, WIDTH)  # other sizes, not square
    assert (vit.pixels is not None) == shared


def test_pixel_heads(checkpoints, tmp_path):
    for name in ("simmim", "decoder", "hybrid"):
        assert analyze.load_encoder(checkpoints / name / "ckpt.pt").pixels is not None, name
    assert analyze.load_encoder(checkpoints / "moco" / "ckpt.pt").pixels is None
    # SimMIM's decoder: a 1 × 1 convolution to 3p² channels, then PixelShuffle; ours: a linear layer, then fold
    vit, p = sslvit.ViT(16, 8, 128, 1, 2), 8
    conv = torch.nn.Conv2d(128, 3 * p * p, 1)
    state = rename(vit.state_dict(), "encoder.") | {"encoder.mask_token": torch.zeros(1, 1, 128)}
    state |= {f"decoder.0.{k}": v for k, v in conv.state_dict().items()}
    _, head = analyze.load_encoder(write(tmp_path, {"model": state})).pixels
    tokens = torch.randn(2, 4, 128)
    with torch.no_grad():
        want = torch.pixel_shuffle(conv(tokens.mT.unflatten(2, (2, 2))), p)
        assert close(torch.nn.functional.fold(head(tokens).mT, (16, 16), p, stride=p), want)


def test_heads_are_said_and_settable(tmp_path, capsys):
    small = sslvit.ViT(16, 8, 384, 1, 6).state_dict()
    assert analyze.load_encoder(write(tmp_path, small)).blocks[0].heads == 6
    assert "assumed" in capsys.readouterr().out
    moco = {"state_dict": rename(small, "module.base_encoder.")}
    assert analyze.load_encoder(write(tmp_path, moco)).blocks[0].heads == 12
    assert analyze.load_encoder(write(tmp_path, small), heads=4).blocks[0].heads == 4


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_executed(zipped, tmp_path):
    state = sslvit.ViT(16, 8, 64, 1, 1).state_dict()
    path = tmp_path / "evil.pth"
    content = {"model": state, "args": Evil(tmp_path / "ran")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    vit = analyze.load_encoder(path)
    assert not (tmp_path / "ran").exists()
    assert torch.equal(vit.state_dict()["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
    torch.save(Evil(tmp_path / "ran"), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(sslvit.UserError):
        analyze.load_encoder(path)
    assert not (tmp_path / "ran").exists()


# ==== probes, evaluation ===================================================================================


def test_linear_probe_and_knn():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    x = torch.randn(300, 6, generator=g) * torch.tensor([1, 1, 1, 50, 1, 0.01])
    x[:, 5] += 0.1 * y  # the class shows in the smallest direction only: standardisation must find it
    split = [(x[i::3], y[i::3]) for i in (0, 1, 2)]
    split = [(x[a:b], y[a:b]) for a, b in ((0, 150), (150, 225), (225, 300))]
    assert analyze.linear_probe(*split)["accuracy"] > 0.98
    noise = [(torch.randn(len(b), 6, generator=g), b) for _, b in split]
    probe = analyze.linear_probe(*noise)
    assert probe["accuracy"] < 0.55 and probe["predicted"].shape == (75,)
    wrong = split[:2] + [(split[2][0], (split[2][1] + 1) % 3)]
    assert analyze.linear_probe(*wrong)["accuracy"] < 0.02  # the test labels are scored, never learnt
    bank = torch.eye(4).repeat(3, 1) + 0.01 * torch.randn(12, 4, generator=g)
    labels = torch.arange(4).repeat(3)
    assert analyze.knn(bank, labels[:, None], torch.eye(4), torch.arange(4)[:, None], k=3) == [1]
    known = torch.stack([labels, 3 - labels], dim=1)  # two label sets, one of them read the wrong way round
    assert analyze.knn(bank, known, torch.eye(4), torch.arange(4)[:, None].expand(4, 2), k=3).tolist() == [
        1,
        0,
    ]


def test_fine_tuning_and_segmentation_learn_and_leave_the_encoder_alone():
    torch.manual_seed(0)
    vit = sslvit.ViT(16, 8, 32, 1, 1)
    before = [p.clone() for p in vit.parameters()]
    images = torch.zeros(128, 3, 16, 16, dtype=torch.uint8)
    labels = torch.arange(128) % 2
    images[labels == 1, 0] = 255  # red or black
    masks = torch.zeros(128, 16, 16, dtype=torch.long)
    masks[labels == 1, :8] = 1
    images[labels == 1, 1, :8] = 255
    masks[:, 3:5, 3:5] = 255  # void
    kept = images.clone()
    right = analyze.fine_tune(
        vit, (images, labels[:, None]), (images, labels[:, None]), [2], epochs=20, lr=1e-2
    )
    assert right.shape == (128, 1) and right.mean() == 1
    for tune in (False, True):
        iou = analyze.dense_probe(vit, (images, masks), (images, masks), 2, epochs=60, tune=tune)
        assert iou.shape == (128,) and iou.mean() > 0.9, tune
    assert all(torch.equal(a, b) for a, b in zip(before, vit.parameters())) and torch.equal(images, kept)


def test_collect_does_not_depend_on_the_batches():
    vit = sslvit.ViT(16, 4, 32, 3, 2).eval()
    source = sslvit.Stimuli(10, 16)
    images, labels, masks = analyze.read_images(source, np.arange(10), 16)
    assert labels.tolist() == [list(source[i][1:3]) for i in range(10)] and masks.shape == (10, 16, 16)
    a, b = (analyze.collect(vit, images.split(n)) for n in (10, 3))
    assert (
        a["distance"].shape == (10, 3, 2)
        and a["depths"].shape == (10, 2)
        and a["fourier"].shape == (10, 3, 2, 3)
    )
    assert a["pooled"].shape == (10, 3, 2, 32) and a["spectrum"].shape == (10, 3, 2, 15)
    assert set(a) == set(b) and all(np.allclose(a[k], b[k], atol=1e-4) for k in a)
    wide = torch.zeros(2, 3, 16, 24, dtype=torch.uint8)
    assert analyze.collect(vit, [wide])["nmi"].shape == (2, 3, 2)


def arrays(n, shift, L=6):
    return {
        key: np.full((n, L), 1.0) + shift for key in ("distance", "nmi", "heads", "tokens", "pi", "volume")
    }


def test_values_are_means_over_images_and_some_layers():
    layers = {"x": np.array([[1.0, 2, 4, 8, 16, 32, 64], [3, 2, 4, 8, 16, 32, 64]])}
    for which, value in {"early": 8 / 3, "middle": 8, "late": 112 / 3, "last": 64, "all": 128 / 7}.items():
        assert analyze.over("x", which)(layers, lambda rows: rows) == pytest.approx(value), which
    assert analyze.over("x", "last")(layers, lambda rows: rows[:0:-1] / 2) == 32  # of the images drawn only
    assert analyze.over("x", "early", lambda rows: rows.max(axis=0))(layers, lambda rows: rows) == 3
    assert analyze.over("x", "middle")({"x": np.array([[1.0, 3]])}, lambda rows: rows) == 2  # no middle: all


def test_verdicts():
    n = 50
    cl, mim = arrays(n, 0.0), arrays(n, 0.0)
    cl["distance"] = cl["distance"] + 1 + 0.1 * np.arange(n)[:, None] / n
    mim["nmi"] = mim["nmi"] * 1.5  # CL is lower, but not below half: one of two parts
    mim["pi"] = mim["pi"] - 1
    verdicts = {row["claim"]: row["verdict"] for row in analyze.judge({"CL": [cl], "MIM": [mim]}, draws=50)}
    assert verdicts[4] == "agrees" and verdicts[5] == "weak" and verdicts[8] == "disagrees"
    assert all(verdicts[k] == "not testable" for k in (1, 2, 3, 6, 9, 10, 11, 12))
    # two seeds: the first differs by +2 as claimed, the second by -1; together +0.5, which no interval carries
    seeds = {"CL": [arrays(n, 2.0), arrays(n, 0.0)], "MIM": [arrays(n, 0.0), arrays(n, 1.0)]}
    table = analyze.judge(seeds, draws=200)
    late = table[3]["parts"][0]
    assert [one["difference"] for one in late["seeds"]] == pytest.approx([2, -1])
    assert [one["holds"] for one in late["seeds"]] == [True, False]
    assert late["difference"] == pytest.approx(0.5) and not late["holds"] and late["interval"][0] < 0
    lines = analyze.claims_table(table).split("attention distance, late, px")[1].splitlines()
    assert lines[0].split()[:2] == ["2.000", "1.500"]  # means of 3 and 1, of 1 and 2
    assert lines[1].split()[:5] == ["±", "1.414", "±", "0.707", "holds"]  # by hand: |3 - 1|/√2, |1 - 2|/√2
    assert "holds in 1 of 2 seeds" in lines[1]
    noise = np.random.default_rng(0).normal(size=(n, 1))
    one_head = {**cl, "heads": np.full((n, 6), np.nan), "depths": cl["tokens"]}
    row = analyze.judge({"CL": [one_head], "MIM": [one_head]}, draws=50)[5]
    assert row["verdict"] == "not testable" and "two heads" in row["parts"][0]["why"]
    assert "holds" in row["parts"][2] and row["claim"] == 6
    tuned = {name: [arrays(n, 0.0) | {"fine-tuned": np.full((n, 1), value)}] for name, value in
             (("CL", 0.3), ("MIM", 0.4), ("smallest CL", 0.6), ("smallest MIM", 0.5), ("largest CL", 0.7), ("largest MIM", 0.9))}  # fmt: skip
    small, large = analyze.judge(tuned, draws=20)[1]["parts"]  # values of the sizes compared, no others
    assert (small["CL"], small["MIM"], large["CL"], large["MIM"]) == pytest.approx((0.6, 0.5, 0.7, 0.9))
    assert (small["difference"], large["difference"]) == pytest.approx((0.1, 0.2)) and small["holds"]
    row = analyze.judge({"CL": [arrays(n, noise)], "MIM": [arrays(n, -noise)]}, draws=200)[7]
    assert row["verdict"] in ("weak", "disagrees") and row["parts"][0]["interval"][0] < 0


# ==== the command line =====================================================================================


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Three objectives, one more λ, one decoder and one other size, untrained: 2 layers, 16 tokens."""
    folder, old = tmp_path_factory.mktemp("runs"), dict(sslvit.SIZES)
    sslvit.SIZES["micro"] = {"width": 32, "depth": 2, "heads": 2}
    sslvit.SIZES["tiny"] = {"width": 48, "depth": 2, "heads": 2}
    for name, change in {
        "moco": {"lam": 1.0}, "simmim": {"lam": 0.0}, "hybrid": {"lam": 0.2},
        "decoder": {"lam": 0.0, "decoder_depth": 1}, "large": {"lam": 0.0, "model": "tiny"},
        "crops": {"lam": 1.0, "crop_min": 0.5, "blur": 0.5},
    }.items():  # fmt: skip
        torch.manual_seed(0)
        cfg = sslvit.Config(**{"image_size": 16, "proj_hidden": 16, **change})
        (folder / name).mkdir()
        state = {"config": sslvit.asdict(cfg), "model": sslvit.SSL(cfg).state_dict(), "step": 1, "log": []}
        torch.save(state, folder / name / "ckpt.pt")
    yield folder
    sslvit.SIZES.update(old)


def test_end_to_end(checkpoints, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(analyze.judge, "__defaults__", (50,))  # bootstrap draws
    names = "moco", "simmim", "hybrid", "decoder", "large", "crops"
    files = [str(checkpoints / name / "ckpt.pt") for name in names]
    out = tmp_path / "figures"
    assert analyze.main([*files, "--images", "24", "--epochs", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    results = analyze.json.loads((out / "results.json").read_text())
    assert [c["claim"] for c in results["claims"]] == list(range(1, 13))
    assert {c["verdict"] for c in results["claims"]} <= {"agrees", "weak", "disagrees", "not testable"}
    assert "not testable" in {
        c["verdict"] for c in results["claims"] if c["claim"] == 2
    }  # no small CL beside a large one
    assert [m["role"] for m in results["models"]] == ["CL", "MIM", "hybrid", "MIM", "MIM", "CL"]
    names = {f.name for f in out.glob("*.png")}
    assert len(names) == len(analyze.FIGURES), (names, printed)
    assert "skipped " not in printed.replace("skipped: ", "")
    for f in out.glob("*.png"):
        f.rename(f.with_suffix(".first"))
    assert analyze.main(["--from", str(out / "results.json"), "--out", str(out)]) == 0
    assert {f.name for f in out.glob("*.png")} == names
    assert all((out / n).read_bytes() == (out / n).with_suffix(".first").read_bytes() for n in names)
    photos = np.asarray(analyze.Image.open(out / "pixels.png").convert("RGB")).astype(int)
    for role in ("MIM", "hybrid"):  # 256 colours keep the rare ones: those of the names
        colour = [int(analyze.COLOURS[role][i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(photos - colour).max(axis=-1) < 20).sum() > 20


def test_results_of_one_figure_are_drawn_again(checkpoints, tmp_path, capsys):
    argv = [str(checkpoints / "moco" / "ckpt.pt"), "--images", "20", "--only", "similarity"]
    assert analyze.main([*argv, "--out", str(tmp_path)]) == 0
    (tmp_path / "fig05_similarity.png").unlink()
    assert analyze.main(["--from", str(tmp_path / "results.json"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "fig05_similarity.png").exists() and "skipped tokens" in capsys.readouterr().out


def test_decay_is_for_the_trained_network_alone(checkpoints, tmp_path, monkeypatch):
    seen, new = [], []

    def fine_tune(vit, train, test, classes, epochs, decay, **_):
        seen.append(decay)
        new.extend([vit.blocks[0].attn["qkv"].weight] * (decay == 1))
        return np.ones((len(test[0]), len(classes)))

    monkeypatch.setattr(analyze, "fine_tune", fine_tune)
    argv = [
        str(checkpoints / "moco" / "ckpt.pt"),
        "--images",
        "20",
        "--only",
        "accuracy",
        "--out",
        str(tmp_path),
    ]
    assert analyze.main([*argv, "--decay", "0.5"]) == 0
    assert seen == [1.0, 0.5]  # a new network, all of whose layers have to learn; the checkpoint's
    torch.rand(1)
    assert analyze.main([*argv, "--decay", "0.5"]) == 0
    assert torch.equal(*new)  # whatever was drawn before: one yardstick for all analyses


def test_seeds_are_drawn_as_mean_and_range():
    facts = {"name": "a", "role": "CL", "nth": 0, "depth": 2, "blur": 1.0}
    models = [
        {**facts, "nmi": [[0.0, 0.2], [0.5, 0.5]], "mIoU linear": 0.4},  # layers, heads
        {**facts, "nmi": [[0.2, 0.4], [0.7, 0.9]], "mIoU linear": 0.8},
    ]
    axis = analyze.fig_curves([analyze.NMI], models).axes[0]
    assert list(axis.lines[0].get_ydata()) == pytest.approx([0.2, 0.65]) and len(axis.lines) == 1
    band = axis.collections[0].get_paths()[0].vertices
    assert {(x, round(y, 3)) for x, y in band} >= {(1.0, 0.0), (1.0, 0.4), (2.0, 0.5), (2.0, 0.9)}
    points = analyze.fig_curves([("mIoU ", "mIoU", "")], models)
    assert [list(line.get_ydata()) for line in points.axes[0].lines] == [
        [0.4],
        [0.8],
    ]  # a point for each seed
    assert [text.get_text() for text in points.legends[0].texts] == ["a"]
    analyze.plt.close("all")


def test_only_and_folders(checkpoints, tmp_path, capsys):
    from PIL import Image

    rng, masks = np.random.default_rng(0), tmp_path / "masks"
    for split, count in (("train", 20), ("val", 10)):
        for c in ("cat", "dog"):
            for root in (tmp_path / "data", masks):
                (root / split / c).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8))
                image.save(tmp_path / "data" / split / c / f"{i}.jpg")
                Image.fromarray(rng.integers(0, 3, (20, 30), dtype=np.uint8)).save(
                    masks / split / c / f"{i}.png"
                )
    cues = tmp_path / "cues"
    cues.mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(cues / f"cat{i}-dog{i}.png")
    (tmp_path / "data" / "val" / "cat" / "broken.jpg").write_bytes(b"no image")
    file, out = str(checkpoints / "simmim" / "ckpt.pt"), tmp_path / "out"
    flags = ["--data", str(tmp_path / "data"), "--masks", str(masks), "--cue-conflict", str(cues)]
    assert (
        analyze.main(
            [
                file,
                *flags,
                "--images",
                "20",
                "--epochs",
                "1",
                "--out",
                str(out),
                "--only",
                "dense",
                "bias",
                "nmi",
            ]
        )
        == 0
    )
    assert len(list(out.glob("*.png"))) == 3 and "broken.jpg" in capsys.readouterr().out
    for name in ("noise", "bias"):  # each does its own work only
        other = {"noise": "cue_conflict", "bias": "band_noise"}[name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(analyze, other, None)
            assert analyze.main([file, *flags, "--images", "20", "--out", str(out), "--only", name]) == 0
        model = analyze.json.loads((out / "results.json").read_text())["models"][0]
        assert ("noise drop" in model, "shape bias cues" in model) == (name == "noise", name == "bias")
    Image.new("RGB", (20, 30)).save(masks / "val" / "cat" / "0.png")
    capsys.readouterr()
    assert analyze.main([file, *flags, "--images", "20", "--out", str(out), "--only", "dense"]) == 2
    assert "class numbers" in capsys.readouterr().err
    flat = tmp_path / "data" / "val" / "dog"  # no classes, no test set: what needs no labels is drawn
    assert analyze.main([file, "--data", str(flat), "--out", str(out), "--only", "layers", "distance"]) == 0
    assert "skipped layers: needs labels" in capsys.readouterr().out


def test_bad_input_is_one_line_and_status_2(checkpoints, tmp_path, capsys):
    good = checkpoints / "simmim" / "ckpt.pt"
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:5000])
    (tmp_path / "text.pt").write_text('{"model": 1}')
    (tmp_path / "empty").mkdir()
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(10)}, tmp_path / "resnet.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    part = dict(list(sslvit.ViT(16, 8, 64, 1, 1).state_dict().items())[:-6])
    torch.save(part, tmp_path / "part.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "script.pt")
    files = ["missing.pt", "cut.pt", "text.pt", "resnet.pt", "list.pt", "part.pt", "script.pt", "empty"]
    cases = [[str(tmp_path / name)] for name in files]
    cases += [[], ["--images", "5", str(good)], ["--only", "everything", str(good)], ["--nonsense"]]
    cases += [
        [str(good), "--data", str(tmp_path / "empty")],
        [str(good), "--data", str(tmp_path / "nowhere")],
    ]
    cases += [["--from", str(tmp_path / "text.pt")], ["--from", str(good)], [str(good), "--masks", "nowhere"]]
    cases += [[f"a={good}", f"a={checkpoints / 'moco' / 'ckpt.pt'}"]]  # one name for two models
    cases += [[str(good), "--device", "abacus"], [str(good), "--decay", "0"], [str(good), "--decay", "1.5"]]
    for argv in cases:
        try:
            status = analyze.main([*argv, "--out", str(tmp_path / "out")])
        except SystemExit as end:
            status = end.code
        error = capsys.readouterr().err
        assert status == 2 and error.count("\n") == 1 and "Traceback" not in error, (argv, error)
