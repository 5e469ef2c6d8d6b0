"""The loader: same seed same bytes, exact resume, ranks, visibility of updates, unreadable images."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import shutil
import struct
import warnings
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import noise_images, without_waiting
from nvidia.dali import Pipeline, fn, types

from dali_views import RegionTable, SampleIndex, View, ViewLoader, recipes
from dali_views.graph.build import release_memory
from dali_views.graph.decode import decode
from dali_views.loader.batch import Batch, Stats, StreamWaits

FULL = replace(recipes.moco_v2(24, crop="contrastive")[0], solarise=0.2)
VIEWS = [FULL, FULL]


def digest(batch) -> tuple:
    """Everything a batch holds, as something to compare."""
    tensors = [*batch.views, batch.index, batch.label, batch.crops, batch.flipped, batch.boxes, batch.weights]
    return tuple(zlib.crc32(t.cpu().contiguous().numpy().tobytes()) for t in [*tensors, batch.partner])


def samples(loader) -> dict[int, tuple]:
    """Of each sample seen: the step, the crops and the pixels of its views."""
    seen = {}
    for step, batch in enumerate(loader):
        for b, row in enumerate(batch.index.tolist()):
            assert row not in seen
            pixels = tuple(zlib.crc32(v[b].cpu().contiguous().numpy().tobytes()) for v in batch.views)
            seen[row] = (step, batch.crops[b].cpu().numpy().tobytes(), batch.flipped[b].tolist(), pixels)
    return seen


def written_table(index: SampleIndex, seed: int = 0) -> RegionTable:
    regions = RegionTable(len(index))
    low = np.random.default_rng(seed).uniform(0, 0.5, (len(index), 2)).astype(np.float32)
    regions.update(np.arange(len(index)), np.concatenate([low, low + 0.4], axis=1))
    return regions


def test_equal_seeds_give_equal_bytes_wherever_the_folder_lies_and_unequal_ones_do_not(small_index, tmp_path):
    copy = tmp_path / "a longer name for the same images"
    shutil.copytree(small_index.root, copy)
    moved = SampleIndex.from_folder(copy, cache=False, progress=False)
    runs = [
        [digest(batch) for batch in ViewLoader(index, VIEWS, 8, device="cpu", seed=seed)]
        for index, seed in ((small_index, 3), (small_index, 3), (moved, 3), (small_index, 4))
    ]
    assert runs[0] == runs[1] == runs[2]
    assert not set(runs[0]) & set(runs[3])


@pytest.mark.gpu
def test_on_a_gpu_the_pixels_of_a_sample_do_not_depend_on_its_place_in_the_batch(photographs):
    """Its hardware and CUDA decode to different pixels, so the file must decide which of them has it."""
    index = SampleIndex.from_folder(photographs, cache=False, progress=False)
    first, second = (samples(ViewLoader(index, VIEWS, size, drop_last=False)) for size in (8, 5))
    assert {row: seen[1:] for row, seen in first.items()} == {row: seen[1:] for row, seen in second.items()}


def test_the_gpus_decoder_has_whole_batches_and_memory_for_usual_images(small_index):
    options = ViewLoader(small_index, VIEWS, 8, device="cpu")._feed._options
    graph = Pipeline(batch_size=8, num_threads=1, device_id=None, seed=0)
    with graph:
        encoded = fn.external_source(name="encoded", batch=True, dtype=types.UINT8, ndim=1)
        load, usual = options["hw_decoder_load"], options["usual"]
        graph.set_outputs(decode(encoded, "gpu", load, usual=usual))
    assert b"hw_decoder_load\x12\x05float\x1d" + struct.pack("<f", 1.0) in graph.serialize()
    for side, hint in zip(("height", "width"), usual, strict=True):
        assert f"preallocate_{side}_hint".encode() + b"\x12\x05int64 " + bytes([hint]) in graph.serialize()
    sizes = small_index.sizes
    assert (sizes > usual).mean(0).max() <= 0.05 <= (sizes >= usual).mean(0).min()


def rows_of(loader: ViewLoader) -> list[int]:
    return [row for batch in loader for row in batch.index.tolist()]


def test_an_epoch_shows_every_sample_once_and_the_next_one_in_another_order(small_index):
    loader = ViewLoader(small_index, VIEWS, 8, device="cpu")
    orders = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        orders.append(rows_of(loader))
        assert sorted(orders[-1]) == list(range(40))
    assert orders[0] != orders[1]
    assert rows_of(ViewLoader(small_index, VIEWS, 8, device="cpu", shuffle=False)) == list(range(40))


def test_an_iterator_whose_loader_has_gone_elsewhere_ends_with_a_sentence(small_index):
    loader = ViewLoader(small_index, recipes.moco_v2(16), 8, device="cpu")
    first = iter(loader)
    next(first)
    second = iter(loader)
    next(second)
    with pytest.raises(RuntimeError, match="one at a time"):
        next(first)
    assert len(list(second)) == 4
    for elsewhere in (lambda: loader.set_epoch(1), lambda: loader.load_state_dict(loader.state_dict())):
        walk = iter(loader)
        next(walk)
        elsewhere()
        with pytest.raises(RuntimeError, match="one at a time"):
            next(walk)


def _one_epoch(index: SampleIndex) -> None:
    assert len(list(ViewLoader(index, recipes.moco_v2(16), 8, device="cpu"))) == 5


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_that_is_forked_from_one_with_a_loader_has_its_own(small_index):
    _one_epoch(small_index)
    child = multiprocessing.get_context("fork").Process(target=_one_epoch, args=(small_index,))
    child.start()
    child.join(60)
    code = child.exitcode
    child.kill()
    assert code == 0


def _refused_in_a_fork(loader: ViewLoader, batches: Iterator[Batch]) -> None:
    for go_on in (lambda: next(batches), lambda: next(iter(loader))):
        with pytest.raises(RuntimeError, match=r"has iterated in process \d+; .* make a ViewLoader in each"):
            go_on()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_of_a_loader_that_has_iterated_says_what_to_do_and_waits_for_nothing(small_index):
    loader = ViewLoader(small_index, recipes.moco_v2(16), 8, device="cpu")
    batches = iter(loader)
    next(batches)
    child = multiprocessing.get_context("fork").Process(target=_refused_in_a_fork, args=(loader, batches))
    child.start()
    child.join(120)
    code = child.exitcode
    child.kill()
    assert code == 0
    assert len(list(batches)) == 4


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_of_a_loader_is_refused_with_what_to_do_instead(small_index, copied):
    with pytest.raises(TypeError, match=r"Make another one with the same arguments; .* load_state_dict"):
        copied(ViewLoader(small_index, VIEWS, 8, device="cpu"))


def test_updates_become_visible_exactly_at_the_next_set_epoch(small_index):
    regions = RegionTable(len(small_index))
    loader = ViewLoader(small_index, VIEWS, 8, device="cpu", regions=regions)
    regions.load_state_dict(written_table(small_index).state_dict())  # seen by the first set_epoch
    reference = ViewLoader(small_index, VIEWS, 8, device="cpu", regions=written_table(small_index))
    moved = np.tile(np.array([0.6, 0.6, 0.9, 0.9], np.float32), (40, 1))
    loader.set_epoch(0)
    for step, (batch, expected) in enumerate(zip(loader, reference, strict=True)):
        if step == 0:
            regions.update(np.arange(40), moved)
        assert digest(batch) == digest(expected)
    loader.set_epoch(1)
    for batch in loader:
        assert (batch.boxes == torch.tensor([0.6, 0.6, 0.9, 0.9])).all()


def test_a_loader_loaded_with_its_table_holds_no_second_one(small_index):
    table = written_table(small_index)
    state = ViewLoader(small_index, VIEWS, 8, device="cpu", regions=table).state_dict()
    fresh = RegionTable(len(small_index))
    loader = ViewLoader(small_index, VIEWS, 8, device="cpu", regions=fresh)
    loader.load_state_dict(state)
    frozen = loader._epoch.snapshot
    assert np.shares_memory(frozen.boxes, fresh.boxes)
    assert np.array_equal(frozen.boxes, table.boxes)


def test_an_abandoned_loop_leaves_nothing_behind(small_index):
    loader = ViewLoader(small_index, VIEWS, 8, device="cpu")
    whole = [digest(batch) for batch in loader]
    for stop in (1, 2, 4):
        for number, _ in enumerate(loader, 1):
            if number == stop:
                break
        assert [digest(batch) for batch in loader] == whole


class Held:
    """The encoded images of an index, as a source of one's own."""

    def __init__(self, index: SampleIndex) -> None:
        self.images = [index.encoded(row) for row in range(len(index))]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: np.ndarray) -> list[bytes]:
        return [self.images[row] for row in rows]


