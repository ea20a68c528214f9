r"""How far apart are two networks in one part of a claim? With the verdicts' interval.

    python figures/compare.py figures/sweep "probe: best λ - better" \
      "hybrid, λ = 0.2" "MIM (SimMIM)"

Claims compare roles; this compares any two names of a folder that analyze.py wrote,
the second taken from the first, paired by seed.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import analyze


def compare(folder, part_name, names):
    results, samples = analyze.read_results(Path(folder) / "results.json")
    parts = {p.name: p for f in analyze.FIGURES.values() for p in f.parts}
    analyze.require(part_name in parts, f"parts are {', '.join(parts)}")
    part = parts[part_name]
    groups = [[], []]
    known = set()
    for model, rows in zip(results["models"], samples, strict=True):
        if not analyze.was_measured(part, [{"rows": rows}]):
            continue
        known.add(model["name"])
        for group, name in zip(groups, names, strict=True):
            if model["name"] == name:
                group.append(model | {"rows": rows})
    measured = "; ".join(sorted(known)) or "no network"
    analyze.require(all(groups), f"{part_name} was measured of {measured}")
    numbers = []  # of each name (1 + draws, seeds)
    for group in analyze.paired(groups):
        found = [analyze.numbers_of(part, m["rows"]) for m in group]
        numbers.append(np.stack(found, axis=1))
    for name, values in zip(names, numbers, strict=True):
        print(f"{name}: {values[0].mean():.3f}, seeds {np.round(values[0], 3)}")
    difference = numbers[0] - numbers[1]
    (low, high), kind = analyze.interval_of(difference)
    if "seeds and" in kind:
        kind += f", {difference.shape[1]} seeds"
    print(f"difference {difference[0].mean():.3f} [{low:.3f}, {high:.3f}], {kind}")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    try:
        compare(sys.argv[1], sys.argv[2], sys.argv[3:])
    except (analyze.UserError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        sys.exit(2)
