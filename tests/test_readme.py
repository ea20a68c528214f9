"""README.md keeps its promises: commands, names, quoted code, numbers."""

import json
import re
import subprocess
import tarfile
import tempfile
from dataclasses import fields
from pathlib import Path

import sslvit  # before torch
import analyze
import cifar10
import exercises
import numpy as np
import pytest
import solutions

ROOT = Path(__file__).resolve().parents[1]

TEXT = (ROOT / "README.md").read_text()
PROGRAMS = {"sslvit.py": sslvit, "analyze.py": analyze}


def commands():
    """Every command of README.md's sh blocks, word by word, as a shell expands it."""
    blocks = re.findall(r"^```sh\n(.*?)^```", TEXT, re.M | re.S)
    shell = "exec 3>&1\n"
    for name in ("python", "torchrun", "pip", "git", "cd", "bash", "srun", "scontrol"):
        shell += f"{name}() {{ local IFS=$'\\t'; echo \"{name}\t$*\" >&3; }}\n"
    shell += "\n".join(blocks)
    with tempfile.TemporaryDirectory() as folder:
        how = {"capture_output": True, "text": True, "check": True, "cwd": folder}
        said = subprocess.run(["bash", "-eu", "-c", shell], **how)
    assert said.stderr == ""
    return [line.rstrip("\t").split("\t") for line in said.stdout.splitlines()]


def test_every_command_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scripts_run = set()
    for words in commands():
        scripts = [word for word in words if word.endswith((".py", ".sh"))]
        for script in scripts[:1]:
            assert (ROOT / script).exists(), words
            scripts_run.add(script)
            if script in PROGRAMS:
                arguments = words[words.index(script) + 1 :]
                PROGRAMS[script].parse(arguments)
    assert scripts_run >= {"sslvit.py", "analyze.py", "tests/bench.py"}


def test_every_name_exists():
    for path in re.findall(r"\]\(([^)#]+?)\)", TEXT):
        assert path.startswith("http") or (ROOT / path).exists(), path
    for path in re.findall(r"`((?:tests|figures)/[\w./-]+)`", TEXT):
        assert (ROOT / path).exists(), path
    others = "help nproc_per_node nnodes only rdzv_backend rdzv_endpoint nodes time "
    others += "ntasks-per-node gpus-per-node signal cpus-per-task"  # Slurm's
    flags = {"--" + name for name in others.split()}
    flags |= {"--" + field.name.replace("_", "-") for field in fields(sslvit.Config)}
    flags |= set(re.findall(r'"(--[a-z-]+)"', (ROOT / "analyze.py").read_text()))
    flags |= {"--" + name for name in analyze.FLAGS}
    assert set(re.findall(r"--[a-z][a-z_-]+", TEXT)) <= flags


def test_it_is_read_in_ten_minutes():
    assert len(TEXT.split()) <= 2300


def test_quoted_code_is_the_files():
    source = (ROOT / "sslvit.py").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    assert len(blocks) >= 3
    for block in blocks:
        quote, code = [re.sub(r"\n +", "\n", text) for text in (block, source)]
        assert quote.strip() in code, block


@pytest.mark.parametrize("solution", solutions.SOLUTIONS)
def test_exercises_fail_until_solved(solution, monkeypatch):
    name = solution.__name__
    assert f"`{name}`" in TEXT
    check = getattr(exercises, f"test_{name}")
    with pytest.raises(NotImplementedError):
        check()
    monkeypatch.setattr(exercises, name, solution)
    check()


# ---- the table of claims ----
def number(value):
    return f"{value:.3f}".replace("-", "−")


def verdict_of(claim):
    return claim["verdict"].partition(" (")[0].replace("not testable", "")


def row_of(claim, on_photographs):
    """README's row for a claim of results.json: its first part, the verdict of all."""
    part = claim["parts"][0]
    values = {name.partition(",")[0]: x for name, x in part.get("values", {}).items()}
    cl, mim = [number(values.pop(r)) if r in values else "" for r in ("CL", "MIM")]
    name = part["part"]
    for role, value in values.items():
        name += f"; {role} {number(value)}"
    gap = ""
    if "difference" in part:
        low, high = [part["difference"] + sign * part["reach"] for sign in (-1, 1)]
        gap = f"{number(part['difference'])} [{number(low)}, {number(high)}]"
    verdicts = ", ".join(filter(None, (verdict_of(claim), on_photographs)))
    return "|".join([claim["text"], name, cl, mim, gap, verdicts, ""])