@pytest.mark.parametrize("batches", [0, 1, 2, 5])
@pytest.mark.parametrize("form", ["names", "bytes", "pixels"])
def test_a_loader_that_is_dropped_is_gone_at_once_with_its_graph(small_index, form, batches):
    """Its memory must not wait until Python looks for cycles."""
    index = small_index
    if form == "bytes":
        index = replace(index, source=Held(index))
    elif form == "pixels":
        index = SampleIndex.from_arrays(np.zeros((40, 32, 32, 3), np.uint8))
    assert index.form == form
    gc.collect()
    gc.disable()
    try:
        loader = ViewLoader(index, VIEWS, 8, device="cpu", regions=RegionTable(40))
        seen = iter(loader)
        for _ in range(batches):
            batch = next(seen)
        parts = [weakref.ref(part) for part in (loader, loader._feed, loader._feed._pipeline) if part]
        assert len(parts) == 2 + bool(batches)
        del loader, seen
        assert [part() for part in parts] == [None] * len(parts)
    finally:
        gc.enable()
    if batches:
        assert batch.views[0].isfinite().all()  # which owns its memory


def test_batches_own_their_memory_and_stay_as_they_were(small_index):
    loader = ViewLoader(small_index, VIEWS, 8, device="cpu")
    kept = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        kept += [(batch, digest(batch)) for batch in loader]
    assert all(digest(batch) == was for batch, was in kept)


