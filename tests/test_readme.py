"""README.md keeps its promises: its command lines parse, its links, figures, functions, tests and flags exist."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root / "tests")]
import analyze  # noqa: E402
import exercises  # noqa: E402
import sslvit  # noqa: E402

text = (root / "README.md").read_text()
code = {name: (root / name).read_text() for name in ("sslvit.py", "analyze.py", "tests/bench.py")}


def commands():
    """Every command in README.md's sh blocks and between backticks, loops and variables expanded by a shell in which python, torchrun
    and pip only say how they were called."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    blocks += re.findall(
        r"(?<!`)`((?:OMP_NUM_THREADS=1 )?(?:python|torchrun) [^`…]+)`", text.replace("\n", " ")
    )
    say = "".join(  # a line in one piece, as some run side by side
        f"{name}() {{ local IFS=$'\\t'; echo \"{name}\t$*\"; }}\n" for name in ("python", "torchrun", "pip")
    )
    shell = say + "\n".join(blocks)
    said = subprocess.run(["bash", "-eu", "-c", shell], capture_output=True, text=True, check=True, cwd=root)
    assert not said.stderr, said.stderr
    return [line.rstrip("\t").split("\t") for line in said.stdout.splitlines()]


def test_every_command_parses(monkeypatch):
    monkeypatch.setattr(os.path, "isdir", lambda path: True)  # /imagenet is the reader's
    programs, seen = {"sslvit.py": sslvit.parse, "analyze.py": analyze.parse}, set()
    for words in commands():
        program = next((word for word in words if word.endswith(".py")), None)
        seen.add(program)
        if program is None:
            assert words[0] == "pip" or words[1:4] == ["-m", "pytest", "-q"], words
            continue
        assert (root / program).exists(), words
        if program in programs and "--help" not in words:
            programs[program](words[words.index(program) + 1 :])
    assert seen >= {*programs, "tests/bench.py", "figures/first_look.py", "tests/exercises.py", None}


def test_cifar10_becomes_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("cifar-10-batches-bin")
    Path("cifar-10-batches-bin/batches.meta.txt").write_text("plane\ncar\nbird\n\n")
    red, green = np.repeat(np.uint8([[2, 255, 0, 0], [1, 0, 255, 0]]), [1, 1024, 1024, 1024], axis=1)
    for i in range(1, 6):
        red.tofile(f"cifar-10-batches-bin/data_batch_{i}.bin")
    np.stack([red, green]).tofile("cifar-10-batches-bin/test_batch.bin")
    exec(re.search(r"^```python\n(.*?)^```", text, re.M | re.S)[1], {})
    train, test = sslvit.find_data(sslvit.Config(data="cifar10"))
    assert len(train) == 5 and len(test) == 2 and test.classes == (["bird", "car"],)
    for i, colour in enumerate(([255, 0, 0], [0, 255, 0])):  # bird, then car: sorted
        image, labels = test.load(i)
        assert image.size == (32, 32) and labels == [i] and image.getpixel((31, 0)) == tuple(colour)


