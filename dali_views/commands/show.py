"""dali-views show: a picture of images, boxes, crops and views."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import recipes
from ..command_line import Answer
from ..index import SampleIndex
from ..regions import RegionTable
from ..views import CROPS, View
from . import common

EXAMPLES = """
dali-views show photos --out views.png
dali-views show photos --regions run/regions.npz --crop contrastive --out guided.png
"""


def add(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "show",
        parents=[common.images(), common.views(), common.options()],
        examples=EXAMPLES,
        help="draw images, boxes, crops and views into a PNG",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--out", type=Path, default=Path("views.png"), help="picture to write (views.png)")
    parser.add_argument("--count", type=common.at_least(1), default=6, help="images to show (6)")
    parser.add_argument("--epoch", type=int, default=0, help="epoch whose draw is shown (0)")
    parser.add_argument("--crop", choices=CROPS, help="replaces how the recipe crops")
    parser.add_argument("--alpha", type=float, default=0.6, help="Beta law of contrastive crops (0.6)")
    parser.add_argument("--regions", type=Path, metavar="NPZ", help="region table that guides the crops")
    parser.add_argument(
        "--model", help="torchvision model whose heatmaps are drawn (random weights unless --weights)"
    )
    parser.add_argument("--weights", type=Path, help="state dict of --model (.pt)")
    parser.add_argument("--layer", default="layer4", help="layer of --model to look at (layer4)")


def run(args: argparse.Namespace) -> Answer:
    """Carries it out."""
    from .. import show
    from ..loader import ViewLoader

    index = common.open_index(args)
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
        device=common.device(args),
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
    facts = {"out": args.out, "images": len(part), "views": len(views)}
    return Answer(facts, f"{args.out}: {len(part)} images, {len(views)} views each")


def _heatmaps(args: argparse.Namespace, index: SampleIndex) -> NDArray[np.float32]:
    """(B, h, w) heatmaps of the whole images by a torchvision model."""
    import torch
    from torchvision.models import get_model

    from ..loader import ViewLoader
    from ..saliency import heatmaps

    model = get_model(args.model)
    if args.weights is not None:
        try:
            model.load_state_dict(torch.load(args.weights, map_location="cpu", weights_only=True))
        except Exception as error:  # PyTorch raises errors of any kind about what it cannot make sense of
            told = str(error).strip().partition("\n")[0]
            raise ValueError(f"{args.weights} is no state dict of {args.model}: {told}") from error
    whole = recipes.localisation(args.size)
    loader = ViewLoader(index, whole, len(index), device=common.device(args), shuffle=False, rank=0, world=1)
    (batch,) = list(loader)
    return heatmaps(model.to(loader.device), batch.views[0], args.layer).cpu().numpy()
