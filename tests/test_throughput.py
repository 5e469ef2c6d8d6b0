"""Images per second of training: only training counts, and nothing counts twice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from runs import scenes_in, write_config

from dali_views import ViewLoader, recipes
from trainers import pretrain as loop
from trainers.config import file as config_file
from trainers.pretrain import pretrain
from trainers.report import report
from trainers.report.history import lines_of


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes when a test says so."""
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(report, "time", clock)
    return clock


def test_rates_and_waiting_are_of_the_steps_since_the_last_reading_or_the_first_step_after_a_pause(
    small_index, clock
):
    loader = ViewLoader(small_index, recipes.moco_v2(16), 8, device="cpu")
    measured, whole = (report.Throughput(loader, images=8) for _ in range(2))
    readings, waited = {}, {}
    for epoch in range(2):
        loader.set_epoch(epoch)
        for step, _ in enumerate(loader, start=1 + 5 * epoch):
            clock.now += 2.0 if epoch == 0 else 4.0
            measured.step(step)
            whole.step(step)
            waited[step] = loader.stats.waited
            if step in (1, 3, 4, 7, 8):
                readings[step] = measured.read(step).get("images_per_second")
            if step == 4:
                measured.pause()
                clock.now += 1000.0  # an evaluation
    # The start of the first step after a start or a pause is not known: 5 is the first after the pause.
    assert readings == {1: None, 3: 4.0, 4: 4.0, 7: 2.0, 8: 2.0}
    # Step 1 begins the measurement; the loader's own count restarts with step 6.
    seconds = 4 * 2.0 + 1000.0 + 5 * 4.0
    found = whole.read(10)
    assert found["wait_share"] == pytest.approx((waited[5] - waited[1] + waited[10]) / seconds)
    assert "gpu_wait_share" not in found


def test_what_a_gpu_tells_of_an_epoch_only_after_its_end_counts(clock):
    old, new = (SimpleNamespace(waited=0.0, gpu_waited=0.0, stream="of the GPU") for _ in range(2))
    loader = SimpleNamespace(stats=old)
    measured = report.Throughput(loader, images=8)
    old.waited, old.gpu_waited = 1.0, 1.0
    measured.step(1)  # begins
    clock.now += 10.0
    old.waited, old.gpu_waited = 1.5, 2.0
    measured.step(2)
    old.waited, old.gpu_waited = 1.75, 4.0  # the host has seen the end of the epoch, and the GPU comes to it
    loader.stats = new
    new.waited, new.gpu_waited = 0.25, 0.5
    clock.now += 10.0
    measured.step(3)
    found = measured.read(3)
    assert (found["wait_share"], found["gpu_wait_share"]) == (0.75 / 20, 3.5 / 20)


def test_a_run_logs_no_rate_where_none_was_measured_and_frees_memory_after_passes(tmp_path, monkeypatch):
    file = write_config(tmp_path, scenes_in(tmp_path / "scenes"), run={"epochs": 2, "evaluate_every": 1})
    released = []
    monkeypatch.setattr(loop, "release_memory", lambda kind: released.append(kind))
    result = pretrain(config_file.load(file))
    assert released == ["cpu"] * 4, "after the first evaluation, the guide's pass after epoch 1, and two more"
    logged = [line for line in lines_of(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    # Step 1 is the first of the run, step 4 the first after an evaluation.
    assert [line["step"] for line in logged if "images_per_second" not in line] == [1, 4]
    rates = [line["images_per_second"] for line in logged if "images_per_second" in line]
    assert all(0 <= line["wait_share"] <= 1 for line in logged if "wait_share" in line)
    assert [rates[1], rates[-1]] == [result.scores[f"epoch {n}"]["images_per_second"] for n in (1, 2)]
