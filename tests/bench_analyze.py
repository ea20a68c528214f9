"""How fast are the training-free metrics?  python tests/bench_analyze.py [images] prints a table.

Seconds per 1,000 images of a ViT-B/16 at 224 px: one plain forward pass, collect() with every metric, and the
same numbers by plain NumPy, one image at a time from the same recorded tensors.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import analyze  # noqa: E402
import sslvit  # noqa: E402


def numpy_metrics(records, vit, grid, patch):
    """The formulas as one would write them down, for the batch's images one after the other."""
    y, x = np.divmod(np.arange(grid * grid), grid)
    far = patch * np.hypot(y[:, None] - y, x[:, None] - x)
    for b in range(len(records[0].mid)):
        before = None
        for block, record in zip(vit.blocks, records):
            attn = record.attn[b, :, 1:, 1:].numpy()
            attn = attn / attn.sum(-1, keepdims=True)
            p = attn.mean(1, keepdims=True)
            (attn * far).sum(-1).mean(-1)
            information = (attn * np.log(np.maximum(attn, 1e-30) / p)).sum(-1).mean(-1)
            information / np.sqrt(np.log(grid * grid) * -(p * np.log(p)).sum((1, 2)))
            heads = record.heads[b, :, 1:].numpy()
            unit = heads / np.linalg.norm(heads, axis=-1, keepdims=True)
            np.einsum("hnd,gnd->hg", unit, unit)
            written = block.attn["proj"](record.heads[b].transpose(0, 1).flatten(1))[1:].numpy()
            unit = written / np.linalg.norm(written, axis=-1, keepdims=True)
            (unit @ unit.T).mean()
            if before is not None:
                (unit * before).sum(-1).mean()
            before = unit
            for state in (record.mid, record.out):
                tokens = state[b, 1:].numpy()
                np.linalg.svd(tokens - tokens.mean(0), compute_uv=False)
                np.log(np.abs(np.fft.fft2(tokens.reshape(grid, grid, -1), axes=(0, 1)))).mean(-1).diagonal()


@torch.no_grad()
def bench_analyze(images=16, size=224, patch=16, model="base", device="cpu"):
    """Prints the table and returns {row: seconds per 1,000 images}."""
    torch.manual_seed(0)
    vit = sslvit.ViT(size, patch, **sslvit.SIZES[model]).eval().to(device)
    batches = [torch.randint(256, (4, 3, size, size), dtype=torch.uint8)] * (images // 4)

    def seconds(work):
        work(batches[:1])  # warm up
        began = time.perf_counter()
        work(batches)
        return (time.perf_counter() - began) * 1000 / images

    def forward(batches):
        return [vit(analyze.normalise(x, device)).sum().item() for x in batches]

    def plain(batches):
        for x in batches:
            records = vit(analyze.normalise(x, device), record=True)[1]
            numpy_metrics([type(r)(*(t.cpu() for t in r)) for r in records], vit.cpu(), size // patch, patch)
            vit.to(device)

    work = {"one plain forward pass": forward, "collect(), every metric": lambda b: analyze.collect(vit, b)}
    rows = {name: seconds(f) for name, f in (work | {"plain NumPy, per image": plain}).items()}
    print(f"ViT-{model}/{patch}, {size} px, {device}, {torch.get_num_threads()} threads, {images} images")
    for name, value in rows.items():
        print(f"{name:26} {value:9.1f} s per 1,000 images   {value / rows['one plain forward pass']:5.2f} x")
    return rows


if __name__ == "__main__":
    bench_analyze(*map(int, sys.argv[1:2]), device="cuda" if torch.cuda.is_available() else "cpu")
