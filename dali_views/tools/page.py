"""Pages that stand alone: HTML with its pictures inside, read without a network and without scripts."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image


def render(template: Path, **values: Any) -> str:
    """The page that a template makes of values, which are shown as text whatever they hold. The template may
    extend `page.html` and use its macros."""
    page = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]), autoescape=True,
        finalize=_printable, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page.globals["jpeg"] = jpeg
    return page.get_template(template.name).render(values)


def _printable(value: Any) -> Any:
    """Replaces broken bytes of file names and marks that change the direction of text."""
    if isinstance(value, Markup) or not isinstance(value, str) or value.isprintable():
        return value
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in value)


def jpeg(image: Image.Image, side: int, most: int) -> str:
    """An RGB image as the address of a JPEG of at most `side` pixels and at most `most` (>= 700) bytes.

    The quality is lowered until it fits, and then the size. An opened JPEG keeps its quality.
    """
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    for quality in [*(["keep"] if image.format == "JPEG" else []), 92, 85, 75, 60, 45, 30]:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= most:
            return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
    return jpeg(image, max(image.size) * 3 // 4, most)
