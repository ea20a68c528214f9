"""Makes a network small enough to ship: encoder and pixel head, in half precision.

    python figures/ship.py runs/micro-moco/ckpt.pt figures/checkpoints/micro-moco.pt

What only training needs (optimiser, momentum encoder, contrastive heads) is left out.
analyze.py takes the result like any checkpoint, and networks in figures/checkpoints as
companions for somebody else's.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sslvit

KEPT = ("encoder.", "mask_token", "decoder.")


def ship(source, target):
    state = sslvit.load_checkpoint(source)
    model = {}
    for name, tensor in state["model"].items():
        if name.startswith(KEPT):
            model[name] = tensor.half()
    small = {"config": state["config"], "step": state["step"], "model": model}
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    sslvit.save_checkpoint(target, small)
    print(f"{target}: {Path(target).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        ship(*sys.argv[1:])
    except (sslvit.UserError, KeyError, OSError) as error:
        print(f"ship.py: {error}", file=sys.stderr)
        sys.exit(2)
