"""The GPU's graphs, without a GPU: all operators exist where they are used, and no image goes back.

A graph is serialised and not built, since that needs a driver. DALI checks names and types of arguments then;
its registries say which operators have code for which device. Not seen: what an operator does not take on a
GPU (a type, a layout, a parameter per sample), memory, streams and pixels.
"""

from __future__ import annotations

import inspect
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
from nvidia.dali import Pipeline, backend, types

from dali_views import SampleIndex, View, ViewLoader, recipes
from dali_views.graph import build
from dali_views.graph.decode import decoder
from dali_views.tools.bench import pixels
from dali_views.tools.bench.contest import Setup
from dali_views.tools.bench.loaders import limits, short_graph
from dali_views.tools.bench.peers import solo_learn_graph

REGISTERED = {
    "cpu": set(backend.RegisteredCPUOps()),
    "gpu": set(backend.RegisteredGPUOps()),
    "mixed": set(backend.RegisteredMixedOps()),
}
DTYPES = {"float32": types.FLOAT, "float16": types.FLOAT16}
# With every set of photometric operators; both interpolations; rotated or not.
BLOCKS = [
    View(size=32, jitter=jitter, blur=blur, solarise=solarise, interpolation=interpolation, rotate90=blur)
    for jitter, blur, solarise, interpolation in product((0, 0.8), (0, 0.5), (0, 0.2), ("linear", "cubic"))
]
VIEWS = {name: recipe(32) for name, recipe in recipes.BY_NAME.items()} | {"every block": BLOCKS}


