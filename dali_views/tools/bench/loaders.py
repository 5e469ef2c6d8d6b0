"""Loaders against each other and against the limits, on the same images, in one run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

from . import limits, ours, peers
from .contender import Contender, Setup
from .peers.torchvision_pil import NAME as BASE
from .results import IMAGES, Row, joined, median_ratio
from .turns import WARM_UP, forget_files, take_turns

_PLANS = 50  # timed


def compare(
    setup: Setup,
    *,
    rounds: int,
    seconds: float,
    only: Sequence[str] = (),
    cold: bool = False,
    told: Callable[[str], None] = print,
) -> list[Row]:
    """A row per limit, setting of our loader and installed peer.

    Args:
        rounds, seconds: turns that each takes and their length, after a warm-up.
        only: keep contenders whose names contain one of these; the baseline and the limit stay.
        cold: drop the images from the page cache before every turn.
        told: receives lines about what is left out.
    """
    enough = 8 * WARM_UP * setup.batch_size
    if cold and len(setup.index) < enough:
        raise ValueError(
            f"With a cold cache a turn reads every file once, and {len(setup.index)} files are too few for "
            f"batches of {setup.batch_size}; give at least {enough} files or lower --batch-size."
        )
    all_of_them = [*peers.found(setup, told), *limits.contenders(setup), *ours.contenders(setup)]
    contenders = [
        each
        for each in all_of_them
        if not only or each.name in (BASE, limits.DECODE) or any(word in each.name for word in only)
    ]
    rates = take_turns(
        contenders,
        rounds,
        seconds,
        before=(lambda: forget_files(setup.index)) if cold else None,
        # A file that is read again is no longer cold. Whole batches only: the next one may be an epoch later.
        images=len(setup.index) // setup.batch_size * setup.batch_size if cold else math.inf,
        told=told,
    )
    rows = [_row(each, rates) for each in contenders if each.name in rates]
    if ours.GUIDED in rates:
        rows.append(_plan_row(setup, statistics.median(rates[ours.GUIDED])))
    return rows


def _plan_row(setup: Setup, images_per_second: float) -> Row:
    """How much of a guided batch's time goes into drawing its plan, which happens on one thread."""
    loader = ours.loader(
        setup, ours.guided(setup.views), ours.table_of_boxes(len(setup.index), 1, setup.seed)
    )
    shares = []
    for number in range(_PLANS):
        began = time.perf_counter()
        loader.plan_at(number * setup.batch_size)
        shares.append((time.perf_counter() - began) * images_per_second / setup.batch_size)
    return Row(
        "loaders", "plan of a guided batch", "of time", round(statistics.median(shares), 5), kind="ours"
    )


def _row(contender: Contender, rates: dict[str, list[float]]) -> Row:
    values = rates[contender.name]
    return Row(
        part="loaders",
        name=contender.name,
        measure=IMAGES,
        value=round(statistics.median(values), 1),
        ratio=median_ratio(values, rates.get(BASE)),
        of_limit=median_ratio(values, rates.get(limits.DECODE)),
        rounds=joined(values),
        kind=contender.kind,
        device=contender.device,
        views=contender.views,
        note=contender.note,
    )
