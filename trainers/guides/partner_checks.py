"""What to judge a search for partners by: random partners, those of the same label, and their precision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dali_views.plan import rng

from .partners import anchor_rows

__all__ = ["label_partners", "precision", "random_partners"]

_STREAM = 0x7061  # sets these random numbers apart from those of the loader


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
    rows = anchor_rows(anchors, len(label)).cpu().numpy()
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
