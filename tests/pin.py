"""Pins what a training run computes, to the bit:   python tests/pin.py record FILE
                                                    python tests/pin.py check FILE

Twenty steps of each objective, on stimuli and on JPEG files: log and a hash of the
encoder. Bits are those of one processor and one version of torch. `--program PATH` pins
another version of sslvit.py.
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
TIMES = ("images/s", "minutes left")


def write_jpegs(folder):
    """Forty-eight smooth colour pictures of many sizes, in two class folders."""
    rng = np.random.default_rng(0)
    for i in range(48):
        small = rng.integers(256, size=(5, 6, 3), dtype=np.uint8)
        size = (int(rng.integers(40, 200)), int(rng.integers(40, 200)))
        picture = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        target = folder / ("cat", "dog")[i % 2]
        target.mkdir(parents=True, exist_ok=True)
        picture.save(target / f"{i:02}.jpg", quality=90)


def describe(run):
    """A run folder -> its log without times, and a hash of its encoder."""
    lines = (run / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [{name: row[name] for name in row if name not in TIMES} for row in rows]
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
        write_jpegs(folder / "jpeg")
        sources = {"stimuli": [], "jpeg": ["--data", str(folder / "jpeg")]}
        for source, data in sources.items():
            for objective in OBJECTIVES:
                run = folder / f"{source}-{objective}"
                command = [sys.executable, program, "--objective", objective]
                command += [*RUN, *data, "--out", str(run)]
                quiet = {"stdout": subprocess.DEVNULL, "check": True}
                subprocess.run(command, env=environment, **quiet)
                pinned[run.name] = describe(run)
    return pinned


def compare(old, new):
    """Prints each run's first difference; returns True where everything is equal."""
    different = [name for name in new if old[name] != new[name]]
    for name in sorted(set(different) - {"torch", "machine"}):
        print(f"{name}: other bits")
        for a, b in zip(old[name]["log"], new[name]["log"], strict=True):
            if a != b:
                print(f"  was {a}\n  is  {b}")
                break
    is_equal = set(different) <= {"torch", "machine"}
    if is_equal:
        print(f"equal to the bit; recorded with torch {old['torch']}")
    return is_equal


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["record", "check"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--program", default=str(ROOT / "sslvit.py"))
    options = parser.parse_args()
    new = pin(options.program)
    if options.action == "record":
        return not options.file.write_text(json.dumps(new, indent=1) + "\n")
    return not compare(json.loads(options.file.read_text()), new)


if __name__ == "__main__":
    sys.exit(main())
