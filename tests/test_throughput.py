"""Images per second of training: what is no training is left out, and nothing is counted twice."""

from __future__ import annotations

import json

import pytest
from runs import scenes_in, write_config

from dali_views import ViewLoader, recipes
from trainers.config import file as config_file
from trainers.pretrain import pretrain
from trainers.report import measures
from trainers.report.measures import Throughput


class Clock:
    """Time that passes when a test says so."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measures, "time", clock)
    return clock


def test_a_rate_is_of_the_steps_since_the_last_reading_or_since_the_first_step_after_a_pause(
    small_index, clock
):
    loader = ViewLoader(small_index, recipes.moco_v2(16), 8, device="cpu")
    measured = Throughput(loader, images=8)
    readings = {}
    for epoch in range(2):
        loader.set_epoch(epoch)
        for number, _ in enumerate(loader, start=1 + 5 * epoch):
            clock.now += 2.0 if epoch == 0 else 4.0
            measured.step(number)
            if number in (1, 3, 4, 7, 8):
                readings[number] = measured.read(number).get("images_per_second")
            if number == 4:
                measured.pause()
                clock.now += 1000.0  # an evaluation
    # Of the first step after a start or a pause it is not known when it began: 5 and 6 lie around an epoch's
    # end, and step 5 is the first after the pause.
    assert readings == {1: None, 3: 4.0, 4: 4.0, 7: 2.0, 8: 2.0}
    assert measured.latest["images_per_second"] == 2.0


def test_waiting_is_counted_over_the_end_of_an_epoch(small_index, clock):
    loader = ViewLoader(small_index, recipes.moco_v2(16), 8, device="cpu")
    measured = Throughput(loader, images=8)
    waited = {}
    number = 0
    for epoch in range(2):
        loader.set_epoch(epoch)
        for _ in loader:
            number += 1
            measured.step(number)
            waited[number] = loader.stats.waited
    clock.now += 10.0
    # Step 1 begins the measurement; the loader's own count starts anew with step 6.
    of_both = waited[5] - waited[1] + waited[10]
    assert measured.read(10)["wait_share"] == pytest.approx(of_both / 10.0)


def test_a_run_logs_no_rate_where_none_was_measured(tmp_path):
    file = write_config(tmp_path, scenes_in(tmp_path / "scenes"), run={"epochs": 2, "evaluate_every": 1})
    result = pretrain(config_file.load(file))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss" in line]
    # Step 1 is the first of the run, step 4 the first after an evaluation.
    assert [line["step"] for line in logged if "images_per_second" not in line] == [1, 4]
    rates = [line["images_per_second"] for line in logged if "images_per_second" in line]
    assert all(0 <= line["wait_share"] <= 1 for line in logged if "wait_share" in line)
    assert [rates[1], rates[-1]] == [result.scores[f"epoch {n}"]["images_per_second"] for n in (1, 2)]
