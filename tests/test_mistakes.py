"""Wrong invocations: each is answered by one clear sentence, an exit code that is not 0, and no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import noise_images
from runs import launch

from dali_views import RegionTable, SampleIndex
from dali_views.tools import cli as loader_cli
from trainers import cli as trainer_cli


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the invocations below name, right and wrong."""
    folder = tmp_path_factory.mktemp("place")
    noise_images(folder / "photos", 6)
    (folder / "empty").mkdir()
    (folder / "words.json").write_text("[1, 2]")
    (folder / "bad.parquet").write_bytes(b"PAR1 and no table")
    (folder / "weights.pt").write_bytes(b"no weights")
    other = SampleIndex.from_folder(noise_images(folder / "other", 6, seed=3), cache=False, progress=False)
    RegionTable(6, fingerprint=other.fingerprint).save(folder / "other.npz")
    RegionTable(3).save(folder / "short.npz")
    torch.save({"a": torch.zeros(2)}, folder / "state.pt")
    (folder / "config.yaml").write_text(
        f"run: {{out: {folder}/run, device: cpu, epochs: 1}}\nviews: {{size: 16}}\noptim: {{batch: 4}}\n"
        f"data: {{kind: folder, path: {folder}/photos, val_share: 0}}\nmodel: {{backbone: resnet18}}\n"
    )
    (folder / "bad.yaml").write_text("run: {out: a\n")
    (folder / "low.yaml").write_text("base: config.yaml\nviews: {size: 0}\n")
    (folder / "norun").mkdir()
    (folder / "circle").symlink_to("circle")
    return folder


