"""What did they learn?  This file takes trained Vision Transformers apart and checks twelve claims on them.

  python analyze.py runs/*/ckpt.pt                                   every figure and claim, on the stimuli
  python analyze.py cl=mocov3.pth mim=simmim.pth --data /imagenet    published weights, photographs
  python analyze.py --from figures/results.json                      draws again, computes nothing

Section of the paper [P] -> claim -> figure, and its name for --only:
  1 accuracy    1 CL wins linear probing, MIM wins fine-tuning             1 left    accuracy
                2 CL wins small models, MIM wins large ones                1 middle  scaling
                3 MIM wins dense prediction                                1 right   dense
  2 attention   4 CL attends globally, MIM locally, most in later layers   2, 3      maps distance
                5 CL's later attention is one map for all queries          4         nmi
                6 CL's heads, depths and tokens are alike in later layers  5         similarity
  3 transform   7 CL moves all tokens of an image together, MIM singly     6, 7      plane spectra
                8 CL keeps low frequencies, MIM high ones                  8         fourier
                9 CL is shape-biased, MIM texture-biased                   9         bias noise
  4 components 10 MIM is better in early layers, CL in the last            10        layers
               11 an explicit decoder keeps the last layers useful         11        decoder
  5 both       12 a hybrid beats both                                      12        sweep hybrid
  not in [P]:  tokens coloured by image, reconstructions, CKA              -         tokens pixels cka

[P] Park et al., What Do Self-Supervised Vision Transformers Learn?, ICLR 2023, arXiv 2305.00729.
Glossary: B batch, N patch tokens (CLS is dropped), D width, H heads, d = D/H, L layers, F frequencies, n rows
of a matrix, A[q,k] attention of query q to key k; CL contrastive learning, MIM masked image modelling.
"""

# fmt: off
# (laid out by hand: it is to be read, and projected on a wall)
import argparse, contextlib, json, math, os, pickle, re, sys, time, zipfile
from collections import defaultdict
from copy import deepcopy
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
import sslvit
from sslvit import MEAN, SIZES, STD, Block, Config, Stimuli, UserError, ViT

