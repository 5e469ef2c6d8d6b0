"""Which columns of a table hold the encoded images, their names and their labels."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

_LABELS = ("label", "labels", "cls", "class", "fine_label")


@dataclass(frozen=True)
class Columns:
    """The columns that a scan reads; a field of a struct is written with a dot, as "image.bytes"."""

    image: str
    path: str | None
    """Text, a name of each image."""
    label: str | None
    """Whole numbers or text."""
    classes: list[str] | None
    """Names of the numbers, where the table tells them as Hugging Face does."""

    def absent(self, schema: pa.Schema) -> str:
        """What a table of this schema lacks of what the first table has, or ""."""
        if self.image not in _images(schema):
            return f"it has no column {self.image!r} of encoded images"
        if self.label is not None and self.label not in _labels(schema):
            return f"it has no column {self.label!r} of whole numbers or words"
        if self.label is not None and _class_names(schema, self.label) != self.classes:
            return f"the classes of its column {self.label!r} are not those of the first table"
        return ""


def choose(schema: pa.Schema, image: str | None, label: str | None) -> Columns:
    """The columns of a table, as named or by their types and names.

    Args:
        image: Column with the encoded bytes, binary or a struct with a binary field `bytes`.
        label: Column with whole numbers or words.

    Raises:
        ValueError: No column fits, several do and none is named, or the one named does not.
    """
    fits = _images(schema)
    told = ", ".join(map(repr, schema.names))
    if image is None:
        if len(fits) > 1:
            several = ", ".join(map(repr, fits))
            raise ValueError(
                f"The columns {several} can all hold encoded images; name one of them as `image`."
            )
        if not fits:
            raise ValueError(
                f"None of the columns {told} can hold encoded images (binary, or a struct with a binary "
                "field 'bytes'); check the table."
            )
        leaf = fits[0]
    else:
        leaf = image if image in fits else f"{image}.bytes"
        if leaf not in fits:
            raise ValueError(
                f"There is no column {image!r} of encoded images (binary, or a struct with a "
                f"binary field 'bytes'); the columns are {told}."
            )
    if label is None:
        label = next((name for name in _LABELS if name in _labels(schema)), None)
        other = next((name for name in _LABELS if name in schema.names), None)
        if label is None and other is not None:
            kind = schema.types[schema.names.index(other)]
            warnings.warn(
                f"The images have no labels, for the column {other!r} holds {kind} and neither whole numbers "
                "nor words; convert it, or name another as `label`.",
                stacklevel=2,
            )
    elif label not in _labels(schema):
        raise ValueError(f"There is no column {label!r} of whole numbers or words; the columns are {told}.")
    stem, _, field = leaf.rpartition(".")
    path = None
    if field == "bytes" and leaf not in schema.names:
        kind = schema.field(stem).type
        place = kind.get_field_index("path")
        path = f"{stem}.path" if place >= 0 and _is_text(kind.field(place).type) else None
    return Columns(leaf, path, label, None if label is None else _class_names(schema, label))


def _images(schema: pa.Schema) -> list[str]:
    return list(_image_leaves(schema))


def _image_leaves(schema: pa.Schema) -> Iterator[str]:
    for field in schema:
        if _is_binary(field.type):
            yield field.name
        elif pa.types.is_struct(field.type):
            place = field.type.get_field_index("bytes")
            if place >= 0 and _is_binary(field.type.field(place).type):
                yield f"{field.name}.bytes"


def _labels(schema: pa.Schema) -> list[str]:
    kinds = ((field.name, _plain(field.type)) for field in schema)
    return [name for name, kind in kinds if pa.types.is_integer(kind) or _is_text(kind)]


def _is_binary(kind: pa.DataType) -> bool:
    plain = _plain(kind)
    return bool(pa.types.is_binary(plain) or pa.types.is_large_binary(plain) or str(plain) == "binary_view")


def _is_text(kind: pa.DataType) -> bool:
    plain = _plain(kind)
    return bool(pa.types.is_string(plain) or pa.types.is_large_string(plain) or str(plain) == "string_view")


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """What Hugging Face's ClassLabel says of a column."""
    try:
        told: Any = json.loads(schema.metadata[b"huggingface"])
        names = told["info"]["features"][label]["names"]
        "".join(names).encode()
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return None
    return list(names) if isinstance(names, list) and pa.types.is_integer(schema.field(label).type) else None