def test_views_are_channels_last_without_a_copy_and_of_the_dtype_asked_for(small_index, device):
    batches = []
    for dtype in ("float32", "float16"):
        loader = ViewLoader(small_index, recipes.dino(32, local_size=16), 4, device=device, dtype=dtype)
        batch = next(iter(loader))
        batches.append(batch.views)
        assert [tuple(view.shape) for view in batch.views] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 8
        for view in batch.views:
            assert view.dtype == getattr(torch, dtype)
            assert view.is_contiguous(memory_format=torch.channels_last)
            assert view.device == loader.device
    assert all((one - half).abs().max() < 4e-3 for one, half in zip(*batches, strict=True))


def test_state_of_another_data_set_or_seed_is_refused(small_index, tmp_path):
    state = ViewLoader(small_index, VIEWS, 8, device="cpu").state_dict()
    with pytest.raises(ValueError, match="seed"):
        ViewLoader(small_index, VIEWS, 8, device="cpu", seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="has no 'fingerprint'"):
        ViewLoader(small_index, VIEWS, 8, device="cpu").load_state_dict({"epoch": 1})
    other = SampleIndex.from_folder(noise_images(tmp_path, 40, seed=9), cache=False, progress=False)
    with pytest.raises(ValueError, match="another data set"):
        ViewLoader(other, VIEWS, 8, device="cpu").load_state_dict(state)


def test_state_of_other_views_is_refused_by_their_first_difference_or_taken_without_them(small_index):
    def loader(*views: View) -> ViewLoader:
        return ViewLoader(small_index, views, 8, device="cpu")

    one, other = View(size=16, flip=1, shorts=(), scale=(0.2, 1)), View(size=np.int64(16), flip=1.0)
    state = loader(one, one).state_dict()
    loader(other, other).load_state_dict(state)  # the same views in other words
    with pytest.raises(ValueError, match=r"flip = 1 in view 1, this loader has 0\.5; give it the same"):
        loader(one, replace(one, flip=0.5)).load_state_dict(state)
    with pytest.raises(ValueError, match="2 views, this loader has 1; give it the same"):
        loader(one).load_state_dict(state)
    with pytest.raises(ValueError, match="views = 'x', not a list"):
        loader(one).load_state_dict({**state, "views": "x"})
    del state["views"]  # as in states of earlier versions
    loader(one).load_state_dict(state)


def test_a_second_pass_over_an_epoch_that_should_differ_is_warned_of_once(small_index):
    def passes(*views: View, **options: object) -> list[str]:
        loader = ViewLoader(small_index, views, 8, device="cpu", **options)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            next(iter(loader))  # a look at one batch is no pass
            for _ in range(3):
                list(loader)
            loader.set_epoch(1)
            list(loader)
        return [f"{each.filename} {each.message}" for each in told]

    whole = View(size=8, crop="whole")
    assert passes(whole, shuffle=False) == []
    for found in (passes(whole), passes(View(size=8), shuffle=False)):
        assert len(found) == 1
        assert found[0].startswith(f"{__file__} Epoch 0 is iterated a second time")
        assert "loader.set_epoch(epoch)" in found[0]


