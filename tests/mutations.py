"""Valid files of every kind that is loaded, and seeded damage to them."""

from __future__ import annotations

import io
import json
import os
import random
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import matplotlib
import numpy as np
import pyarrow as pa
import safetensors.numpy
import torch
from PIL import Image
from tables import structs, write
from tars import add

from dali_views import RegionTable, SampleIndex
from dali_views.system.files import _checksum as checksum
from trainers.config import file as config_file
from trainers.engine import checkpoint

IMAGES = {"jpeg": ".jpg", "png": ".png", "raster": ".bmp .webp .tif .ppm"}
ENDINGS = IMAGES | {"shard": ".tar", "table": ".parquet"}
KINDS = (*IMAGES, "list", "coco", "index", "regions", "checkpoint", "yaml", "shard", "table", "lmdb")

TABLES = ("parquet none", "parquet zstd", "file", "stream", "file zstd")
_VALUES = ("0", "-1", "1e999", "NaN", "65536", "9" * 20, "9" * 5000, '"a"', "null", "[]", "{}", "[" * 3000)
_TEXTS = (*"\0/\t\n\u2028\udcff\ud800", '"', "../", "x" * 5000, "\\ud800", "\\u0000", "&a ", "*a ", "!!set ")
_SIDES = (0, 1, 2_700, 13_000, 65_500, 65_535, 100_000, 2**31 - 1, 2**32 - 1)


class Trap:
    """An object whose unpickling makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.folder,)


def originals(folder: Path) -> dict[str, list[bytes]]:
    """Valid files of every kind; the images that they name are written to `folder`/images."""
    images = folder / "images"
    images.mkdir(parents=True)
    portrait = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    large = [Image.open(portrait).convert("RGB").rotate(90 * turn, expand=True) for turn in range(3)]
    small = [image.resize((96, 72)) for image in large]
    for number, image in enumerate(small):
        image.save(images / f"{number}.jpg")
    index = SampleIndex.from_folder(images, cache=folder / "cache", progress=False)
    boxed = index.with_boxes({"0.jpg": [[0.1, 0.1, 0.5, 0.6]], "2.jpg": [[0, 0, 1, 1], [0.2, 0, 1, 0.7]]})
    boxed.save(folder / "boxed")
    cached = list((folder / "cache").iterdir())
    shards = [_shard(images, kind) for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    (folder / "a.tar").write_bytes(shards[0])
    SampleIndex.from_shards(folder / "a.tar", cache=False, progress=False).save(folder / "shards")
    regions = RegionTable(3, fingerprint=index.fingerprint)
    regions.update([1], boxes=[[0.1, 0.2, 0.6, 0.9]], partner=[2])
    regions.save(folder / "regions")
    config = "run: {out: runs/a}\ndata: {kind: folder, path: images}\noptim: {lr: 0.1, batch: 8}\n"
    net = torch.nn.Linear(20, 30)
    state = {"step": 3, "config": config, "method": net.state_dict(), "regions": regions.state_dict()}
    checkpoint.save(folder, state)
    (folder / "a.yaml").write_text(config)
    coco = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 96, "height": 72} for n in range(3)],
        "categories": [{"id": 7, "name": "dog"}],
        "annotations": [{"image_id": 1, "category_id": 7, "bbox": [1.5, 2, 30, 40], "iscrowd": 0}],
    }
    pictures = structs([(images / f"{number % 3}.jpg").read_bytes() for number in range(12)])
    table = pa.table({"image": pictures, "label": pa.array(["a", "b", None] * 4).dictionary_encode()})
    return {
        "jpeg": [_encoded(image, "JPEG") for image in (large[0], small[2].convert("CMYK"))]
        + [_encoded(small[1], "JPEG", progressive=True, restart_marker_blocks=2)],
        "png": [_encoded(small[0].convert(mode), "PNG") for mode in ("RGB", "L", "P", "RGBA", "1", "I;16")],
        "raster": [_encoded(small[0], kind) for kind in ("BMP", "WEBP", "TIFF", "PPM")]
        + [_encoded(small[1], "TIFF", compression=how) for how in ("tiff_lzw", "jpeg", "tiff_adobe_deflate")]
        + [_encoded(small[1], "WEBP", lossless=True), _encoded(small[1].convert("P"), "BMP")],
        "list": [b"0.jpg 0\n1.jpg 1\n2.jpg 5\n", b"# words\n0.jpg\tcat\n./1.jpg\tdog\n2.jpg\n"],
        "coco": [json.dumps(coco).encode()],
        "index": [file.read_bytes() for file in (folder / "boxed", folder / "shards", *cached)],
        "regions": [(folder / "regions").read_bytes()],
        "checkpoint": [(folder / checkpoint.LAST).read_bytes()],
        "table": [write(folder / "table", table, how, 5).read_bytes() for how in TABLES],
        "lmdb": [_environment(folder, images)],
        "yaml": [config.encode(), config_file.dump(config_file.load(folder / "a.yaml")).encode()],
        "shard": shards,
    }


def _shard(images: Path, kind: int) -> bytes:
    """A shard of the images, each with a label."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for number, file in enumerate(sorted(images.iterdir())):
            add(tar, f"{'long ' * 30 * (number % 2)}{file.name}", file.read_bytes(), mtime=number + 0.5)
            add(tar, f"{'long ' * 30 * (number % 2)}{file.stem}.cls", b"7")
            add(tar, f"{file.stem}.json", b'{"label": 3}')
    return out.getvalue()


