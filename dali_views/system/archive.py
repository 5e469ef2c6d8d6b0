"""Zip archives that are verified before anything is made of them: .npz files, and PyTorch's checkpoints.

Our writers store members as they are. So what a member claims can be held against the bytes that the file
has, and no file can ask for more memory than its own size: one that is compressed is refused.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
from numpy.typing import NDArray

from .files import PathLike

MAPPED_FROM = 16 << 20
"""Arrays of archives of so many bytes are mapped into memory, smaller ones read."""

# All that NumPy, zipfile and the makers of tables were seen to raise when bytes were flipped or cut off.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    BadZipFile,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)

# The header of an array as NumPy writes it, of plain numbers and texts. NumPy would evaluate whatever stands
# there, which can be nested deeply enough to exhaust the parser.
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    rb"\{'descr': '([<>|][biufSU][1-9]\d{0,8})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,18}, )*\d{1,18},?|)\), \} *\n"
)


def open_stored(file: IO[bytes]) -> ZipFile:
    """Opens an archive after a look at its directory; the checksum of a member is verified as it is read.

    Raises:
        BadZipFile: It is no zip archive, a member is compressed, encrypted, remarked upon or in it twice, or
            the members claim more bytes than the file has.
    """
    archive = ZipFile(file)
    members = archive.infolist()
    if any(
        m.compress_type != ZIP_STORED or m.compress_size != m.file_size or m.flag_bits & 1 for m in members
    ):
        raise BadZipFile("a member is compressed or encrypted")
    # A damaged length of a remark would swallow the members after it. The longest of ours is that of a member
    # above 2 GiB.
    if any(m.comment or len(m.extra) > 28 for m in members):
        raise BadZipFile("a member has a remark")
    if len(set(archive.namelist())) < len(members):
        raise BadZipFile("a member is in it twice")
    if sum(m.file_size for m in members) > os.fstat(file.fileno()).st_size:
        raise BadZipFile("its members claim more bytes than the file has")
    return archive


def verify(path: PathLike) -> None:
    """Reads an archive from end to end, some 0.45 s per GB: PyTorch looks at no checksum when it loads one.

    Raises:
        OSError: It cannot be read.
        BadZipFile: See `open_stored`; or a checksum is wrong.
    """
    with open(path, "rb") as file, open_stored(file) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise BadZipFile(f"the checksum of {broken} is wrong")


@contextmanager
def open_npz(path: PathLike, what: str) -> Iterator[dict[str, NDArray[Any]]]:
    """Gives the arrays of an .npz file to a block that makes `what` of them; large ones are read-only.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, or the block could not make anything of its arrays.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no {what} at {path}; save one there first or mend the path.")
    with open(path, "rb") as raw:  # outside the try: a file one may not read is not a damaged file
        try:
            with open_stored(raw) as archive:
                read = _reader(raw, archive)
                arrays = {m.filename.removesuffix(".npy"): read(m) for m in archive.infolist()}
            yield arrays
        except _DAMAGE as error:
            raise ValueError(
                f"{path} is not a readable {what} but damaged or something else ({error}); "
                "delete it or restore it from a copy."
            ) from error


def _reader(raw: IO[bytes], archive: ZipFile) -> Callable[[ZipInfo], NDArray[Any]]:
    """What makes an array of a member: of a large archive mapped into memory, read-only."""
    if os.fstat(raw.fileno()).st_size < MAPPED_FROM:
        return partial(_array, archive)
    return partial(_mapped, archive, memoryview(mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)))


def _array(archive: ZipFile, member: ZipInfo) -> NDArray[Any]:
    """One array, whose header must describe exactly the bytes that the member has."""
    with archive.open(member) as file:
        _header(file, member)
    with archive.open(member) as file:  # opened again: after a step back, zipfile verifies no checksum
        array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return _readable(array, member)


def _mapped(archive: ZipFile, content: memoryview, member: ZipInfo) -> NDArray[Any]:
    """The same, as a view of the archive's content."""
    with archive.open(member) as file:
        kind, shape, in_columns, length = _header(file, member)
    # zipfile has held the local header against the directory, but does not tell where it ends.
    name, extra = struct.unpack_from("<HH", content, member.header_offset + 26)
    start = member.header_offset + 30 + name + extra
    data = content[start : start + member.file_size]
    if len(data) != member.file_size or zlib.crc32(data) != member.CRC:
        raise BadZipFile(f"the checksum of {member.filename} is wrong")
    array = np.frombuffer(data, kind, offset=length) if len(data) > length else np.zeros(0, kind)
    return _readable(array.reshape(shape, order="F" if in_columns else "C"), member)


def _header(file: IO[bytes], member: ZipInfo) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """Type, shape, whether by columns, and bytes of the header of an array, held against those it has."""
    start = file.read(10)
    length = 10 + int.from_bytes(start[8:], "little")
    header = _HEADER.fullmatch(file.read(length - 10))
    if not start.startswith(_MAGIC) or header is None:
        raise ValueError(f"{member.filename} is no array of numbers or texts")
    kind, shape = (
        np.dtype(header[1].decode()),
        tuple(int(side) for side in header[3].split(b",") if side.strip()),
    )
    if math.prod(shape) * kind.itemsize != member.file_size - length:
        raise ValueError(f"{member.filename} claims another size than it has")
    return kind, shape, header[2] == b"True", length


def _readable(array: NDArray[Any], member: ZipInfo) -> NDArray[Any]:
    if array.dtype.kind == "U":  # of which Python cannot make a text if a letter is none
        letters = array.reshape(-1).view(np.dtype(np.uint32).newbyteorder(array.dtype.byteorder))
        if letters.max(initial=0) > sys.maxunicode:
            raise ValueError(f"{member.filename} holds what is no Unicode")
    return array