def test_guided_views_without_a_table_are_warned_of_and_true_boxes_become_one(small_index):
    names = [os.path.relpath(small_index.path(row), small_index.root) for row in (1, 3)]
    boxes = [[0, 0, 0.5, 0.5], [0, 0, 0.9, 0.9], [0.1, 0.1, 1, 1]], [[0, 0, 0.2, 1]]
    index = small_index.with_boxes(dict(zip(names, boxes, strict=True)))
    with pytest.warns(UserWarning, match=r"regions\.update\(\*index\.largest_boxes\(\)\)"):
        ViewLoader(index, VIEWS, 8, device="cpu")
    regions = RegionTable(len(index))
    with warnings.catch_warnings(action="error"):
        ViewLoader(index, VIEWS, 8, device="cpu", regions=regions)
        ViewLoader(index, [View(size=8)], 8, device="cpu")
    regions.update(*index.largest_boxes())
    assert np.flatnonzero(regions.written).tolist() == [1, 3]
    np.testing.assert_allclose(regions.boxes[[1, 3], 0], [[0, 0, 0.9, 0.9], [0, 0, 0.2, 1]])
    empty, none = small_index.largest_boxes()
    assert (empty.shape, none.shape) == ((0,), (0, 4))


def frozen(rows: int = 40, regions: int = 1, **columns: object) -> dict[str, object]:
    return {**RegionTable(rows, regions).snapshot().state_dict(), **columns}


