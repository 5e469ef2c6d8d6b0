"""Evaluations that learn from labels: linear probe and fine-tuning, with their recipes and label choices."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from dali_views import SampleIndex
from trainers import config as cfg
from trainers.data import DataSets, evaluation_views, plain_loader
from trainers.encoders.backbones import Backbone, build_backbone
from trainers.engine import checkpoint
from trainers.engine.setting import join
from trainers.evaluate import classifiers
from trainers.evaluate.classifiers import FEW_LABELS, MORE_LABELS, PROBES, labelled_list, labelled_share
from trainers.evaluate.knn import extract
from trainers.evaluate.learners import Recipe, rate
from trainers.evaluate.logistic import standard
from trainers.evaluate.supervised import Result

COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [180, 180, 60]])
Evaluate = Callable[..., Result]


def probe(settings: cfg.Config, *arguments: Any, resume: bool = False) -> Result:
    return classifiers.linear_probe(settings, join(settings), *arguments, resume)


def tune(settings: cfg.Config, *arguments: Any, resume: bool = False) -> Result:
    return classifiers.finetune(settings, join(settings), *arguments, resume)


def colours(count: int, seed: int, spread: float = 40) -> SampleIndex:
    """`count` images of noise around four colours, in turn; the colour is the class."""
    labels = np.arange(count) % 4
    noise = np.random.default_rng(seed).normal(0, spread, (count, 16, 16, 3))
    pixels = np.clip(COLOURS[labels, None, None] + noise, 0, 255).astype(np.uint8)
    return SampleIndex.from_arrays(pixels, labels)


def with_labels(index: SampleIndex, labels: np.ndarray) -> SampleIndex:
    return SampleIndex.from_arrays(index.arrays, labels, index.classes)


def sets(bank: SampleIndex, queries: SampleIndex | None) -> DataSets:
    return DataSets(train=bank, bank=bank, queries=queries)


def config(device: str = "cpu", size: int = 16, **sections: object) -> cfg.Config:
    return cfg.Config(
        run=cfg.Run(out="unused", device=device, threads=1), data=cfg.Data(kind="folder", path="unused"),
        views=cfg.Views(size=size), model=cfg.Model(backbone="resnet10"), **sections,
    )  # fmt: skip


def probe_of(epochs: int = 3, **changes: object) -> cfg.Config:
    return config(probe=cfg.Probe(**{"epochs": epochs, "batch": 16, "lr": 1.0, **changes}))


def tuning_of(epochs: int = 3, device: str = "cpu", **changes: object) -> cfg.Config:
    keys = {"labels": 1.0, "batch": 16, "lr": 0.2, **changes}
    return config(device, finetune=cfg.FineTune(epochs=epochs, **keys))


def encoder(seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return build_backbone("resnet10")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def learnt(folder: Path) -> dict[str, Tensor]:
    return dict(checkpoint.load(folder)["learner"])


@pytest.fixture
def data() -> DataSets:
    return sets(colours(96, 1), colours(32, 2))


@pytest.fixture
def photos(tmp_path: Path) -> SampleIndex:
    """Ninety-six images in four class folders; two of them have one name."""
    index = colours(96, 1)
    for number, (pixels, label) in enumerate(zip(index.arrays, index.labels, strict=True)):
        file = tmp_path / f"class{label}" / f"{max(number, 1)}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(file)
    return SampleIndex.from_folder(tmp_path, cache=False, progress=False)


@pytest.mark.parametrize("augment", [True, False])
def test_a_probe_separates_classes_of_different_colour_and_leaves_the_encoder_as_it_was(
    data, tmp_path, device, augment
):
    settings = config(device, probe=cfg.Probe(epochs=4, batch=32, augment=augment))
    net = encoder().train().to(join(settings).device)
    net.conv1.weight.requires_grad_(False)  # as in a momentum encoder
    before = deepcopy(net.state_dict())
    result = probe(settings, net, data, tmp_path)
    assert result.top1 > 0.9
    assert result.top5 == 1  # of four classes
    assert len(result.curve) == 4
    assert result.curve[-1]["loss"] < result.curve[0]["loss"]
    assert equal(net.state_dict(), before)
    assert net.training
    assert not net.conv1.weight.requires_grad


def test_fine_tuning_changes_the_encoder_and_rises_above_chance(data, tmp_path, device):
    settings = tuning_of(labels=0.5, device=device)
    net = encoder().eval().requires_grad_(False).to(join(settings).device)  # as a momentum encoder comes
    before = deepcopy(net.state_dict())
    assert tune(settings, net, data, tmp_path).top1 > 0.5  # chance is a quarter
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(before)  # weights, and the statistics of batch norm
    assert not net.training


def test_a_probe_is_gradient_descent_with_momentum_on_the_mean_cross_entropy(tmp_path):
    bank = colours(64, 1, spread=90)
    settings = probe_of(6, batch=64, lr=2.0, weight_decay=0.01, augment=False, recipe="moco")
    net = encoder()
    result = probe(settings, net, sets(bank, colours(12, 2)), tmp_path)

    plain = plain_loader(join(settings), settings.views, bank, evaluation_views(settings.views))
    features, labels, _ = extract(net, plain, "cpu")
    features = features.double()
    weight = 0.01 * torch.randn(4, net.dim, generator=torch.Generator().manual_seed(0)).double()
    bias = torch.zeros(4).double()
    speeds = [torch.zeros_like(weight), torch.zeros_like(bias)]
    losses = []
    # Peak 2 per 256 images is 0.5 for 64; a tenth after 0.6 * 6 and 0.8 * 6 epochs, rounded.
    for lr in (0.5, 0.5, 0.5, 0.5, 0.05, 0.005):
        logits = features @ weight.T + bias
        losses.append(float(F.cross_entropy(logits, labels)))
        error = (logits.softmax(1) - F.one_hot(labels, 4)) / len(labels)
        gradients = (error.T @ features, error.sum(0))
        for part, gradient, speed in zip((weight, bias), gradients, speeds, strict=True):
            speed.mul_(0.9).add_(gradient + 0.01 * part)
            part.sub_(lr * speed)
    assert [epoch["loss"] for epoch in result.curve] == pytest.approx(losses, abs=1e-5)
    found = {name: value.double() for name, value in learnt(tmp_path).items()}
    torch.testing.assert_close(found, {"weight": weight, "bias": bias}, atol=1e-5, rtol=1e-4)


def test_rates_fall_by_drops_between_epochs_or_along_half_a_cosine():
    moco = [rate(PROBES["moco"], epoch * 7, 7) for epoch in range(100)]
    assert moco == pytest.approx([1.0] * 60 + [0.1] * 20 + [0.01] * 20)
    assert rate(PROBES["moco"], 60 * 7 - 1, 7) == 1.0
    orl = [rate(FEW_LABELS["other"], epoch, 1) for epoch in range(20)]
    assert orl == pytest.approx([1.0] * 12 + [0.2] * 4 + [0.04] * 4)
    cosine = [rate(Recipe(epochs=2, batch=8, head_lr=1.0), step, 4) for step in range(9)]
    assert cosine == pytest.approx([(1 + np.cos(np.pi * step / 8)) / 2 for step in range(9)])


def test_the_recipe_is_the_methods_own_or_that_for_small_images_or_the_one_asked_for():
    def chosen(settings: cfg.Config) -> Recipe:
        own = settings.probe.model_copy(update={"recipe": "published"})
        return classifiers.probe_recipe(settings.model_copy(update={"probe": own}))

    assert classifiers.probe_recipe(config()) == PROBES["auto"]
    for method in (cfg.MoCo(), cfg.SimCLR(), cfg.BYOL(), cfg.SimSiam(), cfg.DINO(), cfg.SCFS(), cfg.LeJEPA()):
        name = {"scfs": "dino", "lejepa": "dino"}.get(method.name, method.name)
        assert chosen(config(method=method, size=224)) == PROBES[name]
        assert chosen(config(method=method, size=96)) == PROBES["small"]
    asked = cfg.Probe(recipe="byol", lr=0.4, epochs=5, batch=64, weight_decay=0.0, augment=False)
    expected = Recipe(epochs=5, batch=64, head_lr=0.4, optimizer="nesterov", augment=False)
    assert classifiers.probe_recipe(config(probe=asked)) == expected
    # Each whole step as published: rate times batch / 256.
    peaks = {name: recipe.head_lr * recipe.batch / 256 for name, recipe in PROBES.items()}
    published = {
        "moco": 30,
        "small": 10,
        "simclr": 1.6,
        "byol": 0.8,
        "simsiam": 1.6,
        "dino": 0.08,
        "auto": 5,
    }
    assert peaks == pytest.approx(published)
    tuned = classifiers.finetune_recipe
    for method, name in ((cfg.MoCo(), "other"), (cfg.SimCLR(), "simclr"), (cfg.BYOL(), "byol")):
        assert tuned(config(method=method), 0.01) == FEW_LABELS[name]
        assert tuned(config(method=method), 0.1) == MORE_LABELS[name]
    keys = {"lr": 0.02, "head_lr": 5.0, "weight_decay": 0.0}
    changed = tuned(config(finetune=cfg.FineTune(recipe="other", **keys)), 0.01)
    assert changed == replace(FEW_LABELS["other"], head_lr=5.0, encoder_lr=0.02, weight_decay=0.0)
    simclr, byol = FEW_LABELS["simclr"], FEW_LABELS["byol"]
    assert simclr.encoder_lr * 4096 / 256 == pytest.approx(0.8)
    assert byol.encoder_lr * 1024 / 256 == pytest.approx(0.02)


def test_standardised_features_do_not_depend_on_scale_and_shift_of_a_dimension():
    def standardised(features: Tensor) -> Tensor:
        mean, scale = standard(features)
        return (features - mean) * scale

    draw = torch.Generator().manual_seed(0)
    features, scale = torch.randn(50, 6, generator=draw), torch.tensor([1e-3, 1.0, 1e3, 7.0, 0.1, 1.0])
    plain = standardised(features)
    torch.testing.assert_close(plain, (features - features.mean(0)) / features.std(0, correction=0) / 6**0.5)
    torch.testing.assert_close(plain.square().sum(1).mean(), torch.tensor(1.0))
    torch.testing.assert_close(standardised(features * scale + scale), plain, atol=1e-5, rtol=1e-4)
    features[:, 2] = 0.1  # as float32 has it, its deviation is not quite 0
    assert not standardised(features)[:, 2].any()


def test_a_rate_that_is_worse_than_guessing_is_warned_of(tmp_path):
    images = sets(colours(96, 1, spread=250), colours(32, 2))
    with pytest.warns(UserWarning, match=r"where guessing has 1\.39: its learning rate is too high"):
        probe(probe_of(3, lr=1e6, recipe="moco"), encoder(), images, tmp_path)


@pytest.mark.parametrize(("recipe", "mark"), [("simclr", "nesterov"), ("simsiam", "trust")])
def test_nesterov_and_lars_lower_the_loss(tmp_path, recipe, mark):
    settings = probe_of(20, recipe=recipe, batch=64, lr=10.0, augment=False)
    result = probe(settings, encoder(), sets(colours(64, 1), colours(12, 2)), tmp_path)
    assert result.curve[-1]["loss"] < result.curve[0]["loss"] - 0.05
    assert all(group[mark] for group in checkpoint.load(tmp_path)["optimizer"]["param_groups"])


def test_the_first_of_the_best_epochs_is_told():
    result = Result([{"top1": top} for top in (0.2, 0.7, 0.4, 0.7, 0.5)])
    assert (result.top1, result.best_epoch, result.best_top1) == (0.5, 2, 0.7)


KINDS: dict[str, tuple[Evaluate, cfg.Config]] = {
    "crops": (probe, probe_of(2)),
    "kept": (probe, probe_of(2, augment=False)),
    "tuned": (tune, tuning_of(2)),
}


@pytest.mark.parametrize(("evaluate", "settings"), KINDS.values(), ids=KINDS)
def test_a_run_that_lost_its_last_epoch_is_resumed_to_the_very_weights_of_one_that_did_not(
    tmp_path, evaluate: Evaluate, settings: cfg.Config
):
    data = sets(colours(40, 1, spread=90), colours(12, 2))
    whole = evaluate(settings, encoder(), data, tmp_path)
    weights = learnt(tmp_path)
    assert checkpoint.load(tmp_path)["curve"] == whole.curve
    # All that a run leaves which is killed after its last step but one: the checkpoint of the epoch before.
    (tmp_path / checkpoint.LAST).unlink()
    with pytest.warns(UserWarning, match="resuming from"):
        again = evaluate(settings, encoder(), data, tmp_path, resume=True)
    assert again == whole
    assert equal(learnt(tmp_path), weights)
    # A finished run only tells its result, and a fine-tuned encoder comes back fine-tuned.
    net = encoder()
    assert evaluate(settings, net, data, tmp_path, resume=True) == whole
    if evaluate is tune:
        kept = {name[8:]: value for name, value in weights.items() if name[:8] == "encoder."}
        assert equal(net.state_dict(), kept)


def test_a_run_is_neither_overwritten_nor_continued_with_other_settings_data_or_encoder(tmp_path):
    bank, queries = colours(40, 1), colours(12, 2)
    once, data = probe_of(1), sets(bank, queries)
    probe(once, encoder(), data, tmp_path)
    with pytest.raises(FileExistsError, match="--resume"):
        probe(once, encoder(), data, tmp_path)
    other_tests = sets(bank, with_labels(queries, queries.labels[::-1]))
    for settings, seed, images, changed in (
        (probe_of(2, augment=True), 0, data, "epochs 1, now 2, augment False, now True"),
        (once, 1, data, "encoder"),
        (once, 0, sets(colours(44, 1), queries), "training images"),
        (once, 0, other_tests, "test images"),
    ):
        with pytest.raises(ValueError, match=rf"begun with other values \({changed}\)"):
            probe(settings, encoder(seed), images, tmp_path, resume=True)
    probe(once, encoder(), data, tmp_path, resume=True)


def test_a_batch_that_the_labelled_images_do_not_fill_is_reduced_and_its_rate_with_it(tmp_path):
    data = sets(colours(40, 1), colours(12, 2))
    with pytest.warns(UserWarning, match=r"a batch of 64 does not fit 40 labelled images.*batches are of 40"):
        reduced = probe(probe_of(2, batch=64, augment=False), encoder(), data, tmp_path / "reduced")
    assert probe(probe_of(2, batch=40, augment=False), encoder(), data, tmp_path / "fitting") == reduced
    groups = checkpoint.load(tmp_path / "reduced")["optimizer"]["param_groups"]
    assert [group["peak_lr"] for group in groups] == [40 / 256]


def test_images_without_a_label_take_no_part(tmp_path):
    bank, queries = colours(48, 1), colours(16, 2)
    labels, holes = bank.labels.copy(), queries.labels.copy()
    labels[::3] = holes[:5] = -1
    with_holes = sets(with_labels(bank, labels), with_labels(queries, holes))
    without = sets(bank.subset(labels >= 0), queries.subset(holes >= 0))
    found = probe(probe_of(), encoder(), with_holes, tmp_path / "with")
    assert found == probe(probe_of(), encoder(), without, tmp_path / "without")


@pytest.mark.parametrize("evaluate", [probe, tune])
def test_missing_labels_are_refused_with_the_key_to_set(tmp_path, evaluate: Evaluate):
    bank, queries = colours(16, 1), colours(8, 2)
    none = with_labels(queries, np.full(len(queries), -1))
    for data, told in (
        (sets(bank, None), r"no test image has a label; .* data\.eval_val=DIR"),
        (sets(none, queries), r"no training image has a label; .* data\.eval_train=DIR"),
    ):
        with pytest.raises(ValueError, match=told):
            evaluate(config(), encoder(), data, tmp_path)


def test_a_loss_that_is_no_number_ends_the_run_with_a_hint(tmp_path):
    settings = probe_of(2, lr=1e38, augment=False, recipe="moco")
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        probe(settings, encoder(), sets(colours(64, 1, 200), colours(8, 2)), tmp_path)


def two_rank_data() -> DataSets:
    # The last of 513 test images fills one rank's batch; the other one's is padded.
    return sets(colours(40, 1, spread=90), colours(513, 2, spread=150))


def evaluate_on_one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name, (evaluate, settings) in KINDS.items():
        net = encoder()
        result = evaluate(settings, net, two_rank_data(), Path(folder, name))
        found[name] = {"curve": result.curve, "encoder": net.state_dict()}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_learn_what_one_does_and_count_every_test_image_once(tmp_path):
    (tmp_path / "two").mkdir()
    start_processes(evaluate_on_one_rank, args=(str(tmp_path / "two"),), nprocs=2, start_method="forkserver")
    ranks = [torch.load(tmp_path / "two" / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, (evaluate, settings) in KINDS.items():
        one, other = (rank[name] for rank in ranks)
        assert one["curve"] == other["curve"]
        net, weights = encoder(), learnt(tmp_path / "two" / name)
        if evaluate is tune:
            assert equal(one["encoder"], other["encoder"])
            net.load_state_dict(one["encoder"])
        else:
            assert equal(one["encoder"], net.state_dict())
            alone = evaluate(settings, encoder(), two_rank_data(), tmp_path / name)
            losses = [[epoch["loss"] for epoch in curve] for curve in (one["curve"], alone.curve)]
            assert losses[0] == pytest.approx(losses[1], abs=1e-6)
            torch.testing.assert_close(weights, learnt(tmp_path / name), atol=1e-6, rtol=0)
        setting, views, data = join(settings), settings.views, two_rank_data()
        features, labels, _ = extract(
            net, plain_loader(setting, views, data.queries, evaluation_views(views)), "cpu"
        )
        head = [value for key, value in weights.items() if key.removeprefix("head.") in ("weight", "bias")]
        if evaluate is probe:
            bank = plain_loader(setting, views, data.bank, evaluation_views(views))
            mean, scale = standard(extract(net, bank, "cpu")[0])
            features = (features - mean) * scale
        guesses = F.linear(features, *head).argmax(1)
        assert one["curve"][-1]["top1"] == int((guesses == labels).sum()) / 513


def test_the_labelled_share_is_the_same_of_every_class_but_never_nothing_and_grows_by_adding():
    labels = np.random.default_rng(0).permutation([0] * 100 + [1] * 40 + [2] * 3 + [4] * 1 + [-1] * 50)
    index = SampleIndex.from_arrays(np.zeros((len(labels), 1, 1, 3), np.uint8), labels)
    rows = labelled_share(index, 0.1, seed=0)
    assert np.unique(index.labels[rows], return_counts=True)[1].tolist() == [10, 4, 1, 1]
    assert index.labels[rows].min() == 0
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert np.array_equal(labelled_share(index, 0.1, seed=0), rows)
    assert not np.array_equal(labelled_share(index, 0.1, seed=4), rows)
    assert set(rows) < set(labelled_share(index, 0.5, seed=0))
    assert np.array_equal(labelled_share(index, 1.0, seed=0), np.flatnonzero(labels >= 0))


def test_listed_images_are_found_by_file_name_or_by_path_and_set_the_recipe(photos, tmp_path):
    file = tmp_path / "some.txt"
    wanted = [Path(photos.path(row)) for row in (70, 3, 41)]
    lines = [wanted[0].name, "", str(wanted[1].relative_to(photos.root)), wanted[2].name, wanted[0].name]
    file.write_text("\n".join(lines) + "\n")
    assert labelled_list(photos, file).tolist() == [3, 41, 70]
    file.write_text("".join(f"class{number % 4}/{number}.png\n" for number in range(1, 96, 6)))
    settings = tuning_of(1, labels=str(file), weight_decay=None)
    tune(settings, encoder(), sets(photos, colours(32, 2)), tmp_path / "run")
    saved = checkpoint.load(tmp_path / "run")["description"]
    assert saved["weight_decay"] == MORE_LABELS["simclr"].weight_decay  # a sixth of the labels
    assert saved["batch"] == 16


def test_a_list_that_does_not_fit_the_images_is_refused(photos, tmp_path):
    file = tmp_path / "some.txt"
    with pytest.raises(FileNotFoundError, match=r"some\.txt"):
        labelled_list(photos, file)
    for text, told in (
        ("2.png\nabsent_b.png\nabsent_a.png\nclass3/2.png\n", r"3 of 4 names .* the first is absent_a\.png"),
        ("\n\n", "names no image"),
        ("1.png\n", r"several folders; write folder/name, the first is 1\.png"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=told):
            labelled_list(photos, file)
    with pytest.raises(ValueError, match="in memory"):
        labelled_list(colours(4, 0), file)
