"""Checkpoints of other people: each published format, with random weights, gives what
its paper's formulas give; what is damaged, hostile or another network, one line."""

import argparse
import math
import os
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import sslvit  # before torch
import analyze
import numpy as np
import pytest
import torch
import torch.nn.functional as F

PATCH, SIDE, D, DEPTH = 4, 3, 128, 2  # 3 x 3 patches; 128 wide: two heads are assumed
PATCHES = "patch_embed.proj.weight"
TABLE = "rel_pos_bias.relative_position_bias_table"
GAMMAS = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}  # LayerScale in BEiT, iBOT


class CfgNode(dict):
    """Stands for the class of yacs in SimMIM's files: a dict that pickles by name."""


NODE = CfgNode(lr=CfgNode(base=1))
NODE.__dict__["_immutable"] = True
NAMESPACE = argparse.Namespace(lr=1.0)


def timm_state(width=D, **options):
    """Random tensors by the names of timm, DINO and MAE, which are ours too."""
    torch.manual_seed(1)
    sizes = (SIDE * PATCH, PATCH, width, DEPTH, 4)
    state = sslvit.ViT(*sizes, positions="learned", **options).state_dict()
    for name, value in state.items():
        spread = width**-0.5 if "weight" in name else 0.5
        state[name] = spread * torch.randn_like(value)
    return dict(state)


def renamed(state, names):
    for old, new in names.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    return state


def beit_state():
    """As BEiT and SimMIM publish them: a table of position biases, no bias of keys."""
    state = timm_state(rel_pos_bias=True, layer_scale=0.1)
    del state["pos_embed"]
    state["rel_pos_bias.relative_position_index"] = torch.zeros(10, 10, dtype=int)
    for i in range(DEPTH):
        bias = state.pop(f"blocks.{i}.attn.qkv.bias")
        state[f"blocks.{i}.attn.q_bias"] = bias[:D].clone()
        state[f"blocks.{i}.attn.v_bias"] = bias[2 * D :].clone()
    return renamed(state, GAMMAS)


def position_bias(table):
    """(heads, 1+N, 1+N): a number for each offset of query and key; CLS: last three."""
    side, tokens = SIDE, 1 + SIDE**2
    bias = torch.zeros(table.shape[1], tokens, tokens, dtype=table.dtype)
    bias[:, 0, :] = table[-3][:, None]
    bias[:, :, 0] = table[-2][:, None]
    bias[:, 0, 0] = table[-1]
    for query in range(side**2):
        for key in range(side**2):
            down = query // side - key // side + side - 1
            across = query % side - key % side + side - 1
            bias[:, 1 + query, 1 + key] = table[down * (2 * side - 1) + across]
    return bias