def test_the_table_says_what_results_json_says():
    work = {"CL": 8, "MIM": 3, analyze.HYBRID: 11}
    for which, *folders in (
        ("", "stimuli", "photographs"),
        (", equal images", "more/sweep", "more/photographs"),
        ("", "more/decoder", "photographs"),
    ):
        paths = [ROOT / f"figures/{folder}/results.json" for folder in folders]
        stimuli, photographs = [json.loads(path.read_text()) for path in paths]
        for results in (stimuli, photographs):
            pairs = [(n["images"], n["name"]) for n in results["networks"] if n["path"]]
            equal = [n if which else n * work.get(name, 1) for n, name in pairs]
            assert max(equal) <= 1.02 * min(equal)
        verdicts = {row["claim"]: verdict_of(row) for row in photographs["claims"]}
        for claim in filter(verdict_of, stimuli["claims"]):
            number = claim["claim"]
            row = f"|{number}{which}|{row_of(claim, verdicts[number])}"
            if which:  # the same networks' rows of equal work stand above
                above = r"\1|as above|as above|"
                row = re.sub("(equal images)[|].*?[|].*?[|]", above, row)
            assert row in TEXT, row


def beside_the_protocol():
    """Differences in README that no part reads; `fine`: without the coarsest ring."""
    detail = analyze.of(lambda x: analyze.late(x[2::2]), analyze.above_lowest)
    fine = analyze.of(lambda x: np.mean(x[-4:]) - np.mean(x[1:4]), analyze.noise_drop)
    reads = [("photographs", fine, "MIM", "CL")]
    reads += [(folder, detail, "CL", "MIM") for folder in ("stimuli", "photographs")]
    for labels in (analyze.shapes, analyze.textures):
        read = analyze.of(labels, "linear probe")
        reads.append(("more/sweep", read, analyze.HYBRID, "CL"))
    for lam in (0.05, 0.1, 0.5, 0.8):
        reads.append(("more/sweep", analyze.mean_probe, f"hybrid, λ = {lam}", "CL"))
    for folder, read, *roles in reads:
        _, networks = analyze.read_results([ROOT / f"figures/{folder}/results.json"])
        groups = [[n for n in networks if n.role == role] for role in roles]
        yield analyze.interval(*[analyze.numbers(read, group) for group in groups])


def test_every_interval_stands_in_results_json():
    """Of a part or of a gain over untrained, either way."""
    pairs = [*beside_the_protocol()]
    for path in ROOT.glob("figures/**/results.json"):
        claims = json.loads(path.read_text())["claims"]
        for part in sum([claim["parts"] for claim in claims], []):
            pairs += [*part.get("gains", {}).values()]
            pairs.append((part.get("difference", 0), part.get("reach", 0)))
    pairs += [(-x, reach) for x, reach in pairs]
    intervals = {tuple(map(number, (x, x - reach, x + reach))) for x, reach in pairs}
    triple = r"(−?\d\.\d{3})[^\[\d]*\[(−?\d\.\d{3}), (−?\d\.\d{3})\]"
    stated = re.findall(triple, TEXT)
    assert len(stated) > 40 and set(stated) <= intervals


def test_cifar10_becomes_folders(tmp_path):
    (tmp_path / "batches.meta.txt").write_text("plane\ncar\nbird\n\n")
    red = np.uint8([2] + [255] * 1024 + [0] * 2048)  # a red bird
    green = np.uint8([1] + [0] * 1024 + [255] * 1024 + [0] * 1024)  # a green car
    red.tofile(tmp_path / "data_batch_1.bin")
    np.stack([red, green]).tofile(tmp_path / "test_batch.bin")
    archive = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for file in ("batches.meta.txt", "data_batch_1.bin", "test_batch.bin"):
            tar.add(tmp_path / file, f"cifar-10-batches-bin/{file}")
    assert cifar10.unpack(archive, tmp_path / "cifar10") == 3
    train, test = sslvit.find_data(sslvit.Config(data=str(tmp_path / "cifar10")))
    assert len(train) == 1 and test.classes == (["bird", "car"],)
    for i, colour in enumerate([(255, 0, 0), (0, 255, 0)]):
        image, labels = test.load(i)
        assert image.size == (32, 32) and labels == [i]
        assert image.getpixel((31, 0)) == colour
