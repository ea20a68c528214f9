"""200 random command lines.

Whatever is typed, both programs end with status 0 or 2 and one clear line, never with a
traceback.
"""

import random
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import analyze
import sslvit

VALUES = (
    "0 1 2 -1 0.5 1e9 nan inf x é -- = 8 16 32 hybrid simmim moco fp32 bf16 cpu yes "
    "../../ /dev/null"
).split()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name in sslvit.SIZES:
        tiny = {"embed_dim": 24, "depth": 2, "num_heads": 3}
        monkeypatch.setitem(sslvit.SIZES, name, tiny)


def check(program, words, capfd):
    status = program.main(words)
    out, err = capfd.readouterr()
    assert status in (0, 2), (words, out, err)
    assert "Traceback" not in err, (words, err)
    if status == 2:
        assert len(err.strip().splitlines()) == 1, (words, err)
    return status


def flags_of(program, capfd):
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    return re.findall(r"^  (--[a-z-]+)", capfd.readouterr().out, re.M)


def test_sslvit(tmp_path, capfd):
    rng = random.Random(0)
    flags = flags_of(sslvit, capfd)
    assert len(flags) > 35
    slow = {"--steps", "--epochs", "--compile", "--workers", "--out", "--knn-images"}
    slow |= {"--accum", "--device"}
    quick = [flag for flag in flags if flag not in slow]
    cheap = (
        "--overwrite --steps 1 --batch-size 4 --knn-images 8 --workers 0 --device cpu "
        f"--proj-hidden 8 --out {tmp_path}/run"
    ).split()
    seen = []
    for _ in range(140):
        words = []
        for flag in rng.sample(quick, rng.choice([0, 1, 1, 1, 2])):
            values = rng.sample(VALUES, rng.choice([0, 1, 1, 1, 1, 2]))
            words += [flag, *values]
        size = ["--image-size", "16"]
        if "--image-size" in words or "--preset" in words:
            size = []
        seen.append(check(sslvit, [*cheap, *size, *words], capfd))
    assert seen.count(0) > 10
    assert seen.count(2) > 60


def test_analyze(tmp_path, capfd):
    rng = random.Random(1)
    run = str(tmp_path / "run")
    cheap = (
        "--steps 1 --batch-size 4 --knn-images 0 --image-size 16 --device cpu "
        "--proj-hidden 8"
    ).split()
    assert sslvit.main([*cheap, "--out", run]) == 0
    flags = flags_of(analyze, capfd)
    pool = [*VALUES, run, f"{run}/ckpt.pt", f"cl={run}/ckpt.pt", "distance", "nmi"]
    pool += [__file__, "results.json"]
    last = ["--only", "distance", "--images", "20", "--out", str(tmp_path / "figures")]
    seen = []
    for _ in range(60):
        words = rng.sample(pool, rng.choice([0, 1, 1, 2]))
        words += [f"{run}/ckpt.pt"] * rng.choice([0, 1])
        for flag in rng.sample(flags, rng.choice([0, 0, 1, 2])):
            words += [flag, *rng.sample(pool, rng.choice([0, 1, 1, 2]))]
        seen.append(check(analyze, [*words, *last], capfd))
    assert seen.count(0) > 2
    assert seen.count(2) > 30
