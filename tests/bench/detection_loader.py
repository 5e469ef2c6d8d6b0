"""Images per second and peak memory of the detection loader beside torchvision's, in one run.

python tests/bench/detection_loader.py IMAGES INSTANCES --size 800 --passes 3 --threads 2

Both give whole images with a short side of `--size` (at most 1,333 pixels long), flipped at random and
normalised, with their boxes and, if the file has them, masks. torchvision's is its reference: CocoDetection,
transforms v2 and a DataLoader with as many workers as ours has threads. Each runs in a process of its own, in
turns; both resize with antialiasing. Memory is the greatest of the process and its workers together, where
pages that they share count once, over the first pass, which no rate is taken of. A turn that takes longer
than `--limit` seconds is an error.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def ours(args: argparse.Namespace) -> Iterator[Iterator[int]]:
    from dali_views import SampleIndex
    from trainers import config as cfg
    from trainers.detect.targets import loader_to_train, targets_of
    from trainers.detect.truth import read_truth
    from trainers.engine.setting import join

    run = {"out": "-", "device": "cpu", "threads": args.threads}
    config = cfg.check({"run": run, "data": {"kind": "coco", "path": args.images}}, "")
    truth = read_truth(SampleIndex.from_folder(args.images, progress=False), [args.instances]).with_objects()
    section = cfg.Detect(size=args.size, batch=args.batch)
    loader = loader_to_train(join(config), config.views, section, truth.index, 1)
    for epoch in range(args.passes):
        loader.set_epoch(epoch)
        yield (len(targets_of(truth, batch, truth.masked)[0]) for batch in loader)


def reference(args: argparse.Namespace) -> Iterator[Iterator[int]]:
    from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
    from torchvision.transforms import v2

    steps = [
        v2.ToImage(), v2.RandomHorizontalFlip(0.5), v2.RandomShortestSize([args.size], 1333),
        v2.ToDtype(torch.float32, scale=True), v2.SanitizeBoundingBoxes(),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]  # fmt: skip
    marks = json.loads(Path(args.instances).read_text())["annotations"]
    data = CocoDetection(args.images, args.instances, transforms=v2.Compose(steps))
    boxed = {mark["image_id"] for mark in marks}
    data.ids = [row for row in data.ids if row in boxed]
    keys = ["boxes", "labels"] + ["masks"] * all(mark.get("segmentation") for mark in marks)
    loader = torch.utils.data.DataLoader(
        wrap_dataset_for_transforms_v2(data, target_keys=keys), args.batch, shuffle=True, drop_last=True,
        num_workers=args.threads, collate_fn=lambda rows: tuple(zip(*rows, strict=True)),
        persistent_workers=True, multiprocessing_context="fork", timeout=args.limit,
    )  # fmt: skip
    for _ in range(args.passes):
        yield (len(images) for images, _ in loader)


def measured(name: str, args: argparse.Namespace, answer: Any) -> None:
    """Rate of every pass after the first, and memory in bytes in the first."""
    torch.set_num_threads(1)
    rates, most = [], 0
    for images in globals()[name](args):
        began, count = time.perf_counter(), 0
        for more in images:
            count += more
            most = max(most, 0 if rates else used())
        rates.append(count / (time.perf_counter() - began))
    answer.send((rates[1:], most))


def used() -> int:
    """Bytes of memory of this process and its workers."""
    pids = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("images")
    parser.add_argument("instances")
    parser.add_argument("--size", type=int, default=800)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--limit", type=int, default=300)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[Any]] = {"ours": [], "reference": []}
    for name in list(found) * args.turns:
        here, there = context.Pipe()
        process = context.Process(target=measured, args=(name, args, there))
        process.start()
        there.close()  # so that a process that fails ends the wait for it
        answered = here.poll(args.limit)
        if answered:
            found[name].append(here.recv())
            process.join(10)
        process.kill()  # its workers end when they miss it
        if not answered:
            raise SystemExit(f"{name}: no result within {args.limit} s; raise --limit or take fewer images")
    for name, turns in found.items():
        rates = [rate for each, _ in turns for rate in each]
        told, most = ", ".join(f"{rate:.1f}" for rate in rates), max(each for _, each in turns) / 1e6
        print(f"{name}: median {statistics.median(rates):.1f} images/s ({told}); {most:.0f} MB")


if __name__ == "__main__":
    main()
