"""What did they learn?  This file takes trained Vision Transformers apart and checks twelve claims on them.

  python analyze.py runs/*/ckpt.pt                                   every figure and claim, on the stimuli
  python analyze.py cl=mocov3.pth mim=simmim.pth --data /imagenet    published weights, photographs
  python analyze.py --from figures/results.json                      draws again, computes nothing

Section of the paper [P] -> claim -> figure, and its name for --only. This table is MAP below.
  1 accuracy   1 CL wins linear probing, MIM wins fine-tuning             1 left           accuracy
               2 CL wins small models, MIM wins large ones                1 middle         scaling
               3 MIM wins dense prediction                                1 right          dense
  2 attention  4 CL attends globally, MIM locally, most in later layers   2, 3             maps distance
               5 CL's later attention is one map for all queries          4                nmi
               6 CL lacks diversity across heads, depths and tokens       5                similarity
  3 transform  7 CL spreads images apart, MIM the tokens of an image      6, 7             plane spectra
               8 CL keeps low frequencies, MIM high ones                  8                fourier
               9 CL is shape-biased, MIM texture-biased                   9 left, 9 right  bias noise
  4 parts     10 MIM is better in early layers, CL in the last            10               layers
              11 an explicit decoder keeps the last layers useful         11               decoder
  5 hybrid    12 a hybrid beats both                                      12               sweep
  not in [P]   - do the tokens of an image stay together                  -                tokens
               - what was under the mask                                  -                pixels
               - which layers see the same differences between images     -                cka
               - does contrastive learning ignore what crops destroy      -                views

[P] Park et al., What Do Self-Supervised Vision Transformers Learn?, ICLR 2023, arXiv 2305.00729.
Glossary: B batch, N patch tokens (CLS is dropped), D width, H heads, d = D/H, L layers, F frequencies, n rows
of a matrix, A[q,k] attention of query q to key k; CL contrastive learning, MIM masked image modelling.
"""

import argparse, contextlib, json, math, os, pickle, re, sys, time, zipfile
from collections import Counter, defaultdict
from copy import deepcopy
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
from PIL import Image, ImageOps
import sslvit
from sslvit import MEAN, SIZES, STD, Block, Config, Stimuli, UserError, ViT, require
MAP = re.findall(r"^ .{13} ?([\d-]+) (.+?)  +(.+?)  +(.+)$", __doc__, re.M)  # number, claim, figures, names

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
    tokens (..., N, D), grid (rows, cols) or a number -> (..., F) at ω = π·j/(F - 1), F = short side // 2 + 1.
    First 0; last: far below 0 = only low frequencies left (blurred), about 0 = as much detail as mean."""
    rows, cols = (grid, grid) if isinstance(grid, int) else grid
    n = torch.arange(rows * cols, device=tokens.device)
    omega = torch.linspace(0, math.pi, min(rows, cols) // 2 + 1, dtype=torch.float64).to(tokens.device)
    phase = omega[:, None] * (n // cols + n % cols)                                 # (F, N)
    real, imag = (wave.to(tokens.dtype) @ tokens for wave in (phase.cos(), phase.sin()))    # (..., F, D)
    log = torch.hypot(real, imag).clamp(min=1e-37).log().mean(dim=-1)               # keeps log 0 finite
    return log - log[..., :1]
def singular_spectrum(x):
    """How many directions do the rows of a matrix fill?  Log singular values, largest first ([P] figure 7).
    x (..., n, D), centred over n here -> (..., min(n, D)). Equal values: the rows fill all directions alike;
    a steep fall: few. With n ≤ D the last is 0 by centring. From the Gram matrix in float64: as exact as an
    SVD in float32 and several times faster; below 1e-8 of the largest is rounding, so that is the floor."""
    x = (x - x.mean(dim=-2, keepdim=True)).double()
    square = torch.linalg.eigvalsh(x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x).flip(-1)
    floor = (square[..., :1] * 1e-16).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.maximum(square, floor).log() / 2
def free_spectrum(x):
    """singular_spectrum(x) without the value that is 0 only because n ≤ D rows were centred."""
    return singular_spectrum(x)[..., :min(x.shape[-2] - 1, x.shape[-1])]
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
    """Intersection over union, mean over the classes in either map; pred, target (B, h, w) of class numbers,
    target VOID where nobody knows -> (B,) in [0, 1]. 1: every pixel right ([P] figure 1 right)."""
    maps = (m.long().masked_fill(target == VOID, classes).flatten(1) for m in (pred, target))
    p, t = (F.one_hot(m, classes + 1)[..., :-1].bool() for m in maps)               # (B, hw, classes)
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
    (bands, n): 1 where right -> (bands,), at most 1. 0: does not matter, 1: all is lost; nan: never right."""
    return 1 - noisy.mean(axis=-1) / (clean.mean() or math.nan)

# ==== 2. Files: what is in a checkpoint, ours or published?   (data, never code) ===========================
class Inert:
    """Stands in for whatever a file names beside tensors and dicts, argparse.Namespace (MAE, DINO), a yacs
    node (SimMIM) or os.system: takes any call, does nothing. Nothing in a file is imported or called."""
    def __init__(self, *args, **kwargs):
        pass
    __setstate__ = __setitem__ = append = extend = add = __init__

class SafePickle:       # what torch.load takes for the pickle module
    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            known = r"collections.OrderedDict|torch\.(Size|\w+Storage|_utils\._rebuild_(parameter|tensor\w*))"
            return super().find_class(module, name) if re.fullmatch(known, f"{module}.{name}") else Inert
    load = staticmethod(lambda file, **options: SafePickle.Unpickler(file, **options).load())

