"""README.md's exercises: write the prediction down, fill in the function, run its test.

    python -m pytest tests/exercises.py -k info_nce

pytest leaves this file alone unless it is named. Every test is a case that can be
worked out on paper: the answer is in the test, the way there is not. README.md has what
we found, folded away. Shapes: B batch, N tokens, D width, C width of the embedding.
"""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import analyze  # before torch, as it sets how threads wait for each other
import sslvit
import torch


def info_nce(q, k, temperature):
    """Lesson 1. Mean over the queries of -log softmax(q·k / τ) at the own key.

    Unit vectors q, k (B, C) -> scalar.
    Predict first: at the start of a run with 64 images, what does `cl` in the log show?
    It is the sum of both directions, each times 2τ, with τ = 0.2.
    """
    raise NotImplementedError


def test_info_nce():
    # four orthogonal queries, each its own key: logits 1/τ = 2 and three times 0
    q = torch.eye(4)
    by_hand = math.log(math.e**2 + 3) - 2
    assert info_nce(q, q, 0.5).item() == pytest.approx(by_hand, abs=1e-5)
    # collapse: every key fits every query, so the loss is that of guessing
    same = q[:1].expand(4, 4)
    assert info_nce(same, same, 0.5).item() == pytest.approx(math.log(4), abs=1e-5)


def looked_at_keys(attn):
    """Lesson 2. exp of each row's entropy: at how many keys does the query look?

    Attention (..., N, N), rows sum to 1 -> (..., N). 0·log 0 is 0.
    Predict first: in the last layer of CL and of MIM, at how many of the 64 keys?
    python tests/exercises.py looked_at_keys CHECKPOINT  prints it.
    """
    raise NotImplementedError


def test_looked_at_keys():
    everywhere = [0.25, 0.25, 0.25, 0.25]
    at_two = [0.0, 0.5, 0.5, 0.0]
    at_one = [0.0, 0.0, 0.0, 1.0]
    attn = torch.tensor([everywhere, at_two, at_one])
    assert looked_at_keys(attn).tolist() == pytest.approx([4, 2, 1], abs=1e-5)


def low_pass(images, cutoff):
    """Lesson 3. Images (B, 3, h, w) without the frequencies |ω| > cutoff (rad/px).

    Predict first: which network suffers more from fine noise, CL or MIM?
    """
    raise NotImplementedError


def test_low_pass():
    x = torch.arange(8.0)
    # |ω| = π/4
    slow = torch.cos(2 * math.pi * x / 8).expand(1, 3, 8, 8)
    # |ω| = √2·π
    checks = torch.cos(math.pi * (x + x[:, None])).expand(1, 3, 8, 8)
    filtered = low_pass(3 + slow + checks, math.pi / 2)
    assert torch.allclose(filtered, 3 + slow, atol=1e-5)
    mean = low_pass(3 + slow, 0.1)
    assert torch.allclose(mean, torch.full((1, 3, 8, 8), 3.0), atol=1e-5)


def cka(x, y):
    """Lesson 4. Do two layers see the same differences between images? (Kornblith 2019)

    Linear CKA of features of the same images, x (n, D) and y (n, E), each centred over
    the images first: ‖YᵀX‖² / (‖XᵀX‖·‖YᵀY‖), Frobenius norms -> 1: the same up to
    rotation and scale, 0: nothing in common. A mean may be far larger than the spread.
    Predict first: is MIM's layer 1 more like its own layer 6, or like CL's layer 1?
    python tests/exercises.py cka CHECKPOINT CHECKPOINT  prints it.
    """
    raise NotImplementedError


def test_cka():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    quarter_turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert float(cka(x, 3 * x @ quarter_turn + 1000)) == pytest.approx(1, abs=1e-4)
    # XᵀX is 2·I, of norm 2√2; YᵀY is 2; YᵀX is (2, 0)
    assert float(cka(x, x[:, :1])) == pytest.approx(4 / (2 * 2**0.5 * 2), abs=1e-5)
    assert float(cka(x[:, :1], x[:, 1:])) == pytest.approx(0, abs=1e-6)


def gradient_cosine(loss_a, loss_b, parameters):
    """Lesson 5. The cosine of two losses' gradients, all parameters as one long vector.

    Two scalars that depend on `parameters` (a list) -> 1: the losses pull together,
    0: they do not meet, -1: they pull against each other.
    Predict first: what is it for L_CL and L_MIM in each block of a trained hybrid?
    python tests/exercises.py gradient_cosine runs/micro-hybrid/ckpt.pt  prints it.
    """
    raise NotImplementedError


