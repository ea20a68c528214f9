"""Draws the whole comparison as one picture, from numbers that analyze.py wrote:

    python figures/poster.py figures/{stimuli,photographs}/results.json

Four columns: how far tokens look, whether it matters which token asks, which
frequencies stay, what a linear probe reads from each layer. A row for each
results.json. Axes are drawn by analyze.py; below each question stand the first part of
its claim, with its numbers, and the verdict on all parts: where the data disagree with
the paper, so does the poster.
"""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import analyze

# Text sizes in points on a picture 20 inches wide; half that size is still legible.
TITLE, TEXT, SMALL = 22, 15, 15


ROLES = ("CL", "MIM", analyze.HYBRID, "untrained")
# name in analyze.FIGURES, question, what draws it on an axis
COLUMNS = (
    (
        "distance",
        "How far does a token look?\nDotted: everywhere alike",
        analyze.plot_distance,
    ),
    ("nmi", "Does it matter who asks?\nGrey was there first", analyze.plot_nmi),
    (
        "fourier",
        "Does detail survive?\nHalf layers: after attention",
        analyze.plot_high_frequencies,
    ),
    (
        "layers",
        "What can be read out?\nA linear probe of each layer",
        analyze.plot_layers,
    ),
)


def finding(name, claims):
    """The first part of the figure in numbers, whether it holds, and its claim."""
    for claim in claims:
        for row in claim["parts"]:
            if row["figure"] == name and "values" in row:
                values = [f"{role} {x:.3g}" for role, x in row["values"].items()]
                verdict = f"claim {claim['claim']}, all parts: {claim['verdict']}"
                part = f"{row['part']} ({row['outcome']}):\n{', '.join(values)}"
                return f"{part}\n{verdict}"
    return ""


def draw_row(row, path):
    """A row of axes -> {name: line} for the legend."""
    results, networks = analyze.read_results([path])
    networks = [n for n in networks if n.role in ROLES]
    name = "photographs (32 px)"
    if len(networks[0].label_names) > 1:
        name = "stimuli"
    row.suptitle(
        f"What CL and MIM learnt: {name}",
        fontsize=TITLE,
        weight="bold",
        x=0.01,
        ha="left",
    )
    claims = analyze.judge(networks, [column[0] for column in COLUMNS])
    roles = {network.name: network.role for network in networks}
    lines = {}
    for axis, (figure, question, plot) in zip(
        row.subplots(1, len(COLUMNS)), COLUMNS, strict=True
    ):
        plot(axis, networks)
        for line in axis.lines:
            line.set_linewidth(2 * line.get_linewidth())
        title = f"{question}\n{finding(figure, claims)}"
        axis.set_title(title, fontsize=TEXT, loc="left")
        axis.set_xlabel("layer", fontsize=SMALL)
        axis.set_ylabel(axis.get_ylabel(), fontsize=SMALL)
        axis.tick_params(labelsize=SMALL)
        handles, labels = axis.get_legend_handles_labels()
        dotted = "uniform attention; one map for all queries"
        labels = [roles.get(label, dotted) for label in labels]
        lines |= dict(zip(labels, handles, strict=True))
    return lines


def draw_poster(paths):
    heights = [6.1] * len(paths) + [0.9]
    figure = plt.figure(figsize=(20, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(heights), 1, height_ratios=heights)
    lines = {}
    for row, path in zip(rows[:-1], paths, strict=True):
        lines |= draw_row(row, path)
    style = {"loc": "center", "ncols": 5, "fontsize": SMALL, "frameon": False}
    rows[-1].legend(lines.values(), lines.keys(), **style)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", help="results.json, a row for each")
    parser.add_argument("--out", default="figures/poster.png")
    options = parser.parse_args()
    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        draw_poster(options.results).savefig(options.out, dpi=100)
    # 256 colours, a third of the bytes
    picture = Image.open(options.out).convert("RGB")
    picture.quantize(dither=Image.Dither.NONE).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
