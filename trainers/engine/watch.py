"""Ranks that end together: when one fails or vanishes, the others learn why at once and end, too.

Every rank keeps one TCP connection to rank 0, which passes on what it hears. Nobody sends a pulse that a busy
process could miss: of a killed process or a lost machine the kernel tells, and a call that keeps Python from
running for minutes is neither.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import ipaddress
import os
import secrets
import socket
import sys
import threading
import warnings
from collections.abc import Coroutine
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

__all__ = ["Watch"]

_PATIENCE = 10.0  # seconds for a connection, and for its first line
_CAUSE = 5.0  # seconds for word of what caused the error of a collective
_LAG = 4.0  # seconds that the rank at fault is given to end first, for launchers report the first to end
_LONGEST = 600  # characters of a message
_LINE = 8192  # bytes that are read at most of whoever connects
_KEPT = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}
_BYE = "bye"
T = TypeVar("T")


class Watch:
    """This rank's connection to the others, over the default process group; a collective call.

    Ends by `leave` or `fail`. As soon as another rank ends otherwise, this process prints one line with the
    reason to stderr and exits with code 1, whatever its main thread is waiting for.

    Args:
        device: for the collective that tells where rank 0 is: a GPU of this process for NCCL, else the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.name = f"rank {dist.get_rank()} on {socket.gethostname()}"
        self._heard = threading.Event()
        self._over = False
        self._peers: dict[str, asyncio.StreamWriter] = {}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="watch", daemon=True).start()
        meeting: list[Any] = [None]
        if dist.get_rank() == 0:
            # Anyone can connect to the port; only ranks know the token.
            self._token = secrets.token_hex(16)
            meeting = [(_own_address(), self._run(self._open()), self._token, self.name)]
        dist.broadcast_object_list(meeting, src=0, device=device)
        if dist.get_rank() > 0:
            host, port, token, first = meeting[0]
            try:
                self._run(asyncio.wait_for(self._call(host, port, token, first), _PATIENCE))
            except (OSError, asyncio.TimeoutError) as error:
                warnings.warn(
                    f"{self.name} cannot reach {first} at {host}:{port} ({error or 'no answer'}) and will "
                    "not learn when another rank fails; let the machines of a run connect on all ports",
                    stacklevel=2,
                )
        # Who fails from here on fails before the eyes of all.
        dist.barrier()
        atexit.register(self._at_exit)

    def leave(self) -> None:
        """End in order. If another rank has failed, does not return: the process ends with its message."""
        self._stop_if_heard()
        self._run(self._say(_BYE))

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank ends. Does not return if the error comes of another rank's end."""
        # Collectives fail in their own words when a rank is gone; the true cause is then under way.
        if isinstance(error, RuntimeError):
            self._heard.wait(_CAUSE)
        self._stop_if_heard()
        text = " ".join(f"{self.name}: {type(error).__name__}: {error}".split()).rstrip(": ")
        self._run(self._say(text[:_LONGEST]))

    def _at_exit(self) -> None:
        """A program of the user's own may neither `leave` nor `fail`, but come to its end or to an error."""
        if not self._over:
            error = getattr(sys, "last_value", None)
            self.leave() if error is None else self.fail(error)

    def _stop_if_heard(self) -> None:
        if self._heard.is_set():
            threading.Event().wait()  # `_end` has seen to it that the process ends

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # --- in the watch's thread --------------------------------------------------------------------

    async def _open(self) -> int:
        """Listen for the other ranks; the port."""
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
        self._server = await asyncio.start_server(self._welcome, sock=listener, limit=_LINE, backlog=1024)
        return int(listener.getsockname()[1])

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Listen to whoever has connected to rank 0, if it is a rank."""
        try:
            line = await asyncio.wait_for(reader.readline(), _PATIENCE)
        except (OSError, ValueError, asyncio.TimeoutError):
            line = b""
        token, _, name = line.strip().partition(b" ")
        if secrets.compare_digest(token, self._token.encode()):
            writer.write(b"welcome\n")
            await self._listen(reader, writer, name.decode(errors="replace"))
        else:
            writer.close()

    async def _call(self, host: str, port: int, token: str, first: str) -> None:
        """Connect to rank 0 and go on listening to it."""
        reader, writer = await asyncio.open_connection(host, port, limit=_LINE)
        writer.write(f"{token} {self.name}\n".encode())
        if not await reader.readline():
            raise ConnectionError("turned away")
        self._listening = self._loop.create_task(self._listen(reader, writer, first))

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str) -> None:
        """Wait for a rank's only line, or for its end without one."""
        _keep_alive(writer.get_extra_info("socket"))
        self._peers[name] = writer
        try:
            line = (await reader.readline()).decode(errors="replace").strip()
        except (OSError, ValueError):
            line = ""
        self._peers.pop(name, writer).close()
        if line != _BYE:
            self._end(line or f"{name} is gone: killed, or its machine is lost")

    async def _say(self, line: str) -> None:
        """This rank's last word."""
        self._over = True
        self._tell(line)
        for writer in self._peers.values():
            writer.close()
        if rest := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(rest, timeout=1)

    def _tell(self, line: str) -> None:
        for writer in self._peers.values():
            writer.write(f"{line}\n".encode())

    def _end(self, message: str) -> None:
        """Pass the message on, say it and end this process."""
        if self._over or self._heard.is_set():
            return
        self._heard.set()
        threading.Timer(_LAG, _exit).start()
        self._tell(message)
        tqdm.write(f"{self.name} ends, for {message}", file=sys.stderr)


def _exit() -> None:
    """End the process, wherever its main thread is."""
    with contextlib.suppress(OSError, ValueError):  # nobody may be reading any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(1)


def _keep_alive(connection: socket.socket) -> None:
    """Have the kernel find out within half a minute that the machine at the other end is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEPT.items():
        if hasattr(socket, name):  # not on every platform
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _own_address() -> str:
    """Where the others reach this machine: at the interface that leads to where the ranks met."""
    master = os.environ["MASTER_ADDR"]
    family, kind, _, _, address = socket.getaddrinfo(
        master, int(os.environ["MASTER_PORT"]), type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        found = str(probe.getsockname()[0])
    # This is that machine; other machines resolve its name to something better than the loopback.
    return master if ipaddress.ip_address(found.partition("%")[0]).is_loopback else found