@dataclass
class Operator:
    """One operator of a serialised graph; each in- or output is (name, device, whether it is an argument)."""

    name: str
    device: str
    arguments: dict[str, Any]
    inputs: list[tuple[str, str, bool]]
    outputs: list[tuple[str, str, bool]]


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message of protocol buffers: integers, or bytes as they are."""
    at = 0

    def integer() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(integer(), 8)
        if kind == 0:
            yield number, integer()
        else:
            size = {1: 8, 5: 4}.get(kind) or integer()
            yield number, message[at : at + size]
            at += size


def operators(graph: bytes) -> tuple[list[Operator], list[str]]:
    """The operators of a serialised graph, in order, and the devices of its outputs (DALI's dali.proto)."""
    found, devices = [], []
    for number, message in fields(graph):
        if number == 5:
            parts = list(fields(message))
            ends = [[_end(part) for n, part in parts if n == kind] for kind in (2, 3)]
            arguments = {}
            for part in (part for n, part in parts if n == 4):
                (_, name), _, *values = fields(part)
                arguments[name.decode()] = values[0][1] if values else None
            name = next(part for n, part in parts if n == 1).decode()
            found.append(Operator(name, arguments["device"].decode(), arguments, *ends))
        elif number == 7:
            devices.append(_end(message)[1])
    return found, devices


def _end(message: bytes) -> tuple[str, str, bool]:
    parts = dict(fields(message))
    return parts[1].decode(), parts[2].decode(), bool(parts.get(3))


def graph_of(views: Sequence[View], index: SampleIndex, **changes: Any) -> Pipeline:
    """The graph that a loader builds on a GPU, with its defaults."""
    options = ViewLoader(index, views, 4, device="cpu")._feed._options
    return not_built(build.build, views, lambda: [], **{**options, "device": "gpu", **changes})


def not_built(make: Callable[..., Pipeline], *given: Any, **options: Any) -> Pipeline:
    """The graph that a function makes, without a device and without being built, which need a driver."""
    begin, known = Pipeline.__init__, inspect.signature(Pipeline.__init__)

    def without_device(*given: Any, **options: Any) -> None:
        bound = known.bind(*given, **options)
        bound.arguments["device_id"] = None
        begin(*bound.args, **bound.kwargs)

    without_device.__signature__ = known  # `pipeline_def` asks for it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "__init__", without_device)
        patch.setattr(Pipeline, "build", lambda graph: None)
        return make(*given, **options)


def in_order(graph: Pipeline) -> tuple[list[Operator], list[str]]:
    """The operators of a graph on a GPU and where its outputs are; an AssertionError says what is wrong."""
    found, outputs = operators(graph.serialize())
    makers = {name: (operator, device) for operator in found for name, device, _ in operator.outputs}
    for operator in found:
        told = f"{operator.name} on the {operator.device}"
        assert operator.name in REGISTERED[operator.device], f"DALI has no {told}"
        assert "PythonFunction" not in operator.name, f"{told} calls Python"
        for name, device, is_argument in operator.inputs:
            maker, made = makers[name]
            wanted = "gpu" if operator.device == "gpu" and not is_argument else "cpu"
            assert device == wanted, f"{told} takes an input on the {device}"
            assert (made, device) != ("gpu", "cpu"), f"{told} waits for what {maker.name} computes on the GPU"
        if "Decoder" in operator.name or operator.name.startswith("decoders__"):
            assert operator.device == "mixed", f"{told} decodes"
            # nvImageCodec 0.9.0 fails to decode parts of images on hardware and CUDA (its issue 55).
            assert operator.name == "decoders__Image", f"{told} decodes a part"
    return found, outputs


def check_ours(graph: Pipeline) -> list[Operator]:
    """The operators of one of our graphs: in order, the CPU sends only what it is given, and the file of an
    image alone decides what decodes it."""
    found, outputs = in_order(graph)
    assert set(outputs) == {"gpu"}, f"outputs are on {outputs}"
    on_cpu = {
        name: operator.name for operator in found for name, device, _ in operator.outputs if device == "cpu"
    }
    sent = {on_cpu.get(name) for one in found for name, device, _ in one.inputs if device == "gpu"}
    assert sent <= {None, "ExternalSource", "Reshape"}, f"the CPU sends what it computes: {sent}"
    for operator in found:
        if operator.device == "mixed":
            (load,) = struct.unpack("<f", operator.arguments["hw_decoder_load"])
            assert load in (0, 1), f"with a load of {load} the place in the batch decides what decodes"
    return found


class Kept(Exception):
    """A graph that was made, in place of its runs."""


def check_bench(index: SampleIndex) -> None:
    """Operators of the GPU read what the bench decodes while the hardware decodes the next batch."""

    def keep(*given: Any, **options: Any) -> None:
        raise Kept(not_built(short_graph, *given, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "short_graph", keep)
        with pytest.raises(Kept) as kept:
            pixels.checksums(Setup(index, BLOCKS, 4, "gpu", 1), index, 1.0, busy=True)
    (graph,) = kept.value.args
    found, _ = in_order(graph)
    (images,) = (name for one in found if one.device == "mixed" for name, _, _ in one.outputs)
    readers = {
        one.name for one in found for name, device, _ in one.inputs if (name, device) == (images, "gpu")
    }
    assert len(readers) > 1, f"only {readers} read images on the GPU"
    assert graph.prefetch_queue_depth > 1, "no batch is decoded while another one is read"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("partner", [False, True])
@pytest.mark.parametrize("form", ["bytes", "pixels"])
@pytest.mark.parametrize("views", VIEWS)
def test_every_operator_of_the_gpus_graphs_exists_there_and_no_image_goes_back(
    views: str, form: str, partner: bool, dtype: str, small_index: SampleIndex
) -> None:
    shown = VIEWS[views] + [replace(VIEWS[views][-1], partner=True)] * partner
    found = check_ours(graph_of(shown, small_index, form=form, dtype=dtype))
    given = [one.arguments for one in found if one.name == "CropMirrorNormalize"]
    assert len(given) == len(shown)
    assert {(one["dtype"], one["output_layout"]) for one in given} == {(int(DTYPES[dtype]), b"HWC")}
    rotated = [view for view in shown if view.rotate90]
    assert sum(one.name == "WarpAffine" for one in found) == len(rotated)
    decoders = [one for one in found if one.device == "mixed"]
    assert len(decoders) == (0 if form == "pixels" else 1 + partner)


def test_the_graph_that_decodes_alone_is_in_order() -> None:
    found = check_ours(not_built(decoder, 1, 1, "gpu", None))
    assert [one.name for one in found if one.device == "mixed"] == ["decoders__Image"]


def test_the_graphs_that_bench_measures_are_in_order(small_index: SampleIndex) -> None:
    setup = Setup(small_index, VIEWS["dino"], 4, "gpu", 1)
    in_order(not_built(solo_learn_graph, setup))
    stages = [contender.start.args[1] for contender in limits(setup)]
    for stage in stages:
        in_order(not_built(short_graph, setup, iter(()), stage))
    check_bench(small_index)