def tokens_of(state, images, heads):
    """Dosovitskiy et al. 2021, eq. 1 to 4, with LayerScale and position biases."""
    names = {new: old for old, new in GAMMAS.items()}
    w = {name: value.double() for name, value in renamed(state, names).items()}
    width = len(w[PATCHES])

    def norm(x, name):
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = F.conv2d(images.double(), w[PATCHES], w["patch_embed.proj.bias"], PATCH)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], dim=1)
    x = x + w.get("pos_embed", 0)
    position = position_bias(w[TABLE]) if TABLE in w else [0.0] * heads
    for i in range(DEPTH):
        block = f"blocks.{i}."
        if f"{block}attn.q_bias" in w:
            q_bias, v_bias = w[f"{block}attn.q_bias"], w[f"{block}attn.v_bias"]
            w[f"{block}attn.qkv.bias"] = torch.cat([q_bias, 0 * q_bias, v_bias])
        q, k, v = linear(norm(x, f"{block}norm1"), f"{block}attn.qkv").chunk(3, dim=-1)
        outputs = []
        for h in range(heads):
            part = slice(h * width // heads, (h + 1) * width // heads)
            logits = q[..., part] @ k[..., part].mT / math.sqrt(width / heads)
            outputs.append((logits + position[h]).softmax(dim=-1) @ v[..., part])
        attended = linear(torch.cat(outputs, dim=-1), f"{block}attn.proj")
        x = x + w.get(f"{block}ls1.gamma", 1) * attended
        hidden = F.gelu(linear(norm(x, f"{block}norm2"), f"{block}mlp.fc1"))
        x = x + w.get(f"{block}ls2.gamma", 1) * linear(hidden, f"{block}mlp.fc2")
    return norm(x, "norm")


def moco_sines(width, side):
    """MoCo v3's fixed positions: sin y, cos y, sin x, cos x; CLS: zeros."""
    frequency = 10000 ** -(torch.arange(width // 4) / (width // 4))
    positions = torch.zeros(1, 1 + side**2, width)
    for patch in range(side**2):
        y, x = patch // side * frequency, patch % side * frequency
        positions[0, 1 + patch] = torch.cat([y.sin(), y.cos(), x.sin(), x.cos()])
    return positions


def write(tmp_path, content, **options):
    torch.save(content, tmp_path / "file.pth", **options)
    return tmp_path / "file.pth"


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def plus_one(state):
    return {key: value + 1 for key, value in state.items()}


def check_same(path, state, num_heads=2, **settings):
    """The file's encoder gives the formulas' tokens -> the encoder."""
    vit = analyze.load_encoder(path, **settings)
    images = torch.randn(2, 3, SIDE * PATCH, SIDE * PATCH)
    with torch.no_grad():
        error = (vit(images) - tokens_of(state, images, num_heads)).abs().max()
    assert error < 1e-4 and not vit.training, error
    assert {weight.dtype for weight in vit.parameters()} == {torch.float32}
    return vit


def check_refused(path, *words, **settings):
    """One line that says why, and can be printed."""
    with pytest.raises(sslvit.UserError) as caught:
        analyze.load_encoder(path, **settings)
    message = str(caught.value)
    assert message.isprintable() and str(path) in message and len(message) < 700
    for word in words:
        assert word in message, message


def published():
    """{name: (what a file holds, the encoder's tensors in it)}"""
    plain, beit, wide = timm_state(), beit_state(), timm_state(384)
    dinov2 = timm_state(layer_scale=0.1)
    ibot = renamed(dinov2, GAMMAS)
    moco = wide | {"pos_embed": moco_sines(384, SIDE)}
    head = {"head.weight": torch.zeros(5, D), "head.bias": torch.zeros(5)}
    token = {"mask_token": torch.zeros(1, 1, D)}
    decoder = {"decoder_blocks.0.norm1.weight": torch.zeros(D)}
    decoder["decoder_pos_embed"] = torch.zeros(1, 10, D)
    moco_run = under("module.momentum_encoder.", plus_one(moco))
    moco_run |= under("module.base_encoder.", moco | head) | under("predictor.", head)
    cae = {name: value for name, value in beit.items() if name != TABLE}
    cae["pos_embed"] = moco_sines(D, SIDE)
    # block_chunks=2: blocks.1.1.norm1 is the second block, in chunk 1
    chunks = renamed(dinov2, {"blocks.0.": "blocks.0.0.", "blocks.1.": "blocks.1.1."})
    simmim = under("encoder.", beit | token) | {"decoder.0.weight": torch.zeros(3)}
    student = {"student": under("backbone.", plus_one(plain))}
    average = {"state_dict_ema": plus_one(plain)}
    return {
        "MoCo v3 in training": ({"epoch": 3, "state_dict": moco_run}, moco),
        "MoCo v3, linear": ({"state_dict": under("module.", moco | head)}, moco),
        "CAE": ({"model": cae}, cae),
        "MAE": ({"model": plain | token | decoder, "args": NAMESPACE}, plain),
        "DINO": (student | {"teacher": under("backbone.", plain) | head}, plain),
        "iBOT": ({"state_dict": ibot | {"masked_embed": torch.zeros(1, D)}}, ibot),
        "DINOv2": (chunks | token, dinov2),
        "SimMIM": ({"model": simmim, "config": NODE}, beit),
        "BEiT": ({"model": beit | token | {"lm_head.weight": torch.zeros(9, D)}}, beit),
        "timm": (average | {"state_dict": plain | head}, plain),
    }


ALL = "--heads, --pixels, square grid"
# heads, format, λ, pixels, what is guessed, a key that is skipped
FACTS = {
    "MoCo v3 in training": (12, "MoCo v3", 1.0, "imagenet", "--heads", "predictor"),
    "MoCo v3, linear": (12, "MoCo v3", 1.0, "imagenet", "--heads", "'head': 2"),
    "CAE": (2, "of BEiT's family", None, "imagenet", "--heads, --pixels", ""),
    "MAE": (2, "MAE", 0.0, "imagenet", "--heads, square grid", "'decoder_blocks': 1"),
    "DINO": (2, "timm", None, "imagenet", ALL, "student.back"),
    "iBOT": (2, "timm", None, "imagenet", ALL, "masked_embed"),
    "DINOv2": (2, "timm", None, "imagenet", ALL, "mask_token"),
    "SimMIM": (4, "SimMIM", 0.0, "imagenet", "nothing", "'model.decoder': 1"),
    "BEiT": (4, "BEiT or data2vec", 0.0, "half", "--pixels", "relative_position_index"),
    "timm": (2, "timm", None, "imagenet", ALL, "_ema"),
}


@pytest.mark.parametrize("name", FACTS)
def test_published_formats_equal_their_formulas(name, tmp_path, capsys):
    content, state = published()[name]
    heads, form, lam, pixels, guessed, skipped = FACTS[name]
    vit = check_same(write(tmp_path, content), state, heads)
    facts = {"lam": lam, "pixels": pixels, "num_heads": heads, "depth": 2, "config": {}}
    facts |= {"image_size": 12, "patch_size": 4, "embed_dim": len(state[PATCHES])}
    facts |= {"seed": None, "images": None, "path": str(tmp_path / "file.pth")}
    assert vars(vit.facts) == vars(analyze.Network(**facts, look=vit.facts.look))
    line, keys = capsys.readouterr().out.splitlines()
    assert f": {form}, 12 px" in line and f"guessed: {guessed}" in line, line
    assert skipped in keys, keys


def test_heads_and_pixels_can_be_given(tmp_path, capsys):
    state = timm_state(384)
    path = write(tmp_path, state)
    check_same(path, state, 6)
    vit = check_same(path, state, 3, heads=3, pixels="half")
    white = analyze.normalise(torch.full((1, 3, 12, 12), 255), vit)
    assert vit.facts.pixels == "half" and (white == 1).all()
    new = analyze.untrained_like(vit)  # whose positions are learned, too: small
    assert new.facts.pixels == "half" and 0.01 < new.pos_embed.std() < 0.03
    huge = analyze.find_sizes({PATCHES: torch.zeros(1280, 3, 14, 14)}, 16, None, "MAE")
    assert huge == (224, 14, 1280, 1, 16)
    assert "guessed: square grid" in capsys.readouterr().out.splitlines()[-2]
    beit = write(tmp_path, published()["BEiT"][0])
    assert analyze.load_encoder(beit, pixels="imagenet").facts.pixels == "imagenet"
    assert analyze.load_networks(analyze.parse([f"cl={beit}"]))[1].facts.lam == 1
    # sines that begin with x are MAE's, or of a MoCo v3 that was written anew
    state["pos_embed"] = sslvit.sincos_positions(384, SIDE, SIDE)
    vit = check_same(write(tmp_path, state), state, 6)
    assert "heads, --pixels\n" in capsys.readouterr().out and vit.facts.lam is None
    # 224 x 192 px: 14·12 + 1 = 13²; DeiT III: 13² patches, and none for CLS
    state["pos_embed"] = torch.ones(1, 169, 384)
    check_refused(write(tmp_path, state), "169 positions")


ONES, MATRIX = torch.ones(D), (4 * D, D)
FC1 = "blocks.0.mlp.fc1.weight"
# tensors added to a ViT, or taken from it (None) -> words of the refusal
OTHER_NETWORKS = [
    ({"rope_embed.periods": ONES, "storage_tokens": ONES}, "rope_embed.periods, stor"),
    ({"reg_token": ONES, "pos_embed": None}, "reg_token"),
    ({"pos_embed": None}, "no positions"),
    ({"blocks.0.attn.q_norm.weight": ONES}, "blocks.*.attn.q_norm.weight"),
    ({"blocks.1.attn.qkv.lora_A": ONES}, "blocks.*.attn.qkv.lora_A"),
    ({"blocks.0.attn.relative_position_bias_table": ONES}, "relative_position_bias_ta"),
    ({"blocks.0.attn.q_bias": ONES, "blocks.0.attn.v_bias": ONES}, "attn.q_bias"),
    ({"fc_norm.weight": ONES, "norm.weight": None, "norm.bias": None}, "norm.weight"),
    ({"cls_token": None}, "cls_token"),
    ({"blocks.1.mlp.fc1.bias": None}, "blocks.1.mlp.fc1.bias"),
    ({"blocks.0.mlp.fc1.bias": ONES}, "blocks.0.mlp.fc1.bias"),
    ({"module.norm.weight": ONES}, "two tensors for norm.weight"),
    ({PATCHES: torch.ones(D, 3, 2, 4, 4)}, "expected 4"),
    ({FC1: torch.ones(MATRIX, dtype=torch.int8)}, f"{FC1} is torch.int8"),
    ({FC1: torch.ones(1, 1).expand(MATRIX)}, f"{FC1} claims more numbers"),
    ({FC1: torch.full(MATRIX, math.nan)}, f"{FC1} holds NaN"),
    ({PATCHES: None, "\x1b[2J": ONES}, PATCHES),
    ({"\x1b[2J": ONES}, r"has not: \x1b[2J"),
]


@pytest.mark.parametrize("change, words", OTHER_NETWORKS)
def test_another_network_is_refused_by_name(change, words, tmp_path):
    state = {name: x for name, x in (timm_state() | change).items() if x is not None}
    check_refused(write(tmp_path, state), words)


def test_our_own_runs_tell_everything(tmp_path, capsys):
    for path in Path(__file__).parents[1].glob("figures/checkpoints/**/*.pt"):
        content = torch.load(path, weights_only=True)
        vit = analyze.load_encoder(path, heads=4, pixels="half")
        encoder = sslvit.make_encoder(sslvit.Config(image_size=32, patch_size=4)).eval()
        for name, weight in encoder.state_dict().items():
            weight.copy_(content["model"][f"encoder.{name}"])
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(vit(images), encoder(images))
        facts = {"lam": content["config"]["lam"], "num_heads": 3}
        config = vars(sslvit.Config()) | content["config"]
        config["data"] = "20000 stimuli of 32 px"
        images = content["step"] * config["batch_size"]
        facts |= {"pixels": "imagenet", "config": config, "images": images}
        assert {key: getattr(vit.facts, key) for key in facts} == facts
        assert "guessed: nothing" in capsys.readouterr().out
    for name in ("model", "batch_size", "lam", "seed", "decoder_depth"):
        config = content["config"] | {name: "giant"}
        check_refused(write(tmp_path, content | {"config": config}), "giant")
    content["config"]["batch_size"] = "64"
    assert analyze.load_encoder(write(tmp_path, content)).facts.images == images


# ---- a file is data ----
def rewrite(path, compression=zipfile.ZIP_STORED):
    """The same archive, or compressed."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, record in records.items():
            archive.writestr(name, record)


class Runs(tuple):
    """Its pickle calls a function with arguments."""

    def __reduce__(self):
        return tuple(self)


def test_a_file_is_data(tmp_path):
    state, mark = timm_state(), tmp_path / "made"
    numbers = defaultdict(list, a=[np.float32(1), np.zeros(3)])
    objects = [NAMESPACE, Path("x"), NODE, numbers, {Path: 1}]
    content = {"more": objects, "model": state, "args": Runs((open, (str(mark), "w")))}
    content["self"] = content
    check_same(write(tmp_path, content), state)
    content = {"model": state, "args": Runs((open, (str(mark), "w")))}
    old_format = write(tmp_path, content, _use_new_zipfile_serialization=False)
    check_refused(old_format, "not readable as data alone")
    content["args"] = Runs((os.system, (f"touch {mark}",)))
    check_refused(write(tmp_path, content), "not readable as data alone")
    assert not mark.exists()
    torch.load(old_format, weights_only=False)  # the trap is a trap
    assert mark.exists()


def test_damaged_archives_are_refused(tmp_path):
    state = timm_state()
    path = write(tmp_path, state)
    whole = path.read_bytes()
    rewrite(path)
    check_same(path, state)
    rewrite(path, compression=zipfile.ZIP_DEFLATED)
    check_refused(path, "compressed")
    place = whole.index(state[PATCHES].numpy().tobytes())
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    check_refused(path, "checksum")
    for length in (1, 8, 9, 5000, len(whole) - 200):
        path.write_bytes(whole[:length])
        check_refused(path)


def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path):
    path = tmp_path / "file.pth"
    check_refused(path, "No such file")
    check_refused(tmp_path, "directory")
    for start, word in (
        (b"", "EOFError"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git LFS"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x1f\x8b", "not readable as data alone"),
        (b'{"model": 1}', "not readable as data alone"),
    ):
        path.write_bytes(start)
        check_refused(path, word)
    check_refused(write(tmp_path, {"model": torch.nn.Linear(1, 1)}), "state_dict()")
    check_refused(write(tmp_path, [1, 2]), "no tensors")
    check_refused(write(tmp_path, torch.zeros(2)), "no patch_embed", PATCHES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_and_formats_of_files(dtype, tmp_path, monkeypatch):
    state = {name: value.to(dtype) for name, value in timm_state().items()}
    check_same(write(tmp_path, under("module._orig_mod.", state)), state)
    check_same(write(tmp_path, state, _use_new_zipfile_serialization=False), state)
    sines = sslvit.sincos_positions(D, SIDE, SIDE).to(dtype).float()  # MAE's
    assert analyze.find_positions({"pos_embed": sines}) == (SIDE, "x")
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        check_refused(path, "safetensors")
    pytest.importorskip("safetensors.torch").save_file(state, path)
    check_same(path, state)
