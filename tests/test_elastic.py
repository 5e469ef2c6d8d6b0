"""Runs on several processes: moved to another number of them, killed, stopped, started again by torchrun."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import recorded
import torch
from by_hand import finish, start
from runs import curve, launch, scenes_in, weights, write_config

from trainers.config import file as config_file
from trainers.engine import checkpoint
from trainers.pretrain import pretrain

# Nothing here depends on the batch of a process: no batch norm, and negatives come from all of them.
APART: dict[str, Any] = {
    "views": {"size": 32, "crop": "contrastive", "blur": 0},
    "model": {"backbone": "test_convnext"},
    "method": {"name": "simclr", "bn": False, "hidden_dim": 32, "output_dim": 16},
    "guide": {"name": "contrastive_crop", "warmup": 1, "interval": 1, "size": 64, "threshold": 0.5},
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return scenes_in(tmp_path_factory.mktemp("scenes"))


def train(folder: Path, world: int, *words: str, when: str = "never") -> tuple[list[int | None], list[str]]:
    """Pretrain folder/config.yaml on ranks started by hand; their exit codes and outputs."""
    logs = folder / f"logs-{world}"
    arguments = (folder, when, "pretrain", str(folder / "config.yaml"), *words)
    codes = finish(start(world, logs, recorded.main, lambda rank: arguments))
    return codes, [(logs / f"{rank}.log").read_text() for rank in range(world)]


@pytest.mark.slow
def test_the_number_of_processes_may_change_between_resumes_and_a_kill_ends_all(scenes, tmp_path):
    """Two steps on one process, three on four until one is killed, the rest on two; beside nine on one."""
    folder, alone = tmp_path / "moved", tmp_path / "alone"
    for each in (folder, alone):
        write_config(each, scenes, **APART)
    for run, world, words in ((alone, 1, ()), (folder, 1, ("run.max_steps=2",))):
        codes, outputs = train(run, world, *words)
        assert codes == [0], outputs
    codes, outputs = train(folder, 4, "--resume", when="6:3:SIGKILL")
    assert codes == [2, 2, 2, -signal.SIGKILL]
    for rank, output in enumerate(outputs[:3]):
        assert f"rank {rank} lost another rank, which has failed or was killed" in output
        assert "Traceback" not in output
    codes, outputs = train(folder, 2, "--resume", "run.threads=2")
    assert codes == [0, 0], outputs
    # Every view stays.
    assert recorded.batches(folder) == recorded.batches(alone)
    assert len(recorded.batches(folder)) == 9 * 16
    boxes = [checkpoint.load(run / "run")["regions"]["boxes"] for run in (folder, alone)]
    assert (boxes[0] != torch.tensor([0.0, 0, 1, 1])).any()
    assert torch.equal(*boxes)
    # Sums are taken in another order: a relative error of 6e-8 each, a few of them in a row in nine steps.
    assert [step for step, _ in curve(folder)] == list(range(1, 10))
    assert [loss for _, loss in curve(folder)] == pytest.approx([loss for _, loss in curve(alone)], rel=2e-6)
    torch.testing.assert_close(weights(folder), weights(alone), rtol=1e-5, atol=1e-6)
    assert curve(alone)[0][1] != pytest.approx(curve(alone)[-1][1], rel=0.1)  # it did learn


@pytest.mark.slow
def test_torchrun_reports_the_reason_and_ends_the_others(scenes, tmp_path):
    file = write_config(tmp_path, scenes, **APART)
    words = ["--nproc-per-node", "2", recorded.__file__, str(tmp_path), "never", "pretrain", str(file)]
    with launch([*TORCHRUN, *words, "model.backbone=resnet10"]) as process:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))  # no checkpoint fits
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    report = output.partition("Root Cause")[2]
    assert "local_rank: 0" in report
    assert "last.pt cannot be written (File too large)" in report


def pretrain_under_an_agent(*arguments: Any) -> int:
    os.environ["TORCHELASTIC_MAX_RESTARTS"] = "3"
    return recorded.main(*arguments)


def test_a_signal_to_one_process_saves_and_ends_all_at_one_step(scenes, tmp_path):
    method, run = {"name": "moco", "queue": 64}, {"epochs": 200, "checkpoint_every": 0}
    file = write_config(tmp_path, scenes, guide={"name": "simccrop"}, method=method, run=run)
    arguments = (tmp_path, "2:1:SIGUSR1", "pretrain", str(file))
    codes = finish(start(2, tmp_path, pretrain_under_an_agent, lambda rank: arguments))
    # Not 0, which an agent takes for the end of the work.
    assert codes == [os.EX_TEMPFAIL, os.EX_TEMPFAIL]
    step = checkpoint.load(tmp_path / "run")["step"]
    assert step == curve(tmp_path)[-1][0] <= 1 + 50
    assert f"stopped after {step} steps and saved; --resume continues it" in (tmp_path / "0.log").read_text()


@pytest.mark.slow
def test_torchrun_restarts_what_was_killed_and_it_goes_on_by_itself(scenes, tmp_path):
    run = {"evaluate_every": 3}
    file = write_config(tmp_path / "restarted", scenes, **APART, run=run)
    words = ["--nproc-per-node", "2", "--max-restarts", "1", recorded.__file__, str(tmp_path), "5:1:SIGKILL"]
    with launch([*TORCHRUN, *words, "pretrain", str(file)]) as process:
        output = process.communicate()[0]
    assert process.returncode == 0, output
    write_config(tmp_path / "whole", scenes, **APART, run=run)
    codes, outputs = train(tmp_path / "whole", 2)
    assert codes == [0, 0], outputs
    assert "knn_top1" in (tmp_path / "restarted" / "run" / "metrics.jsonl").read_text()
    assert curve(tmp_path / "restarted") == curve(tmp_path / "whole")
    ends = [weights(tmp_path / name) for name in ("restarted", "whole")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("name", ["job-7", "none"])
def test_only_the_launch_that_began_a_run_goes_on_by_itself(scenes, tmp_path, monkeypatch, name):
    config = config_file.load(write_config(tmp_path, scenes, guide={"name": "none"}), ["run.max_steps=1"])

    def restarted(launch: str, times: int) -> None:
        """The environment that torchrun gives to the processes of its launch after so many restarts."""
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name if launch == "first" else name.replace("7", "8"))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(times))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/logs/{launch}/attempt_{times}/0/error.json")

    restarted("first", 0)
    assert pretrain(config).step == 1
    restarted("first", 1)
    assert pretrain(config).step == 1
    for times in (0, 1):  # refused, and started again because of that
        restarted("second", times)
        with pytest.raises(FileExistsError, match="--resume"):
            pretrain(config)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    with pytest.raises(FileExistsError, match="--resume"):
        pretrain(config)
