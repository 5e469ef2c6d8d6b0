"""The same loader on the same images wherever their bytes lie: ratios to the first place, in one run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import partial

from . import limits, ours
from .contender import Contender, Setup
from .results import IMAGES, Row, joined, median_ratio
from .turns import forget_files, take_turns


def compare(setups: Mapping[str, Setup], *, rounds: int, seconds: float, cold: bool = False) -> list[Row]:
    """Two rows per place: our loader, and a graph that only reads and decodes.

    Args:
        setups: By the name of the place, the first of which the others are compared with.
        rounds, seconds: turns that each takes and their length, after a warm-up.
        cold: drop local images from the page cache before every turn.
    """
    contenders = [one for name, setup in setups.items() for one in _contenders(name, setup)]
    most = min(len(setup.index) // setup.batch_size * setup.batch_size for setup in setups.values())

    def forget() -> None:
        for setup in setups.values():
            forget_files(setup.index)

    rates = take_turns(
        contenders, rounds, seconds, before=forget if cold else None, images=most if cold else math.inf
    )
    base = {one.kind: rates[one.name] for one in contenders[:2]}
    return [_row(one, rates[one.name], base[one.kind]) for one in contenders]


def _contenders(name: str, setup: Setup) -> Sequence[Contender]:
    (decode,) = (one for one in limits.contenders(setup) if one.name == limits.DECODE)
    return [
        Contender(name, "ours", setup.device, partial(ours.batches, setup, setup.views), len(setup.views)),
        Contender(f"{name}, {limits.DECODE}", "limit", setup.device, decode.start, 0),
    ]


def _row(contender: Contender, values: Sequence[float], first: Sequence[float]) -> Row:
    return Row(
        part="sources",
        name=contender.name,
        measure=IMAGES,
        value=round(statistics.median(values), 1),
        ratio=median_ratio(values, first),
        rounds=joined(values),
        kind=contender.kind,
        device=contender.device,
        views=contender.views,
    )
