"""Checkpoints of other people: each published naming, with random weights in timm's
modules as oracle, must give the oracle's outputs. And what is damaged, hostile or of no
known family must give one line."""

import argparse
import json
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import analyze  # noqa: E402
import sslvit  # noqa: E402

SIZE, PATCH, D, DEPTH = 32, 8, 128, 2  # 16 patches; 128 wide: two heads are assumed
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


# ---- oracles and files ----


def random_weights(model, scale=0.2):
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data = scale * torch.randn_like(parameter)
        if parameter.ndim == 1:
            parameter.data += 1
    return model.eval()


def import_timm():
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        # RuntimeError: its torchvision is for another torch
        pytest.skip(f"no timm: {error}")
    return timm


def timm_vit(**options):
    timm = import_timm()
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": D, "depth": DEPTH}
    options = {"num_heads": 2, "num_classes": 0} | sizes | options
    return random_weights(timm.models.vision_transformer.VisionTransformer(**options))


def timm_beit(**options):
    timm = import_timm()
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": D, "depth": DEPTH}
    # four heads, which only the tables tell
    options = {"num_heads": 4, "num_classes": 0} | sizes | options
    return random_weights(timm.models.beit.Beit(use_abs_pos_emb=False, **options))


def our_vit(depth=1):
    return random_weights(sslvit.ViT(SIZE, PATCH, D, depth, 2, positions="learned"))


def write(tmp_path, content, **options):
    path = tmp_path / "file.pth"
    torch.save(content, path, **options)
    return path


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def plus_one(state):
    return {key: value + 1 for key, value in state.items()}


def check_same(path, oracle, tolerance=1e-4):
    """The file's encoder gives what the oracle gives -> the encoder."""
    vit = analyze.load_encoder(path)
    forward = getattr(oracle, "forward_features", oracle)
    with torch.no_grad():
        error = (vit(IMAGES) - forward(IMAGES)).abs().max()
    assert error < tolerance, error
    assert not vit.training
    return vit