def _environment(folder: Path, images: Path) -> bytes:
    """Values in pages of their own, and small ones beside their keys."""
    with lmdb.open(str(folder / "lmdb"), map_size=1 << 24) as to, to.begin(write=True) as written:
        for number in range(60):
            written.put(b"class/%d.jpg" % number, (images / f"{number % 3}.jpg").read_bytes())
            written.put(b"__text%d__" % number, b"no image" * 20)
    return (folder / "lmdb" / "data.mdb").read_bytes()


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def damaged(kind: str, valid: list[bytes], draw: random.Random) -> bytes:
    """One of the valid files of a kind, damaged in one or two ways."""
    data = draw.choice(valid)
    for _ in range(draw.choice((1, 1, 2))):
        # Random bytes rarely pass a checksum, so half of the damage knows the format.
        way = draw.choice((_flip, _flip, _cut, _insert, *[_WAYS.get(kind, _text)] * 4))
        data = way(data, draw)
    return data


def _flip(data: bytes, draw: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 3, 20)) if out else 0):
        # Half of them in the head, where most of the structure is.
        out[draw.randrange(min(len(out), draw.choice((200, len(out)))))] ^= 1 << draw.randrange(8)
    return bytes(out)


def _cut(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data) + 1)
    return data[:start] + data[draw.choice((len(data), draw.randint(start, len(data)))) :]


def _insert(data: bytes, draw: random.Random) -> bytes:
    start, size = draw.randrange(len(data) + 1), draw.choice((1, 4, 100, 5000))
    junk = draw.choice((draw.randbytes(size), bytes(size), b"\xff" * size, data[start : start + size]))
    return data[:start] + junk + data[start:]


def _number(data: bytes, draw: random.Random) -> bytes:
    """Another number at any place of a binary file."""
    size = draw.choice((1, 2, 4))
    start = draw.randrange(max(1, min(len(data), draw.choice((64, len(data)))) - size))
    value = draw.choice(_SIDES) % 256**size
    return data[:start] + value.to_bytes(size, draw.choice(("little", "big"))) + data[start + size :]


def _text(data: bytes, draw: random.Random) -> bytes:
    """A number of a text replaced, a word put in, or a line twice or away."""
    text = data.decode(errors="surrogateescape")
    start = end = draw.randrange(len(text) + 1)
    numbers = list(re.finditer(r"-?\d+(\.\d+)?", text))
    way = draw.randrange(4)
    if way < 2 and numbers:
        (start, end), new = draw.choice(numbers).span(), draw.choice(_VALUES)
    elif way == 2:
        new = draw.choice(_TEXTS)
    else:
        start, end = text.rfind("\n", 0, start) + 1, text.find("\n", start) + 1
        new = text[start:end] * draw.choice((0, 2, 500))
    return (text[:start] + new + text[end:]).encode(errors="surrogatepass")