# ==== 1. Metrics of one batch: pure functions of tensors ===================================================
def attention_distance(attn, grid, patch_size):
    """How far does a token look?  Σ_k A[q,k]·‖x_q - x_k‖, mean over queries ([P] figure 3).
    attn (B, H, N, N), rows sum to 1; grid (rows, cols), or one number for a square -> (B, H) in px. 0: every
    token looks at itself. Uniform attention: the mean distance between grid points."""
    rows, cols = (grid, grid) if isinstance(grid, int) else grid
    n = torch.arange(rows * cols, device=attn.device)
    x = torch.stack([n // cols, n % cols], dim=1).to(attn.dtype) * patch_size       # (N, 2) px
    return (attn * (x[:, None] - x).norm(dim=-1)).sum(dim=-1).mean(dim=-1)

def attention_nmi(attn):
    """Does it matter who asks?  Normalised mutual information of query and key ([P] figure 4).
    With p(q) = 1/N and p(k) = mean_q A[q,k]: I = Σ p(q) A log(A / p(k)) = H(k) - mean_q H(A[q]), and
    NMI = I / √(H(q)·H(k)). attn (B, H, N, N), rows sum to 1 -> (B, H) in [0, 1]. 0: one map for all queries
    (collapse). 1: each query its own key. 0·log 0 is 0; if all look at one key, H(k) = 0 and NMI is 0."""
    entropy = torch.special.entr(attn.mean(dim=-2)).sum(dim=-1)                     # H(k): (B, H)
    information = entropy - torch.special.entr(attn).sum(dim=-1).mean(dim=-1)
    nmi = information / (entropy * math.log(attn.shape[-2])).sqrt()
    return torch.where(entropy > 0, nmi, 0.0).clamp(0, 1)   # rounding may step over the ends

def token_similarity(tokens):
    """Are the tokens of an image told apart?  Mean cosine of the N(N - 1) pairs of different tokens, from
    |Σu|² = Σ|u|² + Σ_pairs ([P] figure 5 right). tokens (..., N, D) -> (...) in [-1/(N-1), 1]; 1: alike."""
    unit, n = F.normalize(tokens, dim=-1), tokens.shape[-2]
    pairs = unit.sum(dim=-2).square().sum(dim=-1) - unit.square().sum(dim=(-2, -1))
    return pairs / (n * (n - 1) or math.nan)

def head_similarity(heads):
    """Do the heads read different things?  Mean cosine between the heads' outputs A_h·V_h of the same token
    ([P] figure 5 left). heads (B, H, N, d) -> (B,) in [-1, 1]. 1: all alike, 0: orthogonal; one head: nan."""
    return token_similarity(heads.transpose(1, 2)).mean(dim=-1)

def depth_similarity(a, b):
    """Do neighbouring layers add different things?  Mean cosine of the same token's attention outputs in two
    layers ([P] figure 5 middle). a, b (B, N, D) -> (B,) in [-1, 1]. 1: the second layer repeats the first."""
    return F.cosine_similarity(a, b, dim=-1).mean(dim=-1)

def fourier_amplitude(tokens, grid):
    """Which frequencies does a token map keep?  Δ log amplitude along the half diagonal 0 … π ([P] figure 8).
    X(ω) = Σ x[r,c]·exp(-iω(r + c)) for each channel; log|X(ω)| - log|X(0)|, mean over channels. On an even
    square grid these are the FFT's diagonal bins up to Nyquist; the sum itself reaches π on odd grids too.
    tokens (B, N, D), grid (rows, cols) or one number -> (B, F) at ω = π·j/(F - 1), F = shorter side // 2 + 1.
    First 0; last: far below 0 = only low frequencies left (blurred), about 0 = as much detail as mean."""
    rows, cols = (grid, grid) if isinstance(grid, int) else grid
    n = torch.arange(rows * cols, device=tokens.device)
    omega = torch.linspace(0, math.pi, min(rows, cols) // 2 + 1, dtype=torch.float64).to(tokens.device)
    phase = omega[:, None] * (n // cols + n % cols)                                 # (F, N)
    real, imag = (wave.to(tokens.dtype) @ tokens for wave in (phase.cos(), phase.sin()))    # (B, F, D)
    log = torch.hypot(real, imag).clamp(min=1e-37).log().mean(dim=-1)               # keeps log 0 finite
    return log - log[:, :1]

def singular_spectrum(x):
    """How many directions do the rows of a matrix fill?  Log singular values, largest first ([P] figure 7).
    x (..., n, D), centred over n here -> (..., min(n, D)). Equal values: the rows fill all directions alike;
    a steep fall: few. With n ≤ D the last is 0 by centring. From the Gram matrix in float64: as exact as an
    SVD in float32 and several times faster; below 1e-8 of the largest is rounding, so that is the floor."""
    x = (x - x.mean(dim=-2, keepdim=True)).double()
    square = torch.linalg.eigvalsh(x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x).flip(-1)
    floor = (square[..., :1] * 1e-16).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.maximum(square, floor).log() / 2

def cka(x, y):
    """Do two layers see the same differences between images?  Linear CKA (Kornblith et al. 2019),
    ‖XᵀY‖² / (‖XᵀX‖·‖YᵀY‖), Frobenius norms of centred features x (n, D), y (n, D') -> scalar in [0, 1].
    1: the same up to rotation and scale. 0: unrelated."""
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    return (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())

def nearest_purity(tokens):
    """Share of tokens whose nearest neighbour (Euclidean) is of the same image; tokens (B, N, D) -> scalar
    in [0, 1]. 1: images are islands. Chance: (N - 1) / (BN - 1)."""
    flat, image = tokens.flatten(0, 1), torch.arange(len(tokens)).repeat_interleave(tokens.shape[1])
    distance = torch.cdist(flat, flat).fill_diagonal_(math.inf)
    return (image[distance.argmin(dim=1).cpu()] == image).float().mean()

def mean_iou(pred, target, classes):
    """Intersection over union, mean over the classes in either map; pred, target (B, h, w) of class numbers
    -> (B,) in [0, 1]. 1: every pixel right ([P] figure 1 right)."""
    p, t = (F.one_hot(m.long().flatten(1), classes).bool() for m in (pred, target))     # (B, hw, classes)
    both, either = (p & t).sum(dim=1), (p | t).sum(dim=1)
    return (both / either.clamp(min=1)).sum(dim=1) / (either > 0).sum(dim=1)

def shape_bias(decisions, shapes, textures):
    """Outline or surface?  Among cue-conflict decisions that match either cue, the share that match the shape
    (Geirhos et al. 2019; [P] figure 9 left). Three arrays (n,) of class numbers -> scalar in [0, 1], nan if
    no decision matches. 1: always the shape, 0: always the texture."""
    shape, texture = (decisions == shapes).sum(), (decisions == textures).sum()
    return float(shape / (shape + texture)) if shape + texture else math.nan

def band_noise(size, low, high, generator=None):
    """Gaussian noise of the spatial frequencies low ≤ |ω| < high (rad/px), (B, 3, h, w) like `size`: each
    image's root mean square is 1 ([P] figure 9 right)."""
    noise = torch.fft.fft2(torch.randn(size, generator=generator))
    y, x = (torch.fft.fftfreq(side) * 2 * math.pi for side in size[-2:])
    radius = (y[:, None].square() + x.square()).sqrt()                              # (h, w)
    noise = torch.fft.ifft2(noise * ((radius >= low) & (radius < high))).real
    return noise / noise.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()

def band_noise_drop(clean, noisy):
    """What does noise cost?  1 - accuracy(noisy) / accuracy(clean) ([P] figure 9 right). clean (n,), noisy
    (bands, n): 1 where right, 0 where wrong -> (bands,), at most 1. 0: does not matter, 1: all is lost."""
    return 1 - noisy.mean(axis=-1) / clean.mean()

# ==== 2. Files: what is in a checkpoint, ours or published?   (data, never code) ===========================
class Inert:
    """Stands in for every class that a file names and we do not need: takes any call, does nothing."""
    def __init__(self, *args, **kwargs):
        pass
    __setstate__ = __setitem__ = append = extend = add = __init__

class Unpickler(pickle.Unpickler):
    """Files rebuild tensors and dicts. Any other name, argparse.Namespace (MAE, DINO), a yacs node (SimMIM)
    or os.system, becomes Inert: nothing in a file is imported or called."""
    def find_class(self, module, name):
        known = r"collections\.OrderedDict|torch\.(Size|\w+Storage|_utils\._rebuild_(parameter|tensor(_v2)?))"
        return super().find_class(module, name) if re.fullmatch(known, f"{module}.{name}") else Inert

class SafePickle:       # what torch.load takes for the pickle module
    Unpickler, load = Unpickler, staticmethod(lambda file, **options: Unpickler(file, **options).load())

def read_checkpoint(path):
    """A .pt or .pth file -> its dict; every object but tensors, containers, numbers and strings is inert."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}")
    try:
        if zipfile.is_zipfile(path) and "constants.pkl" in " ".join(zipfile.ZipFile(path).namelist()):
            raise ValueError("a TorchScript program")       # torch.load would hand it to an interpreter
        raw = torch.load(path, map_location="cpu", weights_only=False, pickle_module=SafePickle)
        if not isinstance(raw, dict):
            raise ValueError(f"a {type(raw).__name__}, not a dict")
        return raw
    except Exception as error:                              # a damaged pickle can raise anything
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise UserError(f"{path}: not a checkpoint, or cut short ({reason})") from error

RENAMES = (  # names in published files -> names here; regular expressions, in this order
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),                          # DINOv2 in chunks
    (r"\.gamma_([12])$", r".ls\1.gamma"),                               # SimMIM, BEiT
    (r"^(reg_token|register_tokens)$", "blocks.0.register_tokens"))     # timm, DINOv2
NOT_ENCODER = re.compile(  # heads and buffers; all are listed as skipped
    r"(head|fc|fc_norm|lm_head|mask_token|masked_embed|decoder\w*)(\.|$)|"
    r".*(relative_position_index|num_batches_tracked)$")
TABLE = "relative_position_bias_table"

def tidy(state, prefix):
    """Tensors under `prefix` by this project's names -> (weights, keys of heads and buffers, bias tables)."""
    weights, skipped = {}, []
    pooled = () if prefix + "norm.weight" in state else ((r"^fc_norm\.", "norm."),)  # after pooling
    for key, value in state.items():
        name = key.removeprefix(prefix)
        for pattern, new in RENAMES + pooled:
            name = re.sub(pattern, new, name)
        if NOT_ENCODER.match(name) or not key.startswith(prefix):
            skipped.append(key)
        else:
            weights[name] = value.float()
    for name in [name for name in weights if name.endswith("attn.qkv.weight")]:
        start, none = name.removesuffix("qkv.weight"), torch.zeros(len(weights[name]) // 3)
        biases = [weights.pop(f"{start}{x}_bias", none) for x in "qkv"]     # SimMIM, BEiT: none for the keys
        weights.setdefault(start + "qkv.bias", torch.cat(biases))
    tables = sorted((name for name in weights if name.endswith("attn." + TABLE)), key=lambda t: (len(t), t))
    if tables:                          # fine-tuned SimMIM, BEiT: one per block; side by side: (offsets, L·H)
        weights["rel_pos_bias." + TABLE] = torch.cat([weights.pop(name) for name in tables], dim=1)
    if "pos_embed" in weights:
        table, registers = weights["pos_embed"], weights.get("blocks.0.register_tokens", torch.zeros(1, 0, 1))
        extra = table.shape[1] - math.isqrt(table.shape[1]) ** 2    # tokens with a place beside the patches
        if extra not in (0, 1, 1 + registers.shape[1]):
            raise ValueError(f"{table.shape[1]} positions are no square grid and a class token")
        if extra > 1:
            weights["blocks.0.register_tokens"] = registers + table[:, 1:extra]
        weights["pos_embed"] = F.pad(table[:, extra:], (0, 0, 1, 0))    # timm's no_embed_class: CLS at 0
        weights["pos_embed"][:, :min(extra, 1)] = table[:, :min(extra, 1)]
    return weights, skipped, len(tables)

def own_bias(block, args):
    """Of all blocks' position biases (L·H, 1+N, 1+N) side by side, this block's (H, 1+N, 1+N)."""
    return args[0], args[1].unflatten(0, (-1, block.heads))[block.number], *args[2:]

def add_registers(block, args):
    """DINOv2's registers: tokens without a place, added before block 0, at the end."""
    return torch.cat([args[0], block.register_tokens.expand(len(args[0]), -1, -1)], dim=1), *args[1:]

def drop_registers(vit, args, result):
    """... so that nobody outside sees them."""
    tokens, records = result if type(result) is tuple else (result, None)
    n = -vit.blocks[0].register_tokens.shape[1]
    cut = [r._make((r.attn[:, :, :n, :n], *(x[..., :n, :] for x in r[1:]))) for r in records or ()]
    return (tokens[:, :n], cut) if records else tokens[:, :n]

def load_model(path, heads=None):
    """File -> (ViT in eval mode, facts about it, key report, pixel head as (mask token, decoder) or None).
    Told by content, not name; sizes come from shapes, `heads` is for files whose shapes do not tell."""
    raw, stem = read_checkpoint(path), "patch_embed.proj.weight"
    config = raw["config"] if isinstance(raw.get("config"), dict) and "objective" in raw["config"] else {}
    for box in ("state_dict", "model", "teacher", "student", "module"):
        raw = raw[box] if isinstance(raw.get(box), dict) else raw
    state = {str(key): value for key, value in raw.items() if isinstance(value, torch.Tensor)}
    prefixes = [key.removesuffix(stem) for key in state if key.endswith(stem)]
    if not prefixes:
        raise UserError(f"{path}: no Vision Transformer: no {stem} in {len(state)} tensors {list(state)[:3]}")
    prefix = min(prefixes, key=lambda p: ("momentum" in p or "key" in p, len(p)))  # an average only if alone
    try:
        weights, skipped, own = tidy(state, prefix)
        table, positions = (weights.get(name) for name in ("rel_pos_bias." + TABLE, "pos_embed"))
        width, _, patch, _ = weights[stem].shape
        depth = 1 + max(int(m[1]) for name in weights if (m := re.match(r"blocks\.(\d+)\.", name)))
        grid = math.isqrt(positions.shape[1]) if positions is not None else 224 // patch
        moco, said = re.search("base_encoder|momentum", prefix), "by --heads"
        if table is not None:
            grid = (math.isqrt(len(table) - 3) + 1) // 2
            heads, said = table.shape[1] // max(1, own), "from its bias table"
        elif config:
            heads, said = SIZES[config["model"]]["heads"], "from its config"
        elif not heads:
            heads = {1280: 16, 384: 12 if moco else 6}.get(width, max(1, width // 64))
            said = "assumed, shapes cannot tell: MoCo v3's ViT-S has 12, timm's 6; --heads sets it"
        scale = 1.0 if "blocks.0.ls1.gamma" in weights else None
        look = dict(positions="none" if positions is None else "learned", rel_pos_bias=table is not None)
        vit = ViT(grid * patch, patch, width, depth, heads, layer_scale=scale, **look).eval()
        if own:
            vit.rel_pos_bias[TABLE] = nn.Parameter(table)
            for i, block in enumerate(vit.blocks):
                block.number = i
                block.register_forward_pre_hook(own_bias)
        if "blocks.0.register_tokens" in weights:
            vit.blocks[0].register_tokens = nn.Parameter(weights["blocks.0.register_tokens"])
            vit.blocks[0].register_forward_pre_hook(add_registers)
            vit.register_forward_hook(drop_registers)
        missing, unexpected = vit.load_state_dict(weights, strict=False)
        if absent := [key for key in missing if not key.startswith("norm.")]:
            raise ValueError(f"{len(absent)} tensors are missing, among them {', '.join(absent[:4])}")
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{path}: not a ViT of a kind that can be taken apart here: {reason}") from error
    masked = re.search(r"\b(decoder|lm_head)", " ".join(state))     # DINOv2 has a mask token, but not these
    lam = config.get("lam", 0.0 if masked else 1.0 if moco else None)
    role = "other" if lam is None else {1: "CL", 0: "MIM"}.get(lam, "hybrid")
    mask, deep = state.get(prefix + "mask_token", state.get("mask_token")), config.get("decoder_depth", 0)
    pixels, decoder = None, {key[8:]: v for key, v in state.items() if key.startswith("decoder.")}
    with contextlib.suppress(RuntimeError):                 # another kind of decoder
        blocks = [Block(width, heads) for _ in range(deep)] + [nn.LayerNorm(width, eps=1e-6)] * (deep > 0)
        head = nn.Sequential(*blocks, nn.Linear(width, 3 * patch**2)).eval()
        # SimMIM's 1 × 1 convolution is a linear layer; its PixelShuffle has our order: colour, row, column
        head.load_state_dict({key: v.flatten(1) if v.ndim == 4 else v for key, v in decoder.items()})
        pixels = None if mask is None else (mask, head)
    size, count = grid * patch, sum(p.numel() for p in vit.parameters())
    facts = dict(path=str(path), role=role, lam=lam, width=width, depth=depth, heads=heads, patch_size=patch,
                 image_size=size, decoder_depth=deep, config=config, parameters=count)
    report = f"{path}: {role}, {width} wide, {depth} deep, {heads} heads ({said}), patch {patch}, {size} px"
    if not pixels and (decoder or mask is not None):
        report += "\n  no reconstructions, which need a mask token and a pixel head like SimMIM's"
    for title, keys in (("missing", missing), ("unexpected, not used", unexpected), ("skipped", skipped)):
        folded = defaultdict(list)                          # 'blocks.0.x', 'blocks.1.x' -> 'blocks.{0,1}.x'
        for key in keys:
            start, number, end = re.fullmatch(r"(?:(.*?blocks\.)(\d+)(?=\.))?(.*)", key).groups()
            folded[start, end].append(number)
        names = [f"{a}{{{','.join(n)}}}{b}" if a else b for (a, b), n in folded.items()]
        report += f"\n  {title}: {len(keys)} keys" + "".join(f"\n    {name}" for name in names)
    return vit, facts, report, pixels

def load_encoder(path, heads=None):
    """File -> ViT in eval mode; prints what it is and every missing, unexpected and skipped key."""
    vit, _, report, _ = load_model(path, heads)
    print(report)
    return vit

# ==== 3. One pass: which numbers does every figure need? ===================================================
def progress(items, total, label):
    """Yields the items; a line every 5 s with the time left."""
    began = said = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if (now := time.monotonic()) > said + 5:
            print(f"  {label}: {done}/{total}, {(now - began) * (total / done - 1):.0f} s left", flush=True)
            said = now

def read_images(source, indices, size, masks=None, batch=64):
    """Centre squares in batches: images uint8 (B, 3, S, S), labels (B, label sets), masks (B, S, S) or None.
    masks: (image folder, folder of PNGs of the same names). Unreadable files are named and left out."""
    for start in range(0, len(indices), batch):
        rows = []
        for i in indices[start:start + batch].tolist():
            try:                                            # Pillow raises almost anything on a broken file
                (image, labels), mask = source.load(i), np.zeros(())
                if isinstance(source, Stimuli):
                    mask = source[i][-1]
                elif masks:
                    png = masks[1] / Path(source[i][0]).relative_to(masks[0]).with_suffix(".png")
                    mask = np.asarray(ImageOps.fit(Image.open(png), (size, size), Image.NEAREST))
                rows.append((sslvit.cut(image, size)[0], labels, mask))
            except Exception as error:
                print(f"  left out: {source[i][0]!r} ({type(error).__name__}: {error})")
        if rows:
            images, labels, drawn = (torch.from_numpy(np.stack(part)) for part in zip(*rows))
            yield images, labels.long(), drawn.long() if drawn.ndim == 3 else None

def joined(batches):
    return [None if part[0] is None else torch.cat(part) for part in zip(*batches)]

def normalise(images, device):
    """uint8, or float in [0, 1] -> what the networks were trained on."""
    x = images.to(device)
    return (x / (255 if x.dtype == torch.uint8 else 1) - MEAN.to(device)) / STD.to(device)

@torch.no_grad()
def collect(vit, batches, measure=True):
    """One pass over batches (images, labels, masks) serves every metric -> arrays with one row per image.
    pooled, cls (n, L, 2, D): mean patch token and CLS after each layer's attention [0] and MLP [1]; output
    (n, 2, D) the same after the last norm; labels. With `measure` also distance, nmi (n, L, H); heads, tokens
    (n, L); depths (n, L - 1); fourier (n, L, 2, F); volume (n, L, 2), the mean log singular value; spectrum
    (L, 2, K), a mean over images, without the value that centring makes 0. No map outlives its batch."""
    kept, spectrum, patch = defaultdict(list), 0, vit.patch_size
    for images, labels, _ in batches:
        x, layers, above = normalise(images, vit.cls_token.device), defaultdict(list), None
        tokens, records = vit(x, record=True)
        grid = x.shape[2] // patch, x.shape[3] // patch
        for block, record in zip(vit.blocks, records):
            states = torch.stack([record.mid, record.out], dim=1)                   # (B, 2, 1+N, D)
            found = dict(pooled=states[:, :, 1:].mean(dim=2), cls=states[:, :, 0])
            if measure:
                attn = F.normalize(record.attn[:, :, 1:, 1:], p=1, dim=-1, eps=1e-37)   # without CLS, sum 1
                added = block.attn["proj"](record.heads.transpose(1, 2).flatten(2))[:, 1:]  # its output
                inner = states[:, :, 1:].flatten(0, 1)                              # (2B, N, D)
                rank = min(inner.shape[1] - 1, inner.shape[2])
                found |= dict(
                    distance=attention_distance(attn, grid, patch), nmi=attention_nmi(attn),
                    heads=head_similarity(record.heads[:, :, 1:]), tokens=token_similarity(added),
                    fourier=fourier_amplitude(inner, grid).unflatten(0, (-1, 2)),
                    singular=singular_spectrum(inner)[:, :rank].unflatten(0, (-1, 2)))
                found |= {} if above is None else dict(depths=depth_similarity(above, added))
                above = added
            for name, value in found.items():
                layers[name].append(value)
        rows = {name: torch.stack(values, dim=1).cpu() for name, values in layers.items()}
        rows["output"] = torch.stack([tokens[:, 1:].mean(dim=1), tokens[:, 0]], dim=1).cpu()
        if measure:
            singular = rows.pop("singular")                                         # (B, L, 2, K)
            spectrum, rows["volume"] = spectrum + singular.sum(dim=0), singular.mean(dim=-1)
        for name, value in rows.items():
            kept[name].append(value.float())
        kept["labels"].append(labels)
    if not kept:
        raise UserError("not one image could be read")
    result = {name: torch.cat(parts).numpy() for name, parts in kept.items()}
    return result | ({"spectrum": (spectrum / len(result["labels"])).float().numpy()} if measure else {})

@torch.no_grad()
def encode(vit, images):
    """Images (n, 3, S, S) -> features after the last norm (n, 2, D): pooled patch tokens and CLS."""
    chunks = (vit(normalise(x, vit.cls_token.device)).cpu() for x in images.split(64))
    return torch.cat([torch.stack([t[:, 1:].mean(dim=1), t[:, 0]], dim=1) for t in chunks]).numpy()

@torch.no_grad()
def examples(vit, pixels, images):
    """Numbers for pictures. maps, pixels: rows of (image, title, boxes (row, column, side)), attention of two
    queries and reconstructions; plane, tokens (B, N, 2): tokens on their principal components."""
    x, p = normalise(images, vit.cls_token.device), vit.patch_size
    tokens, records = vit(x, record=True)
    rows, cols, last = x.shape[2] // p, x.shape[3] // p, len(records) - 1
    def plane(groups):          # (B, N, D) -> (B, N, 2), the two directions of largest variance
        centred = (groups - groups.mean(dim=(0, 1))).cpu()
        return (centred @ torch.linalg.svd(centred.flatten(0, 1), full_matrices=False).Vh[:2].T).numpy()
    def picture(x):             # (3, h, w) -> numbers 0 .. 255, at most 112 px
        x = F.adaptive_avg_pool2d((x.cpu() * STD + MEAN).clamp(0, 1), min(112, x.shape[1]))
        return (x * 255).round().int().permute(1, 2, 0).tolist()
    image, queries = picture(x[0]), ((rows // 2, cols // 2), (rows // 8, cols // 8)) # and near a corner
    maps = [(image, "queries", [(r, c, len(image) / rows) for r, c in queries])]
    for (r, c), layer in ((query, i) for query in queries for i in sorted({0, (last + 1) // 2, last})):
        seen = records[layer].attn[0, :, 1 + r * cols + c, 1:].mean(dim=0).reshape(rows, cols)
        maps.append(((seen / seen.sum()).tolist(), f"layer {layer + 1}", [(r, c, 1)]))
    around = [records[max(last - 1, 0)].out[:3, 1:], records[last].mid[:3, 1:]]         # the last attention
    result = dict(maps=maps, plane=plane(torch.cat(around, dim=1)), tokens=plane(tokens[:, 1:]),
                  purity=float(nearest_purity(tokens[:, 1:])))
    if pixels:
        mask = torch.rand(len(x), rows * cols, generator=torch.Generator().manual_seed(0)).to(x.device) < 0.6
        token, decoder = (part.to(x.device) for part in pixels)
        target, guess = sslvit.patchify(x, p), decoder(vit(x, mask, mask_token=token))[:, 1:]
        shown = target, *(torch.where(mask[..., None], filled, target) for filled in (0 * target, guess))
        shown = [F.fold(y.mT, x.shape[2:], p, stride=p) for y in shown]
        names = "image", "masked", "predicted"
        result["pixels"] = [(picture(y[i]), name, []) for i in range(3) for y, name in zip(shown, names)]
    return result

# ==== 4. What has to be trained: probes, fine-tuning, segmentation, cue conflict ===========================
def linear_probe(train, val, test, strengths=(1.0, 0.1, 0.01, 1e-3, 1e-4)):
    """Multinomial logistic regression on frozen features: mean cross-entropy + strength/2·|W|², by L-BFGS
    ([P] figures 1, 10). train, val, test: (features (n, D), labels (n,)). Features are standardised by the
    training set, the strength is chosen on `val`, `test` is only scored. Returns accuracy in [0, 1] (chance:
    1 / classes), val (accuracy there), strength, predicted (n,)."""
    sets = [(torch.as_tensor(x).float(), torch.as_tensor(y).long()) for x, y in (train, val, test)]
    std, mean = torch.std_mean(sets[0][0], dim=0)           # a column of ones for the bias
    (x, y), *others = [(F.pad((x - mean) / std.clamp(min=1e-6), (0, 1), value=1.0), y) for x, y in sets]
    w = torch.zeros(x.shape[1], 1 + max(int(y.max()) for _, y in sets), requires_grad=True)
    best = dict(val=-1.0)
    for strength in strengths:                  # from strong to weak, each from the last one's solution
        solver = torch.optim.LBFGS([w], max_iter=100, history_size=10, line_search_fn="strong_wolfe")
        def objective(solver=solver, strength=strength):
            solver.zero_grad()
            (loss := F.cross_entropy(x @ w, y) + strength / 2 * w[:-1].square().sum()).backward()
            return loss
        solver.step(objective)
        predicted = [(features @ w).argmax(dim=1) for features, _ in others]
        val, accuracy = ((p == labels).float().mean().item() for p, (_, labels) in zip(predicted, others))
        if val > best["val"]:
            best = dict(val=val, accuracy=accuracy, strength=strength, predicted=predicted[1].numpy())
    return best

def probe_sets(train, val, test):
    """A linear probe per label set; each (features (n, D), labels (n, label sets)) -> accuracies, their mean
    on val, and for each test image the share of its labels that are right (n,)."""
    probes = [linear_probe(*((x, y[:, s]) for x, y in (train, val, test))) for s in range(test[1].shape[1])]
    right = np.mean([p["predicted"] == y for p, y in zip(probes, np.asarray(test[1]).T)], axis=0)
    return dict(accuracy=[p["accuracy"] for p in probes], val=float(np.mean([p["val"] for p in probes])),
                right=right, predicted=probes[0]["predicted"])

def better_probe(*splits):
    """Features (n, 2, D), pooled patch tokens and CLS: the probe of what is better on the 2nd split."""
    both = (probe_sets(*((x[:, k], y) for x, y in splits)) | {"cls": k} for k in (0, 1))
    return max(both, key=lambda probe: probe["val"])

def knn(bank, known, queries, labels, k=20):
    """Accuracy of the vote of the k nearest bank images, weighted by exp(cos / 0.07) after centring on the
    bank. Features (n, D), (m, D), labels (n,), (m,) -> [0, 1]; nothing is trained, nothing tuned."""
    bank, known, queries, labels = (torch.as_tensor(array) for array in (bank, known, queries, labels))
    mean, votes = bank.mean(dim=0), torch.zeros(len(queries), int(known.max()) + 1)
    similarity = F.normalize(queries - mean) @ F.normalize(bank - mean).T           # (m, n)
    cosine, nearest = similarity.topk(min(k, len(bank)))                            # (m, k)
    votes.scatter_add_(1, known[nearest], (cosine / 0.07).exp())
    return (votes.argmax(dim=1) == labels).float().mean().item()

def fit(vit, outputs, pick, loss, train, epochs, lr, tune=True, decay=0.75, label="fine-tuning"):
    """Trains a linear head on the standardised features pick(tokens), with `tune` the encoder too, by AdamW
    and half a cosine; returns images -> logits. Block l of L learns at lr·decay^(L - l): what is early is
    general already (BEiT, SimMIM). Half of the images are flipped, their masks too."""
    torch.manual_seed(0)
    (images, targets), device, width = train, vit.cls_token.device, vit.norm.normalized_shape[0]
    head = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, outputs)).to(device)
    groups, batch, depth = [dict(params=[*head.parameters()], lr=lr)], min(64, len(images)), len(vit.blocks)
    for name, p in vit.named_parameters() if tune else ():
        layer = int(m[1]) + 1 if (m := re.match(r"blocks\.(\d+)", name)) else depth * name.startswith("norm")
        groups.append(dict(params=[p.requires_grad_()], lr=lr * decay ** (depth - layer)))
    solver, peaks = torch.optim.AdamW(groups, weight_decay=0.05), [group["lr"] for group in groups]
    whole = len(images) // batch * batch                    # BatchNorm needs full batches
    order = torch.cat([torch.randperm(len(images))[:whole] for _ in range(epochs)]).split(batch)
    for step, i in enumerate(progress(order, len(order), label), start=1):
        for group, peak in zip(solver.param_groups, peaks):
            group["lr"] = sslvit.lr_at(step, len(order) + 1, len(order) / 10, peak)
        x, y, flip = images[i], targets[i], torch.rand(batch) < 0.5
        for part in (x, y) if y.ndim == 3 else (x,):
            part[flip] = part[flip].flip(-1)
        with torch.set_grad_enabled(tune):
            tokens = vit(normalise(x, device))
        solver.zero_grad()
        loss(head(pick(tokens)), y.to(device)).backward()
        solver.step()
    head.eval()
    return torch.no_grad()(lambda images: torch.cat(
        [head(pick(vit(normalise(x, device)))).cpu() for x in images.split(64)]))

def sizes(vit):
    return vit.patch_size, vit.norm.normalized_shape[0], len(vit.blocks), vit.blocks[0].heads

def fine_tune(vit, train, test, classes, epochs=10, lr=1e-3, scratch=False):
    """All weights of a copy trained on labels, mean patch token ([P] figure 1). train, test: (images uint8
    (n, 3, S, S), labels (n, label sets)); classes: number per label set; scratch: a new ViT of the same size,
    no layer-wise decay. Returns 1 for right, 0 for wrong (n, label sets): the mean is the accuracy."""
    fresh = ViT(vit.grid * vit.patch_size, *sizes(vit)).to(vit.cls_token.device) if scratch else deepcopy(vit)
    how = dict(decay=1.0, label="from scratch") if scratch else {}
    def loss(logits, labels):
        return sum(map(F.cross_entropy, logits.split(classes, dim=1), labels.T))
    predict = fit(fresh, sum(classes), lambda t: t[:, 1:].mean(dim=1), loss, train, epochs, lr, **how)
    parts = predict(test[0]).split(classes, dim=1)
    return torch.stack([(p.argmax(dim=1) == y).float() for p, y in zip(parts, test[1].T)], dim=1).numpy()

def dense_probe(vit, train, test, classes, epochs=10, tune=False):
    """Segmentation: one linear layer per token predicts the classes of its p × p pixels; tune: the encoder
    learns too ([P] figure 1 right). train, test: (images uint8, masks (n, S, S)) -> IoU per image (n,)."""
    p = vit.patch_size
    def fold(y, mask):                                      # (B·N, classes·p²) -> (B, classes, S, S)
        return F.fold(y.unflatten(0, (len(mask), -1)).mT, mask.shape[1:], p, stride=p)
    predict = fit(
        deepcopy(vit), classes * p * p, lambda tokens: tokens[:, 1:].flatten(0, 1),
        lambda y, mask: F.cross_entropy(fold(y, mask), mask), train, epochs, 1e-3 if tune else 1e-2, tune,
        label="segmentation, " + ("fine-tuned" if tune else "linear"))
    parts = zip(test[0].split(64), test[1].split(64))
    return torch.cat([mean_iou(fold(predict(x), m).argmax(dim=1), m, classes) for x, m in parts]).numpy()

def cue_conflict(options, train, test, size, count):
    """-> (images, classes) to learn from (None: --data's own), images to decide on, their shapes, textures.
    Stimuli: shape and texture of the same number to learn from, of different numbers to decide on. A folder
    of Geirhos' names (cat1-elephant2.png: a cat's shape): learnt from --data's classes."""
    if isinstance(train, Stimuli):
        rng, sets = np.random.default_rng(0), []
        for source, number, turn in ((train, 2 * count, [0]), (test, count, range(1, 8))):
            shapes = rng.integers(8, size=number)
            textures = (shapes + rng.choice(turn, size=number)) % 8
            images = [source.render(i, s, t)[0] for i, (s, t) in enumerate(zip(shapes, textures))]
            sets.append((torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), shapes, textures))
        return sets[0][:2], *sets[1]
    if not options.cue_conflict:
        return None
    source, classes = sslvit.ImageFolder(options.cue_conflict), {c: i for i, c in enumerate(test.classes[0])}
    found = [re.fullmatch(r"([a-z]+)\d*-([a-z]+)\d*\.png", Path(file).name) for file, _ in source]
    if not all(found) or not {cue for m in found for cue in m.groups()} <= classes.keys():
        raise UserError(f"{options.cue_conflict}: needs <shape><n>-<texture><n>.png of --data's classes")
    images = joined(read_images(source, np.arange(len(found)), size))[0]
    return None, images, *np.array([[classes[cue] for cue in m.groups()] for m in found]).T

BANDS = [(0.1 * math.pi * i, 0.1 * math.pi * (i + 1)) for i in range(10)]   # rings, rad/px, up to Nyquist
NOISE = 0.1  # the noise's root mean square, in units of full brightness

def study(vit, facts, pixels, options, steps, scratch):
    """One model -> (numbers for results.json, arrays with a row per image for the claims)."""
    size, n, L = facts["image_size"], options.images, facts["depth"]
    train, test = sslvit.find_data(Config(data=options.data, image_size=size))
    labelled, test = bool(test and test.label_names), test or train
    rng, folders = np.random.default_rng(0), (options.data, Path(options.masks)) if options.masks else None
    picked, chosen = rng.permutation(len(test))[:n], rng.permutation(len(train))[:4 * n]
    maps = L * facts["heads"] * (size / facts["patch_size"]) ** 4           # attention weights of an image
    batch = max(1, min(64, int(1e8 / maps)))                                # at most 400 MB of them
    def read(source, which, label):
        return progress(read_images(source, which, size, folders, batch), -(-len(which) // batch), label)

    # what needs no training
    got = collect(vit, read(test, picked, "one pass"))
    images, labels, masks = joined(read(test, picked, "reading"))
    sample = {key: got[key] for key in ("distance", "nmi", "heads", "depths", "tokens") if key in got}
    result = {key: array.mean(axis=0) for key, array in sample.items()}
    for key in ("pooled", "volume", "fourier"):             # what the claims ask for: after the layer's MLP
        sample[key] = got[key][:, :, 1]
    sample["pi"], fourier = sample.pop("fourier")[..., -1], got["fourier"].mean(axis=0)     # (L, 2, F)
    result |= dict(pi=fourier[..., -1].flatten(), fourier=fourier[-1, 1])
    result["examples"] = examples(vit, pixels, images[:10])
    states, rank = torch.from_numpy(got["pooled"]).permute(1, 2, 0, 3), min(len(images) - 1, facts["width"])
    for key, log in (("token", got["spectrum"]), ("image", singular_spectrum(states)[..., :rank].numpy())):
        result |= {f"{key} spectrum": log[-1, 1] - log[-1, 1, :1], f"{key} volume": log.mean(2).flatten()}
    if not labelled or not steps:
        return result, sample

    # probes of the output, by regression and by nearest neighbours; three quarters to learn, one to choose
    names, classes, cut = test.label_names, [len(c) for c in test.classes], 3 * len(chosen) // 4
    seen = collect(vit, read(train, chosen, "training features"), measure=False)
    splits = [{k: v[:cut] for k, v in seen.items()}, {k: v[cut:] for k, v in seen.items()}, got]
    output = [(split["output"], split["labels"]) for split in splits]
    best = better_probe(*output)
    sample |= {"probe": best["right"], "probe_val": best["val"]}
    result["probe of"] = ("pooled patch tokens", "CLS")[best["cls"]]
    for s, name in enumerate(names):
        near = [array for x, y in output[::2] for array in (x[:, 0], y[:, s])]
        result |= {f"linear probe {name}": best["accuracy"][s], f"k-NN {name}": knn(*near)}
    if "layers" in steps:
        for kind in ("cls", "pooled"):
            probes = [probe_sets(*((split[kind][:, i // 2, i % 2], split["labels"]) for split in splits))
                      for i in progress(range(2 * L), 2 * L, f"probes of every layer, {kind}")]
            for s, name in enumerate(names):
                result[f"layers {name}, {kind}"] = [probe["accuracy"][s] for probe in probes]
        sample["layers"] = np.stack([probe["right"] for probe in probes[1::2]], axis=1)  # after the MLP
        sample["layers_val"] = np.array([probe["val"] for probe in probes[1::2]])
        result["layer probes"] = sample["layers"].mean(axis=0)
    # fine-tuning and segmentation
    lesson = joined(read(train, chosen, "reading")) if steps & {"tuned", "dense"} else None
    if "tuned" in steps:
        both = [torch.cat([a, b[cut:]]) for a, b in zip((images, labels), lesson)]      # test, validation
        work, alike = ([x[:cut] for x in lesson[:2]], both, classes, options.epochs), (*sizes(vit), size)
        if alike not in scratch:                            # one new network serves all models of its size
            scratch[alike] = fine_tune(vit, *work, scratch=True)
        tuned = "fine_tune", "fine-tuned", fine_tune(vit, *work)
        for key, label, right in (tuned, ("scratch", "from scratch", scratch[alike])):
            result |= {f"{label} {name}": a for name, a in zip(names, right[:len(images)].mean(axis=0))}
            sample |= {key: right[:len(images)].mean(axis=1), f"{key}_val": right[len(images):].mean()}
    if "dense" in steps and masks is not None:
        kinds, parts = 1 + int(max(masks.max(), lesson[2].max())), (lesson[0][:n], lesson[2][:n])
        for key, tune in (("linear", False), ("tuned", True)):
            iou = dense_probe(vit, parts, (images, masks), kinds, options.epochs, tune)
            sample[f"dense_{key}"], result["mIoU fine-tuned" if tune else "mIoU linear"] = iou, iou.mean()
    # shape against texture, and band-limited noise
    if "bias" in steps:
        if cues := cue_conflict(options, train, test, size, n):
            known, conflict, shapes, textures = cues
            x, y = (encode(vit, known[0]), known[1][:, None]) if known else (seen["output"], seen["labels"])
            keep = np.flatnonzero(np.isin(y[:, 0], [*shapes, *textures]))
            known = [(x[k], y[k]) for k in np.split(keep, [3 * len(keep) // 4])]
            decisions = better_probe(*known, (encode(vit, conflict), shapes[:, None]))["predicted"]
            sample["cues"] = np.stack([decisions, shapes, textures], axis=1)
            result["shape bias cues"] = shape_bias(decisions, shapes, textures)
        clean, generator = images[:n // 2] / 255, torch.Generator().manual_seed(0)
        sets = [encode(vit, clean)] + [encode(vit, clean + NOISE * band_noise(clean.shape, *band, generator))
                                       for band in progress(BANDS, len(BANDS), "band noise")]
        noisy = np.concatenate(sets), np.tile(got["labels"][:len(clean)], (len(sets), 1))
        right = better_probe(*output[:2], noisy)["right"].reshape(len(sets), -1)
        sample["noise"], result["noise drop"] = right.T, band_noise_drop(right[0], right[1:])
    return result, sample

# ==== 5. Claims: does the paper's picture hold for these models?   (rules fixed before any result) =========
def third(values, which):
    """Early: the first third of the layers, late: the last (both rounded up); middle: what lies between."""
    k = math.ceil(len(values) / 3)
    middle = values[k:-k] if len(values) > 2 * k else values
    return dict(early=values[:k], middle=middle, late=values[-k:], last=values[-1:], all=values)[which]

def over(key, which="all"):
    """Value function (a model's arrays, take) -> number: mean over images and over layers. `take` draws the
    images: all, or a bootstrap sample that is the same for all models."""
    return lambda m, take: float(third(np.atleast_1d(take(m[key]).mean(axis=0)), which).mean())

def last_minus_best(m, take):   # the layer best on validation, lest chance choose it on the test set
    accuracy = take(m["layers"]).mean(axis=0)
    return accuracy[-1] - accuracy[m["layers_val"].argmax()]

def token_growth(m, take):      # of the mean log singular value, from the first layer to the last
    return np.diff(take(m["volume"])[:, [0, -1]]).mean()

def image_growth(m, take):      # of the (images × D) matrix of mean tokens
    x = torch.from_numpy(take(m["pooled"])[:, [0, -1]]).transpose(0, 1)     # first and last layer: (2, n, D)
    first, last = singular_spectrum(x)[:, :min(x.shape[1] - 1, x.shape[2])].mean(dim=1)
    return float(last - first)

def high_noise(m, take):
    right = take(m["noise"]).mean(axis=0)                                   # clean, then the bands
    return float(1 - third(right[1:], "late").mean() / right[0]) if right[0] else math.nan

CL_MIM, MIM_CL = lambda v: v("CL") - v("MIM"), lambda v: v("MIM") - v("CL")
# A part is (what, value function, test): test(v) > 0 is what the claim says; v(role) is the value's mean over
# the models of a role. Accuracy is the mean over the label sets (shape and texture, or class).
CLAIMS = [
    (1, "1 left", "CL wins linear probing, MIM wins fine-tuning", [
        ("linear probe, output", over("probe"), CL_MIM), ("fine-tune accuracy", over("fine_tune"), MIM_CL)]),
    (2, "1 middle", "CL wins small models, MIM wins large ones", [
        ("fine-tuning, smallest size", over("fine_tune"), lambda v: v("smallest CL") - v("smallest MIM")),
        ("fine-tuning, largest size", over("fine_tune"), lambda v: v("largest MIM") - v("largest CL"))]),
    (3, "1 right", "MIM wins dense prediction", [
        ("mIoU, linear", over("dense_linear"), MIM_CL), ("mIoU, fine-tuned", over("dense_tuned"), MIM_CL)]),
    (4, "2, 3", "CL attends globally, MIM locally, most in later layers", [
        (f"attention distance, {which}, px", over("distance", which), CL_MIM) for which in ("late", "all")]),
    (5, "4", "CL's later attention is one map for all queries", [("NMI, late", over("nmi", "late"), MIM_CL),
        ("NMI, late: CL < MIM / 2", over("nmi", "late"), lambda v: v("MIM") / 2 - v("CL"))]),
    (6, "5", "CL lacks diversity across heads, depths and tokens", [
        (f"cosine between {key}, late", over(key, "late"), CL_MIM) for key in ("heads", "depths", "tokens")]),
    (7, "6, 7", "CL spreads images apart, MIM the tokens of an image", [
        ("growth of log singular values, tokens", token_growth, MIM_CL),
        ("growth of log singular values, images", image_growth, CL_MIM)]),
    (8, "8", "CL keeps low frequencies, MIM high ones", [
        ("Δ log amplitude at π, late", over("pi", "late"), MIM_CL)]),
    (9, "9", "CL is shape-biased, MIM texture-biased", [
        ("shape bias", lambda m, take: shape_bias(*take(m["cues"]).T), CL_MIM),
        ("accuracy drop, high-frequency noise", high_noise, MIM_CL)]),
    (10, "10", "MIM is better in early layers, CL in the last", [
        ("pooled probe, early", over("layers", "early"), MIM_CL),
        ("best layer", lambda m, take: 1.0 + take(m["layers"]).mean(axis=0).argmax(), CL_MIM),
        ("last minus best layer, MIM < 0", last_minus_best, lambda v: -v("MIM")),
        ("CL, late > early", over("layers", "late"), lambda v: v("CL") - v("CL", over("layers", "early")))]),
    (11, "11", "an explicit decoder keeps the last layers useful", [
        ("last minus best layer", last_minus_best, lambda v: v("MIM with decoder") - v("MIM")),
        ("NMI, last layer", over("nmi", "last"), lambda v: v("MIM with decoder") - v("MIM"))]),
    (12, "12", "a hybrid beats both", [
        ("probe and fine-tuning, least margin", over("probe"), lambda v: min(
            v("best hybrid", over(key)) - v(pure, over(key))
            for key in ("probe", "fine_tune") for pure in ("CL", "MIM"))),
        ("NMI: last < mid", over("nmi", "last"), lambda v: v("hybrid", over("nmi", "middle")) - v("hybrid")),
        ("Δ at π: early ≥ CL, late ≤ MIM", over("pi", "late"), lambda v: min(
            v("hybrid", over("pi", "early")) - v("CL", over("pi", "early")), v("MIM") - v("hybrid")))])]
NEEDS = {  # array of a model -> what it takes to have it; every other missing key is a role
    "probe": "labels", "fine_tune": "labels, and --only accuracy", "layers": "labels, and --only layers",
    "noise": "labels, and --only noise", "cues": "cue-conflict images, labels, and --only bias",
    "dense_linear": "masks, labels, and --only dense", "depths": "two layers",
    "nan": "two heads or more, and decisions that match a cue"}

def groups_of(models, samples):
    """Role -> arrays of its models; several seeds are several models. The plain roles take the size that most
    models have, without decoder; 'hybrid' is the λ nearest 0.2, 'best hybrid' the λ best on validation."""
    size = [(m["width"] ** 2 * m["depth"], m["width"], m["depth"]) for m in models]
    groups, hybrids = defaultdict(list), defaultdict(list)
    common = max(size, key=lambda s: (size.count(s), s))
    for m, sample, own in zip(models, samples, size):
        if own == common and not m["decoder_depth"]:
            (hybrids[m["lam"]] if m["role"] == "hybrid" else groups[m["role"]]).append(sample)
        elif own == common:
            groups[f"{m['role']} with decoder"].append(sample)
        for word, end in (("smallest", min(size)), ("largest", max(size))):
            if own == end and min(size) < max(size):
                groups[f"{word} {m['role']}"].append(sample)
    if hybrids:
        score = {lam: np.mean([s.get("probe_val", 0) + s.get("fine_tune_val", 0) for s in hybrids[lam]])
                 for lam in hybrids}
        groups["hybrid"] = hybrids[min(hybrids, key=lambda lam: abs((0.2 if lam is None else lam) - 0.2))]
        groups["best hybrid"] = hybrids[max(score, key=score.get)]
    return dict(groups)

def evaluate(test, value, groups, rng=None):
    """test(v) for all seeds and images, or, with rng, for a bootstrap sample: seeds first, then images.
    KeyError: a role without a model, or what was not measured."""
    if rng:
        groups = {role: [ms[i] for i in rng.integers(len(ms), size=len(ms))] for role, ms in groups.items()}
        draw = rng.random(max(len(m["nmi"]) for ms in groups.values() for m in ms))
    take = (lambda x: x[(draw[:len(x)] * len(x)).astype(int)]) if rng else lambda x: x
    return test(lambda role, f=value: float(np.mean([f(m, take) for m in groups[role]])))

def judge(groups, draws=1000):
    """The claims table. A part holds when its difference and its 95 % bootstrap interval are above 0.
    'agrees': all parts hold. 'weak': all differences above 0, or half of the parts hold. Else 'disagrees'."""
    table = []
    for number, figure, claim, parts in CLAIMS:
        rows, verdict = [], None
        for what, value, test in parts:
            rows.append(row := {"part": what})
            for role in ("CL", "MIM", "hybrid"):
                with contextlib.suppress(KeyError):
                    row[role] = evaluate(lambda v, role=role: v(role), value, groups)
            try:
                row["difference"], rng = evaluate(test, value, groups), np.random.default_rng(0)
                if math.isnan(row["difference"]):
                    raise KeyError("nan")
                count = draws // 5 if value is image_growth else draws      # each draw decomposes matrices
                drawn = [evaluate(test, value, groups, rng) for _ in range(count)]
                row["interval"] = np.nanpercentile(drawn, [2.5, 97.5]).tolist()
                row["holds"] = bool(row["difference"] > 0 and row["interval"][0] > 0)
            except KeyError as key:
                missing, verdict = key.args[0], "not testable"
                row["why"] = f"needs {NEEDS.get(missing, f'a checkpoint: {missing}')}"
        if not verdict:
            held = sum(row["holds"] for row in rows)
            weak = all(row["difference"] > 0 for row in rows) or 2 * held >= len(rows)
            verdict = "agrees" if held == len(rows) else "weak" if weak else "disagrees"
        table.append(dict(claim=number, figure=figure, text=claim, verdict=verdict, parts=rows))
    return table

def claims_table(table):
    lines = [f"{'':41}     CL     MIM  hybrid   difference [95 % interval]"]
    for claim in table:
        lines.append("{claim:2} {text} (figure {figure}): ".format(**claim) + claim["verdict"].upper())
        for row in claim["parts"]:
            values = (row.get(role) for role in ("CL", "MIM", "hybrid"))
            values = " ".join("      -" if value is None else f"{value:7.3f}" for value in values)
            text = row.get("why") or "{:+.3f} [{:+.3f}, {:+.3f}]".format(row["difference"], *row["interval"])
            lines.append(f"   {row['part']:38} {values}   {text}{'  holds' * row.get('holds', False)}")
    return "\n".join(lines)

# ==== 6. Figures: drawn from the results alone =============================================================
COLOURS = {"CL": "#D55E00", "MIM": "#0072B2", "hybrid": "#009E73", "other": "#7F7F7F"}     # colour-blind safe
STYLES, MARKERS = ("-", "--", ":", "-."), "osD^"            # models of one objective differ in these
AXES = {  # x label -> x of n values from a model of L layers
    "layer": lambda n, L: np.arange(L - n + 1, L + 1),
    "layer (half: after its attention)": lambda n, L: np.arange(1, n + 1) / 2,
    "rank": lambda n, L: np.arange(1, n + 1),
    "frequency (π rad per patch)": lambda n, L: np.linspace(0, 1, n),
    "noise frequency (π rad per pixel)": lambda n, L: (np.arange(n) + 0.5) / n}
LAYER, HALF, RANK, FREQUENCY, NOISE_BAND = AXES
LABELS = "labels and a training set (the stimuli, or class folders in --data)"
NMI, AT_PI = ("nmi", "NMI (band: heads)", LAYER), ("pi", "Δ log amplitude at π", HALF)
PROBE, TUNED = ("linear probe ", "linear probe accuracy"), ("fine-tuned ", "fine-tuned accuracy")
# name for --only: (file, title, panels (key in the results, y label, x label), to train, needs).
# A key that ends in a blank is for all that begin so; without x label they are one panel, else one each.
FIGURES = {
    "accuracy": ("fig01_left", "CL wins linear probing, MIM wins fine-tuning?", [
        (*PROBE, ""), (*TUNED, ""), ("from scratch ", "from scratch accuracy", "")], {"tuned"}, LABELS),
    "scaling": ("fig01_middle", "CL wins small models, MIM large ones?", [(*TUNED, "parameters")], {"tuned"},
                "checkpoints of two model sizes, and " + LABELS),
    "dense": ("fig01_right", "MIM wins dense prediction?", [("mIoU ", "mIoU (test)", "")], {"dense"},
              "masks (the stimuli's, or --masks) and " + LABELS),
    "maps": ("fig02", "CL attends globally, MIM locally?  Attention of the query in the box", [], (), ""),
    "distance": ("fig03", "CL attends globally, MIM locally?", [
        ("distance", "attention distance (px; band: heads)", LAYER)], (), ""),
    "nmi": ("fig04", "CL's late attention is one map (0)?", [NMI], (), ""),
    "similarity": ("fig05", "CL's heads, depths and tokens are alike (1) in late layers?", [
        (key, f"cosine between {key}", LAYER) for key in ("heads", "depths", "tokens")], (), "two layers"),
    "plane": ("fig06", "CL moves all tokens together, MIM one by one?  Last attention", [], (), ""),
    "spectra": ("fig07", "CL spreads images apart, MIM the tokens of an image?", [
        (f"{key} {what}", label + key + "s", x) for key in ("token", "image") for what, label, x in (
            ("spectrum", "last layer, first = 0,\nlog singular value, ", RANK),
            ("volume", "mean log\nsingular value, ", HALF))], (), ""),
    "fourier": ("fig08", "CL keeps low frequencies, MIM high ones?", [
        AT_PI, ("fourier", "Δ log amplitude, last layer", FREQUENCY)], (), ""),
    "bias": ("fig09_left", "CL decides by shape, MIM by texture?", [
        ("shape bias ", "share of shape decisions", "")], {"bias"},
        "cue-conflict images (the stimuli, or --cue-conflict) and " + LABELS),
    "noise": ("fig09_right", "High frequencies matter more to MIM?", [
        ("noise drop", "relative accuracy drop", NOISE_BAND)], {"bias"}, LABELS),
    "layers": ("fig10", "MIM is better in early layers, CL in the last?", [("layers ", "linear probe", HALF)],
               {"layers"}, LABELS),
    "decoder": ("fig11", "An explicit decoder keeps the last layers useful?", [
        ("layer probes", "linear probe, pooled tokens", LAYER), NMI, AT_PI], {"layers"},
        "MIM with and without decoder; " + LABELS),
    "sweep": ("fig12", "A hybrid beats both?  Local first, global last?", [
        (*PROBE, "lam"), (*TUNED, "lam"), NMI, AT_PI], {"tuned"}, "λ = 0, 1 and between; " + LABELS),
    "tokens": ("tokens", "Last-layer tokens of ten images, coloured by image", [], (), ""),
    "pixels": ("pixels", "What was under the mask?", [], (), "a checkpoint with mask token and pixel head"),
    "cka": ("cka", "Which layers see the same differences between images?", [], (), "equally many images")}

def canvas(rows, cols, w=4.3, h=3.7):
    return plt.subplots(rows, cols, figsize=(w * cols, h * rows), squeeze=False, layout="constrained")

def fig_curves(panels, models):
    """Per panel one curve per model along depth, rank or frequency; hollow points side by side, one per key;
    or points and a line along a property of the models (λ, parameters). Values (layers, heads) are drawn as
    mean and band."""
    rows = []
    for stem, y_label, x_label in panels:
        keys = [key for key in models[0] if key == stem or stem[-1] == " " and key.startswith(stem)]
        if x_label in AXES and stem[-1] == " ":
            rows += [([key], f"{y_label},\n{key.removeprefix(stem)}", x_label) for key in keys]
        else:
            rows.append((keys, y_label, x_label))
    wrap = 2 if len(rows) in (2, 4) else min(3, len(rows))
    fig, axes = canvas(-(-len(rows) // wrap), wrap)
    for axis, (keys, y_label, x_label) in zip(axes.flat, rows):
        words = [key.split(" ")[-1] for key in keys]
        for aside, m in zip(np.linspace(-0.3, 0.3, len(models) + 2)[1:], models):
            colour, nth = COLOURS[m["role"]], m["nth"] % 4
            style = dict(color=colour, marker=MARKERS[nth], ms=5, label=m["name"])
            if x_label in AXES:
                y = np.array(m[keys[0]], dtype=float)
                x = AXES[x_label](len(y), m["depth"])
                if y.ndim == 2:
                    axis.fill_between(x, y.min(axis=1), y.max(axis=1), color=colour, alpha=0.15, lw=0)
                    y = y.mean(axis=1)
                axis.plot(x, y, ls=STYLES[nth], **style | ({"marker": ""} if len(y) > 30 else {}))
            else:
                x = [m[x_label]] * len(keys) if x_label else np.arange(len(keys)) + aside
                axis.plot(x, [m[key] for key in keys], ls="", mfc="none", mew=1.5, **style | {"ms": 7})
        for key, word, style in zip(keys, words, STYLES if x_label in ("lam", "parameters") else ()):
            for role in COLOURS if x_label == "parameters" else [None]:     # λ joins all roles
                line = sorted((m[x_label], m[key]) for m in models if role in (None, m["role"]))
                if line:
                    axis.plot(*zip(*line), style, color=COLOURS.get(role, "black"), lw=1, zorder=0)
                    axis.annotate(word, line[-1], fontsize=9)
        axis.set(xlabel={"lam": "λ (0: MIM, 1: CL)"}.get(x_label, x_label), ylabel=y_label)
        if not x_label:
            axis.set(xticks=range(len(keys)), xticklabels=words, xlim=(-0.5, len(keys) - 0.5))
    axes[0, 0].legend(fontsize=9)
    return fig

def fig_images(key, models):
    """Attention maps or reconstructions, one row per model."""
    fig, axes = canvas(len(models), len(models[0]["examples"][key]), 1.4, 1.7)
    for m, line in zip(models, axes):
        line[0].set_ylabel(m["name"], color=COLOURS[m["role"]])
        for axis, (image, label, boxes) in zip(line, m["examples"][key]):
            axis.imshow(image, cmap="magma", vmin=0)
            axis.set(xticks=[], yticks=[], title=label)
            for r, c, side in boxes:
                corner = c * side - 0.5, r * side - 0.5
                axis.add_patch(plt.Rectangle(corner, side, side, fill=False, ec="#56B4E9", lw=2))
    return fig

def fig_plane(key, models):
    """Tokens on their principal plane, a colour per image: around the last attention, or at the end."""
    fig, axes = canvas(1, len(models), 3.8, 4)
    for axis, m in zip(axes[0], models):
        for k, tokens in enumerate(np.array(m["examples"][key])):
            parts = np.split(tokens, 2) if key == "plane" else [tokens]
            axis.plot(*np.stack(parts).transpose(2, 0, 1), color=f"C{k}", lw=0.4, alpha=0.5)
            for part, label, fill in zip(parts[::-1], ("after", "before"), (f"C{k}", "none")):
                axis.scatter(*part.T, s=9, ec=f"C{k}", fc=fill, label=label if k + len(parts) == 2 else None)
        purity = f"\nnearest token is of the same image: {m['examples']['purity']:.0%}"
        axis.set_title(m["name"] + purity * (key == "tokens"), color=COLOURS[m["role"]], fontsize=10)
        axis.set(xlabel="first principal component", ylabel="second principal component")
    if key == "plane":
        axes[0, 0].legend(title="colour: image", fontsize=9)
    return fig

def fig_cka(key, models):
    """Linear CKA of every layer of every model with every other."""
    fig, [[axis]] = canvas(1, 1, 6.5, 5)
    shown = axis.imshow(np.array(models[0][key]), vmin=0, vmax=1, cmap="viridis", origin="lower")
    ends = np.cumsum([0] + [m["depth"] for m in models])
    for lines in (axis.hlines, axis.vlines):
        lines(ends[1:-1] - 0.5, -0.5, ends[-1] - 0.5, color="white")
    for ticks in (axis.set_xticks, axis.set_yticks):
        ticks((ends[1:] + ends[:-1] - 1) / 2, [m["name"] for m in models])
    axis.set_xlabel("layers of each model, first to last")
    fig.colorbar(shown, label="linear CKA of pooled tokens")
    return fig

def draw(models, names, out):
    """Each figure that the results can support; for every other a line that says what would enable it."""
    how = dict(maps=fig_images, pixels=fig_images, plane=fig_plane, tokens=fig_plane, cka=fig_cka)
    for name in names:
        file, title, panels, _, enabled_by = FIGURES[name]
        able = [m for m in models if all(any(key.startswith(stem) for key in m) for stem, _, _ in panels)]
        key = dict(scaling="parameters", sweep="lam", decoder="decoder_depth").get(name)    # must differ
        if key:
            able = [m for m in able if m[key] is not None and (name != "decoder" or m["role"] == "MIM")]
            able = able if len({m[key] for m in able}) > 1 + (key == "lam") else []
        if name in ("maps", "pixels", "cka"):
            able = [m for m in able if name in m["examples"] or name == "cka" and name in models[0]]
        if not able:
            print(f"skipped {name}: needs {enabled_by}")
            continue
        fig = how.get(name, fig_curves)(panels or name, able)
        fig.suptitle(title)
        fig.savefig(out / f"{file if file == name else file + '_' + name}.png", dpi=130)
        plt.close(fig)

# ==== 7. Command line ======================================================================================
def plain(x):
    """What JSON can hold: arrays as lists, 5 significant digits, nan as null."""
    return json.loads(json.dumps(x, default=lambda array: array.tolist()), parse_constant=lambda nan: None,
                      parse_float=lambda number: float(f"{float(number):.5g}"))

def parse(argv):
    def fail(message):
        raise UserError(f"{message} (see --help)")
    parser = argparse.ArgumentParser("analyze.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = fail, parser.add_argument
    add("checkpoints", nargs="*", help="files; NAME=FILE names one, cl=, mim=, hybrid= say what it is")
    add("--data", default="", help="folder of images as for sslvit.py; without it, the built-in stimuli")
    add("--masks", default="", help="folder with <same path>.png of class numbers per pixel")
    add("--cue-conflict", default="", help="folder of <shape><n>-<texture><n>.png, classes as in --data")
    add("--only", nargs="+", default=list(FIGURES), metavar="NAME", help=" ".join(FIGURES))
    add("--out", default="figures", help="where PNGs and results.json go [figures]")
    add("--from", dest="results", default="", help="a results.json: draw again, compute nothing")
    add("--images", type=int, default=1000, help="test images; probes learn from three times as many [1000]")
    add("--epochs", type=int, default=10, help="of fine-tuning and of the segmentation heads [10]")
    add("--heads", type=int, default=0, help="attention heads, for files whose shapes do not tell")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    options = parser.parse_args(argv)
    try:
        torch.zeros(1, device=options.device)
    except Exception as error:                              # torch has many kinds
        raise UserError(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    for bad, message in (
            (set(options.only) - set(FIGURES), f"--only: choose from {' '.join(FIGURES)}"),
            (bool(options.checkpoints) == bool(options.results), "give checkpoints, or --from results"),
            (options.images < 20 or options.epochs < 1, "--images is 20 or more, --epochs 1 or more"),
            (options.heads < 0, "--heads is 1 or more"),
            *((not os.path.isdir(folder or "."), f"{folder}: no such folder")
              for folder in (options.masks, options.cue_conflict))):
        if bad:
            raise UserError(message)
    return options

def analyse(options):
    """Checkpoints -> the contents of results.json."""
    loaded, models, samples, scratch, began = [], [], [], {}, time.monotonic()
    for given in options.checkpoints:                       # every file is read before anything long begins
        name, _, path = ("", "", given) if os.path.exists(given) else given.rpartition("=")
        vit, facts, report, pixels = load_model(path, options.heads or None)
        print(report, flush=True)
        if role := dict(cl="CL", mim="MIM", hybrid="hybrid").get(name.lower()):
            facts |= dict(role=role, lam=dict(CL=1.0, MIM=0.0).get(role, facts["lam"]))
        stem = Path(path).parent.name if Path(path).stem == "ckpt" else Path(path).stem
        facts["name"] = name or f"{facts['role']}: {stem}"
        facts["nth"] = sum(other["role"] == facts["role"] for _, other, _ in loaded)
        loaded.append((vit.to(options.device).requires_grad_(False), facts, pixels))
    steps = set().union(*(FIGURES[name][3] for name in options.only))
    for vit, facts, pixels in loaded:
        print(f"{facts['name']}: to be trained: {' '.join(sorted(steps)) or 'nothing'}", flush=True)
        result, sample = study(vit, facts, pixels, options, steps, scratch)
        models.append(facts | result)
        samples.append(sample)
        print(f"  {time.monotonic() - began:.0f} s since the start", flush=True)
    if len({len(sample["pooled"]) for sample in samples}) == 1:
        layers = [torch.from_numpy(layer) for sample in samples for layer in sample["pooled"].swapaxes(0, 1)]
        models[0]["cka"] = [[float(cka(a, b)) for a in layers] for b in layers]
    return plain(dict(settings=vars(options), models=models, claims=judge(groups_of(models, samples))))

def main(argv=None):
    """Runs the command line; returns the exit status: 0, or 2 for bad input with one line on what to mend."""
    try:
        options = parse(argv)
        out, old = Path(options.out), options.results
        out.mkdir(parents=True, exist_ok=True)
        try:
            results = json.loads(Path(old).read_text()) if old else analyse(options)
            draw(results["models"], options.only, out)
            print(claims_table(results["claims"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if not old:
                raise
            raise UserError(f"--from {old}: not results ({type(error).__name__})") from error
        if not old:
            (out / "results.json").write_text(json.dumps(results))
            print(f"figures and results.json are in {out}")
        return 0
    except (UserError, OSError) as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main())