def plain(state: object) -> object:
    """A state as something to compare."""
    if isinstance(state, dict):
        return {name: plain(part) for name, part in state.items()}
    return state.tolist() if isinstance(state, torch.Tensor) else state


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epoch": 10**30}, r"epoch = 10{30}, not an integer from 0 to 2147483647"),
        ({"epoch": 10**5000}, "epoch = an integer of"),
        ({"epoch": 1.5}, r"epoch = 1\.5, not an integer"),
        ({"epoch": "7"}, "epoch = '7', not an integer"),
        ({"epoch": True}, "epoch = True, not an integer"),
        ({"position": 10**12}, "position = 1000000000000, not an integer from 0 to 80"),
        ({"position": -8}, "position = -8"),
        ({"seed": "0"}, "seed = '0', not an integer"),
        ({"fingerprint": None}, "fingerprint = None, not text"),
        ({"unreadable": [3]}, "unreadable = a list, not a dict"),
        ({"unreadable": {40: "cut off"}}, "a key of unreadable = 40, not an integer from 0 to 39"),
        ({"unreadable": {3: 5}}, r"unreadable\.3 = 5, not text"),
        ({"regions": frozen(39)}, r"regions\.boxes = float32 of shape \(39, 1, 4\), not .*\(40, 1, 4\)"),
        ({"regions": frozen(regions=2)}, r"regions\.boxes = float32 of shape \(40, 2, 4\)"),
        ({"regions": frozen(weights=np.ones((40, 2)))}, r"regions\.weights = float64 of shape \(40, 2\)"),
        ({"regions": frozen(boxes=[[0, 0, 1, 1]])}, r"regions\.boxes = a list"),
        ({"regions": frozen(boxes=torch.ones(1).expand(40, 1, 4))}, r"regions\.boxes = .* repeats a few"),
        ({"regions": frozen(boxes=np.full((40, 1, 4), np.nan))}, r"wrong regions\.boxes: Row 0 .* NaN"),
        ({"regions": frozen(partner=np.full(40, 40))}, r"wrong regions\.partner: Row 0 .* not in the table"),
        ({"regions": frozen(epoch=1.5)}, r"regions\.epoch = 1\.5"),
        ({"regions": {"boxes": torch.zeros(40, 1, 4)}}, r"no 'regions\.weights'"),
        ({"table": RegionTable(39).state_dict()}, r"table\.boxes = float32 of shape \(39, 1, 4\)"),
        ({"table": {}}, r"no 'table\.fingerprint'"),
        ({"table": {**RegionTable(40).state_dict(), "fingerprint": "other"}}, "another data set"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_a_sentence_and_changes_nothing(small_index, change, words):
    state = ViewLoader(small_index, VIEWS, 8, device="cpu", regions=RegionTable(40)).state_dict()
    state["epoch"] = 3
    loader = ViewLoader(small_index, VIEWS, 8, device="cpu", regions=written_table(small_index))
    before, seen = plain(loader.state_dict()), [digest(batch) for batch in loader]
    loader.set_epoch(0)
    with pytest.raises(ValueError, match=words) as refused:
        loader.load_state_dict({**state, **change})
    assert str(refused.value).count("; ") >= 1, "a remedy follows"
    assert len(str(refused.value)) < 400
    assert plain(loader.state_dict()) == before
    assert [digest(batch) for batch in loader] == seen


def test_a_tiny_state_that_claims_much_takes_no_memory(small_index):
    """Without a table, the number of regions is that of the state."""
    many = {
        "boxes": torch.zeros(1).expand(40, 10**9, 4), "weights": torch.ones(1).expand(40, 10**9),
        "partner": torch.arange(40), "written": torch.zeros(40, dtype=torch.bool), "epoch": 0,
    }  # fmt: skip
    loader = ViewLoader(small_index, VIEWS, 8, device="cpu")
    with pytest.raises(ValueError, match=r"regions\.boxes = .* repeats a few"):
        loader.load_state_dict({**loader.state_dict(), "regions": many})


@pytest.mark.parametrize("epoch", [10**30, -1, 1.5, "7"])
def test_an_epoch_that_is_none_is_refused_and_changes_nothing(small_index, epoch):
    loader = ViewLoader(small_index, VIEWS, 8, device="cpu")
    with pytest.raises(ValueError, match=r"The epoch is .*, not an integer from 0 to 2147483647; count"):
        loader.set_epoch(epoch)
    assert loader.epoch == 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 41}, "global batch"),
        ({"views": []}, "View"),
        ({"device": "tpu"}, "tpu"),
        ({"dtype": torch.bfloat16}, "dtype bfloat16 .* take float16 views, and use torch.autocast"),
        ({"index": "photos"}, r"pass a SampleIndex, for instance SampleIndex\.from_folder\('photos'\)"),
        ({"views": FULL}, r"views is a View; pass a list of views"),
        ({"views": recipes.moco_v2}, r"views is a function; pass a list of views"),
        ({"views": [FULL, abs]}, r"views is a list with other things; pass a list of views"),
        ({"rank": 2, "world": 2}, "rank 2"),
        ({"rank": 0}, "both"),
        ({"regions": RegionTable(7)}, "7 rows"),
    ],
)
def test_arguments_that_cannot_work_are_refused_with_the_reason(small_index, change, word):
    arguments = {"index": small_index, "views": VIEWS, "batch_size": 8, "device": "cpu", **change}
    with pytest.raises((ValueError, TypeError), match=word):
        ViewLoader(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("name", ["gpu", "cuda", "cuda:0", torch.device("cuda", 1)])
def test_asking_for_a_gpu_where_there_is_none_says_so(small_index, name):
    with pytest.raises(RuntimeError, match='device="cpu"'):
        ViewLoader(small_index, VIEWS, 8, device=name)


@pytest.mark.gpu
def test_a_gpu_has_pytorchs_names_too_and_must_be_the_current_one(small_index):
    for name in ("cuda", "cuda:0", torch.device("cuda")):
        assert ViewLoader(small_index, VIEWS, 8, device=name).device == torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"is not the current GPU.*torch\.cuda\.set_device\(7\) first"):
        ViewLoader(small_index, VIEWS, 8, device="cuda:7")


def test_pytorchs_names_give_the_same_batches_and_a_batch_is_told_in_a_line(small_index):
    views = [*VIEWS, View(size=16, crop="whole")]
    words, names = (
        next(iter(ViewLoader(small_index, views, 8, device=device, dtype=dtype)))
        for device, dtype in (("cpu", "float16"), (torch.device("cpu"), torch.float16))
    )
    assert digest(words) == digest(names)
    told = "views: 2 x (8, 3, 24, 24) float16, 1 x (8, 3, 16, 16) float16"
    assert repr(names) == f"Batch(8 samples, {told}, device='cpu')"


def test_stats_count_the_epoch(small_index):
    loader = ViewLoader(small_index, VIEWS, 8, device="cpu")
    assert len(list(loader)) == 5
    assert (loader.stats.images, loader.stats.batches) == (40, 5)
    assert loader.stats.images_per_second > 0
    assert 0 < loader.stats.wait_share <= 1


