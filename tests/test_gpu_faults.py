"""Faults that the path to a GPU has had, or nearly: with any of them back, the proofs without a GPU fail."""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import test_loader
import test_optim
import test_ranks
import test_setting
import torch
from fake_cuda import CPU, CUDA
from test_fake_cuda import check_backward, check_pass, check_probe, check_reading
from test_gpu_graph import BLOCKS, check_bench, check_ours, graph_of, not_built
from trainees import Case, few_scenes, make_case  # noqa: F401, fixtures

from dali_views import SampleIndex, ViewLoader
from dali_views.graph import build, colour, decode
from dali_views.loader import batch
from dali_views.maps import boxes, heatmap
from dali_views.tools.bench import pixels
from trainers.engine import optim, ranks
from trainers.evaluate.learners import Learner
from trainers.guides import reading
from trainers.methods import moco, networks, scfs, simclr


class Fault(NamedTuple):
    """A part of a function as it is and as it was, and what the failure says."""

    owner: Any
    name: str
    now: str
    then: str
    told: str

    def put_back(self, patch: pytest.MonkeyPatch) -> None:
        function = inspect.unwrap(getattr(self.owner, self.name))
        source = textwrap.dedent(inspect.getsource(function))
        assert source.count(self.now) == 1, f"{self.name} has no {self.now!r} any more; change the fault"
        flags, found = __future__.annotations.compiler_flag, {}
        code = compile(source.replace(self.now, self.then), self.name, "exec", flags, dont_inherit=True)
        exec(code, function.__globals__, found)
        patch.setattr(self.owner, self.name, found[self.name])


