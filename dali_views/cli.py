"""The command line of the loader.

dali-views index photos
dali-views index data/train-*.parquet --label fine_label
dali-views check photos --out bad.txt
dali-views show photos --out views.png
dali-views show photos --regions run/regions.npz --crop contrastive --out guided.png
dali-views bench photos
dali-views bench photos --source shards/*.tar photos.parquet
dali-views pack photos shards
dali-views pack photos photos-256 --folder --short-side 256
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import bad_list, recipes
from .index import SampleIndex
from .open_images import open_images
from .regions import RegionTable
from .views import CROPS, View

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0, 1 if `check` found bad files, or 2 with one sentence for a mistake."""
    args = _parser().parse_args(arguments)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        return int(args.run(args) or 0)
    except (ValueError, OSError, RuntimeError) as error:
        # RuntimeError is what DALI and torch raise for a missing GPU, a full memory, a broken file.
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dali-views", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument(
        "images",
        nargs="+",
        help="folder of images, text file that lists them, tar shards, Parquet or Arrow tables, or LMDB; "
        "all but tables and LMDB also as a URL (s3://, gs://)",
    )
    data.add_argument(
        "--coco", type=Path, metavar="JSON", help="instances file with true boxes for the folder"
    )
    data.add_argument(
        "--root", type=Path, metavar="DIR", help="where a list's paths start (default: its own folder)"
    )
    data.add_argument("--image", metavar="COLUMN", help="column of a table that holds the images")
    data.add_argument("--label", metavar="COLUMN", help="column of a table that holds the labels")
    data.add_argument(
        "--leave-out", type=Path, metavar="LIST", help="files not to use, as `check` and a run list them"
    )
    views = argparse.ArgumentParser(add_help=False)
    views.add_argument(
        "--recipe", default="moco_v2", choices=sorted(recipes.BY_NAME), help="set of views (moco_v2)"
    )
    views.add_argument("--size", type=int, default=224, help="side of a (global) view in pixels (224)")
    views.add_argument("--device", choices=["gpu", "cpu"], help="default: gpu if there is one")
    views.add_argument("--seed", type=int, default=0)

    index = commands.add_parser(
        "index", parents=[data], help="scan images, say what is left out and why, and cache the result"
    )
    index.set_defaults(run=_index)
    check = commands.add_parser(
        "check", parents=[data], help="decode every image and list those that cannot be used"
    )
    check.set_defaults(run=_check)
    check.add_argument("--out", type=Path, default=Path("bad.txt"), help="list to write (bad.txt)")
    check.add_argument(
        "--device", choices=["gpu", "cpu"], help="whose decoder to ask; default: gpu if there is one"
    )
    check.add_argument("--batch-size", type=int, default=64, help="images decoded at a time (64)")
    check.add_argument("--workers", type=int, help="CPU threads (default: all cores)")
    show = commands.add_parser(
        "show", parents=[data, views], help="draw images, boxes, crops and views into a PNG"
    )
    show.set_defaults(run=_show)
    show.add_argument("--out", type=Path, default=Path("views.png"), help="picture to write (views.png)")
    show.add_argument("--count", type=int, default=6, help="images to show (6)")
    show.add_argument("--epoch", type=int, default=0, help="epoch whose draw is shown (0)")
    show.add_argument("--crop", choices=CROPS, help="replaces how the recipe crops")
    show.add_argument("--alpha", type=float, default=0.6, help="Beta law of contrastive crops (0.6)")
    show.add_argument("--regions", type=Path, metavar="NPZ", help="region table that guides the crops")
    show.add_argument(
        "--model", help="torchvision model whose heatmaps are drawn (random weights unless --weights)"
    )
    show.add_argument("--weights", type=Path, help="state dict of --model (.pt)")
    show.add_argument("--layer", default="layer4", help="layer of --model to look at (layer4)")
    bench = commands.add_parser(
        "bench",
        parents=[data, views],
        help="speed beside the limits and other loaders, cost in training, memory",
    )
    bench.set_defaults(run=_bench)
    bench.add_argument(
        "--parts",
        nargs="+",
        choices=["loaders", "training", "memory", "decoder", "sources"],
        help="what to measure (loaders; with --source: sources)",
    )
    bench.add_argument(
        "--source",
        nargs="+",
        action="append",
        default=[],
        metavar="IMAGES",
        help="the same images in another place, to be measured beside; may be given several times",
    )
    bench.add_argument("--batch-size", type=int, help="default: 256 on a GPU, 64 on the CPU")
    bench.add_argument(
        "--workers", type=int, help="DataLoader processes and graph threads (default: all cores)"
    )
    bench.add_argument("--rounds", type=int, default=3, help="turns that each loader takes (3)")
    bench.add_argument("--seconds", type=float, default=10.0, help="length of a turn (10)")
    bench.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="loaders to keep, by part of name"
    )
    bench.add_argument("--models", nargs="+", default=["resnet18", "resnet50"], help="what to train")
    bench.add_argument("--batches", type=int, default=10_000, help="how long memory is watched (10000)")
    bench.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[], metavar="B", help="whose peak memory is taken"
    )
    bench.add_argument("--cold", action="store_true", help="empty the page cache before every turn")
    bench.add_argument(
        "--hw-decoder-load", type=float, default=0.65, help="share of JPEGs for the hardware decoder (0.65)"
    )
    bench.add_argument("--csv", type=Path, help="write the results here too")
    pack = commands.add_parser(
        "pack",
        parents=[data],
        help="copy a data set to tar shards or, shrunk, to a folder; both may be resumed",
    )
    pack.set_defaults(run=_pack)
    pack.add_argument("destination", type=Path, help="new folder, or one to go on with after an interruption")
    pack.add_argument(
        "--short-side",
        type=int,
        metavar="N",
        help="larger images are shrunk to it, in pixels (shards: all stay as they are; --folder: 256)",
    )
    pack.add_argument("--quality", type=int, default=90, help="JPEG quality of re-encoded images (90)")
    pack.add_argument(
        "--per-shard",
        type=int,
        metavar="COUNT",
        help="images in a shard, counted before any is left out or shrunk (10000: of ImageNet's about 1 GB)",
    )
    pack.add_argument(
        "--numbers", action="store_true", help="labels in shards are numbers, never names of classes"
    )
    pack.add_argument("--folder", action="store_true", help="write a folder of JPEGs instead of tar shards")
    pack.add_argument("--workers", type=int, help="threads (default: all cores)")
    return parser