def check_refused(path, *words):
    """One line that says why -> the line."""
    with pytest.raises(sslvit.UserError) as caught:
        analyze.load_encoder(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for word in words:
        assert word in message, message
    return message


# ---- published namings ----


class CfgNode(dict):
    """Stands for the class of yacs in SimMIM's files: a dict that pickles by name."""


def mocov3(state):
    base = under("module.base_encoder.", state)
    base["module.base_encoder.head.0.weight"] = torch.zeros(3)
    average = under("module.momentum_encoder.", plus_one(state))
    head = {"module.predictor.0.weight": torch.zeros(3)}
    return {"epoch": 3, "optimizer": {}, "state_dict": average | base | head}


def mocov3_average(state):
    return {"state_dict": under("module.momentum_encoder.", state)}


def mocov3_probed(state):
    head = {"head.weight": torch.zeros(5, D), "head.bias": torch.zeros(5)}
    return {"state_dict": under("module.", state | head)}


def timm_supervised(state):
    return state | {"head.weight": torch.zeros(5, D), "head.bias": torch.zeros(5)}


def mae_encoder(state):
    return {"model": state}


def mae(state):
    decoder = {
        "mask_token": torch.zeros(1, 1, D),
        "decoder_pos_embed": torch.zeros(1, 17, D),
        "decoder_embed.weight": torch.zeros(D, D),
        "decoder_blocks.0.norm1.weight": torch.zeros(D),
    }
    return {"model": state | decoder, "args": argparse.Namespace(lr=1.0)}


def dino(state):
    teacher = under("backbone.", state) | {"head.mlp.0.weight": torch.zeros(3)}
    student = under("module.backbone.", plus_one(state))
    return {"student": student, "teacher": teacher, "args": argparse.Namespace(lr=1.0)}


def dino_student(state):
    head = {"module.head.mlp.0.weight": torch.zeros(3)}
    return {"student": under("module.backbone.", state) | head}


def ibot(state):
    return {"state_dict": state | {"masked_embed": torch.zeros(1, D)}}


def ibot_layer_scale(state):
    renamed = {}
    for key, value in state.items():
        key = key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        renamed[key] = value
    return ibot(renamed)


def dinov2(state):
    return state | {"mask_token": torch.zeros(1, D)}


def dinov2_chunks(state):
    """block_chunks=2: blocks.1.1.norm1 is the second block of chunk 1."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("blocks.0.", "blocks.0.0.").replace(
            "blocks.1.", "blocks.1.1."
        )
        renamed[key] = value
    return dinov2(renamed)


def dinov2_run(state):
    heads = {"dino_head.mlp.0.weight": torch.zeros(3)}
    return {"teacher": under("backbone.", dinov2_chunks(state)) | heads}


def sslvit_run(state, average="momentum_encoder."):
    decoder = {
        "mask_token": torch.zeros(1, 1, D),
        "decoder.0.weight": torch.zeros(3 * PATCH**2, D),
        "decoder.0.bias": torch.zeros(3 * PATCH**2),
    }
    average = under(average, plus_one(state))
    return {"model": average | under("encoder.", state) | decoder}


def sslvit_first_edition(state):
    return sslvit_run(state, average="key_encoder.")


def sslvit_masked(state):
    return {"model": under("encoder.", state) | {"mask_token": torch.zeros(1, 1, D)}}


def encoder_alone(state):
    return under("encoder.", state)


def inside_another(state):
    return {"model": under("visual.trunk.", state) | {"text.weight": torch.zeros(3)}}


# naming, family, role, keys that the report must hold
PUBLISHED = [
    (mocov3, "MoCo v3", "CL", ["module.predictor.0.weight"]),
    (mocov3_average, "MoCo v3, its average", "CL", []),
    (mocov3_probed, "timm", "other", ["module.head.bias"]),
    (timm_supervised, "timm", "other", ["head.weight"]),
    (mae_encoder, "timm", "other", []),
    (mae, "MAE with its decoder", "MIM", ["decoder_blocks.*.norm1.weight (1)"]),
    (dino, "DINO, iBOT or DINOv2 in training", "other", ["head.mlp.0.weight"]),
    (dino_student, "DINO, iBOT or DINOv2 in training", "other", ["module.head.mlp.0"]),
    (ibot, "iBOT", "other", ["masked_embed"]),
    (ibot_layer_scale, "iBOT", "other", ["masked_embed"]),
    (dinov2, "DINOv2", "other", ["mask_token"]),
    (dinov2_chunks, "DINOv2 in chunks", "other", ["mask_token"]),
    (dinov2_run, "DINO, iBOT or DINOv2 in training", "other", ["dino_head.mlp.0"]),
    (
        sslvit_run,
        "sslvit with its average",
        "other",
        ["momentum_encoder.* (", "decoder.* ("],
    ),
    (
        sslvit_first_edition,
        "sslvit, first edition",
        "other",
        ["key_encoder.blocks.*.norm1.bias (2)", "decoder.* ("],
    ),
    (sslvit_masked, "sslvit", "MIM", ["mask_token"]),
    (encoder_alone, "encoder alone", "other", []),
    (inside_another, "ViT in another network", "other", ["text.weight"]),
]
LAYER_SCALE = [ibot_layer_scale, dinov2, dinov2_chunks, dinov2_run]


@pytest.mark.parametrize("naming, family, role, keys", PUBLISHED)
def test_published_vits_equal_timm(naming, family, role, keys, tmp_path, capsys):
    oracle = timm_vit(init_values=1.0 if naming in LAYER_SCALE else None)
    path = write(tmp_path, naming(oracle.state_dict()))
    vit = check_same(path, oracle)
    assert vit.facts["family"] == family and vit.facts["role"] == role
    report = capsys.readouterr().out
    assert "missing: 0 keys" in report and "unexpected, not used: 0 keys" in report
    for key in keys:
        assert key in report, report


def test_each_family_of_the_table_is_tried():
    tried = {family for _, family, _, _ in PUBLISHED}
    elsewhere = {"SimMIM", "BEiT"}
    assert {family.name for family in analyze.FAMILIES} <= tried | elsewhere


def test_fine_tuned_on_mean_tokens_has_its_last_norm_behind_the_mean(tmp_path):
    oracle = timm_vit(global_pool="avg", fc_norm=True)
    vit = analyze.load_encoder(write(tmp_path, {"model": oracle.state_dict()}))
    with torch.no_grad():
        records = vit(IMAGES, record=True)[1]
        pooled = vit.norm(records[-1].out[:, 1:].mean(dim=1))
        assert torch.allclose(pooled, oracle(IMAGES), atol=1e-4)


def test_a_norm_behind_the_mean_beside_the_last_norm_is_skipped(tmp_path, capsys):
    oracle = timm_vit()
    extra = {"fc_norm.weight": torch.zeros(D), "fc_norm.bias": torch.zeros(D)}
    check_same(write(tmp_path, oracle.state_dict() | extra), oracle)
    assert "skipped: 2 keys" in capsys.readouterr().out


@pytest.mark.parametrize("named", ["reg_token", "register_tokens"])
@pytest.mark.parametrize("no_embed_class", [True, False])
def test_registers_take_part_and_are_not_seen(named, no_embed_class, tmp_path):
    """DINOv2's registers have no place; timm can give them one (not no_embed_class)."""
    oracle = timm_vit(reg_tokens=3, no_embed_class=no_embed_class)
    state = oracle.state_dict()
    state[named] = state.pop("reg_token")
    vit = analyze.load_encoder(write(tmp_path, state))
    with torch.no_grad():
        want = oracle.forward_features(IMAGES)
        tokens, records = vit(IMAGES, record=True)
        # timm: CLS, registers, patches
        assert torch.allclose(tokens[:, 0], want[:, 0], atol=1e-4)
        assert torch.allclose(tokens[:, 1:], want[:, 4:], atol=1e-4)
        assert torch.allclose(vit(IMAGES), tokens, atol=1e-4)
        assert torch.allclose(vit.norm(records[-1].out), tokens, atol=1e-4)
    assert records[0].attn.shape == (2, 2, 17, 17)
    # a part of each query's attention goes to the registers
    assert records[0].attn.sum(dim=-1).mean() < 0.99
    assert records[1].heads.shape == (2, 2, 17, 64)
    assert records[1].mid.shape == (2, 17, D)
    # other sizes of images, masks
    mask = torch.ones(1, 15, dtype=torch.bool)
    assert vit(torch.randn(1, 3, 24, 40), mask).shape == (1, 16, D)


def simmim(state):
    """A pre-training file of SimMIM: yacs nodes, schedulers, a 1 × 1 convolution."""
    config = CfgNode(lr=1)
    config.__dict__["_immutable"] = True
    model = under("encoder.", state)
    model["encoder.mask_token"] = torch.zeros(1, 1, D)
    model["decoder.0.weight"] = torch.zeros(3 * PATCH**2, D, 1, 1)
    model["decoder.0.bias"] = torch.zeros(3 * PATCH**2)
    return {"model": model, "config": config, "lr_scheduler": argparse.Namespace(a=1)}


def beit(state):
    return state | {"lm_head.weight": torch.zeros(9, D), "mask_token": torch.zeros(D)}


def fine_tuned(state):
    return {"model": state | {"head.weight": torch.zeros(5, D)}}


@pytest.mark.parametrize(
    "naming, shared, gammas, role",
    [
        (simmim, True, 0.1, "MIM"),
        (beit, True, 0.1, "MIM"),
        (fine_tuned, False, 0.1, "other"),
        (fine_tuned, False, None, "other"),
    ],
)
def test_simmim_and_beit_equal_timm(naming, shared, gammas, role, tmp_path):
    """Position biases of all blocks, or of each; biases of queries and values alone."""
    tables = {"use_shared_rel_pos_bias": shared, "use_rel_pos_bias": not shared}
    oracle = timm_beit(init_values=gammas, **tables)
    vit = analyze.load_encoder(write(tmp_path, naming(oracle.state_dict())))
    seen = []
    for block in oracle.blocks:
        block.register_forward_hook(lambda module, args, result: seen.append(result))
    with torch.no_grad():
        oracle.forward_features(IMAGES)
        tokens, records = vit(IMAGES, record=True)
        for record, want in zip(records, seen, strict=True):
            assert torch.allclose(record.out, want, atol=1e-4)
        assert torch.allclose(vit(IMAGES), tokens, atol=1e-5)
    # other sizes, not square
    assert vit(torch.randn(1, 3, 24, 40)).shape == (1, 16, D)
    assert vit.facts["role"] == role and vit.facts["num_heads"] == 4


# ---- wrappings, types, formats ----


@pytest.mark.parametrize(
    "box",
    [
        "model",
        "state_dict",
        "teacher",
        "student",
        "module",
        "net",
        "encoder",
        "state_dict_ema",
        "model_ema",
    ],
)
def test_state_dicts_are_found_in_boxes(box, tmp_path):
    oracle = our_vit(depth=2)
    content = {"epoch": 7, "args": {"lr": 0.1}, box: oracle.state_dict()}
    check_same(write(tmp_path, content), oracle)
    # a box in a box, beside one with settings, which is none
    content = {"model": {"name": "vit"}, "state_dict": {}, "net": content}
    check_same(write(tmp_path, content), oracle)


def test_weights_come_before_their_average(tmp_path):
    oracle = our_vit(depth=2)
    state = oracle.state_dict()
    average = plus_one(state)
    content = {"state_dict_ema": average, "state_dict": state}
    check_same(write(tmp_path, content), oracle)
    content = {"model_ema": average, "model": state}
    check_same(write(tmp_path, content), oracle)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."],
)
def test_prefixes_of_wrappers_are_taken_off(prefix, tmp_path):
    oracle = our_vit(depth=2)
    check_same(write(tmp_path, under(prefix, oracle.state_dict())), oracle)
    content = {"state_dict": under(prefix + "base_encoder.", oracle.state_dict())}
    vit = check_same(write(tmp_path, content), oracle)
    assert vit.facts["role"] == "CL"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_weights_become_float32(dtype, tmp_path):
    oracle = our_vit(depth=2)
    path = write(tmp_path, oracle.to(dtype).state_dict())
    # the oracle, rounded
    vit = check_same(path, oracle.float())
    assert {parameter.dtype for parameter in vit.parameters()} == {torch.float32}