CPU = ["--device", "cpu"]
LOADER = [
    ([], "TOOL"),
    (["indx", "photos"], "did you mean index?"),
    (["index"], "images"),
    (["show", "photos", "--weights", "nope.pt", *CPU], "--weights and --layer are of --model"),
    (["pack", "photos", "packed", "--quality", "5"], "give --short-side, too"),
    (["bench", "photos", "--source", "other", "--parts", "loaders", *CPU], "name it in --parts"),
    (["index", "nowhere"], "nowhere"),
    (["index", "empty"], "holds no image"),
    (["index", "photos", "other"], "Only of tar shards and of tables"),
    (["index", "photos", "--sise", "3"], "--sise"),
    (["index", "bad.parquet"], "bad.parquet"),
    (["index", "x-{0..9}.tar"], "There is no shard"),
    (["index", "{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}{0..9}.tar"], "more than 1048576"),
    (["index", "photos", "--root", "photos"], "--root is for a list, and 'photos' is taken for a folder"),
    (["index", "photos", "--coco", "words.json"], "not a COCO instances file"),
    (["check", "photos", "--batch-size", "0", *CPU], "--batch-size: 0 is less than 1"),
    (["check", "photos", "--workers", "two", *CPU], "'two' is not a whole number"),
    (["show", "photos", "--recipe", "mocov2", *CPU], "did you mean moco_v2?"),
    (["show", "photos", "--crop", "contrast", *CPU], "did you mean contrastive?"),
    (["show", "photos", "--recipe", "evaluation", "--crop", "random", *CPU], "evaluation takes no --crop"),
    (["show", "photos", "--alpha", "0.5", *CPU], "--alpha is the law of --crop contrastive"),
    (["show", "photos", "--seed", "99999999999999999999", *CPU], "--seed"),
    (["show", "photos", "--regions", "short.npz", *CPU], "has 3 rows, and there are"),
    (["show", "photos", "--regions", "other.npz", *CPU], "another data set"),
    (["show", "photos", "--regions", "state.pt", *CPU], "not a readable region table"),
    (["show", "photos", "--model", "resnet19", *CPU], "resnet19"),
    (
        ["show", "photos", "--model", "resnet18", "--weights", "weights.pt", *CPU],
        "not a state dict of resnet18",
    ),
    (["show", "photos", "--model", "resnet18", "--layer", "layer9", *CPU], "layer9"),
    (["bench", "photos", "--parts", "loader", *CPU], "did you mean loaders?"),
    (["bench", "photos", "--parts", "memory", "--batches", "1", *CPU], "--batches: 1 is less than 2"),
    (["pack", "photos", "photos"], "would lie in its source"),
    (["pack", "photos", "new", "--quality", "101"], "quality"),
    (["index", "pho\0tos"], "holds a NUL character"),
]
CCROP = ["views.crop=contrastive", "guide.name=contrastive_crop"]
OTHER = ["model.backbone=convnext_atto", "guide.layer=layer2", "localise.layer=layer2", "views.size=64"]
TRAINER = [
    ([], "COMMAND"),
    (["pretain", "config.yaml"], "did you mean pretrain?"),
    (["pretrain", "nothing.yaml"], "nothing.yaml"),
    (["pretrain", "bad.yaml"], "bad.yaml"),
    (["pretrain", "config.yaml", "optim.learning_rat=1"], "optim.learning_rat"),
    (["pretrain", "config.yaml", "optim.momentun=0.9"], "did you mean optim.momentum? (on the command line)"),
    (
        ["pretrain", "config.yaml", "optim.colour=red"],
        "optim.colour is not a known key; valid here: optim.batch",
    ),
    (["test", "config.yaml"], "there is no 'test', but pretrain"),
    (["pretrain", "config.yaml", "views.size=0"], "equal to 1, not 0 (on the command line)"),
    (["pretrain", "low.yaml", "optim.lr=1"], "equal to 1, not 0 (in low.yaml)"),
    (["pretrain", "config.yaml", "views.partner=add"], "(in config.yaml and on the command line)"),
    (["export", "norun", "encoder.pth"], "name it encoder.safetensors"),
    (["demo", "scenes", "run.evaluate_every=0"], "run.evaluate_every 0 measures nothing"),
    (["pretrain", "config.yaml", "optim.lr=fast"], "optim.lr"),
    (["pretrain", "config.yaml", "optim.lr=1e39"], "optim.lr should be less than or equal to 1"),
    (["pretrain", "config.yaml", "optim.lr=1e38", "optim.batch=1024"], "lower optim.lr"),
    (["pretrain", "config.yaml", "data.path=nowhere"], "nowhere"),
    (
        ["pretrain", "config.yaml", "optim.batch=100"],
        "6 images to train on cannot fill optim.batch 100",
    ),
    (["pretrain", "config.yaml", "model.backbone=resnet19"], "resnet19"),
    (["pretrain", "config.yaml", "method.name=simcrl"], "simcrl"),
    (["pretrain", "config.yaml", "guide.name=saliancy"], "saliancy"),
    (["pretrain", "config.yaml", *CCROP, "guide.layer=fc"], "guide.layer: features have shape (1, 512)"),
    (["pretrain", "config.yaml", *CCROP, "model.backbone=test_vit", "guide.size=90"], "does not take images"),
    (["pretrain", "config.yaml", "localise.layer=layr3"], "localise.layer: ResNet has no layer 'layr3'"),
    (["pretrain", "config.yaml", *CCROP, "guide.layer=layr3"], "are layer3"),
    (
        ["pretrain", "config.yaml", *CCROP, *OTHER],
        "set guide.layer=stages.1 localise.layer=stages.1",
    ),
    (["knn", "norun"], "norun"),
    (["linear", "weights.pt"], "weights.pt"),
    (["export", "norun", "out.safetensors", "--format", "torchvison"], "did you mean torchvision?"),
    (["compare", "config.yaml", "--seeds", "0", "--out", "compared"], "seeds"),
    (["compare", "config.yaml"], "--out"),
    (["demo", "scenes", "run.epocs=2"], "run.epochs"),
    (["demo", "scenes", "data.path=photos"], "data.path"),
    (["pretrain", "config.yaml", "run.out=''"], "run.out"),
    (["pretrain", "config.yaml", f"run.seed={2**64}"], "run.seed should be less than"),
    (["pretrain", "config.yaml", "run.threads=1000000"], "run.threads should be less than"),
    (["export", "norun", "out\0"], "holds a NUL character"),
    (["pretrain", "config.yaml", 'run.out="a\\0b"'], "run.out should hold no NUL character"),
    (["pretrain", "config.yaml", 'finetune.labels="a\\0b"'], "finetune.labels should hold no NUL character"),
    (["pretrain", "config.yaml", "run.out=bad.yaml"], "bad.yaml: File exists; choose another path"),
    (["pretrain", "config.yaml", "run.out=bad.yaml/run"], "bad.yaml/run: Not a directory; choose a path"),
    (["pretrain", "config.yaml", f"run.out={'a' * 300}"], "File name too long; choose a shorter path"),
    (["pretrain", "config.yaml", "run.out=circle"], "choose another path"),
]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of error; warnings may stand before it."""
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    (line,) = (one for one in captured.err.splitlines() if one.strip() and not one.startswith("warning: "))
    assert line.startswith("error: ")
    assert 10 < len(line) < 400
    return line


@pytest.mark.parametrize(("words", "names"), LOADER)
def test_a_mistake_with_the_loader_is_one_sentence(words, names, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert loader_cli.main(words) == 2
    assert names in told(capsys)


@pytest.mark.parametrize(("words", "names"), TRAINER)
def test_a_mistake_with_the_trainer_is_one_sentence(words, names, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert trainer_cli.main(words) == 2
    assert names in told(capsys)
    assert not (place / "run" / "last.pt").exists()


@NO_GPU
def test_a_gpu_that_is_not_there_is_named_with_the_mend(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert loader_cli.main(["show", "photos", "--device", "gpu"]) == 2
    assert "cpu" in told(capsys)
    for device in ("gpu", "cuda"):
        assert trainer_cli.main(["pretrain", "config.yaml", f"run.device={device}"]) == 2
        assert "there is no GPU" in (sentence := told(capsys))
        assert "set run.device=cpu" in sentence


def test_a_full_memory_of_the_gpu_says_what_to_lower(place, monkeypatch, capsys):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.chdir(place)
    monkeypatch.setattr(trainer_cli, "train", full)
    assert trainer_cli.main(["pretrain", "config.yaml"]) == 2
    assert "lower the batch size" in told(capsys)


_LIMITED = """
import resource, sys
from trainers import cli
used = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + (int(sys.argv[1]) << 20),) * 2)
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_too_little_address_space_is_a_sentence_whatever_fails_first(place, tmp_path):
    """Weights, a library that is loaded late, or the threads of DALI, which would end the process."""
    words = ["pretrain", str(place / "config.yaml"), f"run.out={tmp_path}", "run.threads=16"]
    for mebibytes in (30, 200, 500, 900):
        with launch(["-c", _LIMITED, str(mebibytes), *words, "run.max_steps=1", "--resume"]) as process:
            told = process.communicate()[0]
        assert process.returncode in ((2,) if mebibytes == 30 else (0, 2)), told
        assert "Traceback" not in told
        assert process.returncode == 0 or "is full; lower the batch size" in told


