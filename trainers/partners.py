"""Semantic partners: for each image another one of similar content (arXiv 2306.16122), and controls.

Of the paper's search only this is known to us: a pre-trained encoder and a measure of similarity choose the
pairs, without labels. The band of cosines, the single best partner and all numbers here are our choice.
"""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dali_views import SampleIndex, rng

from . import config as cfg
from . import distributed
from .amp import autocast
from .backbones import Backbone, build_backbone
from .data import evaluation_views, plain_loader
from .evaluate.encoders import encoder_of, load_run
from .evaluate.knn import extract

__all__ = [
    "Partners",
    "embed",
    "find_partners",
    "frozen_encoder",
    "label_partners",
    "precision",
    "random_partners",
]

PAIRS = 10_000_000
"""Random pairs that quantiles of the cosine are estimated from."""
_BEYOND = 10  # of them that must lie beyond a quantile: its share is then known to about a third
_PART = 16384  # images whose features are held in float32 at a time
_STREAM = 0x7061  # sets these random numbers apart from those of the loader


class Partners(NamedTuple):
    """Who goes with whom; equal on all ranks."""

    partner: Tensor
    """(N,) int64, row of the partner; the image itself if it has none."""
    cosine: Tensor
    """(N,) float32, of the two; NaN where there is no partner."""
    band: tuple[float, float]
    """Least and greatest cosine that was asked for, as absolute values."""


def frozen_encoder(
    config: cfg.Config, source: str | Path, device: torch.device
) -> tuple[Backbone, cfg.Config]:
    """An encoder to measure similarity with, and the configuration to `embed` with.

    Nothing is downloaded: pretrained weights are those in the library's cache, and torch's random numbers
    go on as if nothing had been built. The paper's encoder learnt without labels; torchvision's learnt from
    ImageNet's, and so did most of timm's.

    Args:
        config: of the run that wants partners.
        source: a run folder or its last.pt, "torchvision:NAME" (its default weights), or "timm:NAME".

    Returns:
        The encoder in eval mode, without gradients, on `device`; and `config` with the size and
        normalisation of views that this encoder was trained with.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: the library has no such model, or its weights are not on this machine.
    """
    library, _, name = str(source).partition(":")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if library == "torchvision":
            encoder, views = _from_torchvision(name)
        elif library == "timm":
            encoder, views = _from_timm(name)
        else:
            _, run, saved = load_run(Path(source))
            encoder = encoder_of(run, saved, "trained", device)
            views = {key: getattr(run.views, key) for key in ("size", "mean", "std")}
    encoder.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    return encoder, config.model_copy(update={"views": config.views.model_copy(update=views)})


def _from_torchvision(name: str) -> tuple[Backbone, dict[str, Any]]:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(f"torchvision has no pretrained encoder {name!r}; choose one such as resnet50")
    weights = torchvision.models.get_model_weights(name).DEFAULT
    fetch = f"torchvision.models.get_model({name!r}, weights='DEFAULT')"
    _in_cache(_hub_file(weights.url), f"torchvision:{name}", fetch)
    learnt = torchvision.models.get_model(name, weights=weights).state_dict()
    encoder = build_backbone(name)
    encoder.load_state_dict({key: learnt[key] for key in encoder.state_dict()})
    preset = weights.transforms()
    return encoder, {"size": preset.crop_size[0], "mean": tuple(preset.mean), "std": tuple(preset.std)}


def _from_timm(name: str) -> tuple[Backbone, dict[str, Any]]:
    try:
        import timm
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        raise ValueError(f"timm:{name} needs timm, which is not installed; pip install timm") from None
    if not timm.models.is_model_pretrained(name):
        raise ValueError(f"timm has no pretrained encoder {name!r}; choose one of timm.list_pretrained()")
    learnt = timm.models.get_pretrained_cfg(name)
    files = [_hub_file(learnt.url)] if learnt.url else []
    if learnt.hf_hub_id:
        names = ("model.safetensors", "pytorch_model.bin")
        files = [try_to_load_from_cache(learnt.hf_hub_id, each) for each in names]
    file = next((file for file in files if isinstance(file, str)), None)
    _in_cache(file, f"timm:{name}", f"timm.create_model({name!r}, pretrained=True)")
    encoder = timm.create_model(
        name, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": str(file)}
    )
    encoder.dim = encoder.num_features
    like = {"size": learnt.input_size[-1], "mean": tuple(learnt.mean), "std": tuple(learnt.std)}
    return cast(Backbone, encoder), like


