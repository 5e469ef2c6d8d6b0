"""The samples on a run's page: how their boxes moved, which were found best and worst, which are pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dali_views.tools.web_page import Outline, escape, legend, picture

from .. import config as cfg
from .files import HISTORY
from .history import stored_in
from .pictures import FOUND_COLOUR, TRUE_COLOUR, colour_of, passes

__all__ = ["followed", "localised", "pairs"]

_TALLEST = 210  # CSS pixels of a small picture


def followed(folder: Path, config: cfg.Config | None) -> Iterator[str]:
    """How the boxes of a dozen samples moved, or why they did not."""
    stored, shown = stored_in(folder / HISTORY / "followed.json"), passes(folder)
    yield "<h2>How the boxes moved</h2>"
    if not stored or not shown:
        yield f'<p class="quiet">{_why_no_boxes(config)}</p>'
        return
    colours = [colour_of(number, len(shown)) for number in range(len(shown))]
    entries = [
        (f"epoch {line['epoch']}", colour, "strong") for line, colour in zip(shown, colours, strict=True)
    ]
    if any(card["true"] for card in stored["cards"]):
        entries.append(("true boxes", TRUE_COLOUR, "thin"))
    yield (
        f'<p class="quiet">{len(stored["cards"])} samples, chosen by the seed, with their boxes of greatest '
        "weight after each pass of the guide.</p>"
    )
    yield legend(entries)
    cards = []
    for place, card in enumerate(stored["cards"]):
        outlines = [Outline(box, TRUE_COLOUR, "thin") for box in card["true"]]
        for line, colour in zip(shown, colours, strict=True):
            if place < len(line["boxes"]) and line["boxes"][place]:
                outlines.append(Outline(line["boxes"][place], colour))
        cards.append(_figure(card, outlines))
    yield f'<div class="grid small-multiples">{"".join(cards)}</div>'


def localised(folder: Path) -> Iterator[str]:
    """The samples whose true boxes the latest evaluation found best, and worst."""
    stored = stored_in(folder / HISTORY / "localised.json")
    if not stored:
        return
    yield "<h2>Best and worst localised</h2>"
    yield (
        f'<p class="quiet">Boxes of the encoder\'s maps after epoch {int(stored["epoch"])}, at '
        f"{float(stored['threshold']):g} of the maximum: the threshold of greatest mean IoU.</p>"
    )
    yield legend([("box of the map", FOUND_COLOUR, "strong"), ("true boxes", TRUE_COLOUR, "thin")])
    for end in ("best", "worst"):
        cards = []
        for card in stored[end]:
            outlines = [Outline(box, TRUE_COLOUR, "thin") for box in card["true"]]
            told = f"IoU {float(card['iou']):.2f}, "
            cards.append(_figure(card, [*outlines, Outline(card["box"], FOUND_COLOUR)], told))
        if cards:
            yield f'<h3>{end.capitalize()}</h3><div class="grid small-multiples">{"".join(cards)}</div><br>'


def pairs(folder: Path, config: cfg.Config | None) -> Iterator[str]:
    """Images beside their semantic partners."""
    stored = stored_in(folder / HISTORY / "pairs.json")
    if not stored:
        if config is not None and config.guide.name == "semantic_pairs":
            yield '<h2>Semantic pairs</h2><p class="quiet">No image has a partner.</p>'
        return
    yield "<h2>Semantic pairs</h2>"
    yield '<p class="quiet">Images and the partners that second views are cut from, chosen by the seed.</p>'
    pairs = [
        f'<div class="card pair">{"".join(_figure(card, [], framed=False) for card in pair)}</div>'
        for pair in stored["pairs"]
    ]
    yield f'<div class="grid pairs">{"".join(pairs)}</div>'


def _figure(card: Mapping[str, Any], outlines: Sequence[Outline], told: str = "", framed: bool = True) -> str:
    """A small picture with its name."""
    caption = f"{told}{card['name']}" + (f", {card['class']}" if card["class"] else "")
    # What stands in the file is not trusted to be a picture.
    found = str(card["picture"]).startswith("data:image/jpeg;base64,")
    size = (int(card["size"][0]), int(card["size"][1]))
    shown = picture(card["picture"], size, str(card["name"]), outlines, _TALLEST) if found else ""
    kind = ' class="card"' if framed else ""
    return f"<figure{kind}>{shown}<figcaption>{escape(caption)}</figcaption></figure>"


def _why_no_boxes(config: cfg.Config | None) -> str:
    guide = None if config is None else config.box_guide
    if isinstance(guide, cfg.NoGuide):
        return "No guide writes boxes in this run: all crops are random."
    if isinstance(guide, cfg.Localised):
        first = max(1, -(-guide.warmup // guide.interval)) * guide.interval
        return f"The guide has not written boxes yet; it begins after epoch {first}, unless that is the last."
    return "No boxes have been noted."
