"""Zip archives that are verified before anything is made of them: .npz files, and PyTorch's checkpoints.

Our writers store members as they are. So what a member claims can be held against the bytes that the file
has, and no file can ask for more memory than its own size: one that is compressed is refused.
"""

from __future__ import annotations

import math
import os
import re
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
from numpy.typing import NDArray

from .atomic import PathLike

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
    rb"\{'descr': '([<>|][biufSU][1-9]\d{0,8})', 'fortran_order': (?:True|False), "
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
    """Gives the arrays of an .npz file to a block that makes `what` of them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, or the block could not make anything of its arrays.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no {what} at {path}; save one there first or mend the path.")
    with open(path, "rb") as raw:  # outside the try: a file one may not read is not a damaged file
        try:
            with open_stored(raw) as archive:
                arrays = {m.filename.removesuffix(".npy"): _array(archive, m) for m in archive.infolist()}
            yield arrays
        except _DAMAGE as error:
            raise ValueError(
                f"{path} is not a readable {what} but damaged or something else ({error}); "
                "delete it or restore it from a copy."
            ) from error


def _array(archive: ZipFile, member: ZipInfo) -> NDArray[Any]:
    """One array, whose header must describe exactly the bytes that the member has."""
    with archive.open(member) as file:
        start = file.read(10)
        length = int.from_bytes(start[8:], "little")
        header = _HEADER.fullmatch(file.read(length))
    if not start.startswith(_MAGIC) or header is None:
        raise ValueError(f"{member.filename} is no array of numbers or texts")
    count = math.prod(int(side) for side in header[2].split(b",") if side)
    if count * np.dtype(header[1].decode()).itemsize != member.file_size - 10 - length:
        raise ValueError(f"{member.filename} claims another size than it has")
    with archive.open(member) as file:  # opened again: after a step back, zipfile verifies no checksum
        array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    if array.dtype.kind == "U":  # of which Python cannot make a text if a letter is none
        letters = array.reshape(-1).view(np.dtype(np.uint32).newbyteorder(array.dtype.byteorder))
        if letters.max(initial=0) > sys.maxunicode:
            raise ValueError(f"{member.filename} holds what is no Unicode")
    return array
