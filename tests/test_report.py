"""analyze.py as a program: from checkpoints over results.json to the report."""

import contextlib
import io
import json
import re
import shutil
import weakref
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from test_analyze import ROOT, SHAPE, analyze, network, no_drawing, similarities, sslvit

__all__ = ["no_drawing"]
SIZES = {
    "nano": {"embed_dim": 24, "depth": 3, "num_heads": 2},
    "micro": {"embed_dim": 32, "depth": 3, "num_heads": 2},
    "tiny": {"embed_dim": 24, "depth": 4, "num_heads": 2},
}
RUNS = {
    "moco": {"lam": 1.0},
    "moco1": {"lam": 1.0, "seed": 1},
    "simmim": {"lam": 0.0},
    "hybrid": {"lam": 0.2},
    "strong": {"lam": 0.8},
    "decoder": {"lam": 0.0, "decoder_depth": 1},
    "deep": {"lam": 0.0, "model": "tiny"},
    "wide moco": {"lam": 1.0, "model": "micro"},
    "wide simmim": {"lam": 0.0, "model": "micro"},
    "coarse": {"lam": 0.0, "patch_size": 8, "mask_patch_size": 8},
    "other lr": {"lam": 1.0, "seed": 1, "lr": 0.1},
}
TRAINING_FREE = ["maps", "distance", "nmi", "similarity", "plane", "spectra", "fourier"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints of networks as they are before training."""
    folder, sizes = tmp_path_factory.mktemp("runs"), dict(sslvit.SIZES)
    sslvit.SIZES.update(SIZES)
    for name, settings in RUNS.items():
        shape = {"image_size": 16, "model": "nano", "proj_hidden": 16}
        config = sslvit.Config(**(shape | settings))
        torch.manual_seed(config.seed)
        state = {"config": vars(config), "model": sslvit.SSL(config).state_dict()}
        torch.save(state | {"step": 10}, folder / f"{name}.pt")
    yield folder
    sslvit.SIZES.update(sizes)


def main(*argv):
    """-> exit status, what was printed, errors."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = analyze.main([str(word) for word in argv])
    return status, out.getvalue(), error.getvalue()


def analysed(out, files, *flags):
    """-> results.json and what was printed of an analysis that must succeed."""
    argv = [*files, "--alone", "--images", 20, "--epochs", 1, "--out", out, *flags]
    status, printed, error = main(*argv)
    assert status == 0, error
    return read(out), printed


def read(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def fails(*argv):
    status, printed, error = main(*argv)
    assert status == 2 and error.count("\n") == 1 and "Traceback" not in error, error
    return error


# ==== A whole analysis ==============================================================


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """Every figure's values, of all roles; drawn later, one by one."""
    out = tmp_path_factory.mktemp("whole")
    names = ["moco", "moco1", "simmim", "hybrid", "decoder", "deep"]
    files = [runs / f"{name}.pt" for name in [*names, "wide moco", "wide simmim"]]
    with pytest.MonkeyPatch.context() as patch:
        for figure in analyze.FIGURES.values():
            patch.setattr(figure, "draw", None)
        patch.setattr(analyze, "FINE_TUNING", analyze.FINE_TUNING[:1])
        patch.setattr(analyze, "LINEAR_HEADS", analyze.LINEAR_HEADS[:1])
        patch.setattr(analyze.linear_probe, "__defaults__", ("cpu", (0.1,)))
        return out, *analysed(out, files)


def test_a_whole_analysis(whole):
    _, results, printed = whole
    assert {claim["claim"] for claim in results["claims"]} == set(range(1, 13))
    assert "needs" not in printed.replace("needs more training", "")
    for network in results["networks"]:
        for key, rows in network["values"].items():
            assert len(rows) == 21 and np.isfinite(rows).all(), key
        # nine classes: eight shapes and the ground
        assert np.shape(network["values"]["overlap, linear"]) == (21, 9, 2)
        assert np.shape(network["values"]["noise"]) == (21, 11, 2)
        assert network["facts"]["choices"]["fine-tuned"] in analyze.FINE_TUNING
    # an untrained network for each seed and shape, which is where training began:
    # these runs are no further
    roles = [network["facts"]["role"] for network in results["networks"]]
    assert roles == ["CL", "CL", "MIM", "hybrid", "MIM with decoder", "MIM"] + [
        "CL", "MIM"] + 4 * ["untrained"]  # fmt: skip
    for trained in results["networks"][:2]:
        seed, width = trained["facts"]["seed"], trained["facts"]["embed_dim"]
        [new] = [n["values"] for n in results["networks"][8:]
                 if (n["facts"]["seed"], n["facts"]["embed_dim"]) == (seed, width)
                 and n["facts"]["depth"] == 3]  # fmt: skip
        assert new["distance"] == trained["values"]["distance"]


@pytest.mark.parametrize("name", analyze.FIGURES)
def test_every_figure_is_drawn_from_results(name, whole, tmp_path):
    folder, _, _ = whole
    argv = ["--from", folder / "results.json", "--only", name, "--out", tmp_path]
    status, printed, _ = main(*argv)
    assert status == 0 and "skipped" not in printed
    [file] = tmp_path.glob("*.png")
    assert Image.open(file).width == 1600
    claims = {claim["claim"] for claim in read(tmp_path)["claims"]}
    assert claims <= {analyze.FIGURES[name].claim}


def test_the_foot_counts_parts_and_what_chance_would_give(tmp_path):
    values = similarities(0.5, 0.5, 0.5) | {"nmi": [[0.5]] * 6}
    networks = [network(role, values) for role in ("CL", "MIM", "untrained")]
    networks[0].values["heads"] += 0.1
    entries = [{**vars(n), "values": {k: v.tolist() for k, v in n.values.items()}}
               for n in networks]  # fmt: skip
    content = {"edition": 3, "settings": {}, "data": [], "networks": entries}
    (tmp_path / "results.json").write_text(json.dumps(content))
    argv = ["--from", tmp_path / "results.json", "--only", "similarity", "nmi", "bias"]
    _, printed, _ = main(*argv)
    [foot] = [line for line in printed.splitlines() if "one in forty" in line]
    # of six parts shape bias was not measured, and one holds; 5 / 40 is about 0.1
    assert re.findall(r"[\d.]+", foot) == ["5", "1", "0.1"]


def test_two_orders_of_files_give_one_table(runs, tmp_path, no_drawing):
    names = ["moco", "simmim", "moco1"]
    tables = []
    for order in (names, names[::-1]):
        files = [runs / f"{name}.pt" for name in order]
        flags = ["--only", "nmi", "distance", "spectra"]
        tables.append(analysed(tmp_path, files, *flags)[1].split("\n 4 ")[1])
    assert tables[0] == tables[1]


def test_a_new_figure_is_one_section(runs, tmp_path, monkeypatch, capsys):
    def measure_largest(layer):
        return {"largest": layer.attn.amax(dim=(1, 2, 3))}

    def read_last(values):
        return values["largest"][-1]

    def draw(networks):
        fig, axis = analyze.plt.subplots()
        analyze.curves(axis, networks, lambda values: values["largest"], "weight")
        return fig

    toy = analyze.Figure("13", 13, "CL looks hardest", "A toy.", draw)
    toy.measure = (measure_largest,)
    toy.parts = (analyze.Part("largest weight", "CL", "MIM", read_last),)
    monkeypatch.setitem(analyze.FIGURES, "toy", toy)
    with pytest.raises(SystemExit):
        analyze.main(["--help"])
    assert "CL looks hardest" in capsys.readouterr().out
    files = [runs / "moco.pt", runs / "simmim.pt"]
    results, printed = analysed(tmp_path, files, "--only", "toy")
    assert [claim["claim"] for claim in results["claims"]] == [13]
    assert "largest weight" in printed
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "A toy." in report and "largest weight" in report and "<img" in report


# ==== Which networks ================================================================


def test_equal_names_are_seeds_of_one_network(runs, tmp_path, no_drawing):
    flags = ["--only", "nmi", "--out", tmp_path]
    moco = runs / "moco.pt"
    error = fails(moco, runs / "other lr.pt", *flags)
    assert "lr" in error and "NAME=" in error
    assert "one run" in fails(moco, moco, *flags)
    assert "NAME=" in fails(f"a={moco}", f"a={runs / 'simmim.pt'}", *flags)
    # what it is called ends at the first =
    shutil.copy(moco, tmp_path / "x-ep=399.ckpt")
    file = f"cl={tmp_path / 'x-ep=399.ckpt'}"
    results, _ = analysed(tmp_path, [file], "--only", "nmi")
    assert results["networks"][0]["facts"]["given"] == "cl"


def test_a_hybrid_of_another_lambda_is_called_so(runs, tmp_path, no_drawing):
    files = [runs / "moco.pt", runs / "simmim.pt", runs / "strong.pt"]
    results, printed = analysed(tmp_path, files, "--only", "nmi", "fourier", "sweep")
    name = results["networks"][2]["facts"]["name"]
    assert "λ = 0.8" in name and "0.2" not in name
    verdicts = {c["claim"]: c["verdict"] for c in results["claims"]}
    assert verdicts[12] == "not testable"
    assert re.search("needs .*λ = 0.2", printed)


def test_no_sweep_without_a_hybrid(whole, tmp_path):
    folder, results, _ = whole
    results = dict(results)
    pair = [n for n in results["networks"] if n["facts"]["role"] != "hybrid"]
    (tmp_path / "results.json").write_text(json.dumps(results | {"networks": pair}))
    argv = ["--from", tmp_path / "results.json", "--only", "sweep"]
    status, printed, _ = main(*argv)
    assert status == 0 and re.search("skipped sweep: .*hybrid", printed)


def test_shipped_networks_stand_beside_one_of_the_same_data(tmp_path, no_drawing):
    shipped = ROOT / "figures" / "checkpoints" / "micro-simmim.pt"
    flags = ["--only", "nmi", "--images", 20, "--out", tmp_path]
    assert main(shipped, *flags)[0] == 0
    roles = [network["facts"]["role"] for network in read(tmp_path)["networks"]]
    assert sorted(roles) == ["CL", "MIM", "hybrid", "untrained"]
    content = torch.load(shipped)
    for setting in ({"data": "photos/cats"}, {"image_size": 40}):
        other = content | {"config": content["config"] | setting}
        torch.save(other, tmp_path / "other.pt")
        assert main(tmp_path / "other.pt", *flags)[0] == 0
        roles = [network["facts"]["role"] for network in read(tmp_path)["networks"]]
        assert roles == ["MIM", "untrained"], setting


def test_networks_of_two_grids_are_drawn(runs, tmp_path):
    files = [runs / "moco.pt", runs / "coarse.pt"]
    results, printed = analysed(tmp_path, files, "--only", *TRAINING_FREE)
    assert "skipped" not in printed
    assert {claim["verdict"] for claim in results["claims"]} == {"not testable"}


# ==== results.json ==================================================================


def test_analyses_are_joined(runs, tmp_path, no_drawing):
    only = ["--only", "nmi"]
    cl, mim, cl1 = [runs / f"{name}.pt" for name in ("moco", "simmim", "moco1")]
    together, _ = analysed(tmp_path / "c", [cl, mim, cl1], *only)
    analysed(tmp_path / "a", [cl, mim], *only)
    analysed(tmp_path / "b", [cl1, mim], *only)
    files = [tmp_path / name / "results.json" for name in "ab"]
    assert main("--from", *files, "--out", tmp_path / "d")[0] == 0
    # the network that is in both counts once
    assert read(tmp_path / "d")["claims"][:1] == together["claims"][:1] or (
        [c for c in read(tmp_path / "d")["claims"] if c["claim"] == 5]
        == together["claims"]
    )
    analysed(tmp_path / "b", [cl1], *only, "--images", 30)
    assert "other" in fails("--from", *files, "--out", tmp_path / "d")


def test_results_that_were_cut_or_edited_are_one_line(whole, tmp_path):
    folder, results, _ = whole
    text = (folder / "results.json").read_text(encoding="utf-8")
    file = tmp_path / "results.json"
    first = {**results["networks"][0], "values": {"nmi": [[0.5]] * 20}}
    lacking = {**results["networks"][0], "facts": {"name": "a"}}
    for content in (
        text[:-100],
        "",
        "[]",
        json.dumps({key: results[key] for key in results if key != "networks"}),
        json.dumps(results | {"edition": 2}),
        json.dumps(results | {"networks": [first]}),
        json.dumps(results | {"networks": [lacking]}),
        json.dumps(results | {"networks": []}),
        json.dumps(results | {"networks": [{**first, "values": {"nmi": "many"}}]}),
    ):
        file.write_text(content, encoding="utf-8")
        assert "results.json" in fails("--from", file, "--out", tmp_path / "out")


def test_ctrl_c_keeps_what_was_measured(runs, tmp_path, monkeypatch):
    nmi = analyze.FIGURES["nmi"]
    [measure] = nmi.measure
    calls = []

    def interrupted(layer):
        calls.append(layer)
        if len(calls) > 3:  # the second network's first layer
            raise KeyboardInterrupt
        return measure(layer)

    monkeypatch.setattr(nmi, "measure", (interrupted,))
    files = [runs / "moco.pt", runs / "simmim.pt"]
    argv = [*files, "--alone", "--images", 20, "--only", "nmi", "--out", tmp_path]
    status, _, error = main(*argv)
    assert status == 130 and error.count("\n") == 1
    assert [n["facts"]["role"] for n in read(tmp_path)["networks"]] == ["CL"]
    status, printed, _ = main("--from", tmp_path / "results.json", "--only", "nmi")
    assert status == 0 and (tmp_path / "fig04_nmi.png").exists()


def test_a_fault_costs_one_figure(runs, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("a planted fault")

    monkeypatch.setattr(analyze.FIGURES["distance"], "draw", broken)
    monkeypatch.setattr(analyze.FIGURES["nmi"], "measure", (broken,))
    names = ["distance", "nmi", "fourier"]
    _, printed = analysed(tmp_path, [runs / "moco.pt"], "--only", *names)
    assert [file.name for file in tmp_path.glob("*.png")] == ["fig08_fourier.png"]
    assert "a planted fault" in printed and "skipped distance" in printed
    assert "skipped nmi" in printed
    assert "<img" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_would_fail_late_fails_first(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "measure_batch", None)  # nothing is measured
    moco = runs / "moco.pt"
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "empty").mkdir()
    for argv in (
        [moco, "--out", tmp_path / "file" / "out"],
        [],
        [moco, "--from", tmp_path / "file"],
        [moco, "--images", "5"],
        [moco, "--only", "everything"],
        [moco, "--nonsense"],
        [moco, tmp_path / "missing.pt"],
        [moco, tmp_path / "file"],
        [moco, "--data", tmp_path / "empty"],
        [moco, "--data", tmp_path / "nowhere"],
        [moco, "--device", "abacus"],
        [moco, "--workers", "-1"],
        [moco, "--heads", "2", "3"],
    ):
        fails("--out", tmp_path / "out", *argv)


# ==== Images ========================================================================


def paint(folder, counts, colours=("black", "red"), size=16):
    """A folder of images for each class, each of a colour."""
    for (name, count), colour in zip(counts.items(), colours, strict=True):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (size, size), colour).save(folder / name / f"{i}.png")


def test_few_photographs_without_classes(runs, tmp_path):
    paint(tmp_path / "photos", {".": 12, "more": 13})
    flags = ["--data", tmp_path / "photos", "--only", "distance", "accuracy", "dense"]
    _, printed = analysed(tmp_path, [runs / "moco.pt"], *flags)
    assert [file.name for file in tmp_path.glob("*.png")] == ["fig03_distance.png"]
    assert "skipped accuracy" in printed and "skipped dense" in printed
    paint(tmp_path / "few", {"a": 9, "b": 9})
    assert "20" in fails(runs / "moco.pt", "--data", tmp_path / "few")


def test_fine_tuning_is_chosen_on_validation(runs, tmp_path, monkeypatch, no_drawing):
    made = []

    class Counted(torch.optim.AdamW):
        def __init__(self, *arguments, **options):
            made.append(self)
            super().__init__(*arguments, **options)

    # in the test set black is called red: what learns, is worse there
    paint(tmp_path / "photos" / "train", {"a": 50, "b": 50})
    paint(tmp_path / "photos" / "val", {"a": 10, "b": 10}, ("red", "black"))
    settings = [{"lr": 1e-9, "decay": 1.0}, {"lr": 0.1, "decay": 1e-3}]
    monkeypatch.setattr(analyze, "FINE_TUNING", settings)
    monkeypatch.setattr(torch.optim, "AdamW", Counted)
    files = [runs / "moco.pt", runs / "moco1.pt"]
    flags = ["--data", tmp_path / "photos", "--only", "accuracy", "--epochs", 18]
    results, printed = analysed(tmp_path, files, *flags)
    cl = results["networks"][:2]
    for network in cl:
        assert network["facts"]["choices"] == {"fine-tuned": settings[1]}
        assert np.max(network["values"]["fine-tuned"]) < 0.2
        assert np.max(network["values"]["linear probe"]) < 0.2
    # two trainings to choose and one to keep; the second seed shares the choice
    assert len(made) == 2 * (3 + 1)  # CL, untrained
    assert re.search("edge|end of the grid", printed)  # the choice is the largest rate


@pytest.fixture
def passes():
    """What ViTs were shown: (network, images (B, 3, S, S))."""
    seen = []

    def watch(module, arguments):
        if isinstance(module, sslvit.ViT):
            seen.append((module, arguments[0]))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(watch)
    yield seen
    hook.remove()


def test_noise_is_clipped_and_equal_for_all(runs, tmp_path, passes, no_drawing):
    files = [runs / "moco.pt", runs / "simmim.pt"]
    analysed(tmp_path, files, "--only", "noise")
    shown = {}
    for vit, x in passes:
        shown.setdefault(id(vit), []).append(x * sslvit.STD + sslvit.MEAN)
    first, *others = [torch.cat(x) for x in shown.values()]
    assert first.min() > -1e-4 and first.max() < 1 + 1e-4
    assert len(others) == 2 and all(torch.equal(first, x) for x in others)
    # 20 test images, 80 to learn from, then 20 clean and in ten rings of noise
    assert len(first) == 20 + 80 + 20 * 11


def test_segmentation_freezes_what_is_linear(runs, tmp_path, passes, monkeypatch):
    monkeypatch.setattr(analyze, "FINE_TUNING", [{"lr": 1e-2}])
    monkeypatch.setattr(analyze, "LINEAR_HEADS", [{"lr": 1e-2}])
    untrained = [runs / "moco.pt"]
    analysed(tmp_path, untrained, "--only", "dense", "--images", 64, "--epochs", 3)
    vits = list({id(vit): vit for vit, _ in passes}.values())
    weights = [vit.blocks[0].attn.qkv.weight for vit in vits]
    equal = [torch.equal(weight, weights[0]) for weight in weights]
    # the network; a linear head to choose and one to keep; the same fine-tuned. Then
    # the untrained one, which is equal
    assert equal == [True, True, True, False, False] * 2


def test_crops_and_masks_are_mirrored_together():
    stimuli = sslvit.Stimuli(40, 32)
    images = analyze.Images(stimuli, list(range(40)), 32, 0)
    training = analyze.replace(images, training=True)
    centre = {images[i]["pixels"].numpy().tobytes() for i in range(40)}
    assert not any(training[i]["pixels"].numpy().tobytes() in centre for i in range(9))
    masked = analyze.replace(training, masks=True)
    mirrored = 0
    for i in range(20):
        image, shape, _, inside = stimuli[i]
        item = masked[i]
        is_same = np.array_equal(item["pixels"].permute(1, 2, 0).numpy(), image)
        mask = item["mask"].numpy() if is_same else item["mask"].flip(-1).numpy()
        assert np.array_equal(mask, inside * (1 + shape))
        mirrored += not is_same
    assert 0 < mirrored < 20


def test_cue_conflict_images(runs, tmp_path):
    for split in ("train", "val"):
        paint(tmp_path / "photos" / split, {"cat": 20, "dog": 20})
    cues = tmp_path / "cues"
    cues.mkdir()
    # by shape, by texture (black is a cat), and a congruent one
    for name, colour in (
        ("cat1-dog1", "black"),
        ("cat2-dog1", "black"),
        ("cat3-dog2", "black"),
        ("dog1-cat1", "black"),
        ("dog2-dog3", "red"),
    ):
        Image.new("RGB", (16, 16), colour).save(cues / f"{name}.png")
    flags = ["--data", tmp_path / "photos", "--cue-conflict", cues, "--only", "bias"]
    results, _ = analysed(tmp_path, [runs / "moco.pt"], *flags)
    # three of four decisions by shape
    assert results["networks"][0]["values"]["cues"][0] == [[0.75, 0.25]]
    Image.new("L", (16, 16)).save(cues / "cat1-cow1.png")
    status, printed, error = main(runs / "moco.pt", *flags, "--out", tmp_path)
    assert "cow" in printed + error


def test_images_do_not_stay_in_memory(runs, tmp_path, monkeypatch, no_drawing):
    states, most = [], []

    def watch(state):
        states.append(weakref.ref(state))
        most.append(sum(state() is not None for state in states))
        return {"mean": state.mean(dim=(1, 2))}

    monkeypatch.setattr(analyze.FIGURES["nmi"], "measure_tokens", (watch,))
    flags = ["--only", "nmi", "--images", 300]
    results, _ = analysed(tmp_path, [runs / "moco.pt"], *flags)
    # seven states of a batch, and perhaps of the one before
    assert len(most) >= 2 * 5 * 7 and max(most) <= 14
    assert np.shape(results["networks"][0]["values"]["mean"]) == (21, 7)


# ==== The report ====================================================================


class Page(HTMLParser):
    """Collects tags and text; every tag must be closed in order."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_report_stands_alone_and_takes_any_text(runs, tmp_path):
    folder = tmp_path / "<i>$x_{$"
    for split in ("train", "val"):
        paint(folder / split, {"<u>a$b_{$c": 20, "dog": 20})
    name = "<b>a&b$_{$c"
    files = [f"{name}={runs / 'moco.pt'}", runs / "simmim.pt"]
    names = ["distance", "nmi", "maps"]
    flags = ["--data", folder, "--only", *names]
    _, printed = analysed(tmp_path, files, *flags)
    assert "skipped" not in printed
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert "<b>" not in source and "<i>" not in source
    assert name in page.text and "<i>$x_{$" in page.text
    # each figure inside the page, nothing from elsewhere, nothing that runs
    images = [values["src"] for tag, values in page.tags if tag == "img"]
    assert len(images) == 3
    assert all(src.startswith("data:image/png;base64,") for src in images)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert not re.search("https?://|url\\(|@import", source)
    for figure in names:
        assert analyze.FIGURES[figure].lesson.split(",")[0] in page.text
