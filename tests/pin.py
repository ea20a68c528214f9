"""Pins what a training run computes, to the bit:   python tests/pin.py record FILE
                                                    python tests/pin.py check FILE

Twenty steps of each objective, on stimuli and on JPEG files, in fp32 and on one thread.
A run is described by its log (losses, gradient norm, k-NN) and by a hash over the bytes
of the encoder in its checkpoint. `--program PATH` pins another version of sslvit.py, so
that two versions can be compared side by side on one machine.

Bits are those of one processor and one version of torch: `check` names both. What is in
tests/pinned.json was recorded anew when the views' random numbers changed (commit
bbede80); before, it was the first edition's (0795e15).
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
RUN = (
    "--preset micro --steps 20 --batch-size 16 --knn-images 64 --proj-hidden 64 "
    "--dtype fp32 --device cpu --workers 0 --log-every 1 --save-every 10"
).split()
OBJECTIVES = ("moco", "simmim", "hybrid")
TIMES = ("images/s", "stall", "minutes left", "broken")


def write_jpegs(folder):
    """Forty-eight smooth colour pictures of many sizes, in two class folders."""
    rng = np.random.default_rng(0)
    for i in range(48):
        small = rng.integers(256, size=(5, 6, 3), dtype=np.uint8)
        size = (int(rng.integers(40, 200)), int(rng.integers(40, 200)))
        picture = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        target = folder / ("cat", "dog")[i % 2]
        target.mkdir(exist_ok=True)
        picture.save(target / f"{i:02}.jpg", quality=90)


def describe(run):
    """A run folder -> its log without times, and a hash of its encoder."""
    rows = []
    for line in (run / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({name: row[name] for name in row if name not in TIMES})
    state = torch.load(run / "ckpt.pt", weights_only=True)["model"]
    digest = hashlib.sha256()
    for name in sorted(state):
        if name.startswith("encoder."):
            digest.update(name.encode())
            digest.update(state[name].contiguous().numpy().tobytes())
    return {"log": rows, "encoder": digest.hexdigest()}


def pin(program):
    pinned = {"torch": torch.__version__, "machine": platform.machine()}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "jpeg").mkdir()
        write_jpegs(folder / "jpeg")
        sources = {"stimuli": [], "jpeg": ["--data", str(folder / "jpeg")]}
        for source, data in sources.items():
            for objective in OBJECTIVES:
                run = folder / f"{source}-{objective}"
                command = [sys.executable, program, "--objective", objective]
                command += [*RUN, *data, "--out", str(run)]
                subprocess.run(
                    command, env=environment, check=True, stdout=subprocess.DEVNULL
                )
                pinned[run.name] = describe(run)
    return pinned


def compare(old, new):
    """Prints each run's first difference; returns True where everything is equal."""
    equal = True
    for name in new:
        if name in ("torch", "machine"):
            continue
        if old[name] == new[name]:
            print(f"{name}: equal to the bit")
            continue
        equal = False
        pairs = zip(old[name]["log"], new[name]["log"], strict=True)
        different = [(a, b) for a, b in pairs if a != b]
        if different:
            print(f"{name}: differs\n  was {different[0][0]}\n  is  {different[0][1]}")
        else:
            print(f"{name}: the same log, but other bits in the encoder")
    return equal


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["record", "check"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--program", default=str(ROOT / "sslvit.py"))
    options = parser.parse_args()
    new = pin(options.program)
    if options.action == "record":
        options.file.write_text(json.dumps(new, indent=1) + "\n")
        return 0
    old = json.loads(options.file.read_text())
    print(f"recorded with torch {old['torch']}, here {new['torch']}")
    return 0 if compare(old, new) else 1


if __name__ == "__main__":
    sys.exit(main())
