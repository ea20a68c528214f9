"""200 random command lines: whatever is typed, both programs end with status 0 or 2 and one clear line, never a traceback."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import analyze
import sslvit

VALUES = (
    "0 1 2 -1 0.5 1e9 nan inf x é -- = 8 16 32 hybrid simmim moco fp32 bf16 cpu yes ../../ /dev/null".split()
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name in sslvit.SIZES:
        monkeypatch.setitem(sslvit.SIZES, name, dict(width=24, depth=2, heads=3))


def check(program, words, capfd):
    status = program.main(words)
    out, err = capfd.readouterr()
    assert status in (0, 2), (words, out, err)
    assert "Traceback" not in err and (status == 0 or len(err.strip().splitlines()) == 1), (words, err)
    return status


def test_sslvit(tmp_path, capfd):
    rng, seen = random.Random(0), []
    flags = re.findall(r"^  (--[a-z-]+)", help_of(sslvit, capfd), re.M)
    assert len(flags) > 35
    slow = {"--steps", "--epochs", "--compile", "--workers", "--out", "--knn-images", "--accum", "--device"}
    cheap = f"--overwrite --steps 1 --batch-size 4 --knn-images 8 --workers 0 --device cpu --proj-hidden 8 --out {tmp_path}/run".split()
    for _ in range(140):
        words = []
        for flag in rng.sample([flag for flag in flags if flag not in slow], rng.choice([0, 1, 1, 1, 2])):
            words += [flag, *rng.sample(VALUES, rng.choice([0, 1, 1, 1, 1, 2]))]
        size = [] if "--image-size" in words or "--preset" in words else ["--image-size", "16"]
        seen.append(check(sslvit, [*cheap, *size, *words], capfd))
    assert seen.count(0) > 10 and seen.count(2) > 60


def help_of(program, capfd):
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    return capfd.readouterr().out


def test_analyze(tmp_path, capfd):
    rng, seen, run = random.Random(1), [], str(tmp_path / "run")
    cheap = "--steps 1 --batch-size 4 --knn-images 0 --image-size 16 --device cpu --proj-hidden 8".split()
    assert sslvit.main([*cheap, "--out", run]) == 0
    flags = re.findall(r"^  (--[a-z-]+)", help_of(analyze, capfd), re.M)
    pool = [*VALUES, run, f"{run}/ckpt.pt", f"cl={run}/ckpt.pt", "distance", "nmi", __file__, "results.json"]
    last = ["--only", "distance", "--images", "20", "--out", str(tmp_path / "figures")]
    for _ in range(60):
        words = rng.sample(pool, rng.choice([0, 1, 1, 2])) + [f"{run}/ckpt.pt"] * rng.choice([0, 1])
        for flag in rng.sample(flags, rng.choice([0, 0, 1, 2])):
            words += [flag, *rng.sample(pool, rng.choice([0, 1, 1, 2]))]
        seen.append(check(analyze, [*words, *last], capfd))
    assert seen.count(0) > 2 and seen.count(2) > 30


def test_the_first_pictures(tmp_path):
    """README's `python figures/first_look.py CHECKPOINT`, on a copy of its folder so that nothing is overwritten."""
    root, run = Path(__file__).resolve().parents[1], str(tmp_path / "run")
    (tmp_path / "figures").mkdir()
    for name in ("sslvit.py", "figures/first_look.py"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    assert (
        sslvit.main(
            [
                "--objective",
                "simmim",
                "--model",
                "tiny",
                *"--steps 1 --batch-size 4 --knn-images 0 --device cpu".split(),
                "--out",
                run,
            ]
        )
        == 0
    )
    code = (
        "import sys; sys.path.insert(0, '.'); import sslvit; sslvit.SIZES['tiny'] = dict(width=24, depth=2, heads=3); "
        "sys.argv = ['first_look.py', sys.argv[1]]; import runpy; runpy.run_path('figures/first_look.py', run_name='__main__')"
    )
    subprocess.run([sys.executable, "-c", code, f"{run}/ckpt.pt"], cwd=tmp_path, check=True)
    assert {path.name for path in (tmp_path / "figures").glob("*.png")} == {
        "stimuli.png",
        "reconstruction.png",
    }