def test_gradient_cosine():
    a = torch.zeros(1, 2, requires_grad=True)
    b = torch.zeros(1, requires_grad=True)
    # gradients (3, 0, 4) and (3, 0, -4)
    one = 3 * a[0, 0] + 4 * b[0]
    other = 3 * a[0, 0] - 4 * b[0]
    cosine = float(gradient_cosine(one, other, [a, b]))
    assert cosine == pytest.approx((9 - 16) / 25, abs=1e-6)
    # a loss that does not know b has no gradient there
    cosine = float(gradient_cosine(a[0, 0] + b[0], a[0, 1], [a, b]))
    assert cosine == pytest.approx(0, abs=1e-6)


def layers_of(path, images):
    """-> Records of a network's layers, for stimuli it has not seen."""
    vit = analyze.load_encoder(path)
    _, test = sslvit.find_data(sslvit.Config())
    crops = sslvit.CenterCrops(test, vit.facts.image_size)
    pixels = torch.stack([torch.from_numpy(crops[i][0]) for i in range(images)])
    with torch.no_grad():
        _, layers = vit((pixels / 255 - sslvit.MEAN) / sslvit.STD, record=True)
    return layers


def print_keys(path, images=200):
    """Your looked_at_keys in every layer of a network."""
    for number, layer in enumerate(layers_of(path, images), 1):
        attn = layer.attn[:, :, 1:, 1:]  # without CLS
        keys = looked_at_keys(attn / attn.sum(dim=-1, keepdim=True))
        print(f"layer {number}: {keys.mean():.1f} of {keys.shape[-1]} keys")


def print_cka(a, b, images=400):
    """Your cka of mean patch tokens, between all layers of two networks."""
    layers = {}
    for path in (a, b):
        layers[path] = [x.out[:, 1:].mean(dim=1) for x in layers_of(path, images)]
    for one, other in ((a, a), (b, b), (a, b)):
        print(f"rows: layers of {one}, columns: of {other}")
        for x in layers[one]:
            print(" ".join(f"{float(cka(x, y)):.2f}" for y in layers[other]))


def print_cosines(path, batches=10):
    """Your gradient_cosine in every block of the hybrid that was saved at `path`."""
    state = sslvit.load_checkpoint(path)
    settings = {name: state["config"].get(name) for name in vars(sslvit.Config())}
    cfg = sslvit.Config(**(settings | {"device": "cpu", "workers": 0, "accum": 1}))
    model = sslvit.SSL(cfg)
    lacks = model.load_state_dict(state["model"], strict=False).missing_keys
    whole = "a hybrid as sslvit.py left it, with heads for both losses"
    sslvit.require(0 < cfg.lam < 1 and not lacks, f"{path}: give {whole}")
    train, _ = sslvit.find_data(cfg)
    rows = []
    for micro_batch in sslvit.make_loader(cfg, train, range(batches)):
        losses = model(*sslvit.augment(micro_batch, cfg))
        cosines = []
        for block in model.encoder.blocks:
            parameters = list(block.parameters())
            cosine = gradient_cosine(losses["cl"], losses["mim"], parameters)
            cosines.append(float(cosine))
        rows.append(cosines)
    for number, cosines in enumerate(torch.tensor(rows).T, 1):
        mean, spread = cosines.mean(), cosines.std()
        print(f"block {number}: {mean:+.3f} ± {spread:.3f} over {batches} batches")


PRINTERS = {
    "looked_at_keys": print_keys,
    "cka": print_cka,
    "gradient_cosine": print_cosines,
}

if __name__ == "__main__":
    name, files = "".join(sys.argv[1:2]), sys.argv[2:]
    if name not in PRINTERS or len(files) != (2 if name == "cka" else 1):
        sys.exit(
            "usage: exercises.py looked_at_keys|gradient_cosine|cka CHECKPOINT ..."
        )
    try:
        PRINTERS[name](*files)
    except sslvit.UserError as error:
        print(f"exercises.py: {error}", file=sys.stderr)
        sys.exit(2)
    except NotImplementedError:
        sys.exit(f"exercises.py: fill in {name}() first")
