"""Draws the pictures that explain the course before anything is trained:

    python figures/diagrams.py

figures/stimuli.png  every shape in every texture
figures/methods.png  MoCo v3, SimMIM and the hybrid, a strip of 16:9 each: views,
                     encoder, heads, loss

The little pictures are real stimuli; what SimMIM predicts, the shipped network does.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import sslvit

# as in the other figures, where the hybrid has λ = 0.2
CL, MIM, HYBRID = "#D55E00", "#0072B2", "#6E4EB4"
INK, GREY = "#222222", "#777777"

# Text sizes in points, on pictures of 1,600 px at 100 px an inch.
TITLE, TEXT, SMALL = 30, 20, 18

# Where the columns stand, in inches.
PHOTO_X, VIEW_X, ENCODER_X, HEAD_X, LOSS_X = 1.4, 4.2, 7.3, 10.4, 13.9
PHOTO, VIEW = 2.2, 1.8
STRIP = 9  # inches high, 16 wide


def save(figure, name):
    """Writes a PNG of 256 colours: a third of the bytes."""
    figure.savefig(HERE / name, dpi=100)
    picture = Image.open(HERE / name).convert("RGB")
    few = picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
    few.save(HERE / name, optimize=True)


# ==== The stimuli ====


def draw_stimuli():
    source = sslvit.Stimuli(64, 64, seed=1)
    shapes, textures = source.classes
    figure, axes = plt.subplots(8, 8, figsize=(7.2, 7.5), layout="constrained")
    for row, shape in enumerate(shapes):
        for column, texture in enumerate(textures):
            image, _ = source.render(8 * row + column, row, column)
            axis = axes[row, column]
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(texture, fontsize=12)
            if column == 0:
                axis.set_ylabel(shape, fontsize=12)
    title = (
        "Stimuli: 8 shapes × 8 textures, independent of each other (networks see 32 px)"
    )
    figure.suptitle(title, fontsize=12)
    # all colours: with fewer the smooth grey would have steps
    figure.savefig(HERE / "stimuli.png", dpi=150)


# ==== What the networks see ====


def stimulus():
    """One object in 96 px: a star with zigzags, as a PIL image."""
    source = sslvit.Stimuli(64, 96, seed=1)
    shapes, textures = source.classes
    image, _ = source.render(22, shapes.index("star"), textures.index("zigzag"))
    return Image.fromarray(image)


def contrastive_views(photo):
    """Two views as MoCo v3 makes them: crop, flip, colour, blur, solarise."""
    first = photo.crop((4, 2, 74, 72)).resize((96, 96))
    first = ImageEnhance.Color(first).enhance(1.6)
    first = first.filter(ImageFilter.GaussianBlur(1.5))
    second = ImageOps.mirror(photo.crop((22, 20, 92, 90))).resize((96, 96))
    second = ImageOps.solarize(second, 150)
    return first, second


@torch.no_grad()
def masked_view(photo, patch_size=12):
    """The image without 60 % of its patches; in these, what a network predicts."""
    state = sslvit.load_checkpoint(HERE / "checkpoints" / "micro-simmim.pt")
    cfg = sslvit.Config(**state["config"])
    model = sslvit.SSL(cfg)
    model.load_state_dict(state["model"])
    generator = torch.Generator().manual_seed(3)
    mask = sslvit.draw_masks(1, cfg, generator)
    small = np.array(photo.resize((cfg.image_size, cfg.image_size)))
    view = (torch.from_numpy(small).permute(2, 0, 1) / 255 - sslvit.MEAN) / sslvit.STD
    tokens = model.encoder(view[None], mask, mask_token=model.mask_token)
    side = model.encoder.grid
    patches = model.decoder(tokens)[:, 1:].mT.unflatten(-1, (side, side))
    image = F.pixel_shuffle(patches, cfg.patch_size)[0]
    image = 255 * (image * sslvit.STD + sslvit.MEAN).clamp(0, 1)
    image = Image.fromarray(image.permute(1, 2, 0).byte().numpy())
    hidden = mask.view(side, side).numpy()
    hidden = hidden.repeat(patch_size, axis=0).repeat(patch_size, axis=1)
    pixels = np.array(photo)
    masked = np.where(hidden[..., None], 225, pixels).astype(np.uint8)
    # Thin lines between patches, so that neighbours are told apart.
    masked[::patch_size] = 255
    masked[:, ::patch_size] = 255
    return masked, np.where(hidden[..., None], image.resize(photo.size), pixels)


# ==== The parts of a diagram ====


def put_picture(axis, image, x, y, size, label="", colour=INK):
    half = size / 2
    extent = (x - half, x + half, y - half, y + half)
    axis.imshow(image, extent=extent, zorder=2)
    axis.plot(
        [x - half, x + half, x + half, x - half, x - half],
        [y - half, y - half, y + half, y + half, y - half],
        color=colour,
        linewidth=2,
        zorder=3,
    )
    axis.text(x, y - half - 0.1, label, fontsize=SMALL, ha="center", va="top")


def put_box(axis, text, x, y, width, height, colour, filled=True):
    """A part with parameters; filled: learns by gradient, outlined: does not."""
    box = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.15",
        facecolor=colour if filled else "white",
        edgecolor=colour,
        linewidth=2.5,
        linestyle="-" if filled else "--",
        zorder=2,
    )
    axis.add_patch(box)
    ink = "white" if filled else colour
    axis.text(x, y, text, color=ink, fontsize=TEXT, ha="center", va="center", zorder=3)


def put_arrow(axis, start, end, colour=INK, style="-"):
    arrow = {"arrowstyle": "-|>,head_width=0.35,head_length=0.6", "color": colour}
    arrow.update(linewidth=2.2, linestyle=style, shrinkA=0, shrinkB=0)
    axis.annotate("", xy=end, xytext=start, arrowprops=arrow, zorder=1)


def put_pairs(axis, x, y, size):
    """All queries against all keys of a batch: only the diagonal belongs together."""
    count = 5
    shades = np.full((count, count, 3), 0.88)
    shades[np.arange(count), np.arange(count)] = matplotlib.colors.to_rgb(CL)
    put_picture(axis, shades, x, y, size, colour="white")
    for line in np.linspace(-size / 2, size / 2, count + 1):
        axis.plot([x - size / 2, x + size / 2], [y + line, y + line], "w", zorder=4)
        axis.plot([x + line, x + line], [y - size / 2, y + size / 2], "w", zorder=4)
    axis.text(x, y + size / 2 + 0.05, "keys", fontsize=SMALL, ha="center", va="bottom")
    side = x - size / 2 - 0.05
    turned = {"rotation": 90, "ha": "right", "va": "center"}
    axis.text(side, y, "queries", fontsize=SMALL, **turned)


def put_title(axis, name, question, y, colour):
    axis.text(0.3, y, name, fontsize=TITLE, color=colour, weight="bold", va="center")
    axis.text(3.4, y, question, fontsize=TITLE, color=INK, va="center")


def put_loss(axis, text, y, colour):
    style = {"color": colour, "weight": "bold", "ha": "center", "va": "top"}
    axis.text(LOSS_X, y, text, fontsize=TEXT, **style)


# ==== The three methods ====


def draw_branches(axis, photo, query_y, key_y, colour):
    """The two branches of MoCo v3, without the encoder that learns."""
    first, second = contrastive_views(photo)
    put_picture(axis, first, VIEW_X, query_y, VIEW, "view 1", CL)
    put_arrow(axis, (VIEW_X + 0.95, query_y), (ENCODER_X - 1.25, query_y))
    put_arrow(axis, (ENCODER_X + 1.2, query_y), (HEAD_X - 1.25, query_y))
    put_box(axis, "projector,\npredictor", HEAD_X, query_y, 2.4, 1.2, CL)

    put_picture(axis, second, VIEW_X, key_y, VIEW, "view 2", CL)
    put_arrow(axis, (VIEW_X + 0.95, key_y), (ENCODER_X - 1.25, key_y))
    put_box(axis, "momentum\nencoder", ENCODER_X, key_y, 2.4, 1.2, colour, filled=False)
    put_arrow(axis, (ENCODER_X + 1.2, key_y), (HEAD_X - 1.25, key_y))
    put_box(axis, "projector", HEAD_X, key_y, 2.4, 1.2, CL, filled=False)

    # The lower branch follows the upper one as a moving average.
    for x, shade in ((ENCODER_X, colour), (HEAD_X, CL)):
        put_arrow(axis, (x, query_y - 0.6), (x, key_y + 0.65), shade, style="--")
    middle = (query_y + key_y) / 2
    note = "slow average,\nno gradient"
    axis.text(ENCODER_X + 0.2, middle, note, fontsize=SMALL, va="center")

    put_pairs(axis, LOSS_X, middle + 0.25, 1.8)
    put_arrow(axis, (HEAD_X + 1.2, query_y), (LOSS_X - 1.4, middle + 0.6))
    put_arrow(axis, (HEAD_X + 1.2, key_y), (LOSS_X - 0.4, middle - 0.7))
    axis.text(HEAD_X + 1.9, query_y, "query", fontsize=SMALL, ha="center")
    axis.text(HEAD_X + 1.6, key_y, "key", fontsize=SMALL, ha="center", va="top")


def draw_moco(axis, photo, top):
    query_y, key_y = top - 3.0, top - 6.6
    middle = (query_y + key_y) / 2
    put_title(axis, "MoCo v3", "which two views come from one image?", top - 0.7, CL)
    put_picture(axis, photo, PHOTO_X, middle, PHOTO, "image")
    for y in (query_y, key_y):
        put_arrow(axis, (PHOTO_X + 1.15, middle), (VIEW_X - 0.95, y))
    draw_branches(axis, photo, query_y, key_y, CL)
    put_box(axis, "ViT encoder", ENCODER_X, query_y, 2.4, 1.2, CL)
    loss = "InfoNCE: each query\nfinds its own key,\nboth ways"
    put_loss(axis, loss, key_y - 0.35, CL)


def draw_prediction(axis, photo, y):
    """The masked view, and at the other end the picture that the pixel head makes."""
    masked, guessed = masked_view(photo)
    put_picture(axis, masked, VIEW_X, y, VIEW, "60 % mask tokens", MIM)
    put_arrow(axis, (VIEW_X + 0.95, y), (ENCODER_X - 1.25, y))
    put_arrow(axis, (ENCODER_X + 1.2, y), (HEAD_X - 1.25, y))
    put_box(axis, "pixel head\n(one layer)", HEAD_X, y, 2.4, 1.2, MIM)
    put_arrow(axis, (HEAD_X + 1.2, y), (LOSS_X - 2.0, y))
    put_picture(axis, guessed, LOSS_X - 1.05, y, VIEW, "predicted under mask", MIM)
    axis.text(LOSS_X + 0.05, y, "−", fontsize=TITLE, ha="center", va="center")
    put_picture(axis, photo, LOSS_X + 1.15, y, VIEW, "image")


def draw_simmim(axis, photo, top):
    y = top - 4.6
    put_title(axis, "SimMIM", "what was under the mask?", top - 0.7, MIM)
    put_picture(axis, photo, PHOTO_X, y, PHOTO, "image")
    put_arrow(axis, (PHOTO_X + 1.15, y), (VIEW_X - 0.95, y))
    draw_prediction(axis, photo, y)
    put_box(axis, "ViT encoder", ENCODER_X, y, 2.4, 1.2, MIM)
    put_loss(axis, "L1: how far off are\nthe hidden pixels?", y - 1.45, MIM)


def draw_hybrid(axis, photo, top):
    masked_y, query_y, key_y = top - 2.4, top - 5.0, top - 7.6
    put_title(axis, "Hybrid", "both questions to one encoder", top - 0.7, HYBRID)
    put_picture(axis, photo, PHOTO_X, query_y, PHOTO, "image")
    for y in (masked_y, query_y, key_y):
        put_arrow(axis, (PHOTO_X + 1.15, query_y), (VIEW_X - 0.95, y))
    draw_prediction(axis, photo, masked_y)
    draw_branches(axis, photo, query_y, key_y, HYBRID)
    middle = (masked_y + query_y) / 2
    height = masked_y - query_y + 1.2
    put_box(axis, "one ViT\nencoder", ENCODER_X, middle, 2.4, height, HYBRID)
    put_loss(axis, "(1 − λ) · L1", masked_y - 1.45, MIM)
    axis.text(LOSS_X, middle - 0.72, "+", fontsize=TITLE, ha="center", va="center")
    loss = "λ · InfoNCE,\nboth ways"
    put_loss(axis, loss, key_y - 0.35, CL)


def draw_methods():
    total = 3 * STRIP
    figure = plt.figure(figsize=(16.3, total))
    axis = figure.add_axes((0, 0, 1, 1))
    photo = stimulus()
    draw_moco(axis, photo, total)
    draw_simmim(axis, photo, total - STRIP)
    draw_hybrid(axis, photo, STRIP)
    for line in (STRIP, 2 * STRIP):
        axis.plot([0.3, 16], [line, line], color="#cccccc", linewidth=1.5)
    axis.set(xlim=(0, 16.3), ylim=(0, total), aspect="equal")
    axis.axis("off")
    save(figure, "methods.png")


if __name__ == "__main__":
    draw_stimuli()
    draw_methods()
