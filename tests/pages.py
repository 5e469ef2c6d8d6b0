"""What stands on a page, read by Python's own parser; and small runs that have pages."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image
from runs import write_config

_ADDRESSES = ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background")


def small_config(folder: Path, data: dict, **changes: dict) -> Path:
    """The configuration of a run with the smallest encoder, into `folder`/run."""
    return write_config(folder, data, **{"model": {"backbone": "test_resnet"}, **changes})


class Page(HTMLParser):
    """The page in a file: its elements, pictures and words. It loads, runs and links to nothing."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        source = file.read_text(encoding="utf-8")
        style = re.search(r"<style>.*</style>", source, re.DOTALL)
        assert style
        self.feed(source.replace(style[0], ""))
        self.close()
        self.text = " ".join(self.words)

        assert not self.tags("script") + self.tags("iframe")
        for tag, attributes in self.elements:
            assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
            for name in attributes.keys() & _ADDRESSES:
                assert attributes[name].startswith(("#", "data:image/jpeg;")), (tag, attributes[name][:80])
        assert not re.search(r"url\(\s*['\"]?(?!#)|@import|https?://", source)
        assert "default-src 'none'" in self.tags("meta")[1]["content"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.words += [data.strip()] if data.strip() else []

    def tags(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        return [each for name, each in self.elements if name == tag and wanted.items() <= each.items()]

    def has(self, *texts: str) -> bool:
        return all(text in self.text for text in texts)

    def pictures(self) -> list[Image.Image]:
        """Every image of the page, decoded."""
        sources = [attributes["src"].partition(",") for attributes in self.tags("img")]
        assert {head for head, _, _ in sources} <= {"data:image/jpeg;base64"}
        files = [io.BytesIO(base64.b64decode(content, validate=True)) for _, _, content in sources]
        return [Image.open(file).convert("RGB") for file in files]