def _hub_file(url: str) -> str | None:
    """Where torch keeps what it fetched from an address, if it did."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    return str(file) if file.is_file() else None


def _in_cache(file: str | None, source: str, fetch: str) -> None:
    if file is None:
        raise ValueError(
            f"the weights of {source} are not on this machine; fetch them once, where there is a network, "
            f"with {fetch}, or name a run folder"
        )


@torch.no_grad()
def embed(config: cfg.Config, encoder: Backbone, index: SampleIndex, device: torch.device) -> Tensor:
    """Features of the plain central view of every image, in the order of the index, equal on all ranks.

    Peak memory on the device, beside the network and a batch of 256 images, is 2 N D + 16 P D bytes, where
    P = min(N, 16384), or 256 times the ranks if that is more: 5.2 GB + 0.5 GB for ImageNet's N = 1,281,167
    and D = 2048.

    Args:
        config: how to decode, resize and normalise; see `frozen_encoder`.
        encoder: on `device`; evaluated in eval mode.

    Returns:
        (N, D) float16 on `device`, rows of length 1. An image that cannot be read has a row of zeros.
    """

    def unit(images: Tensor) -> Tensor:
        with autocast(config, device):
            features = encoder(images)
        return F.normalize(features.float(), dim=1)

    loader = plain_loader(config, index, evaluation_views(config.views))
    batches, at_a_time = iter(loader), max(1, _PART // loader.global_batch)
    training = encoder.training
    encoder.eval()
    whole = torch.zeros(0, dtype=torch.float16, device=device)
    for _ in range(0, len(loader), at_a_time):
        features, _, rows = extract(unit, islice(batches, at_a_time), device)
        if not len(whole):
            whole = whole.new_zeros(len(index), features.shape[1])
        whole[rows] = features.half()
    encoder.train(training)
    return whole


@torch.no_grad()
def find_partners(
    features: Tensor,
    *,
    band: tuple[float, float],
    kind: Literal["absolute", "quantile"] = "absolute",
    anchors: Tensor | None = None,
    chunk: int | None = None,
    budget: int = 2**30,
    pairs: int = PAIRS,
    seed: int = 0,
    progress: bool = True,
) -> Partners:
    """The most similar other image of every anchor among those whose cosine lies inside a band.

    The upper bound leaves (near-)duplicates out. Of equally similar images the first is taken. Features are
    compared in float32, a tile of C anchors and C images at a time: beside them, memory is at most
    7 C^2 + 16 C D bytes, some 60 bytes per image and, for quantiles, 24 per random pair. Anchors are shared
    out over the ranks; 2 A N D operations are 6.7e15 for all of ImageNet at D = 2048.

    Args:
        features: (N, D), float of any width and scale, equal on all ranks. A row of zeros has no cosine, so
            no partner, and is nobody's.
        band: least and greatest cosine, both included.
        kind: "absolute", cosines; or "quantile", quantiles in [0, 1] of the cosine of two random images, for
            how large a cosine is hangs on the encoder. 0 and 1 mean no bound. They are estimated from `pairs`
            random pairs, or exactly from all of them if there are no more, and must have at least 10 pairs
            beyond them: of ten million, none closer to 0 or 1 than 1e-6.
        anchors: (A,) rows to find partners for; default all. The others stay alone.
        chunk: C; default what the budget allows.
        budget: bytes for a tile.
        seed: of the random pairs.
        progress: show a bar on the main rank.

    Raises:
        ValueError: fewer than two images, features that are not finite, a band that is none or that the
            pairs cannot resolve, or anchors that are not rows.
    """
    n, device = len(features), features.device
    if features.ndim != 2 or n < 2 or not features.is_floating_point():
        raise ValueError(
            f"features should be floats (N, D) of at least 2 images, not {tuple(features.shape)}"
        )
    wanted = _rows(anchors, n).to(device)
    chunk = min(n, chunk or _tile(budget, features.shape[1]))
    if not all(bool(torch.isfinite(part).all()) for part in torch.split(features, chunk)):
        raise ValueError("some features are not finite; look for the images or the layer that they come from")
    low, high = _absolute(features, band, kind, pairs, seed, max(1, chunk // 2))
    # Rounding may take the cosine of two equal rows beyond 1.
    least, most = low if low > -1 else -math.inf, high if high < 1 else math.inf

    rank, world = distributed.rank(), distributed.world()
    mine = wanted[rank::world]
    best = torch.full((len(mine),), -math.inf, device=device)
    found = mine.clone()
    tiles = -(-n // chunk) * -(-len(mine) // chunk)
    silent = not (progress and distributed.is_main())
    with tqdm(total=tiles, desc="partners", unit="tile", disable=silent) as bar:
        for first in range(0, n, chunk):
            others = _unit(features[first : first + chunk])
            columns = torch.arange(first, first + len(others), device=device)
            for begin in range(0, len(mine), chunk):
                part = slice(begin, begin + chunk)
                cosines = _unit(features[mine[part]]) @ others.T
                inside = (cosines >= least) & (cosines <= most)  # False for NaN
                inside &= columns != mine[part, None]
                value, place = cosines.masked_fill_(~inside, -math.inf).max(dim=1)
                better = value > best[part]  # not >=, so that the first of equals stays
                best[part] = torch.where(better, value, best[part])
                found[part] = torch.where(better, place + first, found[part])
                bar.update()
    rows, found, best = (distributed.gather_rows(each) for each in (mine, found, best))
    partner = torch.arange(n, device=device)
    partner[rows] = found
    cosine = torch.full((n,), math.nan, device=device)
    cosine[rows] = torch.where(found == rows, math.nan, best.clamp(-1, 1))
    return Partners(partner, cosine, (low, high))


def _unit(features: Tensor) -> Tensor:
    """Rows of length 1 in float32; a row of zeros becomes NaN, which lies in no band."""
    rows = features.float()
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def _tile(budget: int, dim: int) -> int:
    """The largest C with 7 C^2 + 16 C D <= budget: float32 cosines and three masks, features in and out."""
    return max(1, int((math.sqrt((16 * dim) ** 2 + 28 * budget) - 16 * dim) / 14))


def _rows(anchors: Tensor | None, n: int) -> Tensor:
    if anchors is None:
        return torch.arange(n)
    if anchors.ndim != 1 or anchors.is_floating_point() or anchors.dtype == torch.bool:
        raise ValueError(
            f"anchors should be row numbers (A,), not {anchors.dtype} of {tuple(anchors.shape)}; "
            "of a mask, give its nonzero rows"
        )
    if len(anchors) and not 0 <= int(anchors.min()) <= int(anchors.max()) < n:
        raise ValueError(f"anchors should be rows of {n} images, from 0 to {n - 1}")
    return anchors.long()


def _absolute(
    features: Tensor, band: tuple[float, float], kind: str, pairs: int, seed: int, chunk: int
) -> tuple[float, float]:
    """The band as cosines."""
    if kind not in ("absolute", "quantile"):
        raise ValueError(f"the kind of a band is absolute or quantile, not {kind!r}")
    low, high = (float(bound) for bound in band)
    floor = 0 if kind == "quantile" else -1
    if not floor <= low < high <= 1:
        raise ValueError(f"a band of kind {kind} is {floor} <= low < high <= 1, not {(low, high)}")
    if kind == "absolute":
        return low, high
    n = len(features)
    everyone = n * (n - 1) // 2
    count = min(everyone, pairs)
    for bound in (low, high):
        tail = min(bound, 1 - bound)
        if tail and round(count * tail, 3) < _BEYOND:  # rounded, for 1 - 0.9999 is less than 0.0001
            needed = math.ceil(round(_BEYOND / tail, 2))
            mend = f"raise pairs to {needed}" if needed <= everyone else "take one nearer 0.5"
            raise ValueError(
                f"the quantile {bound} cannot be told from {count} pairs of images, for fewer than {_BEYOND} "
                f"lie beyond it; {mend}, or give an absolute band"
            )
    if count == everyone:
        one, other = torch.triu_indices(n, n, 1)
    else:
        draw = torch.Generator().manual_seed(seed)
        one = torch.randint(n, (count,), generator=draw)
        other = (one + 1 + torch.randint(n - 1, (count,), generator=draw)) % n
    share = slice(distributed.rank(), None, distributed.world())
    sides = (torch.split(side[share].to(features.device), chunk) for side in (one, other))
    cosines = [(_unit(features[i]) * _unit(features[j])).sum(dim=1) for i, j in zip(*sides, strict=True)]
    known = distributed.gather_rows(torch.cat(cosines)).cpu().numpy()
    known = known[~np.isnan(known)]
    if not len(known):
        raise ValueError("all features are zeros, so their cosines have no quantiles; look at the encoder")
    quantiles = np.quantile(known, (low, high)).clip(-1, 1).tolist()
    return quantiles[0] if low > 0 else -1.0, quantiles[1] if high < 1 else 1.0


def random_partners(n: int, seed: int, anchors: Tensor | None = None) -> Tensor:
    """The control that must hurt: any other image, all equally likely.

    Args:
        anchors: (A,) rows that get a partner, each the same whoever else does; default all.

    Returns:
        (N,) int64 on the CPU; a pure function of the arguments.

    Raises:
        ValueError: fewer than two images, or anchors that are not rows.
    """
    if n < 2:
        raise ValueError(f"partners need at least 2 images, not {n}")
    return label_partners(torch.zeros(n, dtype=torch.long), seed, anchors)


def label_partners(
    labels: Tensor | NDArray[np.integer[Any]], seed: int, anchors: Tensor | None = None
) -> Tensor:
    """The control that knows the answer: any other image of the same label, all equally likely.

    Args:
        labels: (N,), -1 where unknown.
        anchors: (A,) rows that get a partner, each the same whoever else does; default all.

    Returns:
        (N,) int64 on the CPU; itself if no other has the label, or it is unknown. A pure function of the
        arguments.

    Raises:
        ValueError: anchors that are not rows.
    """
    label = torch.as_tensor(labels).cpu().numpy()
    _, group, sizes = np.unique(label, return_inverse=True, return_counts=True)
    members = np.argsort(group, kind="stable")  # group by group
    place = np.empty(len(label), np.int64)
    place[members] = np.arange(len(label))
    start, others = (np.cumsum(sizes) - sizes)[group], sizes[group] - 1
    rows = _rows(anchors, len(label)).cpu().numpy()
    rows = rows[(label[rows] >= 0) & (others[rows] > 0)]
    step = 1 + (rng.uniform(rng.keys(seed, _STREAM, rows), 0) * others[rows]).astype(np.int64)
    partner = np.arange(len(label))
    partner[rows] = members[start[rows] + (place[rows] - start[rows] + step) % (others[rows] + 1)]
    return torch.from_numpy(partner)


def precision(
    partner: Tensor,
    labels: Tensor | NDArray[np.integer[Any]],
    cosine: Tensor | None = None,
    bands: int = 10,
) -> dict[str, Any]:
    """How many partners are of the same class: to look at a search, never to train.

    Pairs are images with another one as their partner, where the labels of both are known.

    Args:
        partner: (N,), as `find_partners` returns it.
        labels: (N,), -1 where unknown.
        cosine: (N,) similarity of the pairs.
        bands: into how many equal parts the pairs are sorted by similarity: 10, deciles.

    Returns:
        "precision", the share of pairs of equal labels; "pairs", their number; "chance", that share for
        random partners of the same images; and with `cosine` "bands", a list of {"low", "high",
        "precision", "pairs"} by ascending similarity. What nothing is known of is NaN.

    Raises:
        ValueError: the arguments have different lengths, or there are no bands.
    """
    who, label = partner.cpu(), torch.as_tensor(labels).long().cpu()
    if bands < 1 or len({len(each) for each in (who, label, cosine) if each is not None}) > 1:
        raise ValueError("partners, labels and cosines should be of the same images, and bands at least 1")
    asked = (who != torch.arange(len(who))) & (label >= 0) & (label[who] >= 0)
    right = (label[who] == label)[asked].double()
    known = label[label >= 0]
    alike = (torch.bincount(known)[label[asked]] - 1).double()
    found: dict[str, Any] = {"precision": float(right.mean()), "pairs": len(right)}
    found["chance"] = float(alike.mean() / (len(known) - 1)) if len(right) else math.nan
    if cosine is not None:
        similarity = cosine.cpu()[asked].double()
        found["bands"] = [
            {
                "low": float(similarity[part[0]]) if len(part) else math.nan,
                "high": float(similarity[part[-1]]) if len(part) else math.nan,
                "precision": float(right[part].mean()),
                "pairs": len(part),
            }
            for part in similarity.argsort(stable=True).tensor_split(bands)
        ]
    return found