def safetensors_by_hand(state, path):
    """The format: length of the header in 8 bytes, header in JSON, numbers."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    header = {"__metadata__": {"format": "pt"}}
    numbers = b""
    for key, value in state.items():
        raw = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        offsets = [len(numbers), len(numbers) + len(raw)]
        dtype = names[value.dtype]
        entry = {"dtype": dtype, "shape": list(value.shape), "data_offsets": offsets}
        header[key] = entry
        numbers += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["model.safetensors", "without_a_hint"])
def test_safetensors_need_no_package(name, dtype, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    oracle = our_vit(depth=2)
    safetensors_by_hand(oracle.to(dtype).state_dict(), tmp_path / name)
    check_same(tmp_path / name, oracle.float())


def test_safetensors_of_the_package(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    oracle = our_vit(depth=2)
    state = under("encoder.", oracle.state_dict())
    state["relative_position_index"] = torch.arange(9)
    state["empty"] = torch.zeros(0, 3)
    state["scalar"] = torch.tensor(True)
    package.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    check_same(tmp_path / "model.safetensors", oracle)


# ---- this project's own ----


def our_checkpoint(shipped=False, **change):
    torch.manual_seed(0)
    settings = {"model": "nano", "image_size": 16, "proj_hidden": 16, "seed": 4}
    cfg = sslvit.Config(**{**settings, **change})
    model = random_weights(sslvit.SSL(cfg)).state_dict()
    if shipped:
        kept = ("encoder.", "mask_token", "decoder.")
        model = {k: v.half() for k, v in model.items() if k.startswith(kept)}
    return cfg, {"config": vars(cfg), "step": 1, "log": [], "model": model}


@pytest.mark.parametrize("shipped", [False, True])
@pytest.mark.parametrize(
    "lam, role, depth, positions",
    [
        (1.0, "CL", 0, "sincos"),
        (0.2, "hybrid", 0, "learned"),
        (0.0, "MIM", 1, "sincos"),
        (0.0, "MIM", 0, "relative"),
    ],
)
def test_our_runs_tell_everything(
    lam, role, depth, positions, shipped, tmp_path, capsys
):
    objective = {"CL": "moco", "MIM": "simmim"}.get(role, role)
    cfg, content = our_checkpoint(
        shipped,
        lam=lam,
        objective=objective,
        decoder_depth=depth,
        positions=positions,
    )
    vit = analyze.load_encoder(write(tmp_path, content), heads=4)
    assert "assumed" not in capsys.readouterr().out
    facts = {
        "role": role,
        "lam": lam,
        "num_heads": 3,
        "embed_dim": 48,
        "depth": 6,
        "patch_size": cfg.patch_size,
        "image_size": 16,
        "decoder_depth": depth,
        "seed": 4,
        "config": content["config"],
        "path": str(tmp_path / "file.pth"),
    }
    assert {key: vit.facts[key] for key in facts} == facts
    oracle = sslvit.SSL(cfg).eval()
    oracle.load_state_dict(content["model"], strict=False)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(vit(x), oracle.encoder(x))


def test_a_config_of_unknown_size_is_refused(tmp_path):
    _, content = our_checkpoint(lam=0.0, objective="simmim")
    content["config"]["model"] = "giant"
    check_refused(write(tmp_path, content), "a model of unknown size giant")


def test_a_file_without_positions_is_doubted(tmp_path, capsys):
    """Rotary positions (DINOv3) are no tensors: nothing is missing, all is wrong."""
    state = our_vit().state_dict()
    analyze.load_encoder(write(tmp_path, state))
    assert "no positions" not in capsys.readouterr().out
    del state["pos_embed"]
    analyze.load_encoder(write(tmp_path, state))
    assert "no positions in this file" in capsys.readouterr().out


def test_heads_are_said_and_settable(tmp_path, capsys):
    small = sslvit.ViT(16, 8, 384, 1, 6, positions="learned").state_dict()
    bare = write(tmp_path, small)
    assert analyze.load_encoder(bare).blocks[0].attn.num_heads == 6
    assert "6 heads (assumed" in capsys.readouterr().out
    assert analyze.load_encoder(bare, heads=4).blocks[0].attn.num_heads == 4
    assert "assumed" not in capsys.readouterr().out
    moco = write(tmp_path, {"state_dict": under("module.base_encoder.", small)})
    assert analyze.load_encoder(moco).blocks[0].attn.num_heads == 12


# ---- hostile, damaged, unknown ----


class Strange:
    """Pickles with arguments, a state that is no dict, items of lists and dicts."""

    def __init__(self, *args):
        pass

    def __reduce__(self):
        return Strange, (1, 2), [3], iter([4, 5]), iter([("six", 7)])

    def __setstate__(self, state):
        raise AssertionError("code in a file was run")

    extend = append = __setitem__ = __setstate__


def test_objects_of_any_kind_do_not_disturb(tmp_path):
    oracle = our_vit()
    content = {"args": Strange(), "model": oracle.state_dict(), "more": {Strange: 1}}
    check_same(write(tmp_path, content), oracle)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_executed(zipped, tmp_path):
    state = our_vit().state_dict()
    mark = tmp_path / "ran"
    content = {"model": state, "args": Evil(mark)}
    path = write(tmp_path, content, _use_new_zipfile_serialization=zipped)
    vit = analyze.load_encoder(path)
    for key, value in state.items():
        assert torch.equal(vit.state_dict()[key], value)
    path = write(tmp_path, Evil(mark), _use_new_zipfile_serialization=zipped)
    check_refused(path, "no tensors")
    assert not mark.exists()
    # the trap is a trap
    torch.load(path, weights_only=False)
    assert mark.exists()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_whole_modules_and_programs_are_refused(tmp_path):
    path = write(tmp_path, {"model": our_vit()})
    check_refused(path, "state_dict()")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), path)
    check_refused(path, "TorchScript")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused_by_name(value, tmp_path):
    state = under("module.", our_vit().state_dict())
    unused = {"module.head.weight": torch.full((5, D), value)}
    analyze.load_encoder(write(tmp_path, state | unused))
    state["module.blocks.0.mlp.fc1.weight"][3, 4] = value
    check_refused(write(tmp_path, state), "module.blocks.0.mlp.fc1.weight", "NaN")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_refused(kind, tmp_path):
    path = tmp_path / "file.pth"
    if kind == "safetensors":
        safetensors_by_hand(our_vit().state_dict(), path)
    else:
        write(
            tmp_path,
            our_vit().state_dict(),
            _use_new_zipfile_serialization=kind == "zip",
        )
    whole = path.read_bytes()
    analyze.load_encoder(path)
    for length in (0, 1, 8, 9, 100, 5000, len(whole) // 2, len(whole) - 200):
        path.write_bytes(whole[:length])
        check_refused(path)
    if kind == "safetensors":
        check_refused(path, "cut off")


def test_files_that_are_none(tmp_path):
    check_refused(tmp_path / "nowhere.pt", "No such file")
    check_refused(tmp_path)
    path = tmp_path / "text.pt"
    path.write_text('{"model": 1}')
    check_refused(path)
    path.write_text("12345678{not json")
    check_refused(path)
    entry = {"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}
    text = json.dumps(entry).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"0")
    check_refused(path, "tensor a is F8_E4M3")
    check_refused(write(tmp_path, [1, 2]), "no tensors")
    loop = {}
    loop["model"] = loop
    check_refused(write(tmp_path, loop), "no tensors")


def test_a_file_of_no_family_says_which_keys_it_would_need(tmp_path):
    resnet = {"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(10)}
    message = check_refused(write(tmp_path, resnet), "conv1.weight, fc.bias")
    for family in analyze.FAMILIES:
        for key in [family.prefix + "patch_embed.proj.weight", *family.needs]:
            assert key in message
    state = our_vit(depth=2).state_dict()
    del state["blocks.1.attn.proj.bias"]
    check_refused(write(tmp_path, state), "1 tensors", "blocks.1.attn.proj.bias")
    state["registers"] = torch.zeros(1, 2, D)
    state["rel_pos_bias.relative_position_bias_table"] = torch.zeros(52, 2)
    check_refused(write(tmp_path, state), "registers and rel_pos_bias.relative")
    patches = {"patch_embed.proj.weight": torch.zeros(D, 3, 8, 8)}
    check_refused(write(tmp_path, patches), "blocks.0.norm1.weight")
    state = our_vit().state_dict()
    state["pos_embed"] = torch.zeros(1, 19, D)
    check_refused(write(tmp_path, state), "19 positions")
    state = our_vit().state_dict()
    state["patch_embed.proj.weight"] = torch.zeros(D, 1, 8, 8)
    check_refused(write(tmp_path, state), "patch_embed.proj.weight")
