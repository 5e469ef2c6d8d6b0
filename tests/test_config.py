"""The configuration tree: what is accepted, what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dali_views import recipes
from trainers.cli import main
from trainers.config import (
    DINO,
    LARS,
    SCFS,
    SGD,
    Config,
    ContrastiveCrop,
    Data,
    Knn,
    Method,
    MoCo,
    Run,
    Saliency,
    SimCLR,
    Views,
    keys,
)
from trainers.config.file import ConfigError, dump, load
from trainers.data import training_views

MINIMAL = "run: {out: runs/a}\ndata: {kind: folder, path: images}\n"


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_minimal_file_gets_the_documented_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path, MINIMAL))
    assert config == Config(run=Run(out="runs/a"), data=Data(kind="folder", path="images"))
    assert isinstance(config.method, MoCo)
    assert config.method.queue == 65536
    assert isinstance(config.optim, SGD)


@pytest.mark.parametrize(
    "text",
    [
        "method: {name: moco, split_bn: 8}\noptim: {name: lars, lr: 1e-4, weight_decay: 1E-6}",
        "guide: {name: simccrop}\nviews: {crop: contrastive, scale: [0.2, 1]}\noptim: {name: adamw}",
        "run: {out: o, amp: off, max_steps: 3, compile: true}",
    ],
)
def test_dump_and_load_give_an_equal_configuration(tmp_path: Path, text: str) -> None:
    lines = text if "run:" in text else f"run: {{out: runs/ä}}\n{text}"
    config = load(write(tmp_path, f"data: {{kind: folder, path: images}}\n{lines}"))
    again = load(write(tmp_path, dump(config), "b.yaml"))
    assert again == config
    assert dump(again) == dump(config)


def test_scalars_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    for text, value in (("1e-4", 1e-4), ("1", 1.0), (".5", 0.5), ("+2.E+1", 20.0)):
        found = load(path, [f"optim.lr={text}"]).optim.lr
        assert (found, type(found)) == (value, float)
    assert load(path, ["run.amp=off"]).run.amp == "off"  # and not a bool
    assert load(path, ["run.out=2024-01-01"]).run.out == "2024-01-01"  # and not a date


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lr=1", "did you mean optim.lr"),
        ("optim.learning_rate=1", "did you mean optim.lr?"),
        ("data.num_workers=8", "did you mean run.threads?"),
        ("method.temprature=1", "did you mean method.temperature"),
        ("optm.lr=1", "did you mean optim"),
        ("run.epochs=ten", "run.epochs should be a valid integer, not 'ten'"),
        ("run.epochs=1.0", "run.epochs should be a valid integer, not 1.0"),
        ("run.compile=1", "run.compile should be a valid boolean, not 1"),
        ("run.out=7", "run.out should be a valid string, not 7"),
        ("optim.lr='0.1'", "optim.lr should be a valid number, not '0.1'"),
        ("optim.lr=-1", "optim.lr should be greater than 0, not -1"),
        ("run.device=tpu", "run.device should be 'auto', 'gpu' or 'cpu', not 'tpu'"),
        ("run=3", "run should be a section with keys, not 3"),
        ("views.scale=[0.2,2]", "views.scale should be two shares"),
        ("views.scale=[0.2]", "views.scale.1 is missing"),
        ("views.dilate=[1,0.5]", "views.dilate.1 should be greater than or equal to 1"),
        ("views.joint=11", "views.joint should be less than or equal to 10"),
        ("views.local_crop=corner", "views.local_crop should be 'random', 'contrastive', 'inside'"),
        ("method={name: simsiam, hidden_dim: 0}", "method.hidden_dim should be greater than or equal to 1"),
        ("data.instances=a.json", "data.instances is only read for data.kind coco"),
        ("guide.name=contrastive_crop", "views.crop random ignores"),
        ("method.split_bn=7", "does not divide optim.batch 256"),
        ("optim.accumulate=3", "optim.accumulate 3 does not divide optim.batch 256; choose a divisor"),
        ("optim.trust=0.1", "optim.trust is not a known key"),
        ("run.epochs", "should have the form section.key=value"),
        ("run.epochs=[1", "is not valid YAML"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(tmp_path: Path, override: str, words: str) -> None:
    path = write(tmp_path, MINIMAL)
    with pytest.raises(ConfigError) as caught:
        load(path, [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_name_is_the_default_and_what_is_missing_or_twice_is_named(tmp_path: Path) -> None:
    config = load(write(tmp_path, MINIMAL + "method: {temperature: 0.3}"), ["optim.lr=0.1"])
    assert (config.method, config.optim) == (MoCo(temperature=0.3), SGD(lr=0.1))
    with pytest.raises(ConfigError, match=r"data\.path is missing"):
        load(write(tmp_path, "run: {out: a}\ndata: {kind: folder}"))
    with pytest.raises(ConfigError, match='line 5: found duplicate key "path"'):
        load(write(tmp_path, "run: {out: a}\ndata:\n  kind: folder\n  path: a\n  path: b\n"))


def test_several_files_are_merged_in_order_and_name_the_run(tmp_path: Path) -> None:
    (tmp_path / "configs" / "small").mkdir(parents=True)
    one = write(tmp_path / "configs" / "small", "data: {kind: folder, path: a}\noptim: {lr: 0.5}", "one.yaml")
    two = write(tmp_path / "configs", "optim: {lr: 0.2, batch: 64}\n", "two.yaml")
    for files in ([one, two], f"{one}+{two}"):
        config = load(files, ["optim.batch=32"])
        assert config.optim == SGD(lr=0.2, batch=32)
        assert config.run.out == "runs/small/one-two"
    assert load(one).run.out == "runs/small/one"
    assert load([one, write(tmp_path, "run: {out: mine}")]).run.out == "mine"
    with pytest.raises(ConfigError, match="give at least one file"):
        load([])


def test_a_guides_intervals_may_be_shares_of_the_run(tmp_path: Path) -> None:
    guide = "{name: contrastive_crop, warmup: 20%, interval: 10%}"
    path = write(tmp_path, f"{MINIMAL}views: {{crop: inside}}\nguide: {guide}\n")
    for epochs, warmup, interval in ((500, 100, 50), (8, 1, 1)):
        found = load(path, [f"run.epochs={epochs}"]).guide
        assert (found.warmup, found.interval) == (warmup, interval)  # type: ignore[union-attr]
    path = write(tmp_path, f"{MINIMAL}views: {{crop: inside, partner: replace}}\n"
                 f"guide: {{name: semantic_pairs, control: label, boxes: {guide}}}\n")  # fmt: skip
    assert load(path).box_guide.interval == 10  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"guide.warmup should be a valid integer, not 'a%'"):
        load(path, ["guide={name: saliency, warmup: a%}", "views.partner=none"])


def test_a_base_is_relative_to_its_file_and_is_changed_key_by_key(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path, MINIMAL + "optim: {name: sgd, lr: 0.5, momentum: 0.8}\n", "base.yaml")
    write(tmp_path / "deep", "optim: {momentum: 0.7, batch: 8}", "other.yaml")
    for base, optim in (
        ("../base.yaml", SGD(lr=0.1, momentum=0.8)),
        ("[../base.yaml, other.yaml]", SGD(lr=0.1, momentum=0.7, batch=8)),
        ("[other.yaml, ../base.yaml]", SGD(lr=0.1, momentum=0.8, batch=8)),
    ):
        config = load(write(tmp_path / "deep", f"base: {base}\noptim: {{lr: 0.1}}\n"), ["run.epochs=7"])
        assert config.optim == optim
        assert config.run == Run(out="runs/a", epochs=7)
    with pytest.raises(ConfigError, match="should be a file name or a list of them, not 3"):
        load(write(tmp_path, "base: 3"))


def test_a_new_name_starts_its_section_afresh_whatever_the_order(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "method: {name: moco, queue: 64}\noptim: {name: sgd, momentum: 0.5}\n")
    for overrides in (["method.name=simclr", "method.bn=false"], ["method.bn=false", "method.name=simclr"]):
        assert load(path, overrides).method == SimCLR(bn=False)
    assert load(path, ["optim.name=lars"]).optim == LARS()
    assert load(path, ["method.name=moco"]).method == MoCo(queue=64)
    guide = "{name: semantic_pairs, control: label, boxes: {name: contrastive_crop, warmup: 3, interval: 4}}"
    path = write(tmp_path, f"{MINIMAL}views: {{partner: add, crop: contrastive}}\nguide: {guide}\n")
    assert load(path, ["guide.boxes.warmup=2"]).box_guide == ContrastiveCrop(warmup=2, interval=4)
    assert load(path, ["guide.boxes.name=saliency"]).box_guide == Saliency()


def test_options_of_crops_reach_the_views_and_are_enough_for_a_guide(tmp_path: Path) -> None:
    text = (
        "views: {name: dino, joint: 0, local_crop: inside, second_crop: inside, dilate: [1, 1.5], locals: 1, "
        "vflip: 0.5, rotate90: 0.75}"
    )
    views = load(write(tmp_path, f"{MINIMAL}{text}\nguide: {{name: simccrop}}")).views
    first, second, local = training_views(views)
    assert [view.crop for view in (first, second, local)] == ["random", "inside", "inside"]
    assert [view.dilate for view in (first, second, local)] == [1.0, 1.5, 1.0]
    assert [view.joint for view in (first, second, local)] == [0.0, 0.0, None]
    for name in recipes.BY_NAME:
        turned = Views(name=name, vflip=0.5, rotate90=0.75)
        if name in ("evaluation", "localisation"):
            with pytest.raises(ValueError, match=r"does not take views\.vflip, views\.rotate90"):
                training_views(turned)
        else:
            assert {(view.vflip, view.rotate90) for view in training_views(turned)} == {(0.5, 0.75)}
    with pytest.raises(ValueError, match=r"does not take views\.local_crop"):
        training_views(views.model_copy(update={"name": "byol", "locals": None}))


def test_a_missing_file_and_a_circle_of_bases_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="named as base"):
        load(write(tmp_path, "base: nowhere.yaml"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere.yaml")
    write(tmp_path, "base: b.yaml")
    write(tmp_path, "base: a.yaml", "b.yaml")
    with pytest.raises(ConfigError, match="is its own base"):
        load(tmp_path / "a.yaml")


def test_neighbours_are_as_the_methods_authors_report_them_or_as_given() -> None:
    def neighbours(method: Method, **keys: Any) -> tuple[int, float]:
        run, data = Run(out="a"), Data(kind="folder", path="b")
        return Config(run=run, data=data, method=method, knn=Knn(**keys)).neighbours

    assert neighbours(SimCLR()) == (200, 0.1)
    assert neighbours(SCFS()) == neighbours(DINO()) == (20, 0.07)
    assert neighbours(DINO(), k=10) == (10, 0.07)


def test_the_learning_rate_scales_with_the_batch_only_when_asked() -> None:
    assert SGD(lr=0.03, min_lr=0.003, batch=512).peak_lr == pytest.approx(0.06)
    assert SGD(lr=0.5, batch=512, lr_scaling=False).peak_lr == 0.5


def test_every_field_is_documented_and_nothing_can_be_changed() -> None:
    config = Config(run=Run(out="a"), data=Data(kind="folder", path="b"))
    with pytest.raises(ValueError, match="frozen"):
        config.run.epochs = 3
    for section in (Config, SimCLR, LARS, *(type(getattr(config, name)) for name in Config.model_fields)):
        for name, field in section.model_fields.items():
            assert field.description or name == "name", f"{section.__name__}.{name}"


def test_keys_are_listed_with_type_default_and_meaning_in_the_words_of_a_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = keys.listed()
    assert {key["name"].partition(".")[0] for key in found} == set(Config.model_fields)
    assert all(key["meaning"] and key["type"] for key in found)
    lars = {key["name"]: (key["type"], key["default"]) for key in keys.listed("optim.lars")}
    assert lars["optim.lr"] == ("number", "0.3")
    assert lars["optim.lr_scaling"] == ("true or false", "true")
    scfs = {key["name"]: (key["type"], key["default"]) for key in keys.listed("method.scfs")}
    assert scfs["method.losses"] == ("[final | global | search, ...]", "[final, global, search]")
    assert scfs["method.layers"] == ("[text, ...] | null", "null")
    assert main(["keys", "run"]) == 0
    assert "run.out: text = (to be given)\n    Folder for checkpoints" in capsys.readouterr().out
    for wrong, told in (("optics", "known: run, data"), ("optim.adam", "known: sgd, lars, adamw")):
        assert main(["keys", wrong]) == 2
        assert told in capsys.readouterr().err