def test_the_waits_of_a_stream_are_those_between_the_marks_that_it_has_passed():
    came, clock = iter([1.0, 3.0, 10.0, 10.5]), {"now": 0.0}

    class Mark:
        """In place of an event of CUDA; the stream comes to it at the time `at`."""

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(came)

        def query(self) -> bool:
            return self.at <= clock["now"]

        def elapsed_time(self, other: Mark) -> float:
            return 1000 * (other.at - self.at)

    waits, found = StreamWaits(Mark), []
    for _ in range(2):
        with waits.measured():
            pass
    for clock["now"] in (0.5, 3.5, 10.2, 11.0):
        found.append(waits.seconds())
    assert found == [0.0, 2.0, 2.0, 2.5]
    assert Stats(seconds=5.0, stream=waits).gpu_wait_share == 0.5
    assert Stats(seconds=5.0).gpu_wait_share is None


@pytest.mark.gpu
def test_memory_of_a_graph_that_is_gone_returns_to_the_gpu(photographs):
    index = SampleIndex.from_folder(photographs, cache=False, progress=False)
    for _ in ViewLoader(index, recipes.moco_v2(224), len(index)):
        pass
    del _
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    release_memory("gpu")
    assert torch.cuda.mem_get_info()[0] > before


@pytest.mark.gpu
def test_the_gpus_wait_for_views_is_measured_without_a_wait_of_the_host(small_index):
    loader = ViewLoader(small_index, recipes.moco_v2(32), 8, device="gpu")
    for epoch in range(2):  # the second one without the start of the graph
        loader.set_epoch(epoch)
        batches = iter(loader)
        next(batches)
        with without_waiting("gpu"):
            assert len(list(batches)) == 4
            assert loader.stats.gpu_waited is not None
        torch.cuda.synchronize()
        assert loader.stats.gpu_waited > 0


def test_a_profiler_sees_the_stages_of_a_batch(small_index):
    loader = ViewLoader(small_index, recipes.moco_v2(32), 8, regions=RegionTable(40), device="cpu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loader.set_epoch(0)
        batches = len(list(loader))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["dali_views: freeze regions"] == 1
    assert counts["dali_views: plan"] == counts["dali_views: batch"] == batches
    assert counts["dali_views: wait for views"] == batches + 1  # the last one finds the epoch at its end


def test_what_comes_with_the_views_is_one_block_of_memory_sent_at_once(small_index):
    batch = next(iter(ViewLoader(small_index, VIEWS, 7, regions=written_table(small_index), device="cpu")))
    parts = {name: part for name, part in vars(batch).items() if name != "views"}
    assert len({part.untyped_storage().data_ptr() for part in parts.values()}) == 1
    before = {name: part.clone() for name, part in parts.items()}
    for name, part in parts.items():
        part.fill_(1)
        assert all(torch.equal(before[other], parts[other]) for other in parts if other != name)
        part.copy_(before[name])


@pytest.mark.gpu
def test_a_batch_is_handed_over_without_waiting_for_the_gpu(small_index):
    loader = ViewLoader(small_index, recipes.moco_v2(32), 8, regions=RegionTable(40), device="gpu")
    batches = iter(loader)
    next(batches)
    with without_waiting("gpu"):
        for batch in batches:
            loader.regions.update(batch.index, batch.boxes, batch.weights)
    assert (loader.regions.writes == 1).sum() == 32


def test_a_state_is_read_by_torch_load_and_brings_its_region_table_with_it(small_index, tmp_path):
    """Also if it was given NumPy's numbers."""
    options = {"device": "cpu", "seed": np.int64(3)}
    loader = ViewLoader(small_index, VIEWS, np.int64(8), regions=written_table(small_index), **options)
    whole = [digest(batch) for epoch in (0, 1) if not loader.set_epoch(epoch) for batch in loader]
    loader.set_epoch(np.int64(0))
    batches = iter(loader)
    seen = [digest(next(batches)), digest(next(batches))]
    torch.save(loader.state_dict(), tmp_path / "loader.pt")
    state = torch.load(tmp_path / "loader.pt")
    assert (state["seed"], state["epoch"], state["position"]) == (3, 0, 16)
    table = RegionTable(len(small_index))
    second = ViewLoader(small_index, VIEWS, 8, regions=table, **options)
    second.load_state_dict(state)
    assert table.written.all()
    seen += [digest(batch) for epoch in (0, 1) if not second.set_epoch(epoch) for batch in second]
    assert seen == whole
    ViewLoader(small_index, VIEWS, 8, **options).load_state_dict(state)
