"""Where the values of an LMDB environment lie in its file.

The pages are read here and not by LMDB's own library, which trusts a file: one that is damaged can end the
process. The layout is that of data version 1 (LMDB 0.9) on 64-bit little-endian machines.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

_MAGIC, _VERSION = 0xBEEFC0DE, 1
# A page begins with its number (8 bytes), 2 bytes, flags and where its list of nodes ends (2 each), 2 bytes.
_PAGE = struct.Struct("<QHHHH")
_BRANCH, _LEAF, _OVERFLOW = 0x01, 0x02, 0x04
# Magic, version, two words; then twice a database: page size or 0, flags, depth, four counts, root; then the
# last page and the number of the transaction.
_META = struct.Struct("<IIQQ IHHQQQQQ IHHQQQQQ QQ")
_PAGE_SIZES = (4096, 8192, 16384, 32768, 65536)
# A node: in a leaf the bytes of its value (4) and flags (2), in a branch a page number (6); bytes of its key.
_NODE = struct.Struct("<IHH")
_ELSEWHERE, _DATABASE, _SEVERAL = 0x01, 0x02, 0x04  # what the flags of a node in a leaf say of its value
_NO_ROOT = (1 << 64) - 1
_DEEPEST = 32

NO_VALUE, LOST = -1, -2
"""Size of an entry that is no single value, and of one whose value is damaged."""


class Value(NamedTuple):
    """One value of an environment."""

    key: bytes
    offset: int
    """In the file."""
    size: int
    """Bytes, maybe more than a file that was cut off has; `NO_VALUE` or `LOST` for what is none."""


class Pages:
    """The main database of an environment as its last transaction left it."""

    def __init__(self, handle: int, size: int) -> None:
        """Of an open file of `size` bytes; a ValueError if it is no environment."""
        self._handle, self._size = handle, size
        metas = [meta for at in (0, *_PAGE_SIZES) if (meta := self._meta(at)) is not None]
        if not metas:
            raise ValueError("no LMDB environment, or one of another version or kind of machine")
        newest = max(metas, key=lambda meta: meta[-1])
        self._page_size, self._root = newest[4], newest[19]
        self._visited: set[int] = set()
        self.entries = newest[18]
        """How many there should be."""
        self.lost = 0
        """Pages that turned out to be damaged."""

    def _meta(self, at: int) -> tuple[int, ...] | None:
        data = os.pread(self._handle, _META.size, at + _PAGE.size)
        if len(data) < _META.size:
            return None
        meta = _META.unpack(data)
        fits = meta[:2] == (_MAGIC, _VERSION) and meta[4] in _PAGE_SIZES and at in (0, meta[4])
        return meta if fits else None

    def values(self) -> Iterator[Value]:
        """All entries in the order of their keys; a damaged page costs what it holds."""
        if self._root != _NO_ROOT:
            yield from self._below(self._root, 0)

    def _below(self, number: int, depth: int) -> Iterator[Value]:
        try:
            if depth == _DEEPEST:
                raise ValueError("deeper than any tree")
            branch, nodes = self._nodes(number)
        except (struct.error, ValueError):
            self.lost += 1
            return
        for node in nodes:
            if branch:
                yield from self._below(node.offset, depth + 1)
            else:
                yield node

    def _nodes(self, number: int) -> tuple[bool, list[Value]]:
        """The nodes of a page, and whether it is a branch: then their offsets are numbers of pages below."""
        if number in self._visited:
            raise ValueError("a page that leads back")
        self._visited.add(number)
        page, flags, end = self._page(number)
        kind = flags & (_BRANCH | _LEAF | _OVERFLOW)
        if kind not in (_BRANCH, _LEAF) or not _PAGE.size <= end <= len(page):
            raise ValueError("no page of the tree")
        starts = struct.unpack_from(f"<{(end - _PAGE.size) // 2}H", page, _PAGE.size)
        if kind == _BRANCH:
            return True, [_child(page, start) for start in starts]
        return False, [self._value(page, number, start) for start in starts]

    def _value(self, page: bytes, number: int, start: int) -> Value:
        size, flags, key_size = _NODE.unpack_from(page, start)
        at = start + _NODE.size
        key = page[at : at + key_size]
        at += key_size
        if flags & (_DATABASE | _SEVERAL):
            return Value(key, 0, NO_VALUE)
        if not flags & _ELSEWHERE:
            if at + size > len(page):
                raise ValueError("a value leads out of its page")
            return Value(key, number * self._page_size + at, size)
        (first,) = struct.unpack_from("<Q", page, at)
        try:
            whole = self._page(first)[1] & _OVERFLOW
        except (struct.error, ValueError):
            whole = False
        return Value(key, first * self._page_size + _PAGE.size, size if whole else LOST)

    def _page(self, number: int) -> tuple[bytes, int, int]:
        """A page, its flags and the end of its list of nodes."""
        if number >= self._size // self._page_size:
            raise ValueError("no such page")
        page = os.pread(self._handle, self._page_size, number * self._page_size)
        told, _, flags, end, _ = _PAGE.unpack_from(page)
        if told != number:
            raise ValueError("another page")
        return page, flags, end


def _child(page: bytes, start: int) -> Value:
    low, high, _ = _NODE.unpack_from(page, start)
    return Value(b"", low | high << 32, 0)
