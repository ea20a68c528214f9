"""CIFAR-10's official archive becomes class folders of PNG files.

    python figures/cifar10.py cifar-10-binary.tar.gz cifar10

The archive is at https://www.cs.toronto.edu/~kriz/cifar.html ('binary version'). The
folder then holds train/<class>/ and test/<class>/, as --data of both programs wants.
"""

import argparse
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE = 1 + 3 * 32 * 32  # bytes: the class, then red, green and blue row by row


def unpack(archive, folder):
    """-> number of images written."""
    with tarfile.open(archive) as tar:
        members = {Path(member.name).name: member for member in tar.getmembers()}
        names = tar.extractfile(members["batches.meta.txt"]).read().decode().split()
        written = 0
        for file in sorted(members):
            if not file.endswith(".bin"):
                continue
            split = "test" if file.startswith("test") else "train"
            rows = np.frombuffer(tar.extractfile(members[file]).read(), np.uint8)
            for n, row in enumerate(rows.reshape(-1, IMAGE)):
                target = folder / split / names[row[0]]
                target.mkdir(parents=True, exist_ok=True)
                pixels = row[1:].reshape(3, 32, 32).transpose(1, 2, 0)
                Image.fromarray(pixels).save(target / f"{file[:-4]}_{n:05}.png")
                written += 1
    return written


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.folder.exists():
        print(f"{options.folder} exists: nothing was written", file=sys.stderr)
        return 2
    try:
        print(unpack(options.archive, options.folder), "images")
    except (OSError, KeyError, tarfile.TarError) as error:
        message = f"{options.archive}: not the binary version of CIFAR-10 ({error})"
        print(message, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