TABLE, REGISTERS, BLOCK = "relative_position_bias_table", "blocks.0.register_tokens", r"blocks\.(\d+)\."
RENAMES = ((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."), (r"\.gamma_([12])$", r".ls\1.gamma"),    # in order:
           (r"^(reg_token|register_tokens)$", REGISTERS))     # DINOv2 in chunks; SimMIM, BEiT; timm, DINOv2
NOT_ENCODER = re.compile(r"(head|fc|fc_norm|lm_head|mask_token|masked_embed|decoder\w*)(\.|$)|"
                         r".*(relative_position_index|num_batches_tracked)$")       # listed as skipped
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
        table, registers = weights["pos_embed"], weights.get(REGISTERS, torch.zeros(1, 0, 1))
        extra = table.shape[1] - math.isqrt(table.shape[1]) ** 2    # tokens with a place beside the patches
        require(extra in (0, 1, 1 + registers.shape[1]), f"{table.shape[1]} positions, which is no square")
        if extra > 1:
            weights[REGISTERS] = registers + table[:, 1:extra]
        cls = table[:, :1] * (extra > 0)                            # timm's no_embed_class: CLS at 0
        weights["pos_embed"] = torch.cat([cls, table[:, extra:]], dim=1)
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
def load_encoder(path, heads=None):
    """File -> ViT in eval mode; prints what it is and every missing, unexpected and skipped key. Told by
    content, not name; sizes come from shapes, `heads` is for files whose shapes do not tell. The ViT carries
    `facts`, a dict, and `pixels`: (mask token, decoder) if they are named and shaped as here or in SimMIM."""
    stem, doubt = "patch_embed.proj.weight", ""
    try:
        names = " ".join(zipfile.ZipFile(path).namelist()) if zipfile.is_zipfile(path) else ""
        require("constants.pkl" not in names, "a TorchScript program, which torch.load would interpret")
        raw = torch.load(path, map_location="cpu", weights_only=False, pickle_module=SafePickle)
        raw = raw if isinstance(raw, dict) else {}
        config = raw["config"] if isinstance(raw.get("config"), dict) and "objective" in raw["config"] else {}
        for box in ("state_dict", "model", "teacher", "student", "module"):
            raw = raw[box] if isinstance(raw.get(box), dict) else raw
        state = {str(key): value for key, value in raw.items() if isinstance(value, torch.Tensor)}
        prefixes = [key.removesuffix(stem) for key in state if key.endswith(stem)]
        require(prefixes, f"no {stem} in {len(state)} tensors {list(state)[:3]}")
        prefix = min(prefixes, key=lambda p: ("momentum" in p or "key" in p, len(p)))   # average: if alone
        moco = re.search("base_encoder|momentum", prefix)
        weights, skipped, own = tidy(state, prefix)
        table, positions = (weights.get(name) for name in ("rel_pos_bias." + TABLE, "pos_embed"))
        width, _, patch, _ = weights[stem].shape
        depth = 1 + max(int(n) for name in weights for n in re.findall(BLOCK, name))
        grid = math.isqrt(positions.shape[1]) if positions is not None else 224 // patch
        if table is not None:
            grid, heads = (math.isqrt(len(table) - 3) + 1) // 2, table.shape[1] // max(1, own)
        elif config:
            heads = SIZES[config["model"]]["heads"]
        elif not heads:
            heads = {1280: 16, 384: 12 if moco else 6}.get(width, max(1, width // 64))
            doubt = " (assumed, shapes cannot tell: MoCo v3's ViT-S has 12, timm's 6; --heads sets it)"
        vit = ViT(grid * patch, patch, width, depth, heads, rel_pos_bias=table is not None,
                  positions="none" if positions is None else "learned",
                  layer_scale=1.0 if "blocks.0.ls1.gamma" in weights else None).eval()
        if own:
            vit.rel_pos_bias[TABLE] = nn.Parameter(table)
            for i, block in enumerate(vit.blocks):
                block.number = i
                block.register_forward_pre_hook(own_bias)
        if REGISTERS in weights:
            vit.blocks[0].register_tokens = nn.Parameter(weights[REGISTERS])
            vit.blocks[0].register_forward_pre_hook(add_registers)
            vit.register_forward_hook(drop_registers)
        missing, unexpected = vit.load_state_dict(weights, strict=False)
        absent = [key for key in missing if not key.startswith("norm.")]
        require(not absent, f"{len(absent)} tensors are missing, among them {', '.join(absent[:4])}")
    except Exception as error:                              # a damaged file can raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{path}: no Vision Transformer that can be taken apart here: {reason}") from error
    masked = re.search(r"\b(decoder|lm_head)", " ".join(state))     # DINOv2 has a mask token, but not these
    lam, deep = config.get("lam", 0.0 if masked else 1.0 if moco else None), config.get("decoder_depth", 0)
    role = "other" if lam is None else {1: "CL", 0: "MIM"}.get(lam, "hybrid")
    vit.facts = dict(path=str(path), role=role, lam=lam, width=width, depth=depth, heads=heads,
                     patch_size=patch, image_size=grid * patch, decoder_depth=deep, config=config,
                     crop_min=config.get("crop_min"), blur=config.get("blur"),
                     parameters=sum(p.numel() for p in vit.parameters()))
    print(f"{path}: {role}, patches of {patch} px, {width} wide, {depth} deep, {heads} heads{doubt}")
    for title, keys in (("missing", missing), ("unexpected, not used", unexpected), ("skipped", skipped)):
        folded = Counter(re.sub(BLOCK, "blocks.*.", key) for key in keys)   # one line for all blocks
        print(f"  {title}: {len(keys)} keys", *(f"{name} ({n})" for name, n in folded.items()), sep="\n    ")
    masks = [state[key] for key in ("mask_token", prefix + "mask_token") if key in state]
    blocks = [Block(width, heads) for _ in range(deep)] + [nn.LayerNorm(width, eps=1e-6)] * (deep > 0)
    head, vit.pixels = nn.Sequential(*blocks, nn.Linear(width, 3 * patch**2)).eval(), None
    # SimMIM's 1 × 1 convolution is a linear layer; its PixelShuffle has our order: colour, row, column
    decoder = {key[8:]: x.squeeze() for key, x in state.items() if key.startswith("decoder.")}
    with contextlib.suppress(RuntimeError, IndexError):     # another kind of decoder, or no mask token
        head.load_state_dict(decoder)
        vit.pixels = masks[0], head
    if not vit.pixels:
        print("  no reconstructions, which need a mask token and a pixel head like SimMIM's")
    return vit

# ==== 3. One pass: which numbers does every figure need? ===================================================
def progress(items, label):
    """Yields the items; a line every 5 s with the time left."""
    began = said = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if (now := time.monotonic()) > said + 5:
            left, said = (now - began) * (len(items) / done - 1), now
            print(f"  {label}: {done}/{len(items)}, {left:.0f} s left", flush=True)
def read_images(source, indices, size, masks=None, label="images"):
    """Centre squares: images uint8 (n, 3, S, S), labels (n, label sets), masks (n, S, S) or None. masks:
    (image folder, folder of PNGs of the same names). Files that cannot be read are named and left out."""
    rows = []
    for i in progress(indices.tolist(), label):
        try:                                                # Pillow raises almost anything on a broken file
            (image, labels), mask = source.load(i), np.zeros(())
            if isinstance(source, Stimuli):
                mask = source[i][-1]
            elif masks:
                png = masks[1] / Path(source[i][0]).relative_to(masks[0]).with_suffix(".png")
                mask = np.asarray(ImageOps.fit(Image.open(png), (size, size), Image.NEAREST))
            rows.append((sslvit.cut(image, size)[0], labels, mask))
        except Exception as error:
            print(f"  left out: {source[i][0]!r} ({type(error).__name__}: {error})")
    require(rows, "not one image could be read")
    require(all(mask.ndim < 3 for *_, mask in rows), "--masks: class numbers need grey or palette PNGs")
    images, labels, drawn = (torch.from_numpy(np.stack(part)) for part in zip(*rows))
    return images, labels.long(), drawn.long() if drawn.ndim == 3 else None
def normalise(images, device):
    """Brightness 0 .. 255 -> what the networks were trained on."""
    return (images.to(device) / 255 - MEAN.to(device)) / STD.to(device)
def features(tokens):
    """Tokens (B, 1+N, D) -> (B, 2, D): the mean patch token, and CLS."""
    return torch.stack([tokens[:, 1:].mean(dim=1), tokens[:, 0]], dim=1)
@torch.no_grad()
def encode(vit, images, read_out=features):
    """read_out(tokens after the last norm) of all images (n, 3, S, S)."""
    return torch.cat([read_out(vit(normalise(x, vit.cls_token.device))).cpu() for x in images.split(64)])
@torch.no_grad()
def collect(vit, batches, measure=True):
    """One pass over batches of images serves every metric -> arrays with one row per image. pooled, cls
    (n, L, 2, D): mean patch token and CLS after each layer's attention [0] and MLP [1]; output (n, 2, D) the
    same after the last norm. With `measure` also distance, nmi (n, L, H); heads, tokens (n, L); depths
    (n, L - 1); fourier (n, L, 2, F); spectrum (n, L, 2, K). No attention map outlives its batch."""
    kept, patch = [], vit.patch_size
    for images in batches:
        x, layers, above = normalise(images, vit.cls_token.device), [], None
        tokens, records = vit(x, record=True)
        grid = x.shape[2] // patch, x.shape[3] // patch
        for block, record in zip(vit.blocks, records):
            states = torch.stack([record.mid, record.out], dim=1)                   # (B, 2, 1+N, D)
            cls, states = states[:, :, 0], states[:, :, 1:]
            layer = dict(pooled=states.mean(dim=2), cls=cls)
            if measure:
                attn = F.normalize(record.attn[:, :, 1:, 1:], p=1, dim=-1, eps=1e-37)   # without CLS, sum 1
                added = block.attn["proj"](record.heads.transpose(1, 2).flatten(2))[:, 1:]  # its output
                layer |= dict(
                    distance=attention_distance(attn, grid, patch), nmi=attention_nmi(attn),
                    heads=head_similarity(record.heads[:, :, 1:]), tokens=token_similarity(added),
                    fourier=fourier_amplitude(states, grid), spectrum=free_spectrum(states))
                layer |= {} if above is None else dict(depths=depth_similarity(above, added))
                above = added
            layers.append(layer)
        rows = {name: torch.stack([layer[name] for layer in layers if name in layer], dim=1).cpu()
                for name in layers[-1]}
        kept.append(rows | dict(output=features(tokens).cpu()))
    return {name: torch.cat([rows[name] for rows in kept]).numpy() for name in kept[0]}
@torch.no_grad()
def examples(vit, images):
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
    if vit.pixels:
        mask = torch.rand(len(x), rows * cols, generator=torch.Generator().manual_seed(0)).to(x.device) < 0.6
        token, decoder = (part.to(x.device) for part in vit.pixels)
        target, guess = sslvit.patchify(x, p), decoder(vit(x, mask, mask_token=token))[:, 1:]
        shown = target, *(torch.where(mask[..., None], filled, target) for filled in (0 * target, guess))
        rows = zip(*(F.fold(y.mT, x.shape[2:], p, stride=p)[:3] for y in shown))        # an image each
        titles = "image", "masked", "predicted"
        result["pixels"] = [(picture(y), name, []) for row in rows for y, name in zip(row, titles)]
    return result

# ==== 4. What has to be trained: probes, fine-tuning, segmentation, cue conflict ===========================
def linear_probe(train, val, test, strengths=(1.0, 0.1, 0.01, 1e-3, 1e-4)):
    """Multinomial logistic regression on frozen features: mean cross-entropy + strength/2·|W|², by L-BFGS
    ([P] figures 1, 10). train, val, test: (features (n, D), labels (n,)). `train` standardises the features,
    `val` chooses the strength, `test` is only scored. Returns accuracy and val in [0, 1], predicted (n,)."""
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
            best = dict(val=val, accuracy=accuracy, predicted=predicted[1].numpy())
    return best
def best_probe(train, val, test):
    """Linear probes of K alternative features, one for each label set: features (n, K, D), labels (n, label
    sets). Of the alternative that is best on `val`: which (of K), predicted and right (n, label sets) on
    `test`, and val, the mean accuracy there."""
    found = []
    for k in range(test[0].shape[1]):
        probes = [linear_probe(*((x[:, k], y[:, s]) for x, y in (train, val, test)))
                  for s in range(test[1].shape[1])]
        predicted = np.stack([probe["predicted"] for probe in probes], axis=1)
        found.append(dict(which=k, predicted=predicted, right=predicted == np.asarray(test[1]),
                          val=float(np.mean([probe["val"] for probe in probes]))))
    return max(found, key=lambda probe: probe["val"])
def knn(bank, known, queries, labels, k=20):
    """Share of queries to which sslvit.knn() gives the right label. Features (n, D), (m, D); known (n, sets),
    labels (m, sets), a column for each label set -> (sets,) in [0, 1]. Nothing is trained or tuned."""
    votes = sslvit.knn(*map(torch.as_tensor, (bank, known, queries)), k)
    return (votes == torch.as_tensor(labels)).double().mean(dim=0).numpy()
def fit(vit, outputs, pooled, loss, train, epochs, lr, tune=True, decay=0.75, label="fine-tuning"):
    """Trains a linear head on the standardised patch tokens, or on their mean if `pooled`, with `tune` the
    encoder too, by AdamW and half a cosine; returns images -> logits. Block l of L learns at
    lr·decay^(L - l): what is early is general (BEiT, SimMIM). Half of the images are flipped."""
    torch.manual_seed(0)
    (images, targets), device, width = train, vit.cls_token.device, vit.norm.normalized_shape[0]
    head = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, outputs)).to(device)
    def logits(tokens):                                     # (B, outputs) or (B·N, outputs)
        return head(tokens[:, 1:].mean(dim=1) if pooled else tokens[:, 1:].flatten(0, 1))
    groups, batch, depth = [dict(params=[*head.parameters()], lr=lr)], min(64, len(images)), len(vit.blocks)
    for name, p in vit.named_parameters() if tune else ():
        layer = int(m[1]) + 1 if (m := re.match(BLOCK, name)) else depth * name.startswith("norm")
        groups.append(dict(params=[p.requires_grad_()], lr=lr * decay ** (depth - layer)))
    solver, peaks = torch.optim.AdamW(groups, weight_decay=0.05), [group["lr"] for group in groups]
    whole = len(images) // batch * batch                    # BatchNorm needs full batches
    order = torch.cat([torch.randperm(len(images))[:whole] for _ in range(epochs)]).split(batch)
    for step, i in enumerate(progress(order, label), start=1):
        for group, peak in zip(solver.param_groups, peaks):
            group["lr"] = sslvit.lr_at(step, len(order) + 1, len(order) / 10, peak)
        x, y, flip = images[i], targets[i], torch.rand(batch) < 0.5
        for part in (x, y) if y.ndim == 3 else (x,):
            part[flip] = part[flip].flip(-1)
        solver.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, sslvit.has_bf16(device.type == "cuda")):
            lost = loss(logits(vit(normalise(x, device))), y.to(device))
        lost.backward()
        solver.step()
    head.eval()
    return lambda images: encode(vit, images, logits)