def _open(args: argparse.Namespace) -> SampleIndex:
    index = open_images(args.images, args.coco, args.root, args.image, args.label)
    return index if args.leave_out is None else index.without(args.leave_out)


def _device(args: argparse.Namespace) -> str:
    import torch

    return str(args.device or ("gpu" if torch.cuda.is_available() else "cpu"))


def _index(args: argparse.Namespace) -> None:
    index = _open(args)
    print(index.summary())
    print(f"fingerprint {index.fingerprint[:16]}")


def _check(args: argparse.Namespace) -> int:
    from .check import check

    index = _open(args)
    print(index.summary())
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is a number of images, at least 1; got {args.batch_size}.")
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers is a number of threads, at least 1; got {args.workers}.")
    refused = check(index, device=_device(args), batch_size=args.batch_size, threads=args.workers)
    for path, reason in refused.items():
        print(f"  {path}: {reason}")
    bad = {os.path.join(index.root, path): reason for path, reason in index.left_out} | refused
    for row in range(len(index)):  # what is left out because it is listed twice is good nevertheless
        if (path := index.path(row)) not in refused:
            bad.pop(path, None)
    print(
        f"{len(index) - len(refused)} images decoded, {len(refused)} not, "
        f"{len(index.left_out)} left out before"
    )
    bad_list.save(args.out, bad)
    print(f"{args.out}: the {len(bad)} that cannot be used, for --leave-out and data.leave_out")
    return int(bool(bad))


