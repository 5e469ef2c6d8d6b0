"""One training writes in a folder: a second is refused by a sentence, and a kill frees the folder at once."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from by_hand import finish, start
from runs import launch, scenes_in, write_config

from trainers import cli
from trainers.engine.lock import LOCK

# The child that it leaves behind must not keep the lock.
_HOLDER = """
import os, sys
from pathlib import Path
from trainers.engine.lock import held
with held(Path(sys.argv[1])):
    if os.fork():
        print("held", flush=True)
    input()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen]:
    """A process that holds the folder's lock, until it is killed."""
    process = launch(["-c", _HOLDER, str(folder)], stdin=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    return write_config(folder, scenes_in(folder / "scenes"), run={"epochs": 1, "max_steps": 1})


def test_a_second_training_is_refused_and_changes_nothing_until_the_first_is_killed(config, tmp_path, capsys):
    words = ["pretrain", str(config), f"run.out={tmp_path / 'run'}"]
    with holder(tmp_path / "run") as first:
        for more in ([], ["--resume"]):
            assert cli.main([*words, *more]) == 2
            told = capsys.readouterr().err
            assert f"{tmp_path / 'run'} is in use by process {first.pid} on " in told
            assert "Traceback" not in told
        assert [file.name for file in (tmp_path / "run").iterdir()] == [LOCK]
        first.kill()
        first.wait()
        assert cli.main([*words, "--resume"]) == 0
    assert (tmp_path / "run" / "last.pt").exists()


def test_every_command_that_trains_or_makes_a_table_keeps_to_the_lock(config, tmp_path, capsys):
    assert cli.main(["pretrain", str(config), f"run.out={tmp_path / 'run'}"]) == 0
    commands = {
        "run/linear": ["linear", str(tmp_path / "run"), "probe.epochs=1"],
        "compared": ["compare", str(config), "--seeds", "1", "--out", str(tmp_path / "compared")],
        "demo": ["demo", str(tmp_path / "demo")],
    }
    for name, words in commands.items():
        with holder(tmp_path / name):
            capsys.readouterr()
            assert cli.main(words) == 2
            assert f"{tmp_path / name} is in use by" in capsys.readouterr().err
            assert [file.name for file in (tmp_path / name).iterdir()] == [LOCK]
    with holder(tmp_path / "run"):  # these only read, or write a page in one step
        assert cli.main(["report", str(tmp_path / "run")]) == 0
        assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "encoder.safetensors")]) in (0, 2)


@pytest.mark.slow
def test_all_ranks_of_a_second_launch_are_refused(config, tmp_path):
    words = ["pretrain", str(config), f"run.out={tmp_path / 'run'}", "--resume"]
    with holder(tmp_path / "run"):
        assert finish(start(2, tmp_path / "second", cli.main, lambda rank: [words])) == [2, 2]
    logs = [(tmp_path / "second" / f"{rank}.log").read_text() for rank in range(2)]
    assert "is in use by process" in logs[0]
    assert "rank 0 could not take the lock" in logs[1]
    assert finish(start(2, tmp_path / "third", cli.main, lambda rank: [words])) == [0, 0]