# What has the fault, and what shows it: a method, a number of ranks, other changes of the configuration.
STEPS: dict[str, tuple[Any, ...]] = {
    "MoCo sends its shuffle from pageable memory": (
        Fault(moco.MoCo, "_keys", "both = to_device(", "both = torch.Tensor.to(", "_to_copy waits"),
        "moco", 8,
    ),
    "MoCo gathers images in another format": (
        Fault(moco.MoCo, "_keys", "ranks.gather(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)",
              "ranks.gather(images)", "Conv2d"),
        "moco", 8,
    ),
    "MoCo reads where its queue ends": (
        Fault(moco.MoCo, "enqueue", "start = self.pointer", "start = int(self.pointer)", "_local_scalar"),
        "moco", 1,
    ),
    "split batch norm changes the format": (
        Fault(networks.SplitBatchNorm2d, "forward", "input.chunk", "input.contiguous().chunk", "SplitBatch"),
        "moco", 1,
    ),
    "synchronised batch norm leaves out empty ranks": (
        Fault(networks, "synced_batch_norm", "part.__class__ = SyncBatchNorm", "pass", "index waits"),
        "simclr", 8,
    ),
    "logits of prototypes are in half precision": (
        Fault(networks.PrototypeHead, "forward", "enabled=False", "enabled=True", "in half precision"),
        "dino", 1,
    ),
    "similarities are in half precision": (
        Fault(simclr, "nt_xent", "enabled=False", "enabled=True", "in half precision"), "simclr", 1,
    ),
    "what a crop finds is in another format": (
        Fault(scfs, "feature_search", ".contiguous()", "", "Conv2d"), "scfs", 1,
    ),
    "a batch is sent from pageable memory": (
        Fault(batch, "_together", "to_device(torch.from_numpy(packed), device)",
              "torch.from_numpy(packed).to(device)", "_to_copy waits"),
        "simclr", 1,
    ),
    "a batch is sent in parts": (
        Fault(batch, "_together", "torch.split(sent, [arrays[name].nbytes for name in names])",
              "[to_device(torch.from_numpy(arrays[name].ravel().view(np.uint8)), device) for name in names]",
              r"a batch takes \d+ copies"),
        "simclr", 1,
    ),
    "cuDNN does not choose its algorithms": (
        Fault(ranks, "init", "torch.backends.cudnn.benchmark = True", "pass", "cuDNN"), "simclr", 1,
    ),
    "lengths of gradients are read": (
        Fault(optim, "clip_each", ".clamp(max=1).unbind()", ".clamp(max=1).tolist()", "_local_scalar"),
        "simclr", 1,
    ),
    "LARS compares on the host": (
        Fault(optim.Lars, "_step", "torch.where((length > 0) & (slope > 0), local, 1.0)",
              "local if (length > 0).all() else 0 * local + 1", "_local_scalar"),
        "simclr", 1, "optim.name=lars",
    ),
    "SGD is not fused": (
        Fault(optim, "fused", "fused=on_gpu, **options", "**options", "not fused"),
        "simclr", 1,
    ),
    "SGD waits for the scale of gradients": (
        Fault(optim, "guard_fused_sgd", "begin(optimizer)\n",
              "begin(optimizer); optimizer._step_supports_amp_scaling = False\n", "_local_scalar"),
        "simclr", 1, "run.amp=fp16",
    ),
    "AdamW waits for the scale of gradients": (
        Fault(optim, "fused", "fused=on_gpu, **options", "**options", "_local_scalar"),
        "simclr", 1, "optim.name=adamw", "run.amp=fp16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_a_step_with_a_fault_fails(
    name: str, case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, method, world, *changes = STEPS[name]
    fault.put_back(monkeypatch)
    with (
        pytest.raises(AssertionError, match=fault.told),
        case(method=method).on(CUDA, *changes, world=world) as trainee,
    ):
        trainee.step_on_fakes()


def test_a_backward_pass_that_looks_at_gradients_fails(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    mean = "return losses.view(-1, 2)"
    looks = f"losses.register_hook(lambda grad: grad if grad.isfinite().all() else None); {mean}"
    Fault(simclr, "nt_xent", mean, looks, "").put_back(monkeypatch)
    with case().on(CPU) as trainee, pytest.raises(AssertionError, match="_local_scalar"):
        check_backward(trainee)


READINGS: list[tuple[str, Fault]] = [
    ("principal", Fault(heatmap, "principal_map", "enabled=False", "enabled=True", "bfloat16")),
    ("rectangle", Fault(
        boxes, "_best_rectangles", "torch.arange(4, device=maps.device) // 2",
        "maps.new_tensor([0, 0, 1, 1])", "_to_copy waits",
    )),
]  # fmt: skip


@pytest.mark.parametrize(("read", "fault"), READINGS)
def test_a_reading_with_a_fault_fails(read: str, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault.put_back(monkeypatch)
    with pytest.raises(AssertionError, match=fault.told):
        check_reading(read)


def test_a_pass_whose_maps_are_in_half_precision_fails(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    Fault(heatmap, "principal_map", "enabled=False", "enabled=True", "").put_back(monkeypatch)
    changes = "guide.map=principal", "guide.aligned=false"
    with case("frozen_boxes").on(CUDA, *changes) as trainee, pytest.raises(AssertionError, match="bfloat16"):
        check_pass(trainee)


def test_a_pass_that_chooses_rows_on_the_device_fails(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = '"rows": rows[(maps > 0).any((1, 2))]'
    Fault(reading, "write", '"rows": rows', chosen, "").put_back(monkeypatch)
    with case().on(CUDA, "guide.warmup=0") as trainee, pytest.raises(AssertionError, match="index waits"):
        check_pass(trainee)


def test_a_probe_that_sends_rows_from_pageable_memory_fails(
    case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = "self.setting.device"
    sent = f"torch.from_numpy(found).to({device})"
    fault = Fault(Learner, "_kept_batches", f"to_device(torch.from_numpy(found), {device})", sent, "")
    fault.put_back(monkeypatch)
    with case().on(CUDA) as trainee, pytest.raises(AssertionError, match="_to_copy waits"):
        check_probe(trainee)


# Faults that tests in other files see.
OTHERS: dict[str, tuple[Fault, Callable[..., None]]] = {
    "LARS takes one tensor at a time": (
        Fault(optim.Lars, "_step", "torch._foreach_sub_(weights, velocities)",
              "[one.sub_(velocity) for one, velocity in zip(weights, velocities)]", ""),
        test_optim.test_a_step_of_lars_and_clipping_call_as_many_operators_for_many_tensors_as_for_few,
    ),
    "clipping takes one tensor at a time": (
        Fault(test_optim, "clip_each", "torch.stack(torch._foreach_norm(grads))",
              "torch.stack([one.norm() for one in grads])", ""),
        test_optim.test_a_step_of_lars_and_clipping_call_as_many_operators_for_many_tensors_as_for_few,
    ),
    "waits of the GPU are not measured": (
        Fault(batch.StreamWaits, "measured", "(first, second)", "(first, first)", ""),
        test_loader.test_the_waits_of_a_stream_are_those_between_the_marks_that_it_has_passed,
    ),
    "features for kNN are kept in float32": (
        Fault(test_ranks, "share", "torch.float16", "torch.float32", ""),
        partial(
            test_ranks.test_knn_takes_the_memory_that_it_promises_however_wide_the_features,
            [{"memory": []}] * 2,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_has_another_fault_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, shows = OTHERS[name]
    fault.put_back(monkeypatch)
    with pytest.raises(AssertionError):
        shows()


def test_a_run_in_emulated_bfloat16_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    Fault(test_setting, "_precision", "including_emulation=False", "", "").put_back(monkeypatch)
    with pytest.raises(AssertionError):
        test_setting.test_auto_takes_bfloat16_where_the_gpu_computes_in_it_not_where_it_only_emulates(
            7, torch.float16, monkeypatch
        )


GRAPHS = [
    Fault(build, "decode", '"hw_decoder_load": hw_decoder_load', '"hw_decoder_load": 0.65',
          "place in the batch"),
    Fault(build, "decode", '"device": "mixed", "hw_decoder_load": hw_decoder_load', '"device": "cpu"',
          "decoders__Image on the cpu decodes"),
    Fault(build, "decode", "decoders.image(", "decoders.image_random_crop(", "decodes a part"),
    Fault(colour, "apply", "fn.gaussian_blur(image", "fn.gaussian_blur(image.cpu()", "waits for what"),
    Fault(colour, "_colour", "dtype=types.FLOAT) + _beside(image, pivot) * grey",
          "T=_beside(image, pivot) * grey, dtype=types.FLOAT)", "must be on CPU"),
    Fault(colour, "_beside", "parameter.gpu()", "fn.full_like(parameter.gpu(), 1, device='gpu')",
          "DALI has no FullLike on the gpu"),
]  # fmt: skip


@pytest.mark.parametrize("fault", GRAPHS, ids=lambda fault: fault.told)
def test_a_graph_with_a_fault_fails(
    fault: Fault, small_index: SampleIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault.put_back(monkeypatch)
    with pytest.raises((AssertionError, ValueError), match=fault.told):
        check_ours(graph_of(BLOCKS, small_index))


def test_a_loader_or_a_decoder_with_dalis_own_share_of_the_hardware_fails(
    small_index: SampleIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ViewLoader.__init__.__kwdefaults__, "hw_decoder_load", 0.65)
    monkeypatch.setattr(decode.decoder, "__defaults__", (0.65,))
    for graph in (graph_of(BLOCKS, small_index), not_built(decode.decoder, 1, 1, "gpu", None)):
        with pytest.raises(AssertionError, match="place in the batch"):
            check_ours(graph)


# Where the host alone read the images, and where the decoder rested meanwhile.
BENCH = [
    Fault(pixels, "checksums", "if busy else images", "if False else images", "read images on the GPU"),
    Fault(pixels, "checksums", "PREFETCH if busy else 1", "1", "no batch is decoded"),
]


@pytest.mark.parametrize("fault", BENCH, ids=lambda fault: fault.told)
def test_a_bench_of_the_decoder_that_cannot_see_its_hazard_fails(
    fault: Fault, small_index: SampleIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault.put_back(monkeypatch)
    with pytest.raises(AssertionError, match=fault.told):
        check_bench(small_index)
