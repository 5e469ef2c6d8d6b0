"""Worker processes for scans: a function of this package, carried out for many arguments at a time.

The workers are started as new interpreters and speak pickle over pipes. Unlike multiprocessing's fork this is
safe after CUDA or threads have started, and unlike its spawn it never runs the user's script again.
"""

from __future__ import annotations

import pickle
import queue
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar

A = TypeVar("A")
R = TypeVar("R")


@contextmanager
def in_workers(function: Callable[[A], R], processes: int) -> Iterator[Callable[[A], R]]:
    """Gives a function that does the same in one of the processes that is idle, or here if there are none.

    To be called by as many threads as there are processes; it raises a RuntimeError if a process dies.

    Args:
        function: Of the top level of a module; it should not raise.
        processes: 0 means here.
    """
    if processes < 1:
        yield function
        return
    # Of itself, an interpreter looks for modules in the current folder first, which may be the data set.
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; "
        f"serve({function.__module__!r}, {function.__qualname__!r})"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(processes)
    ]
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def run(argument: A) -> R:
        worker = idle.get()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            pickle.dump(argument, worker.stdin)
            worker.stdin.flush()
            answer: R = pickle.load(worker.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            told = repr(argument)
            raise RuntimeError(
                f"A scan process died at work on {told[:200]}; pass processes=0 to scan in this process."
            ) from error
        finally:
            idle.put(worker)
        return answer

    try:
        yield run
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def serve(module: str, name: str) -> None:
    """The loop of a worker process; ends with its input."""
    function = getattr(import_module(module), name)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what a library prints is no answer
    warnings.simplefilter("ignore")
    while True:
        try:
            argument: Any = pickle.load(source)
        except EOFError:
            return
        pickle.dump(function(argument), sink)
        sink.flush()
