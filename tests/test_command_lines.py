"""Whatever is typed, both programs end with status 0, or 2 and one clear line."""

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
    "../../ /dev/null distance nmi results.json"
).split()
CHEAP = (
    "--overwrite --steps 1 --batch-size 4 --knn-images 8 --workers 0 --device cpu "
    "--proj-hidden 8 --image-size 16 --out"
).split()
SLOW = "--steps --epochs --compile --workers --out --knn-images --accum --device"


@pytest.mark.parametrize("program,lines", [(sslvit, 40), (analyze, 20)])
def test_random_words_are_no_traceback(program, lines, tmp_path, capfd, monkeypatch):
    tiny = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    monkeypatch.setattr(sslvit, "SIZES", dict.fromkeys(sslvit.SIZES, tiny))
    rng = random.Random(0)
    run = str(tmp_path / "run")
    assert sslvit.main([*CHEAP, run]) == 0
    first, last = [*CHEAP, run], []
    if program is analyze:
        first = [f"{run}/ckpt.pt"]
        last = ["--only", "distance", "--images", "20", "--out", f"{run}/x"]
    capfd.readouterr()
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    flags = set(re.findall(r"^  (--[a-z-]+)", capfd.readouterr().out, re.M))
    flags = sorted(flags - set(SLOW.split() if program is sslvit else []))
    assert len(flags) > 8
    statuses = []
    for _ in range(lines):
        words = []
        for flag in rng.sample(flags, rng.choice([0, 1, 1, 1, 2])):
            words += [flag, *rng.sample(VALUES, rng.choice([0, 1, 1, 1, 1, 2]))]
        try:
            statuses.append(program.main([*first, *words, *last]))
        except SystemExit as end:  # argparse's, after the usage
            statuses.append(end.code)
        err = capfd.readouterr().err
        assert statuses[-1] in (0, 2), (words, err)
        assert "Traceback" not in err, (words, err)
        assert statuses[-1] == 0 or err.count(".py: ") == 1, (words, err)
    assert {0, 2} == set(statuses)