def test_every_name_exists():
    for path in re.findall(r"\]\(([^)#]+?)\)", text):
        assert path.startswith("http") or (root / path).exists(), path
    for module, name in re.findall(r"`(sslvit|analyze)\.(?!py)(\w+)", text):
        assert hasattr({"sslvit": sslvit, "analyze": analyze}[module], name), (module, name)
    functions = {
        node.name
        for path in (root / "tests").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    for name in set(re.findall(r"\btest_\w+(?!\w|\.py)", text)) - {"test_batch"}:
        assert name in functions or (root / "tests" / f"{name}.py").exists(), name
    known = {"--" + field.name.replace("_", "-") for field in sslvit.fields(sslvit.Config)} | {"--help"}
    known |= set(re.findall(r'"(--[a-z-]+)"', code["analyze.py"] + code["tests/bench.py"]))
    known |= {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}  # torchrun's
    assert set(re.findall(r"--[a-z][a-z_-]+", text)) <= known, (
        set(re.findall(r"--[a-z][a-z_-]+", text)) - known
    )


def test_every_field_of_the_log_is_in_the_glossary():
    glossary = text.split("\n## Glossary", 1)[1].split("\n## ", 1)[0]
    for name in ("cl", "mim", "loss", "std", "norm", "lr", "momentum", "images/s", "broken", "stall", "minutes left",
                 "skipped", "knn_shape", "knn_texture"):  # fmt: skip
        assert re.search(rf"^\| .*`{name}`", glossary, re.M), name


SOLUTIONS = {
    "info_nce": lambda q, k, t: sslvit.contrastive_loss(q, k, t) / (2 * t),
    "looked_at_keys": lambda attn: torch.special.entr(attn).sum(dim=-1).exp(),
    "first_good_layer": lambda curve, share: 1 + int((curve >= share * curve.max() - 1e-6).float().argmax()),
}


def low_pass(images, cutoff):
    y, x = (torch.fft.fftfreq(side) * 2 * torch.pi for side in images.shape[-2:])
    return torch.fft.ifft2(
        torch.fft.fft2(images) * (torch.hypot(*torch.meshgrid(y, x, indexing="ij")) <= cutoff)
    ).real


def gradient_cosine(a, b, parameters):
    def flat(loss):
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        return torch.cat([torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters)])

    return F.cosine_similarity(flat(a), flat(b), dim=0)


@pytest.mark.parametrize(
    "name", ["info_nce", "looked_at_keys", "low_pass", "first_good_layer", "gradient_cosine"]
)
def test_exercises_fail_until_solved(name, monkeypatch):
    assert f"`{name}`" in text
    check = getattr(exercises, f"test_{name}")
    with pytest.raises(NotImplementedError):
        check()
    monkeypatch.setattr(exercises, name, SOLUTIONS.get(name) or globals()[name])
    check()


def test_the_claims_table_says_what_was_measured():
    def claims(folder):
        return {
            c["claim"]: c
            for c in json.loads((root / "figures" / folder / "results.json").read_text())["claims"]
        }

    def numbers(cell):
        return [float(x) for x in re.findall(r"[-+]?\d+\.\d+", cell.replace("−", "-"))]

    ours, photographs = claims("."), claims("cifar10")
    ours |= {2: claims("sizes")[2], 11: claims("decoder")[11]}
    table = re.search(r"^\| # \| claim.*\n\|.*\n((?:\|.*\n)+)", text, re.M)[1].splitlines()
    rows = iter([cell.strip() for cell in line.split(" | ")] for line in table)
    for number in range(1, 13):
        for i, (part, photo) in enumerate(zip(ours[number]["parts"], photographs[number]["parts"])):
            _, name, *roles, difference, seeds, last = next(rows)
            assert part["part"] in name and ("does not hold" in name) != part["holds"], name
            for role, cell in zip(("CL", "MIM", "hybrid"), roles):
                close = 0.006 if abs(part.get(role, 0)) > 3 else 0.0006
                assert not cell or numbers(cell)[0] == pytest.approx(part[role], abs=close), (name, role)
            assert numbers(difference) == pytest.approx([part["difference"], *part["interval"]], abs=6e-4), (
                name
            )
            if count := part.get("seeds"):
                assert f"{sum(seed['holds'] for seed in count)}/{len(count)}" in seeds, name
            if "difference" in photo:
                assert numbers(last) == pytest.approx([photo["difference"], *photo["interval"]], abs=6e-4), (
                    name
                )
                assert ("(no)" in last) != photo["holds"], name
            if i == 0:
                assert f"**{ours[number]['text']}: {ours[number]['verdict']}**" in name
                assert photographs[number]["verdict"] in (
                    re.sub(r"\W", "", last.split("<br>")[0]),
                    "not testable",
                )
    assert next(rows, None) is None
