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
    """The page in a file: its elements, pictures and words."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" not in self._open and data.strip():
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def tags(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def pictures(self) -> list[Image.Image]:
        """Every image of the page, decoded."""
        found = []
        for attributes in self.tags("img"):
            head, _, content = attributes["src"].partition(",")
            assert head == "data:image/jpeg;base64", head[:60]
            found.append(Image.open(io.BytesIO(base64.b64decode(content, validate=True))))
            found[-1].load()
        return found

    def check_alone(self) -> None:
        """It loads nothing, runs nothing and leads nowhere else."""
        assert not self.tags("script")
        assert not self.tags("iframe")
        for tag, attributes in self.elements:
            assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
            for name in _ADDRESSES:
                assert attributes.get(name, "#").startswith(("#", "data:image/jpeg;")), (
                    tag,
                    attributes[name][:80],
                )
        assert not re.search(r"url\(\s*['\"]?(?!#)|@import|https?://", self.source)
        assert "default-src 'none'" in self.tags("meta")[1]["content"]
