"""Ranks that end together: exit codes and last lines of processes that nobody else would end."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from by_hand import finish, start

from trainers.engine import ranks as distributed

WORLD = 3


def work(rank: int, how: str) -> int:
    """Join the others, end as told if this is the rank at fault, else wait for it in a collective."""
    what, _, culprit = how.partition(" of ")
    distributed.init("cpu")
    with distributed.together():
        match what if rank == int(culprit or 1) else "":
            case "death":
                os.kill(os.getpid(), signal.SIGKILL)
            case "error":
                raise ValueError(f"{rank} boxes are missing\nin {'a long list ' * 10_000}")
            case "interruption":
                raise KeyboardInterrupt
            case "errand":
                return 0
        if how == "strangers" and rank == 0:
            pester()
        if what != "errand":
            dist.all_reduce(torch.ones(1))
    return 0


def pester() -> None:
    """Connect to rank 0 as somebody else, with what could be taken for a rank's words, and with noise."""
    watch = distributed._watch
    assert watch is not None
    port = watch._server.sockets[0].getsockname()[1]
    for words in (b"", b"bye\n", b"rank 1 on X\nrank 1 is gone\n", b"\xff\xfe\n", b"\n" * 10, b"x" * 100_000):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(words)


def told(folder: Path, how: str) -> tuple[list[int | None], list[str]]:
    """Exit codes and outputs of the ranks."""
    codes = finish(start(WORLD, folder, work, lambda rank: (rank, how)))
    return codes, [(folder / f"{rank}.log").read_text() for rank in range(WORLD)]


@pytest.mark.parametrize("culprit", [0, 2])
def test_who_is_killed_is_named_by_all_others_which_end(tmp_path: Path, culprit: int) -> None:
    codes, outputs = told(tmp_path, f"death of {culprit}")
    assert codes.pop(culprit) == -signal.SIGKILL
    assert codes == [1, 1]
    assert outputs.pop(culprit) == ""
    for output in outputs:
        (line,) = output.splitlines()  # and nothing about connections that were closed
        assert f"for rank {culprit} on {socket.gethostname()} is gone: killed" in line


@pytest.mark.parametrize("culprit", [0, 2])
def test_an_error_is_told_to_all_others_in_one_line_of_bounded_length(tmp_path: Path, culprit: int) -> None:
    codes, outputs = told(tmp_path, f"error of {culprit}")
    assert codes == [1, 1, 1]
    assert "Traceback" in outputs.pop(culprit)
    for output in outputs:
        (line,) = output.splitlines()
        assert (
            f"rank {culprit} on {socket.gethostname()}: ValueError: {culprit} boxes are missing in a" in line
        )
        assert len(line) < 1000


def test_an_error_without_words_is_told_by_its_name(tmp_path: Path) -> None:
    _, outputs = told(tmp_path, "interruption of 1")
    assert outputs[0].endswith(": KeyboardInterrupt\n")


@pytest.mark.parametrize("how", ["errand of 1", "strangers"])
def test_ranks_may_end_one_after_the_other_and_strangers_change_nothing(tmp_path: Path, how: str) -> None:
    assert told(tmp_path, how) == ([0, 0, 0], ["", "", ""])