def _show(args: argparse.Namespace) -> None:
    from . import show
    from .loader import ViewLoader

    index = _open(args)
    if args.count < 1:
        raise ValueError(f"--count is a number of images, at least 1; got {args.count}.")
    rows = np.linspace(0, len(index) - 1, min(args.count, len(index))).astype(np.int64)
    part = index.subset(rows)
    regions = RegionTable(len(part))
    if args.regions is not None:
        regions = RegionTable.load(args.regions, index.fingerprint).subset(rows)
    # Other crops are chosen by the recipe alone.
    changes = {} if args.crop is None else {"crop": args.crop, "alpha": args.alpha}
    views: list[View] = recipes.BY_NAME[args.recipe](args.size, **changes)
    loader = ViewLoader(
        part,
        views,
        len(part),
        regions=regions,
        device=_device(args),
        seed=args.seed,
        shuffle=False,
        rank=0,
        world=1,
        max_bad_share=1.0,
    )
    loader.set_epoch(args.epoch)
    batch = next(iter(loader))
    # Of the images that the loader has shown: one that cannot be read is replaced.
    shown = part.subset(batch.index.cpu().numpy())
    heatmaps = None if args.model is None else _heatmaps(args, shown)
    show.save(show.grid(part, batch, heatmaps=heatmaps), args.out)
    print(f"{args.out}: {len(part)} images, {len(views)} views each")


def _heatmaps(args: argparse.Namespace, index: SampleIndex) -> NDArray[np.float32]:
    """(B, h, w) heatmaps of the whole images by a torchvision model."""
    import torch
    from torchvision.models import get_model

    from .loader import ViewLoader
    from .saliency import heatmaps

    model = get_model(args.model)
    if args.weights is not None:
        try:
            model.load_state_dict(torch.load(args.weights, map_location="cpu", weights_only=True))
        except Exception as error:  # PyTorch raises errors of any kind about what it cannot make sense of
            told = str(error).strip().partition("\n")[0]
            raise ValueError(f"{args.weights} is no state dict of {args.model}: {told}") from error
    whole = recipes.localisation(args.size)
    loader = ViewLoader(index, whole, len(index), device=_device(args), shuffle=False, rank=0, world=1)
    (batch,) = list(loader)
    return heatmaps(model.to(loader.device), batch.views[0], args.layer).cpu().numpy()


def _bench(args: argparse.Namespace) -> None:
    from . import bench
    from .pipeline import default_threads

    index = _open(args)
    print(index.summary())
    batch_size = args.batch_size if args.batch_size is not None else {"gpu": 256}.get(_device(args), 64)
    rows = bench.run(
        index,
        recipes.BY_NAME[args.recipe](args.size),
        parts=args.parts or (["sources"] if args.source else ["loaders"]),
        elsewhere={os.path.basename(where[0].rstrip("/")): open_images(where) for where in args.source},
        batch_size=batch_size,
        device=_device(args),
        workers=args.workers or default_threads(),
        rounds=args.rounds,
        seconds=args.seconds,
        only=args.only,
        models=args.models,
        batches=args.batches,
        batch_sizes=args.batch_sizes,
        cold=args.cold,
        hw_decoder_load=args.hw_decoder_load,
        recipe=args.recipe,
    )
    setting = rows[0].setting
    print(f"{setting['machine']}\n{args.recipe}, {args.size} pixels, batch {batch_size}, ", end="")
    print(f"{setting['workers']} workers, {setting['cache']} cache\n\n{bench.table(rows)}")
    if args.csv is not None:
        bench.write_csv(rows, args.csv)
        print(f"written to {args.csv}")


def _pack(args: argparse.Namespace) -> None:
    from .pack import pack
    from .pack_shards import pack_shards

    index = _open(args)
    options = {"short_side": args.short_side, "per_shard": args.per_shard}
    options = {name: value for name, value in options.items() if value is not None}
    options |= {"quality": args.quality, "workers": args.workers}
    if not args.folder:
        if args.coco is not None:
            warnings.warn("Shards hold labels, but no boxes; a copy with --folder has both.", stacklevel=1)
        packed = pack_shards(index, args.destination, numbers=args.numbers, **options)
    elif args.per_shard is not None or args.numbers:
        raise ValueError("--per-shard and --numbers are of shards; leave them out with --folder.")
    else:
        packed = pack(index, args.destination, instances=args.coco, **options)
    print(f"{args.destination}: {packed}")
    if packed.left_out:
        path, reason = next(iter(packed.left_out.items()))
        print(f"left out, for example: {path}: {reason}; all are in {args.destination / 'left_out.txt'}")