def fine_tune(vit, train, test, classes, epochs=10, lr=1e-3, **how):
    """All weights of a copy trained on labels, mean patch token ([P] figure 1). train, test: (images uint8
    (n, 3, S, S), labels (n, label sets)); classes: number per label set; how: fit's decay and label.
    Returns 1 for right, 0 for wrong (n, label sets): the mean is the accuracy."""
    def loss(logits, labels):
        return sum(map(F.cross_entropy, logits.split(classes, dim=1), labels.T))
    parts = fit(deepcopy(vit), sum(classes), True, loss, train, epochs, lr, **how)(test[0]).split(classes, 1)
    return torch.stack([(p.argmax(dim=1) == y).float() for p, y in zip(parts, test[1].T)], dim=1).numpy()
def dense_probe(vit, train, test, classes, epochs=10, tune=False):
    """Segmentation: one linear layer per token predicts the classes of its p × p pixels; tune: the encoder
    learns too ([P] figure 1 right). train, test: (images uint8, masks (n, S, S)) -> IoU per image (n,)."""
    p = vit.patch_size
    def fold(y, mask):                                      # (B·N, classes·p²) -> (B, classes, S, S)
        return F.fold(y.unflatten(0, (len(mask), -1)).mT, mask.shape[1:], p, stride=p)
    def loss(y, mask):
        return F.cross_entropy(fold(y, mask), mask, ignore_index=VOID)
    how = dict(lr=1e-3, label="segmentation") if tune else dict(lr=1e-2, label="linear segmentation")
    predict = fit(deepcopy(vit), classes * p * p, False, loss, train, epochs, tune=tune, **how)
    parts = zip(test[0].split(64), test[1].split(64))
    return torch.cat([mean_iou(fold(predict(x), m).argmax(dim=1), m, classes) for x, m in parts]).numpy()
