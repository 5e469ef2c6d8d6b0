"""Arrays of which the ranks of one machine have one copy, in memory that no file system knows of.

One rank of the machine makes an anonymous file in memory (memfd_create) and the others open it through
/proc. It has no name, is not bounded by the size of /dev/shm, and goes with the last process that maps it,
however that ends.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
from collections.abc import Mapping

import numpy as np

from ..system.collective import all_gather, all_gather_bytes, raise_together
from .columns import chunks
from .rows import Array

__all__ = ["Draft", "SharedPages"]


class Draft:
    """A copy of an array that other processes can map, and that its maker may write until it is published.

    Attributes:
        array: the copy.

    Raises:
        OSError: there is not enough memory.
    """

    def __init__(self, array: Array, name: str = "dali_views regions") -> None:
        self._file = os.fdopen(os.memfd_create(name), "w+b")
        try:
            # Written rather than mapped: where memory ends, a write fails, but a page that is mapped kills.
            for part in chunks(len(array)):
                self._file.write(np.ascontiguousarray(array[part]).data)
            self._file.flush()
        except OSError as error:
            self._file.close()
            raise OSError(
                error.errno,
                f"there is no memory for {array.nbytes} bytes that ranks share ({error.strerror}); "
                "free some or give the job more",
            ) from error
        self.descriptor = self._file.fileno()
        self.array = _mapped(self.descriptor, array, writable=True)

    def close(self) -> None:
        """Have no more processes map it; those that do keep it."""
        self._file.close()


class SharedPages:
    """The ranks that share memory, found by trying; a collective call on the default process group.

    Containers on one machine that do not see each other's processes count as machines of their own.

    Attributes:
        leads: whether this rank makes the arrays of its machine.
    """

    def __init__(self) -> None:
        token = f"dali_views {secrets.token_hex(16)}"
        probe = Draft(np.zeros(1, np.uint8), token)
        own = [os.getpid(), probe.descriptor, token]
        everyone = [json.loads(told) for told in all_gather_bytes(json.dumps(own).encode())]
        reached = np.stack(all_gather(np.array([_reaches(*other) for other in everyone], np.uint8)))
        probe.close()  # all have tried
        leaders: list[int] = []
        for rank, others in enumerate(reached):
            leading = (other for other in range(rank) if others[other] and leaders[other] == other)
            leaders.append(next(leading, rank))
        me = everyone.index(own)
        self.leads = leaders[me] == me
        self._leader = leaders[me]
        self._process = int(everyone[self._leader][0])

    def publish(
        self, arrays: Mapping[str, Array], drafts: Mapping[str, Draft], error: Exception | None = None
    ) -> dict[str, Array]:
        """Put the leader's drafts in the place of some arrays; a collective call.

        Args:
            arrays: what is shared so far, under the same names, types and shapes on all ranks.
            drafts: of the rank that leads, to be closed afterwards; no other rank has any.
            error: why the drafts of this rank could not be made.

        Returns:
            The arrays, new ones read-only.

        Raises:
            Exception: `error`; on every other rank, a RuntimeError with its message.
        """
        raise_together(error)
        made = [drafts[name].descriptor if name in drafts else -1 for name in arrays]
        theirs = all_gather(np.array(made, np.int64))[self._leader].tolist()
        shared, failed = dict(arrays), None
        try:
            for name, descriptor in zip(arrays, theirs, strict=True):
                if descriptor >= 0:
                    with open(_path(self._process, descriptor), "rb") as file:
                        shared[name] = _mapped(file.fileno(), arrays[name])
        except OSError as refused:
            failed = refused
        raise_together(failed)  # from here on all have mapped it
        return shared


def _mapped(descriptor: int, like: Array, writable: bool = False) -> Array:
    if not like.size:
        return like  # no pages to map
    if writable:
        pages = mmap.mmap(descriptor, like.nbytes)
    else:
        # All at once: rows are read at random, and a fault for each would take longer than the reading.
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        pages = mmap.mmap(descriptor, like.nbytes, flags=flags, prot=mmap.PROT_READ)
    return np.frombuffer(pages, like.dtype).reshape(like.shape)


def _path(process: int, descriptor: int) -> str:
    return f"/proc/{process}/fd/{descriptor}"


def _reaches(process: int, descriptor: int, name: str) -> bool:
    """Whether this process can map what another has made under a name that nobody else has."""
    path = _path(process, descriptor)
    try:
        # Elsewhere, the number is another process's, or nobody's: what it has open is not to be touched.
        if not os.readlink(path).startswith(f"/memfd:{name}"):
            return False
        with open(path, "rb"):
            return True
    except OSError:
        return False