def _jpeg_header(data: bytes, draw: random.Random) -> bytes:
    """Other sides in the frame header, or another number in any header."""
    frame = re.search(rb"\xff[\xc0-\xc2]\x00.\x08", data, re.DOTALL)
    if frame is None or draw.random() < 0.4:
        return _number(data[:700], draw) + data[700:]
    sides = struct.pack(">HH", *(draw.choice(_SIDES) % 65_536 for _ in range(2)))
    return data[: frame.end()] + sides + data[frame.end() + 4 :]


def _png_chunk(data: bytes, draw: random.Random) -> bytes:
    """Other sides in the header, or any change of a chunk, with a checksum that is right."""
    place = 8
    while draw.random() < 0.4 and place + 12 <= len(data):  # mostly the first chunk, the header
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    end = place + 8 + int.from_bytes(data[place : place + 4], "big")
    name, body = data[place + 4 : place + 8], data[place + 8 : end]
    if name == b"IHDR" and draw.random() < 0.7:
        body = struct.pack(">II", *(draw.choice(_SIDES) for _ in range(2))) + body[8:]
    else:
        body = draw.choice((_flip, _cut, _number))(body, draw)
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return data[:place] + chunk + data[end + 4 :]


def _tar_header(data: bytes, draw: random.Random) -> bytes:
    """One header changed, mostly in its type or its numbers, and its checksum made right."""
    starts = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = draw.choice(starts or [0])
    header = bytearray(data[at : at + 512])
    for _ in range(draw.choice((1, 1, 4))):
        number = b"%011o\0" % draw.choice((0, 1 << 20, 8**11 - 1))
        value = draw.choice((draw.randbytes(12), number, b"\x80" + draw.randbytes(11), draw.randbytes(1)))
        place = min(512 - len(value), draw.choice((0, 124, 157, 257, 345, draw.randrange(512))))
        header[place : place + len(value)] = value
        header[156:157] = draw.choice((header[156:157], *(bytes([code]) for code in b"0123467SLKxgV")))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


def _members(data: bytes, draw: random.Random) -> bytes:
    """One member of an archive changed or dropped, and stored again with a checksum that is right."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # damaged before
        return data
    # The pickle describes the content of all others.
    name = draw.choice([one for one in members if one.endswith("data.pkl")] * len(members) + list(members))
    members[name] = draw.choice((_flip, _flip, _cut, _insert, _number))(members[name], draw)
    if draw.random() < 0.1:
        del members[name]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", draw.choice([zipfile.ZIP_STORED] * 9 + [zipfile.ZIP_DEFLATED])) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return out.getvalue()


def _tensors(data: bytes, draw: random.Random) -> bytes:
    """One array or the facts of a file changed, and stored again with a checksum that is right."""
    try:
        tensors = safetensors.numpy.load(data)
        name = draw.choice([*tensors, *["facts"] * len(tensors)])
        if name == "facts":
            tensors[name] = np.frombuffer(_text(tensors[name].tobytes(), draw), np.uint8)
        else:
            tensors[name] = np.ascontiguousarray(draw.choice(_ARRAYS)(tensors[name], draw))
        return safetensors.numpy.save(tensors, {"crc32": checksum(tensors)})
    except Exception:  # damaged before, or of a type that cannot be stored
        return data


def _value(array: Any, draw: random.Random) -> Any:
    array = np.array(array)
    extreme = [np.nan, np.inf, -1, 2, 0, 1e30] if array.dtype.kind == "f" else [0, 1, 46, 47, 127]
    if array.dtype.kind == "i":
        extreme += [-1, -2, int(np.iinfo(array.dtype).max), int(np.iinfo(array.dtype).min)]
    array.flat[draw.randrange(array.size)] = draw.choice(extreme)  # of an empty one: ValueError
    return array


_ARRAYS: list[Callable[[Any, random.Random], Any]] = [
    _value,
    _value,
    lambda array, draw: array.astype(draw.choice((">i4", "<f8", "u1", "?", "c8", "i8", "i4", "f4"))),
    lambda array, _: array[..., None],
    lambda array, _: array.ravel()[:0],
    lambda array, _: np.concatenate([np.atleast_1d(array)] * 2),
]

_WAYS = {"jpeg": _jpeg_header, "png": _png_chunk, "shard": _tar_header, "checkpoint": _members}
_WAYS |= dict.fromkeys(("index", "regions"), _tensors) | dict.fromkeys(("raster", "table", "lmdb"), _number)