def cue_conflict(options, train, test, lesson, size, count):
    """-> images and classes to learn from; images to decide on, their shapes, their textures. Stimuli: shape
    and texture of the same number to learn from, of different numbers to decide on. A folder of Geirhos'
    names (cat1-elephant2.png: a cat's shape): learnt from --data's images of its classes. No folder: None."""
    if isinstance(train, Stimuli):
        rng, sets = np.random.default_rng(0), []
        for source, number, turn in ((train, 2 * count, [0]), (test, count, range(1, 8))):
            shapes = rng.integers(8, size=number)
            textures = (shapes + rng.choice(turn, size=number)) % 8
            images = [source.render(i, s, t)[0] for i, (s, t) in enumerate(zip(shapes, textures))]
            sets += [torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), shapes, textures]
        return *sets[:2], *sets[3:]
    if not options.cue_conflict:
        return None
    source, classes = sslvit.ImageFolder(options.cue_conflict), {c: i for i, c in enumerate(test.classes[0])}
    found = [re.fullmatch(r"([a-z]+)\d*-([a-z]+)\d*\.png", Path(file).name) for file, _ in source]
    require(all(found) and {cue for m in found for cue in m.groups()} <= classes.keys(),
         f"{options.cue_conflict}: needs <shape><n>-<texture><n>.png of --data's classes")
    cues = np.array([[classes[cue] for cue in m.groups()] for m in found])
    known = np.isin(lesson[1][:, 0], cues)
    return lesson[0][known], lesson[1][known, 0], read_images(source, np.arange(len(found)), size)[0], *cues.T
