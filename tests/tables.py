"""Parquet and Arrow tables for tests, as pyarrow and Hugging Face's datasets write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def structs(images: Sequence[bytes | None], paths: Sequence[str | None] | None = None) -> pa.Array:
    """Images as Hugging Face's feature Image has them."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    names = [f"{number}.jpg" for number in range(len(images))] if paths is None else paths
    values = [{"bytes": image, "path": name} for image, name in zip(images, names, strict=True)]
    return pa.array(values, kind)


def named(table: pa.Table, label: str, names: Any) -> pa.Table:
    """The table with names of the numbers in a column, as ClassLabel writes them."""
    features = {label: {"names": names, "_type": "ClassLabel"}}
    return table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}})})


def write(file: Path, table: pa.Table, how: str = "file", group: int = 7, **options: Any) -> Path:
    """One table in groups of so many rows; `how` is parquet, file or stream, or one and a compression.

    Parquet is compressed with snappy unless told otherwise, the Arrow formats are not.
    """
    how, _, compression = how.partition(" ")
    if how == "parquet":
        pq.write_table(table, file, group, compression=compression or "snappy", **options)
        return file
    new = pa.ipc.new_file if how == "file" else pa.ipc.new_stream
    packed = pa.ipc.IpcWriteOptions(compression=compression or None)
    with new(str(file), table.schema, options=packed) as writer:
        writer.write_table(table, group)
    return file
