"""docs/slurm.sbatch under bash: SLURM is stood in for by three commands, everything below them is real."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, curve, scenes_in, write_config

from trainers.engine import checkpoint

# Two nodes on the loopback. As SLURM's, a signal to the steps reaches the commands that srun started.
COMMANDS = {
    "scontrol": """
        if [ "$1" = show ]; then printf '127.0.0.1\\n127.0.0.1\\n'; else echo "$@" >> "$SPOOL/requeued"; fi
    """,
    "srun": """
        [ "$1" = --kill-on-bad-exit=1 ] && shift
        for node in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & echo $! >> "$SPOOL/tasks"; done
        code=0
        for task in $(jobs -p); do wait "$task" || code=$?; done
        exit "$code"
    """,
    "scancel": """
        [ "$*" = "--signal=TERM $SLURM_JOB_ID" ] && kill -TERM $(cat "$SPOOL/tasks")
    """,
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """What a job of two nodes with one process each finds."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in COMMANDS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (commands / name).chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        job = listener.getsockname()[1]
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        **os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "SPOOL": str(tmp_path), "SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "1",
    }  # fmt: skip


@pytest.mark.slow
def test_a_job_saves_when_its_time_is_up_is_requeued_and_goes_on_to_the_end(tmp_path, environment):
    run, model = {"epochs": 50, "checkpoint_every": 0}, {"backbone": "test_convnext"}
    scenes, guide, method = scenes_in(tmp_path / "scenes"), {"name": "none"}, {"name": "moco", "queue": 64}
    file = write_config(
        tmp_path, scenes, run=run, model=model, guide=guide, method=method, views={"size": 32}
    )
    command = ["bash", str(ROOT / "docs" / "slurm.sbatch"), str(file)]
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **options) as job:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while job.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 2):
            pass
        job.send_signal(signal.SIGUSR1)
        output = job.communicate()[0]
    assert job.returncode == 1, output
    step = checkpoint.load(tmp_path / "run")["step"]
    assert (tmp_path / "requeued").read_text() == f"requeue {environment['SLURM_JOB_ID']}\n", output
    assert f"stopped after {step} steps and saved; --resume continues it" in output
    assert 2 <= step < 150

    (tmp_path / "tasks").unlink()
    fewer = {**environment, "SLURM_RESTART_COUNT": "1", "SLURM_JOB_NUM_NODES": "1"}
    again = subprocess.run(command, **{**options, "env": fewer})
    assert again.returncode == 0, again.stdout
    assert f"{tmp_path / 'run'}: finished after 150 steps" in again.stdout
    assert [number for number, _ in curve(tmp_path)] == list(range(1, 151))
    assert (tmp_path / "requeued").read_text().count("requeue") == 1