BANDS = [(0.1 * math.pi * i, 0.1 * math.pi * (i + 1)) for i in range(10)]   # rings, rad/px, up to Nyquist
VOID = 255   # in a mask: a pixel of no class, which neither the loss nor the score counts
NOISE = 25.5  # the noise's root mean square: a tenth of full brightness
def study(vit, options, scratch):
    """One model -> (numbers for results.json, arrays with a row per image for the claims)."""
    print(vit.facts["name"], flush=True)
    size, L, n, wanted = vit.facts["image_size"], len(vit.blocks), options.images, set(options.only)
    train, test = sslvit.find_data(Config(data=options.data, image_size=size))
    labelled, test = bool(test) and train.classes == test.classes != (), test or train
    rng, folders = np.random.default_rng(0), (options.data, Path(options.masks)) if options.masks else None
    images, labels, masks = read_images(test, rng.permutation(len(test))[:n], size, folders, "test images")
    batch = max(1, min(64, 10**8 // (L * vit.facts["heads"] * vit.grid**4)))    # 400 MB of attention weights
    # what needs no training; the claims ask for the state after the layer's MLP
    got = collect(vit, progress(images.split(batch), "every metric"))
    sample = {key: got[key] for key in ("distance", "nmi", "heads", "depths", "tokens") if key in got}
    result = {key: array.mean(axis=0) for key, array in sample.items()}
    sample |= dict(pooled=got["pooled"][:, :, 1], pi=got["fourier"][:, :, 1, -1])
    fourier, states = got["fourier"].mean(axis=0), torch.from_numpy(got["pooled"]).permute(1, 2, 0, 3)
    result |= dict(pi=fourier[..., -1].flatten(), fourier=fourier[-1, 1], examples={})
    if wanted & {"maps", "plane", "tokens", "pixels"} and vit.facts["run"] == 0:    # of the first seed
        result["examples"] = examples(vit, images[:10])
    sample["growth"] = np.diff(got["spectrum"][:, [0, -1], 1].mean(axis=2))
    for key, log in (("token", got["spectrum"].mean(axis=0)), ("image", free_spectrum(states).numpy())):
        result |= {f"{key} spectrum": log[-1, 1] - log[-1, 1, 0], f"{key} volume": log.mean(axis=2).flatten()}
    if not labelled or not any(LABELS in FIGURES[name][1] for name in wanted):
        return result, sample
    # probes of the output, by regression and by nearest neighbours; three quarters to learn, one to choose
    lesson = read_images(train, rng.permutation(len(train))[:4 * n], size, folders, "training images")
    seen = collect(vit, progress(lesson[0].split(batch), "training features"), measure=False)
    classes, cut = [len(c) for c in test.classes], 3 * len(lesson[0]) // 4
    def splits(x, x_test):                                  # to learn from, to choose by, to score
        return (x[:cut], lesson[1][:cut]), (x[cut:], lesson[1][cut:]), (x_test, labels)
    def by_name(label, accuracies):                         # one for each label set
        return {f"{label} {name}": value for name, value in zip(test.label_names, accuracies)}
    best = best_probe(*(output := splits(seen["output"], got["output"])))
    sample |= {"linear probe": best["right"], "linear probe val": best["val"]}
    result["probe of"] = ("pooled patch tokens", "CLS")[best["which"]]
    result |= by_name("linear probe", best["right"].mean(axis=0))
    result |= by_name("k-NN", knn(*(array for x, y in output[::2] for array in (x[:, 0], y))))
    if wanted & {"layers", "decoder"}:
        for kind in ("cls", "pooled"):
            probes = [best_probe(*splits(*(x[kind][:, i // 2, [i % 2]] for x in (seen, got))))
                      for i in progress(range(2 * L), f"probes of every layer, {kind}")]
            right = np.stack([probe["right"] for probe in probes], axis=1)          # (n, 2L, label sets)
            curves = by_name("layers", right.mean(axis=0).T)
            result |= {f"{key}, {kind}": curve for key, curve in curves.items()}
        sample["layers"] = right[:, 1::2].mean(axis=2)                              # pooled, after the MLP
        best = np.argmax([probe["val"] for probe in probes[1::2]])      # on validation, lest chance choose it
        sample["last - best"] = sample["layers"][:, -1] - sample["layers"][:, best]
        result["layer probes"] = sample["layers"].mean(axis=0)
    # fine-tuning and segmentation
    if wanted & {"accuracy", "scaling", "sweep"}:
        both = [torch.cat([a, b[cut:]]) for a, b in zip((images, labels), lesson)]  # test, validation
        work = [x[:cut] for x in lesson[:2]], both, classes, options.epochs
        shape = tuple(vit.facts[key] for key in ("image_size", "patch_size", "width", "depth", "heads"))
        if shape not in scratch:                            # one new network serves all models of its size
            torch.manual_seed(0)                            # and is the same in every analysis
            scratch[shape] = fine_tune(ViT(*shape).to(options.device), *work, decay=1.0, label="new network")
        tuned = fine_tune(vit, *work, decay=options.decay)
        for label, right in (("fine-tuned", tuned), ("from scratch", scratch[shape])):
            sample |= {label: right[:len(images)], f"{label} val": right[len(images):].mean()}
            result |= by_name(label, sample[label].mean(axis=0))
    if "dense" in wanted and masks is not None:
        kinds = 1 + int(max(x[x != VOID].max() for x in (masks, lesson[2])))
        work = (lesson[0][:n], lesson[2][:n]), (images, masks), kinds, options.epochs
        iou = {"mIoU linear": dense_probe(vit, *work), "mIoU fine-tuned": dense_probe(vit, *work, tune=True)}
        sample, result = sample | iou, result | {key: array.mean() for key, array in iou.items()}
    # shape against texture, and band-limited noise
    if wanted & {"bias", "views"} and (cues := cue_conflict(options, train, test, lesson, size, n)):
        known, y, conflict, shapes, textures = cues
        known, conflict, edge = encode(vit, known), encode(vit, conflict), 3 * len(y) // 4
        parts = (known[:edge], y[:edge, None]), (known[edge:], y[edge:, None]), (conflict, shapes[:, None])
        decisions = best_probe(*parts)["predicted"][:, 0]
        sample["cues"] = np.stack([decisions, shapes, textures], axis=1)
        result["shape bias cues"] = shape_bias(decisions, shapes, textures)
    if "noise" in wanted:
        clean, generator = images[:n // 2], torch.Generator().manual_seed(0)
        sets = [encode(vit, clean)] + [encode(vit, clean + NOISE * band_noise(clean.shape, *band, generator))
                                       for band in progress(BANDS, "band noise")]
        noisy = torch.cat(sets), np.tile(labels[:len(clean)], (len(sets), 1))
        right = best_probe(*output[:2], noisy)["right"].mean(axis=1).reshape(len(sets), -1)
        sample["noise"], result["noise drop"] = right.T, band_noise_drop(right[0], right[1:])
    return result, sample

# ==== 5. Claims: does the paper's picture hold for these models?   (rules fixed before any result) =========
def over(key, which="all", reduce=lambda rows: rows.mean(axis=0)):
    """Value function (a model's arrays, take) -> number: mean over images, or `reduce`, then over layers.
    Early: the first third of the layers, late: the last (both rounded up), middle: what lies between.
    `take` draws the images: all, or a bootstrap sample that is the same for all models."""
    def value(m, take):
        x = np.atleast_1d(reduce(take(m[key])))
        k = math.ceil(len(x) / 3)
        middle = x[k:-k] if len(x) > 2 * k else x
        return float(dict(early=x[:k], middle=middle, late=x[-k:], last=x[-1:], all=x)[which].mean())
    return value
def image_growth(m, take):      # of the mean log singular value of the (images × D) matrix of mean tokens
    x = torch.from_numpy(take(m["pooled"])[:, [0, -1]]).transpose(0, 1)     # first and last layer: (2, n, D)
    return float(free_spectrum(x).mean(dim=1).diff())

ROLES = "CL", "MIM", "hybrid"
CL_MIM, MIM_CL = lambda v: v("CL") - v("MIM"), lambda v: v("MIM") - v("CL")
# Number: parts (what, value function, test). test(v) > 0 is what the claim says; v(role) is the value's mean
# over the models of a role. Accuracy is the mean over the label sets (shape and texture, or class).
CLAIMS = {
    1: [("linear probe, output", over("linear probe"), CL_MIM),
        ("fine-tune accuracy", over("fine-tuned"), MIM_CL)],
    2: [("fine-tuning, smallest size", over("fine-tuned"), lambda v: v("smallest CL") - v("smallest MIM")),
        ("fine-tuning, largest size", over("fine-tuned"), lambda v: v("largest MIM") - v("largest CL"))],
    3: [("mIoU, linear", over("mIoU linear"), MIM_CL), ("mIoU, fine-tuned", over("mIoU fine-tuned"), MIM_CL)],
    4: [(f"attention distance, {which}, px", over("distance", which), CL_MIM) for which in ("late", "all")],
    5: [("NMI, late", over("nmi", "late"), MIM_CL),
        ("NMI, late: CL < MIM / 2", over("nmi", "late"), lambda v: v("MIM") / 2 - v("CL"))],
    6: [(f"cosine between {key}, late", over(key, "late"), CL_MIM) for key in ("heads", "depths", "tokens")],
    7: [("growth of log singular values, tokens", over("growth"), MIM_CL),
        ("growth of log singular values, images", image_growth, CL_MIM)],
    8: [("Δ log amplitude at π, late", over("pi", "late"), MIM_CL)],
    9: [("shape bias", over("cues", reduce=lambda cues: shape_bias(*cues.T)), CL_MIM),
        ("accuracy drop, high-frequency noise",
         over("noise", "late", lambda right: band_noise_drop(right[:, 0], right[:, 1:].T)), MIM_CL)],
    10: [("pooled probe, early", over("layers", "early"), MIM_CL),
         ("best layer", over("layers", reduce=lambda right: 1 + right.mean(axis=0).argmax()), CL_MIM),
         ("last minus best layer, MIM < 0", over("last - best"), lambda v: -v("MIM")),
         ("CL, late > early", over("layers", "late"), lambda v: v("CL") - v("CL", over("layers", "early")))],
    11: [("last minus best layer", over("last - best"), lambda v: v("MIM with decoder") - v("MIM")),
         ("NMI, last layer", over("nmi", "last"), lambda v: v("MIM with decoder") - v("MIM"))],
    12: [("probe and fine-tuning, least margin", over("linear probe"), lambda v: min(
             v("best hybrid", over(key)) - v(pure, over(key))
             for key in ("linear probe", "fine-tuned") for pure in ("CL", "MIM"))),
         ("NMI: last < mid", over("nmi", "last"), lambda v: v("hybrid", over("nmi", "middle")) - v("hybrid")),
         ("Δ at π: early ≥ CL, late ≤ MIM", over("pi", "late"), lambda v: min(
             v("hybrid", over("pi", "early")) - v("CL", over("pi", "early")), v("MIM") - v("hybrid")))]}
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
            if own == end and min(size) < max(size) and not m["decoder_depth"]:
                groups[f"{word} {m['role']}"].append(sample)
    if hybrids:
        score = {lam: np.mean([s.get("linear probe val", 0) + s.get("fine-tuned val", 0) for s in group])
                 for lam, group in hybrids.items()}
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
def compare(row, test, value, groups, draws):
    """Adds to `row` the roles' values, their difference, its 95 % bootstrap interval and whether it holds."""
    size = next((word for word in ("smallest ", "largest ") if word in row["part"]), "")    # claim 2
    names = {role: size + role for role in ROLES if size + role in groups}
    row |= {role: evaluate(lambda v, name=name: v(name), value, groups) for role, name in names.items()}
    row["difference"], rng = evaluate(test, value, groups), np.random.default_rng(0)
    if math.isnan(row["difference"]):
        raise KeyError("a number")
    drawn = [evaluate(test, value, groups, rng) for _ in range(draws // (5 if value is image_growth else 1))]
    row["interval"] = np.nanpercentile(drawn, [2.5, 97.5]).tolist()     # image_growth decomposes matrices
    row["holds"] = row["difference"] > 0 and row["interval"][0] > 0
    return row
def judge(groups, draws=1000):
    """The claims table. A part holds when its difference and its 95 % bootstrap interval are above 0.
    'agrees': all parts hold. 'weak': all differences above 0, or half of the parts hold. Else 'disagrees'.
    Roles with several seeds are also compared seed by seed."""
    table, seeds = [], max(map(len, groups.values()))
    for number, claim, figure, names in MAP[:len(CLAIMS)]:
        rows = []
        for (what, value, test), name in zip(CLAIMS[int(number)], names.split() * 4):
            rows.append(row := {"part": what})
            try:
                compare(row, test, value, groups, draws)
                for i in range(seeds if seeds > 1 else 0):
                    one = {role: [ms[i % len(ms)]] for role, ms in groups.items()}
                    row.setdefault("seeds", []).append(compare({"part": what}, test, value, one, draws))
            except KeyError as key:
                role = re.search(".*(CL|MIM|hybrid).*", key.args[0])
                needs = f"a checkpoint: {role[0]}" if role else f"--only {name}, {FIGURES[name][1]}"
                row["why"] = f"needs {needs}"
        ok = [row.get("holds") for row in rows]             # None: not testable
        weak = all(row.get("difference", 0) > 0 for row in rows) or 2 * ok.count(True) >= len(ok)
        verdict = "not testable" if None in ok else "agrees" if all(ok) else "weak" if weak else "disagrees"
        table.append(dict(claim=int(number), figure=figure, text=claim, verdict=verdict, parts=rows))
    return table
def claims_table(table):
    lines = [f"{'':41}     CL     MIM  hybrid   difference [95 % interval]"]
    for claim in table:
        lines.append("{claim:2} {text} (figure {figure}): ".format(**claim) + claim["verdict"].upper())
        for row in claim["parts"]:
            seeds, values = row.get("seeds", []), [row.get(role) for role in ROLES]
            values = " ".join("      -" if value is None else f"{value:7.3f}" for value in values)
            text = row.get("why") or "{:+.3f} [{:+.3f}, {:+.3f}]".format(row["difference"], *row["interval"])
            lines.append(f"   {row['part']:38} {values}   {text}{'  holds' * row.get('holds', False)}")
            if seeds:
                stds = {r: f"± {np.std([s[r] for s in seeds], ddof=1):5.3f}" for r in ROLES if r in row}
                holds, values = sum(s["holds"] for s in seeds), " ".join(stds.get(r, " " * 7) for r in ROLES)
                lines.append(f"{'':41} {values}   holds in {holds} of {len(seeds)} seeds")
    return "\n".join(lines)

# ==== 6. Figures: drawn from the results alone =============================================================
COLOURS = {"CL": "#D55E00", "MIM": "#0072B2", "hybrid": "#009E73", "other": "#7F7F7F"}     # colour-blind safe
STYLES, MARKERS = ("-", "--", ":", "-."), "osD^vP"          # models of one objective differ in these
AXES = {  # x label -> x of n values from a model of L layers
    "layer": lambda n, L: np.arange(L - n + 1, L + 1),
    "layer (half: after its attention)": lambda n, L: np.arange(1, n + 1) / 2,
    "rank": lambda n, L: np.arange(1, n + 1),
    "frequency (π rad per patch)": lambda n, L: np.linspace(0, 1, n),
    "noise frequency (π rad per pixel)": lambda n, L: (np.arange(n) + 0.5) / n}
def canvas(rows, cols, w=4.3, h=3.7):
    return plt.subplots(rows, cols, figsize=(w * cols, h * rows), squeeze=False, layout="constrained")
def fig_curves(panels, models):
    """Panels (beginning of keys in the results, y label, x label): one curve per name along depth, rank or
    frequency, heads and seeds as mean and band, and a panel for each key; or hollow points, a point per seed,
    the keys side by side or along λ or size, there joined by lines (along λ: of all roles)."""
    rows, names = [], list(dict.fromkeys(m["name"] for m in models))
    for stem, y_label, x_label in panels:
        keys = [key for key in models[0] if key.startswith(stem)]
        each = [([key], y_label + key.removeprefix(stem), x_label) for key in keys]
        rows += each if x_label in AXES else [(keys, y_label, x_label)]
    wrap = 2 if len(rows) in (2, 4) else min(3, len(rows))
    fig, axes = canvas(-(-len(rows) // wrap), wrap)
    for axis, (keys, y_label, x_label) in zip(axes.flat, rows):
        words, lines = [key.split(" ")[-1] for key in keys], defaultdict(list)
        for aside, name in zip(np.linspace(-0.3, 0.3, len(names) + 2)[1:], names):
            m, *_ = seeds = [m for m in models if m["name"] == name]
            y = np.array([[m[key] for m in seeds] for key in keys], dtype=float)    # (keys, seeds, …)
            style = dict(color=(colour := COLOURS[m["role"]]), marker=MARKERS[m["nth"] % 6])
            if x_label in AXES:
                y = np.moveaxis(y[0], 0, -1).reshape(y.shape[2], -1)                # (x, heads · seeds)
                x = AXES[x_label](len(y), m["depth"])
                axis.fill_between(x, y.min(axis=1), y.max(axis=1), color=colour, alpha=0.15, lw=0)
                axis.plot(x, y.mean(axis=1), STYLES[m["nth"] % 4], ms=5 * (len(y) <= 30), label=name, **style)
            else:
                x = [m[x_label]] * len(keys) if x_label else np.arange(len(keys)) + aside
                axis.plot(x, y, ls="", ms=7, mfc="none", label=[name] + ["_"] * (len(seeds) - 1), **style)
                blur = f", blur {m['blur']} px" * (x_label == "crop_min")
                lines["black" if x_label == "lam" else colour, blur].append((x[0], *y.mean(axis=1)))
        for i, ((colour, blur), line) in enumerate(lines.items() if x_label else ()):
            x, *ys = zip(*sorted(line))
            for j, (y, word) in enumerate(zip(ys, words)):
                axis.plot(x, y, STYLES[(i if blur else j) % 4], color=colour, lw=1, zorder=0)
                axis.text(x[i % 2 - 1], y[i % 2 - 1], f"  {word}{blur}  ", ha=("right", "left")[i % 2])
        titles = dict(lam="λ (0: MIM, 1: CL)", crop_min="smallest crop (share of the image)")
        axis.set(xlabel=titles.get(x_label, x_label), ylabel=y_label)
        if not x_label:
            axis.set(xticks=range(len(keys)), xticklabels=words, xlim=(-0.5, len(keys) - 0.5))
    columns = int(46 * wrap / (6 + max(map(len, names)))) or 1
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=9)
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
    middle, names = (ends[1:] + ends[:-1] - 1) / 2, [m["name"] for m in models]
    axis.set(xticks=middle, xticklabels=names, yticks=middle, yticklabels=names, xlabel="layers, in order")
    fig.colorbar(shown, label="linear CKA of pooled tokens")
    return fig

LABELS = "labels and a training set (the stimuli, or --data with the same class folders in both)"
LAYER, HALF, RANK, FREQUENCY, NOISE_BAND = AXES
NMI, AT_PI = ("nmi", "NMI (band: heads, seeds)", LAYER), ("pi", "Δ log amplitude at π", HALF)
PROBE, TUNED = ("linear probe ", "linear probe accuracy"), ("fine-tuned ", "fine-tuned accuracy")
FIGURES = {  # name in MAP: (panels for fig_curves or another function, what it needs)
    "accuracy": ([(*PROBE, ""), (*TUNED, ""), ("from scratch ", "from scratch accuracy", "")], LABELS),
    "scaling": ([(*TUNED, "width")], "checkpoints of two model sizes, " + LABELS),
    "dense": ([("mIoU ", "mIoU (test)", "")], "masks (the stimuli's, or --masks), " + LABELS),
    "distance": ([("distance", "attention distance (px; band: heads, seeds)", LAYER)], ""),
    "nmi": ([NMI], ""),
    "similarity": ([(key, f"cosine between {key}", LAYER) for key in ("heads", "depths", "tokens")],
                   "two layers and two heads"),
    "spectra": ([(f"{key} {what}", label + key + "s", x) for key in ("token", "image") for what, label, x in (
        ("spectrum", "last layer, first = 0,\nlog singular value, ", RANK),
        ("volume", "mean log\nsingular value, ", HALF))], ""),
    "fourier": ([AT_PI, ("fourier", "Δ log amplitude, last layer", FREQUENCY)], ""),
    "bias": ([("shape bias ", "share of shape decisions", "")], "the stimuli or --cue-conflict, " + LABELS),
    "noise": ([("noise drop", "relative accuracy drop", NOISE_BAND)], LABELS),
    "layers": ([("layers ", "linear probe,\n", HALF)], LABELS),
    "decoder": ([("layer probes", "linear probe, pooled tokens", LAYER), NMI, AT_PI],
                "MIM with and without decoder, " + LABELS),
    "sweep": ([(*PROBE, "lam"), (*TUNED, "lam"), NMI, AT_PI], "λ = 0, 1 and between, " + LABELS),
    "views": ([("shape bias ", "share of shape decisions", "crop_min"), (*PROBE, "crop_min")],
              "checkpoints of two --crop-min, " + LABELS),
    "maps": (fig_images, ""), "plane": (fig_plane, ""), "tokens": (fig_plane, ""),
    "pixels": (fig_images, "a checkpoint with mask token and pixel head"),
    "cka": (fig_cka, "equally many images")}
VARY = dict(scaling=("width", 2), views=("crop_min", 2), sweep=("lam", 3), decoder=("decoder_depth", 2))
def draw(models, names, out):
    """Each figure that the results can support; for every other a line that says what would enable it."""
    rows = {name: (claim, figure) for _, claim, figures, names in MAP
            for name, figure in zip(names.split(), figures.split(", "))}
    for name in names:
        (what, needs), (claim, figure) = FIGURES[name], rows[name]
        stems = [stem for stem, *_ in what] if type(what) is list else [name]
        where = "examples" if what in (fig_images, fig_plane) else ""     # numbers of pictures lie apart
        able = [m for m in models if all(any(k.startswith(s) for k in m.get(where, m)) for s in stems)]
        able = models if name == "cka" and able else able   # one table for all
        key, least = VARY.get(name, ("name", 1))            # so many values of it, or more
        able = [m for m in able if m[key] is not None and (name != "decoder" or m["role"] == "MIM")]
        if len({m[key] for m in able}) < least:
            print(f"skipped {name}: needs {needs}")
            continue
        fig = fig_curves(what, able) if type(what) is list else what(name, [m for m in able if m["run"] == 0])
        fig.suptitle(f"{claim[0].upper()}{claim[1:]}?", wrap=True)
        number, *side = figure.split()
        file = out / ("_".join([f"fig{number:0>2}"] * (number != "-") + [*side, name]) + ".png")
        fig.savefig(file, dpi=130)          # then 256 colours, rare ones among them: a third of the bytes
        Image.open(file).convert("RGB").quantize(256, 1, 1).save(file, optimize=True)     # MAXCOVERAGE
        plt.close(fig)

# ==== 7. Command line ======================================================================================
def parse(argv):
    parser = argparse.ArgumentParser("analyze.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = lambda message: require(False, f"{message} (see --help)"), parser.add_argument
    add("checkpoints", nargs="*", help="files; NAME=FILE names one, cl=, mim=, hybrid= say what it is")
    add("--data", default="", help="folder of images as for sslvit.py; without it, the built-in stimuli")
    add("--masks", default="", help="folder with <same path>.png of class numbers per pixel")
    add("--cue-conflict", default="", help="folder of <shape><n>-<texture><n>.png, classes as in --data")
    add("--only", nargs="+", default=list(FIGURES), choices=FIGURES, metavar="NAME", help=" ".join(FIGURES))
    add("--out", default="figures", help="where PNGs and results.json go [figures]")
    add("--from", dest="results", default="", help="a results.json: draw again, compute nothing")
    add("--images", type=int, default=1000, help="test images; probes learn from three times as many [1000]")
    add("--epochs", type=int, default=10, help="of fine-tuning and of the segmentation heads [10]")
    add("--decay", type=float, default=0.75, help="fine-tuning: rate of a layer / of the next [0.75]")
    add("--heads", type=int, help="attention heads, for files whose shapes do not tell")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    options = parser.parse_args(argv)
    try:
        torch.zeros(1, device=options.device)
    except Exception as error:                              # torch has many kinds
        raise UserError(f"--device {options.device}: {str(error).splitlines()[0]}") from error
    require(bool(options.checkpoints) != bool(options.results), "give checkpoints, or --from results")
    require(options.images >= 20 and options.epochs >= 1, "--images is 20 or more, --epochs 1 or more")
    require(0 < options.decay <= 1, "--decay is above 0 and at most 1")
    for folder in filter(None, (options.masks, options.cue_conflict)):
        require(os.path.isdir(folder), f"{folder}: no such folder")
    return options
def analyse(options):
    """Checkpoints -> the contents of results.json."""
    loaded, scratch = [], {}
    for given in options.checkpoints:                       # every file is read before anything long begins
        name, _, path = ("", "", given) if os.path.exists(given) else given.rpartition("=")
        vit = load_encoder(path, options.heads).to(options.device).requires_grad_(False)
        if role := dict(cl="CL", mim="MIM", hybrid="hybrid").get(name.lower()):
            vit.facts |= dict(role=role, lam=dict(CL=1.0, MIM=0.0).get(role, vit.facts["lam"]))
        role, file = vit.facts["role"], Path(path)
        vit.facts["name"] = name or f"{role}: {file.parent.name if file.stem == 'ckpt' else file.stem}"
        seeds = [other.facts for other in loaded if other.facts["name"] == vit.facts["name"]]
        require(all(vit.facts[key] == m[key] for m in seeds for key in ("role", "lam", "width", "depth")),
                f"{vit.facts['name']} is another model already: one NAME= is for seeds of one model")
        names = {other.facts["name"] for other in loaded if other.facts["role"] == role}
        vit.facts |= dict(nth=len(names - {vit.facts["name"]}), run=len(seeds))
        loaded.append(vit)
    studies = [study(vit, options, scratch) for vit in loaded]
    models = [vit.facts | result for vit, (result, _) in zip(loaded, studies)]
    samples = [sample for _, sample in studies]
    if len({len(sample["pooled"]) for sample in samples}) == 1:
        layers = [torch.from_numpy(layer) for m, sample in zip(models, samples) if m["run"] == 0
                  for layer in sample["pooled"].swapaxes(0, 1)]
        models[0]["cka"] = [[float(cka(a, b)) for a in layers] for b in layers]
    results = dict(settings=vars(options), models=models, claims=judge(groups_of(models, samples)))
    text = json.dumps(results, default=lambda array: array.tolist())    # 5 significant digits, nan as null:
    return json.loads(text, parse_float=lambda x: float(f"{float(x):.5g}"), parse_constant=lambda nan: None)
def main(argv=None):
    """Runs the command line; returns the exit status: 0, or 2 for bad input with one line on what to mend."""
    try:
        old, options = "", parse(argv)
        out, old = Path(options.out), options.results
        out.mkdir(parents=True, exist_ok=True)
        results = json.loads(Path(old).read_text()) if old else analyse(options)
        if not old:
            (out / "results.json").write_text(json.dumps(results))
        draw(results["models"], options.only, out)
        print(claims_table(results["claims"]), f"what was drawn and computed is in {out}", sep="\n")
        return 0
    except Exception as error:
        known = isinstance(error, (UserError, OSError))
        if not (known or old):
            raise
        message = error if known else f"--from {old}: not results ({type(error).__name__})"
        print(f"analyze.py: {message}", file=sys.stderr)
        return 2
if __name__ == "__main__":
    sys.exit(main())
