"""Draws the whole comparison as one picture, from numbers that analyze.py wrote:

    python figures/poster.py figures/results.json figures/cifar10/results.json

Four columns: how far tokens look, whether it matters who looks, which frequencies stay,
what a linear probe reads from each layer. A row for each results.json. The headings
are computed from the numbers: where the data disagree with the paper, so do they.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.ticker
import numpy as np
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import analyze  # noqa: E402

# Text sizes in points on a picture 20 inches wide; half that size is still legible.
TITLE, TEXT, SMALL = 22, 18, 16


# ==== Numbers ====


def groups_of(models):
    """{role: its seeds}: equal shapes, no decoder, one λ for the hybrid."""
    groups = analyze.groups_of([model | {"rows": {}} for model in models])
    return {role: groups[role] for role in analyze.ROLES if role in groups}


def curves_of(seeds, key):
    """The values of `key` for every seed -> (seeds, x), heads averaged."""
    curves = []
    for model in seeds:
        if key not in model["values"]:
            continue
        curve = np.array(model["values"][key], dtype=float)
        if key == "fourier":  # (L, 2, F): at π, after each attention and each MLP
            curve = curve[:, :, -1].flatten()
        elif curve.ndim == 2:
            curve = curve.mean(axis=1)
        curves.append(curve)
    return np.array(curves)


def thirds(curves):
    """Mean over seeds of the first and of the last third of the layers."""
    count = -(-curves.shape[1] // 3)
    return curves[:, :count].mean(), curves[:, -count:].mean()


# ==== Findings: a heading from the curves of CL and MIM ====


def leader(cl, mim):
    return "CL" if cl > mim else "MIM"


def find_distance(cl, mim):
    gap = cl.mean() - mim.mean()
    return f"{leader(gap, 0)} looks {abs(gap):.1f} px farther"


def find_nmi(cl, mim):
    late_cl, late_mim = thirds(cl)[1], thirds(mim)[1]
    if late_cl < late_mim / 2:
        return "CL ends in one map for all"
    if late_mim < late_cl / 2:
        return "MIM ends in one map for all"
    return f"In the end CL {late_cl:.2f}, MIM {late_mim:.2f}"


def find_frequency(cl, mim):
    late_cl, late_mim = thirds(cl)[1], thirds(mim)[1]
    return f"{leader(late_cl, late_mim)} keeps more of the detail"


def ahead(cl, mim):
    """Who is better by more than seeds scatter (95 %): seeds (S,) of both, in order."""
    difference = cl - mim
    seeds = len(difference)
    if seeds > 1:
        reach = analyze.t_quantile(seeds - 1) * difference.std(ddof=1) / seeds**0.5
        if abs(difference.mean()) <= reach:
            return "nobody"
    return leader(difference.mean(), 0)


def find_layers(cl, mim):
    seeds = min(len(cl), len(mim))
    cl, mim = cl[:seeds], mim[:seeds]
    count = -(-cl.shape[1] // 3)
    early = ahead(cl[:, :count].mean(axis=1), mim[:, :count].mean(axis=1))
    last = ahead(cl[:, -1], mim[:, -1])
    if early == last == "nobody":
        return "Nobody leads"
    if early == last:
        return f"{early} leads early and late"
    return f"Early {early} leads, late {last}"


# key in results.json, what it asks, axis, heading
COLUMNS = (
    (
        "distance",
        "How far does a token look?",
        "attention distance (px)",
        find_distance,
    ),
    ("nmi", "Does it matter who looks?", "NMI of attention", find_nmi),
    ("fourier", "Does detail survive?", "Δ log amplitude at π", find_frequency),
    ("layers", "What can be read out?", "linear probe accuracy", find_layers),
)


# ==== Drawing ====


def draw_curves(axis, groups, key):
    for role, seeds in groups.items():
        curves = curves_of(seeds, key)
        if len(curves) == 0:
            continue
        colour = analyze.colour_of(seeds[0])
        x = np.arange(1, curves.shape[1] + 1) * seeds[0]["depth"] / curves.shape[1]
        style = "-"
        if role == "untrained":
            style = "--"
        elif len(curves) > 1:
            axis.plot(x, curves.T, color=colour, linewidth=1, alpha=0.45)
        axis.plot(x, curves.mean(axis=0), style, color=colour, linewidth=4)
        classes = seeds[0]["classes"]
    if key == "layers" and axis.lines:
        chance = np.mean([1 / count for count in classes])
        axis.axhline(chance, color="black", linewidth=1.5, linestyle=":")
        style = {"fontsize": SMALL, "ha": "right", "va": "bottom"}
        axis.text(0.98, chance, "chance", transform=axis.get_yaxis_transform(), **style)
    if key in ("distance", "nmi"):
        axis.set_ylim(bottom=0)


def draw_panel(axis, groups, column):
    key, question, ylabel, find = column
    draw_curves(axis, groups, key)
    axis.set_title(question, fontsize=TEXT, loc="left", pad=36)
    cl, mim = [curves_of(groups.get(role, []), key) for role in ("CL", "MIM")]
    if len(cl) > 0 and len(mim) > 0:
        style = {"fontsize": TEXT, "weight": "bold", "transform": axis.transAxes}
        axis.text(0, 1.04, find(cl, mim), **style)
    axis.set_ylabel(ylabel, fontsize=SMALL)
    axis.set_xlabel("layer", fontsize=SMALL)
    axis.tick_params(labelsize=SMALL)
    axis.locator_params(axis="y", nbins=5)
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    axis.spines[["top", "right"]].set_visible(False)


def draw_legend(figure, groups):
    handles = []
    for role, seeds in groups.items():
        style = "-"
        if role == "untrained":
            style = "--"
        line = plt.Line2D([], [], color=analyze.colour_of(seeds[0]), linestyle=style)
        line.set(linewidth=4, label=seeds[0]["name"])
        handles.append(line)
    if any(len(seeds) > 1 for seeds in groups.values()):
        handles.append(plt.Line2D([], [], color="grey", linewidth=1, label="one seed"))
    figure.legend(
        handles=handles,
        loc="center",
        ncols=len(handles),
        fontsize=TEXT,
        frameon=False,
    )


def row_title(results, groups):
    folder = results["settings"]["data"]
    name = "stimuli"
    if folder:
        name = f"photographs, {Path(folder).name}"
    seeds = [len(groups[role]) for role in ("CL", "MIM") if role in groups]
    return f"{name} ({analyze.count_seeds(max(seeds, default=0))})"


def draw_poster(paths):
    heights = [5.8] * len(paths) + [0.7]
    figure = plt.figure(figsize=(20, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(heights), 1, height_ratios=heights)
    for row, path in zip(rows[:-1], paths, strict=True):
        results = json.loads(Path(path).read_text())
        groups = groups_of(results["models"])
        title = row_title(results, groups)
        row.suptitle(title, fontsize=TITLE, weight="bold", x=0.01, ha="left")
        for axis, column in zip(row.subplots(1, len(COLUMNS)), COLUMNS, strict=True):
            draw_panel(axis, groups, column)
    draw_legend(rows[-1], groups)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", help="results.json, a row for each")
    parser.add_argument("--out", default="figures/poster.png")
    options = parser.parse_args()
    figure = draw_poster(options.results)
    figure.savefig(options.out, dpi=100)
    picture = Image.open(options.out).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1).save(options.out)


if __name__ == "__main__":
    main()
