"""The commands of README and pages, in their order as a new user gives them, on small images and networks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import noise_images

from dali_views.tools import cli as loader_cli
from dali_views.tools.scenes import make_scenes
from trainers import cli as trainer_cli

ROOT = Path(__file__).resolve().parents[1]
# What makes a recipe of a hundred epochs on ImageNet end in seconds; nothing else is changed.
SMALL = ["model.backbone=resnet18", "views.size=32", "run.device=cpu"]
TRAINED = [*SMALL, "run.epochs=2", "optim.batch=8", "optim.warmup_epochs=0", "method.queue=16",
           "guide.warmup=1", "guide.interval=1"]  # fmt: skip
LEARNED = ["{}.epochs=1", "{}.batch=8"]
CHEAP = {
    "pretrain": TRAINED,
    "configs/cpu.yaml": [*SMALL[2:], "run.epochs=2", "optim.batch=8"],
    "knn": SMALL[2:],
    "localise": SMALL[2:],
    "linear": [*SMALL[2:], *(word.format("probe") for word in LEARNED)],
    "finetune": [*SMALL[2:], *(word.format("finetune") for word in LEARNED), "finetune.labels=0.5"],
    "doctor": ["--timeout", "120"],
    "check": ["--device", "cpu"],
    "show": ["--device", "cpu"],
}


PROGRAMS = ("dali-views ", "python -m trainers ", "torchrun ")


def commands() -> list[str]:
    """Indented lines that call a program of the environment, with what continues them."""
    pages = ("README.md", "docs/pretrain.md", "docs/sources.md")
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\\\n", " ")
    labelled = re.search(r'LABELLED="([^"]*)"', text)
    assert labelled is not None
    lines = [line.strip().replace("$LABELLED", labelled[1]) for line in text.splitlines()]
    given = [line for line in lines if line.startswith(PROGRAMS)]
    # A page repeats a command of the README.
    return list({tuple(shlex.split(line, comments=True)): line for line in given}.values())


def shortened(line: str) -> list[str]:
    """A command's words, and those that make it end in seconds: later words win."""
    program, *words = shlex.split(line, comments=True)
    command = words[0] if program == "dali-views" else words[words.index("trainers") + 1]
    command = next((word for word in words if word in CHEAP and word.endswith(".yaml")), command)
    return [program, *("2" if word == "8" else word for word in words), *CHEAP.get(command, [])]


def lay_out(folder: Path) -> None:
    """The images that the commands speak of."""
    images = noise_images(folder / "photos", 24)
    for part in ("train", "val"):
        for kind in ("ant", "bee"):
            noise_images(folder / "labelled" / part / kind, 8, seed=len(part + kind))
    (folder / "imagenet").symlink_to("labelled")
    scenes, instances = make_scenes(folder / "scenes", 16, size=48)
    (folder / "coco" / "annotations").mkdir(parents=True)
    scenes.rename(folder / "coco" / "train2017")
    instances.rename(folder / "coco" / "annotations" / "instances_train2017.json")
    (folder / "boxes.txt").write_text("".join(f"{file.name} 2 2 20 20\n" for file in images.iterdir()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_command_of_the_readme_does_what_it_says(tmp_path, monkeypatch, capsys):
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = commands()
    for line in given:
        program, *words = shortened(line)
        if program == "torchrun":  # one process will do
            words = words[words.index("-m") :]
        if program == "dali-views":
            monkeypatch.setattr("sys.argv", [program, *words])
            main, arguments = loader_cli.main, (None,)
        else:
            assert words[:2] == ["-m", "trainers"], line
            main, arguments = trainer_cli.main, (words[2:],)
        assert main(*arguments) == 0, f"{line}: {capsys.readouterr().err}"
    assert len(given) >= 20
    made = ["views.html", "bad.txt", "runs/photos/report.html", "encoder.safetensors"]
    made += ["runs/cpu/report.html", "imagenet-encoder.safetensors", "coco-encoder.safetensors"]
    made += ["shards/shard-000000.tar", "shards-256/shard-000000.tar"]
    assert [name for name in made if not (tmp_path / name).is_file()] == []
