"""Draws README.md's first pictures:   python figures/first_look.py runs/micro-simmim/ckpt.pt

figures/stimuli.png         every shape in every texture
figures/reconstruction.png  eight test images, what SimMIM sees of them, and what it predicts under the mask
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

here = Path(__file__).parent
sys.path.insert(0, str(here.parent))
import sslvit


def save(fig, name):
    fig.savefig(here / name, dpi=100)
    Image.open(here / name).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, 1).save(
        here / name, optimize=True
    )  # a third of the bytes


def stimuli():
    source = sslvit.Stimuli(64, 64, seed=1)
    fig, axes = plt.subplots(8, 8, figsize=(7.2, 7.5), layout="constrained")
    for shape, row in enumerate(axes):
        for texture, axis in enumerate(row):
            axis.imshow(source.render(8 * shape + texture, shape, texture)[0])
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(source.classes[0][shape], fontsize=11)
    for texture, axis in enumerate(axes[0]):
        axis.set_title(source.classes[1][texture], fontsize=11)
    fig.suptitle("Stimuli: 8 shapes × 8 textures, independent of each other", fontsize=13)
    save(fig, "stimuli.png")


@torch.no_grad()
def reconstruction(path):
    state = sslvit.load_checkpoint(path)
    cfg = sslvit.Config(**state["config"])
    model = sslvit.SSL(cfg).eval()
    model.load_state_dict(state["model"])
    test = sslvit.find_data(cfg)[1]
    crops = [sslvit.cut(test.load(i)[0], cfg.image_size)[0] for i in range(8)]
    images = (torch.from_numpy(np.stack(crops)) / 255 - sslvit.MEAN) / sslvit.STD
    generator, sizes = torch.Generator().manual_seed(0), (cfg.image_size, cfg.patch_size, cfg.mask_unit)
    mask = sslvit.random_mask(8, *sizes, cfg.mask_ratio, generator)[..., None]
    tokens = model.encoder(images, mask[..., 0], mask_token=model.mask_token)
    true, predicted = sslvit.patchify(images, cfg.patch_size), model.decoder(tokens)[:, 1:]
    rows = {
        "image": true,
        "60 % masked": torch.where(mask, 0, true),
        "predicted": torch.where(mask, predicted, true),
    }
    fig, axes = plt.subplots(3, 8, figsize=(10, 4.2), layout="constrained")
    for row, (name, patches) in zip(axes, rows.items()):
        pixels = F.fold(patches.mT, images.shape[2:], cfg.patch_size, stride=cfg.patch_size)
        for axis, image in zip(row, (pixels * sslvit.STD + sslvit.MEAN).clamp(0, 1)):
            axis.imshow(image.permute(1, 2, 0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=12)
    error = sslvit.masked_l1(predicted, true, mask[..., 0])
    fig.suptitle(f"SimMIM fills in what it cannot see (L1 under the mask: {error:.2f} standard deviations)")
    save(fig, "reconstruction.png")


if __name__ == "__main__":
    stimuli()
    for checkpoint in sys.argv[1:]:
        reconstruction(checkpoint)