def test_a_full_standard_output_is_a_sentence(place):
    code = "import sys; from dali_views.tools.cli import main; sys.exit(main(['index', sys.argv[1]]))"
    command = [sys.executable, "-c", code, str(place / "photos")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    told = "error: the answer cannot be printed (No space left on device)\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_a_fault_of_ours_keeps_its_traceback(place, monkeypatch):
    def faulty(*_: object, **__: object) -> None:
        raise KeyError("of ours")

    monkeypatch.chdir(place)
    monkeypatch.setattr(trainer_cli, "train", faulty)
    with pytest.raises(KeyError, match="of ours"):
        trainer_cli.main(["pretrain", "config.yaml"])


def test_machines_get_one_line_of_json_for_an_answer_and_for_a_mistake(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert loader_cli.main(["index", "photos", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6
    assert loader_cli.main(["check", "photos", "--json", "--out", "none.txt", *CPU]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"decoded": 6, "undecodable": {}, "bad": {}, "out": "none.txt"}
    assert loader_cli.main(["index", "nowhere", "--json"]) == 2
    assert "nowhere" in json.loads(capsys.readouterr().out)["error"]
    assert trainer_cli.main(["knn", "norun", "--json"]) == 2
    assert "norun" in json.loads(capsys.readouterr().out)["error"]


def test_who_reads_no_further_is_no_error(place):
    """As `head` does."""
    code = "import sys; from dali_views.tools.cli import main; sys.exit(main(['index', sys.argv[1]]))"
    command = [sys.executable, "-c", code, str(place / "photos")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (0, b"")
