"""analyze.py as a program: from checkpoints over results.json to the report."""

import contextlib
import io
import json
import os
import re
from functools import partial
from html import unescape
from operator import itemgetter
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

# first, as it imports sslvit before torch
from test_analyze import ROOT, analyze, network, no_drawing, similarities, sslvit
import numpy as np
import pytest
import torch
from PIL import Image

__all__ = ["no_drawing"]
SHAPES = {"nano": (24, 3, 2), "micro": (32, 3, 2), "tiny": (24, 4, 2)}
SIZES = {k: dict(zip(sslvit.SIZES["micro"], v)) for k, v in SHAPES.items()}
RUNS = {"moco": {"lam": 1.0}, "simmim": {"lam": 0.0}, "hybrid": {"lam": 0.2}}
RUNS |= {"moco1": {"lam": 1.0, "seed": 1}, "strong": {"lam": 0.8}}
RUNS |= {"other lr": {"lam": 1.0, "seed": 1, "lr": 0.1}}
RUNS |= {"deep": {"lam": 0.0, "model": "tiny"}, "wide": {"lam": 1.0, "model": "micro"}}
RUNS |= {"decoder": {"lam": 0.0, "decoder_depth": 1}}
RUNS |= {"relative": {"lam": 0.0, "positions": "relative"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints of networks as they are before training: {name: file}."""
    folder, sizes = tmp_path_factory.mktemp("runs"), dict(sslvit.SIZES)
    sslvit.SIZES.update(SIZES)
    for name, settings in RUNS.items():
        shape = {"image_size": 16, "model": "nano", "proj_hidden": 16}
        config = sslvit.Config(**(shape | settings))
        torch.manual_seed(config.seed)
        state = {"config": vars(config), "model": sslvit.SSL(config).state_dict()}
        torch.save(state | {"step": 10}, folder / f"{name}.pt")
    yield {name: folder / f"{name}.pt" for name in RUNS}
    sslvit.SIZES.update(sizes)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One setting each, and probes that take a few steps."""

    def lbfgs(parameters, max_iter, **options):
        return solver(parameters, max_iter=5, **options)

    solver = torch.optim.LBFGS
    monkeypatch.setattr(torch.optim, "LBFGS", lbfgs)
    monkeypatch.setattr(analyze, "FINE_TUNING", [{"lr": 1e-2, "decay": 1.0}])
    monkeypatch.setattr(analyze, "LINEAR_HEADS", [{"lr": 1e-2}])
    monkeypatch.setattr(analyze.linear_probe, "__defaults__", ("cpu", (0.1,)))


def main(*argv):
    """-> exit status, what was printed, errors."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = analyze.main([str(word) for word in argv])
    return status, out.getvalue(), error.getvalue()


def analysed(out, files, *flags):
    """-> results.json and what was printed of an analysis that must succeed."""
    argv = [*files, "--alone", "--images", 20, "--epochs", 1, "--overwrite", *flags]
    status, printed, error = main(*argv, "--out", out)
    assert status == 0, error
    return read(out), printed


def read(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def roles_in(results):
    return [analyze.Network(**entry).role for entry in results["networks"]]


def fails(*argv):
    """-> the one line of a program that must refuse its input."""
    status, _, error = main(*argv)
    assert status == 2 and error.count("\n") == 1 and "Traceback" not in error, error
    return error


# ==== A whole analysis ==============================================================
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


def test_every_value_of_every_figure(runs, whole, no_drawing):
    names = ["moco", "simmim", "hybrid", "decoder", "deep", "wide"]
    results, _ = analysed(whole, [runs[name] for name in names])
    assert {claim["claim"] for claim in results["claims"]} == set(range(1, 13))
    for entry in results["networks"]:
        for key, rows in entry["values"].items():
            assert len(rows) == 21 and np.isfinite(rows).all(), key
        # nine classes: eight shapes and the ground
        assert np.shape(entry["values"]["overlap, linear"]) == (21, 9, 2)
        assert entry["choices"]["fine-tuned"] == analyze.FINE_TUNING[0]
        assert entry["label_names"] == ["shape", "texture"]
        if entry["lam"] not in (0, 1):
            entry["pictures"] = {}
    (whole / "results.json").write_text(json.dumps(results), encoding="utf-8")


@pytest.mark.parametrize("name", analyze.FIGURES)
def test_every_figure_is_drawn_from_results(name, whole, tmp_path, monkeypatch):
    title = Mock()
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", title)
    argv = ["--from", whole / "results.json", "--only", name, "--out", tmp_path]
    status, printed, _ = main(*argv)
    assert status == 0 and "skipped" not in printed
    assert title.call_args.args[0].endswith("\nstimuli; images seen: {640}")
    assert [Image.open(file).width for file in tmp_path.glob("*.png")] == [1600]
    claims = {claim["claim"] for claim in read(tmp_path)["claims"]}
    assert claims <= {analyze.FIGURES[name].claim}


def write_results(folder, networks, changes):
    """results.json by hand, of these networks -> the flag that reads it."""
    entries = []
    for one in networks:
        values = {key: rows.tolist() for key, rows in one.values.items()}
        entries.append(vars(one) | {"values": values})
    content = {"settings": {}, "data": [], "networks": entries} | changes
    (folder / "results.json").write_text(json.dumps(content))
    return "--from", folder / "results.json"


def test_the_foot_counts_parts_and_what_chance_would_give(tmp_path):
    values = similarities(0.5, 0.5, 0.5) | {"nmi": [[0.5]] * 6}
    networks = [network(role, values) for role in ("CL", "MIM", "untrained")]
    networks[0].values["heads"] += 1
    flags = write_results(tmp_path, networks, {})
    _, printed, _ = main(*flags, "--only", "similarity", "nmi", "bias")
    [foot] = [line for line in printed.splitlines() if "one in forty" in line]
    # of six parts shape bias was not measured, and one holds; 5 / 40 is about 0.1
    assert re.findall(r"[\d.]+", foot) == ["5", "1", "0.1"]


def test_two_orders_of_files_give_one_table(runs, tmp_path, no_drawing):
    tables = []
    for order in ("simmim moco moco1", "moco1 moco simmim"):
        files = [runs[name] for name in order.split()]
        results, printed = analysed(tmp_path, files, "--only", "nmi", "spectra")
        tables.append(printed[printed.index("\n 5 ") :])
    assert tables[0] == tables[1]
    # an untrained network for each seed, which is where these runs stand, too
    assert roles_in(results) == ["untrained", "untrained", "CL", "MIM", "CL"]
    nmi = [entry["values"]["nmi"] for entry in results["networks"]]
    assert nmi[2] in nmi[:2] and nmi[4] in nmi[:2] and nmi[0] != nmi[1]


def test_each_architecture_has_its_untrained_networks(runs, tmp_path, no_drawing):
    results, _ = analysed(tmp_path, [runs["moco"], runs["relative"]], "--only", "nmi")
    assert roles_in(results) == ["untrained", "untrained", "CL", "MIM"]
    *untrained, cl, mim = [entry["values"]["nmi"] for entry in results["networks"]]
    assert cl != mim and cl in untrained and mim in untrained
    names = ["untrained, as CL", "untrained, as MIM", "CL", "MIM"]
    assert [entry["name"] for entry in results["networks"]] == names


# ==== Which networks ================================================================
def test_equal_names_are_seeds_of_one_network(runs, tmp_path, no_drawing):
    moco, flags = runs["moco"], ["--only", "nmi", "--out", tmp_path]
    assert re.search("'lr'.* NAME=", fails(moco, runs["other lr"], *flags))
    pair = network("CL", {}), network("MIM", {}, 1)  # without config
    assert pytest.raises(ValueError, analyze.check_seeds, pair).match("lam")
    assert "'lam'" in fails(f"a={moco}", f"a={runs['relative']}", *flags)
    assert "twice" in fails(moco, moco, *flags)
    longer = [network("CL", {}, seed, images=8 + seed) for seed in (0, 1)]
    assert "'images'" in fails(*write_results(tmp_path, longer, {}))


def test_a_hybrid_of_another_lambda_is_called_so(runs, tmp_path, no_drawing):
    files = [runs["moco"], f"cl={runs['simmim']}", f"hybrid={runs['strong']}"]
    results, printed = analysed(tmp_path, files, "--only", "nmi", "sweep")
    name = results["networks"][-1]["name"]
    assert "λ = 0.8" in name and "0.2" not in name and "MIM" in roles_in(results)
    assert {c["verdict"] for c in results["claims"][1:]} == {"not testable"}
    assert re.search("needs .*λ = 0.2", printed)


def test_shipped_networks_stand_beside_one_of_the_same_data(tmp_path, no_drawing):
    shipped = ROOT / "figures" / "checkpoints" / "micro-simmim.pt"
    flags = ["--only", "nmi", "--images", 20, "--overwrite", "--out", tmp_path]
    assert main(shipped, *flags)[0] == 0
    roles = ["CL", "MIM", analyze.HYBRID, "untrained"]
    assert sorted(roles_in(read(tmp_path))) == roles
    content = torch.load(shipped)
    torch.save(content | {"data": "20 images (0123456789ab)"}, tmp_path / "other.pt")
    assert main(tmp_path / "other.pt", *flags)[0] == 0
    assert roles_in(read(tmp_path)) == ["untrained", "MIM"]


# ==== results.json ==================================================================
def test_analyses_are_joined(runs, tmp_path, no_drawing):
    only = ["--only", "nmi"]
    cl, mim, cl1 = runs["moco"], runs["simmim"], runs["moco1"]
    together, _ = analysed(tmp_path / "c", [cl, mim, cl1], *only)
    analysed(tmp_path / "a", [cl, mim], *only)
    analysed(tmp_path / "b", [cl1, os.path.relpath(mim)], *only)
    files = [tmp_path / name / "results.json" for name in "ab"]
    assert main("--from", *files, *only, "--out", tmp_path / "d")[0] == 0
    # the network that is in both counts once
    assert read(tmp_path / "d")["claims"] == together["claims"]
    # other figures of one network
    analysed(tmp_path / "b", [cl], "--only", "maps")
    joined = ["--from", *files, *only, "--out", tmp_path / "d"]
    assert "--overwrite" in fails(*joined) and "--overwrite" in fails(*joined[:-2])
    assert main(*joined, "--overwrite")[0] == 0
    first = read(tmp_path / "d")["networks"][1]
    assert "nmi" in first["values"] and "maps" in first["pictures"]
    # a file that was trained again is not the same network; choices come along
    new = network("untrained", {"nmi": [[0.5]] * 6})
    again = network("CL", {"nmi": [[0.5]] * 6}, config={"lr": 2})
    (tmp_path / "e").mkdir()
    data = {"data": read(tmp_path / "a")["data"]}
    _, joined[1] = write_results(tmp_path / "e", [new, again], data)
    for config, status in (({"lr": 2}, 0), ({"lr": 3}, 2)):
        chosen = network("CL", {}, config=config, choices={"a": 1})
        write_results(tmp_path / "b", [chosen], data)
        assert main(*joined, "--overwrite")[0] == status
    assert read(tmp_path / "d")["networks"][1]["choices"] == {"a": 1}
    joined[1] = files[0]
    for flags in (["--images", 30], ["--labels", 50]):  # other images to test or learn
        analysed(tmp_path / "b", [cl1], *only, *flags)
        assert "other" in fails(*joined, "--overwrite")


def test_results_that_were_edited_are_one_line(tmp_path):
    one = network("CL", {"nmi": [[0.5]] * 6})
    one.values["nmi"] = one.values["nmi"][:20]  # not 21 rows
    for changes in ({}, {"networks": None}, {"networks": [{"name": "a"}]}):
        words = [*write_results(tmp_path, [one], changes), "--out", tmp_path / "out"]
        assert "results.json" in fails(*words, "--only", "nmi")


def test_ctrl_c_keeps_what_was_measured(runs, tmp_path, monkeypatch):
    [measure] = analyze.FIGURES["nmi"].measure
    # one batch of each network: interrupted in MIM's
    interrupted = Mock(wraps=measure, side_effect=[DEFAULT, DEFAULT, KeyboardInterrupt])
    monkeypatch.setattr(analyze.FIGURES["nmi"], "measure", (interrupted,))
    argv = ["--alone", "--images", 20, "--only", "nmi", "--out", tmp_path]
    status, _, error = main(runs["moco"], runs["simmim"], *argv)
    assert status == 130 and error.count("\n") == 1
    assert roles_in(read(tmp_path)) == ["untrained", "CL"]
    assert main("--from", f"{tmp_path}/./results.json", "--only", "nmi")[0] == 0
    assert (tmp_path / "fig4_nmi.png").exists()
    assert "--overwrite" in fails(runs["simmim"], *argv)
    assert "gains" in read(tmp_path)["claims"][0]["parts"][1]  # what CL lost in depth


def test_a_figure_is_one_section(runs, tmp_path, monkeypatch, capsys):
    """Table, report and help follow from one entry: of the first attention weight."""
    read, measure = itemgetter("toy"), lambda batch: {"toy": batch.attn[:, 0, 0, 0, 0]}
    plot = partial(analyze.points, read=read, label="toy")
    parts = (analyze.Part("a toy part", "CL", "MIM", read),)
    toy = ("13", 13, "a toy claim", "a toy lesson", partial(analyze.on_one_axis, plot))
    monkeypatch.setitem(analyze.FIGURES, "toy", analyze.Figure(*toy, parts, (measure,)))
    _, printed = analysed(tmp_path, [runs["moco"], runs["simmim"]], "--only", "toy")
    assert "13 a toy claim" in printed and "a toy part" in printed
    assert (tmp_path / "fig13_toy.png").exists()
    assert "a toy lesson" in (tmp_path / "report.html").read_text()
    with pytest.raises(SystemExit):
        analyze.main(["--help"])
    assert "a toy claim" in capsys.readouterr().out


def test_a_fault_costs_one_figure(runs, tmp_path, monkeypatch):
    broken = Mock(side_effect=RuntimeError("a planted fault"), __name__="broken")
    monkeypatch.setattr(analyze.FIGURES["distance"], "draw", broken)
    monkeypatch.setattr(analyze.FIGURES["nmi"], "measure", (broken,))
    names = ["distance", "nmi", "fourier"]
    _, printed = analysed(tmp_path, [runs["moco"]], "--only", *names)
    assert [file.name for file in tmp_path.glob("*.png")] == ["fig8_fourier.png"]
    assert "a planted fault" in printed
    assert "skipped distance" in printed and "skipped nmi" in printed


BAD_FLAGS = """\
    --out FOLDER/file/out, --only everything, --nonsense, --images 5, --heads 2 3,
    --from FOLDER/file, FOLDER/no.pt, FOLDER/file, --data FOLDER/empty, --device mps,
    --data FOLDER/nowhere, --device abacus, --workers -1, --images -20, --labels -1,
    --epochs 0, --cue-conflict FOLDER, --data FOLDER --cue-conflict FOLDER/nowhere"""


@pytest.mark.parametrize("flags", BAD_FLAGS.split(","))
def test_what_would_fail_late_fails_first(flags, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "look_inside", None)  # nothing is measured
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "empty").mkdir()
    words = flags.replace("FOLDER", str(tmp_path)).split()
    line = fails("--alone", "--out", tmp_path / "out", runs["moco"], *words)
    assert ("no float64" in line) == ("mps" in words)


# ==== Images ========================================================================
def paint(folder, classes, count=20):
    """A folder for each class, with images of one colour."""
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (16, 16), colour).save(folder / name / f"{i}.png")


def test_few_photographs_without_classes(runs, tmp_path):
    paint(tmp_path / "photos", {".": "red", "more": "blue"}, count=13)
    flags = ["--data", tmp_path / "photos", "--only", "distance", "accuracy", "dense"]
    _, printed = analysed(tmp_path, [runs["moco"]], *flags)
    assert [file.name for file in tmp_path.glob("*.png")] == ["fig3_distance.png"]
    assert "skipped accuracy" in printed and "skipped dense" in printed
    paint(tmp_path / "few", {"a": "red", "b": "blue"}, count=9)
    assert "20 are" in fails(runs["moco"], "--data", tmp_path / "few", "--overwrite")


def test_settings_are_chosen_on_images_that_are_not_learnt(monkeypatch):
    # the second setting is right
    fit, predict = Mock(), Mock(side_effect=[(1, 0), (1, 1), (1, 0), (1, 0)])
    for name, stand_in in (("Tuned", Mock()), ("fit", fit), ("predict", predict)):
        monkeypatch.setattr(analyze, name, stand_in)
    vit = SimpleNamespace(facts=SimpleNamespace(choices={}))
    images, test = [analyze.Images(None, part, 32, 0) for part in (range(8), [99])]
    study = SimpleNamespace(train=images, test=test, vit=vit)
    study.options = SimpleNamespace(epochs=21)
    analyze.tune(study, "mIoU", [{"lr": lr} for lr in (1, 2, 3)], is_dense=True)
    # six of eight images; a quarter of 21 epochs, rounded up, to choose a third of that
    learnt = [(len(c.args[1]), *c.args[2:], c.kwargs["lr"]) for c in fit.mock_calls]
    assert learnt == [(6, 2, 1), (6, 2, 2), (6, 2, 3), (6, 6, 2)]
    looked_at = [list(call.args[1].indices) for call in predict.mock_calls]
    assert looked_at == [[6, 7]] * 3 + [[99]]


def test_fine_tuning_is_chosen_on_validation(runs, tmp_path, monkeypatch, no_drawing):
    # in the test set red is called black: a setting that learns is worse there
    paint(tmp_path / "photos" / "train", {"a": "black", "b": "red"}, count=50)
    paint(tmp_path / "photos" / "val", {"a": "red", "b": "black"})
    settings = [{"lr": 1e-9, "decay": 1.0}, {"lr": 0.003, "decay": 0.1}]
    monkeypatch.setattr(analyze, "FINE_TUNING", settings)
    probe, order = analyze.probe, iter("abcd")  # stand for what each probe chose
    monkeypatch.setattr(analyze, "probe", lambda *x: (*probe(*x)[:3], next(order)))
    files = [runs["moco"], runs["moco1"]]
    flags = ["--data", tmp_path / "photos", "--only", "accuracy", "--epochs", 20]
    results, printed = analysed(tmp_path, files, *flags, "--images", 40)
    for cl in results["networks"][:2]:
        assert cl["choices"]["fine-tuned"] == settings[1]
        assert np.max(cl["values"]["fine-tuned"]) < 0.2
        assert np.max(cl["values"]["linear probe"]) < 0.2
    assert re.findall("strengths (.)", str(results["networks"])) == [*"abcd"]
    # two trainings of CL and of untrained choose; the second seed shares the choice
    assert len(re.findall("fine-tuned: .* on validation", printed)) == 2 * 2
    # at the grid's edge
    assert f"{settings[1]}, best of {settings[0]} to {settings[1]}" in printed


@pytest.fixture
def passes():
    """What ViTs were shown: [(network, images (B, 3, S, S)), ...]."""
    passes = []

    def watch(module, arguments):
        if isinstance(module, sslvit.ViT):
            passes.append((module, arguments[0]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(watch)
    yield passes
    hook.remove()


def test_noise_is_clipped_and_the_same_for_all(runs, tmp_path, passes, no_drawing):
    analysed(tmp_path, [runs["moco"], runs["simmim"]], "--only", "noise")
    images = {}
    for vit, x in passes:
        images.setdefault(id(vit), []).append(x * sslvit.STD + sslvit.MEAN)
    cl, mim, untrained = [torch.cat(x) for x in images.values()]
    assert len(cl) == 20 + 80 + 20 * 11 + 3  # test, to learn from, ten rings, pictures
    assert cl.min() > -1e-4 and cl.max() < 1 + 1e-4
    # a tenth of full brightness, less what was clipped
    noise = cl[120:320].view(10, 20, 3, 16, 16) - cl[100:120]
    assert 0.08 < noise.square().mean().sqrt() < 0.1
    assert torch.equal(cl, mim) and torch.equal(cl, untrained)


def test_a_linear_head_leaves_the_network_frozen(runs, tmp_path, passes, no_drawing):
    analysed(tmp_path, [runs["moco"]], "--only", "dense", "--images", 64, "--epochs", 3)
    vits = {id(vit): vit for vit, _ in passes}
    weights = [vit.blocks[0].attn.qkv.weight for vit in vits.values()]
    # the network, its copies with a linear head (to choose, to keep), and fine-tuned
    same = [torch.equal(weight, weights[0]) for weight in weights]
    assert same == [True, True, True, False, False] * 2


def test_masks_belong_to_their_images():
    stimuli = sslvit.Stimuli(20, 32)
    images = analyze.Images(stimuli, list(range(20)), 32, 0, training=True, masks=True)
    for i, (image, shape, _, inside) in enumerate(map(stimuli.__getitem__, range(20))):
        pixels, mask = images[i]
        assert np.array_equal(pixels.transpose(1, 2, 0), image)
        assert np.array_equal(mask, inside * (1 + shape))
    [(_, shuffled)] = images.batches(20)
    assert not torch.equal(shuffled[0], torch.from_numpy(images[0][1]))


def test_half_of_the_crops_are_mirrored_and_none_is_small():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1)))
    crops = [analyze.random_crop(ramp, 16) for _ in range(40)]
    mirrored = sum(crop[0, 0, 0] > crop[0, 0, -1] for crop in crops)
    assert 10 < mirrored < 30
    # from √(0.35·3/4) = 0.51 of the 64 columns on
    spans = [np.ptp(crop[0, 0].astype(int)) for crop in crops]
    assert 29 < min(spans) < 40


def test_cue_conflict_images(runs, tmp_path, no_drawing):
    for split in ("train", "val"):
        paint(tmp_path / "photos" / split, {"cat": "black", "dog": "red"})
    (cues := tmp_path / "cues").mkdir()
    # black is a cat: of five images three are so by shape, one by texture, one is none
    for name in ("cat1-dog1", "cat2-dog1", "cat3-dog2", "dog1-cat1", "dog2-dog3"):
        Image.new("RGB", (16, 16), "black").save(cues / f"{name}.png")
    flags = ["--data", tmp_path / "photos", "--cue-conflict", cues, "--only", "bias"]
    results, _ = analysed(tmp_path, [runs["moco"]], *flags)
    assert results["networks"][0]["values"]["cues"][0] == [[0.6, 0.2]]
    # one that cannot be read is replaced with its cues
    (cues / "cat3-dog2.png").write_text("no image")
    results, _ = analysed(tmp_path, [runs["moco"]], *flags)
    assert results["networks"][0]["values"]["cues"][0] == [[0.4, 0.4]]
    (cues / "dog4-dog1.png").touch()
    assert analysed(tmp_path, [runs["moco"]], *flags)[0]["data"] != results["data"]
    assert "needs --data" in fails(runs["moco"], *flags[2:], "--out", tmp_path / "new")
    for name in ("cat1.png", "cat1-dog1-cat2.png", "cat1-cow1.png"):
        (cues / name).touch()
        assert f"{name}: not named" in fails(runs["moco"], *flags, "--overwrite")


# ==== The report ====================================================================
def test_the_report_stands_alone_and_takes_any_text(runs, tmp_path):
    name, folder = "<b>a&b$_{$c", tmp_path / "<i>$x_{$"
    for split in ("train", "val"):
        paint(folder / split, {"<u>a$b_{$c": "red", "dog": "blue"})
    files = [f"{name}={runs['moco']}", runs["simmim"]]
    names = ["distance", "nmi", "accuracy"]
    _, printed = analysed(tmp_path, files, "--data", folder, "--only", *names)
    assert not re.search("^skipped", printed, re.MULTILINE)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search("<[biu]>", page)
    assert name in unescape(page) and "<i>$x_{$" in unescape(page)
    # every figure is inside the page, nothing is elsewhere, nothing runs
    sources = re.findall(r'<img[^>]* src="([^",]*,?)', page)
    assert sources == ["data:image/png;base64,"] * 3
    assert not re.search(r"<script|<link|<iframe|https?://|url\(|@import", page)
    for figure in names:
        assert analyze.FIGURES[figure].lesson in unescape(page)
