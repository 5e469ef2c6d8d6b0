"""dali-views show: a picture or a page of images, boxes, crops and views."""

from __future__ import annotations

import argparse
import inspect
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...data.index import SampleIndex
from ...plan import recipes
from ...plan.views import CROPS, View
from ...regions.table import RegionTable
from .. import options
from ..command_line import Answer

EXAMPLES = """
dali-views show photos --out views.png
dali-views show photos --out views.html
dali-views show photos --regions regions.safetensors --crop contrastive --out guided.png
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    options.add_images(parser)
    options.add_views(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("views.png"), help="picture, or page (.html), to write (views.png)"
    )
    parser.add_argument("--count", type=options.at_least(1), default=6, help="images to show (6)")
    parser.add_argument("--epoch", type=int, default=0, help="epoch of the draw (0)")
    parser.add_argument("--crop", choices=CROPS, help="replaces how the recipe crops")
    parser.add_argument("--alpha", type=float, help="Beta law of contrastive crops (0.6)")
    parser.add_argument("--locals", type=options.at_least(0), help="local views, of the recipe dino (8)")
    parser.add_argument(
        "--local-size", type=options.at_least(1), help="pixels along a local view's side (96)"
    )
    parser.add_argument("--regions", type=Path, metavar="NPZ", help="region table that guides the crops")
    parser.add_argument(
        "--partner",
        action="store_true",
        help="cut the second view from the partner in --regions (pages only)",
    )
    parser.add_argument(
        "--model", help="torchvision model whose heatmaps are drawn (random weights unless --weights)"
    )
    parser.add_argument("--weights", type=Path, help="state dict of --model (.pt)")
    parser.add_argument("--layer", help="layer of --model to look at (layer4)")


def run(args: argparse.Namespace) -> Answer:
    """Carries it out."""
    from ...loader.loader import ViewLoader
    from .. import show, show_page

    index = options.open_index(args)
    as_page = args.out.suffix.lower() in (".html", ".htm")
    if args.partner and not (as_page and args.regions):
        raise ValueError("--partner needs the --regions that name partners, and an --out that ends in .html.")
    rows = np.linspace(0, len(index) - 1, min(args.count, len(index))).astype(np.int64)
    part, regions = _part(args, index, rows)
    recipe = recipes.BY_NAME[args.recipe]
    given = {"crop": args.crop, "alpha": args.alpha, "locals": args.locals, "local_size": args.local_size}
    changes = {name: value for name, value in given.items() if value is not None}
    if args.model is None and (args.weights is not None or args.layer is not None):
        raise ValueError("--weights and --layer are of --model; name one, or leave them out.")
    if args.alpha is not None and args.crop != "contrastive":
        raise ValueError("--alpha is the law of --crop contrastive; give both, or neither.")
    if strange := sorted(changes.keys() - inspect.signature(recipe).parameters.keys()):
        option = "--" + strange[0].replace("_", "-")
        raise ValueError(
            f"The recipe {args.recipe} takes no {option}; leave it out, or choose another --recipe."
        )
    views: list[View] = recipe(args.size, **changes)
    if args.partner:
        if len(views) < 2:
            raise ValueError(f"The recipe {args.recipe} has no second view to cut from the partner.")
        views[1] = replace(views[1], source="partner")
    loader = ViewLoader(
        part,
        views,
        len(rows),  # partners come after them
        regions=regions,
        device=options.device(args),
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
    if as_page:
        title = f"{args.recipe} on {os.path.basename(args.images[0].rstrip('/'))}, epoch {args.epoch}"
        html = show_page.page(part, batch, views, regions, title=title, heatmaps=heatmaps)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(html, encoding="utf-8")
    else:
        show.save(show.grid(part, batch, heatmaps=heatmaps), args.out)
    facts = {"out": args.out, "images": len(batch), "views": len(views)}
    return Answer(facts, f"{args.out}: {len(batch)} images, {len(views)} views each")


def _part(
    args: argparse.Namespace, index: SampleIndex, rows: NDArray[np.int64]
) -> tuple[SampleIndex, RegionTable]:
    """The images to show with their rows of the table; with --partner, their partners behind them."""
    if args.regions is None:
        return index.subset(rows), RegionTable(len(rows))
    table = RegionTable.load(args.regions, index.fingerprint)
    if len(table) != len(index):
        raise ValueError(
            f"The table {args.regions} has {len(table)} rows, and there are {len(index)} images; "
            "give the table that was made with these."
        )
    if not args.partner:
        return index.subset(rows), table.subset(rows)
    partner = table.partner[rows]
    everyone = np.concatenate([rows, np.setdiff1d(partner, rows)])
    regions = table.subset(everyone)
    places = {row: place for place, row in enumerate(everyone.tolist())}
    regions.update(np.arange(len(rows)), partner=[places[row] for row in partner.tolist()])
    return index.subset(everyone), regions


def _heatmaps(args: argparse.Namespace, index: SampleIndex) -> NDArray[np.float32]:
    """(B, h, w) heatmaps of the whole images by a torchvision model."""
    import torch
    from torchvision.models import get_model

    from ...loader.loader import ViewLoader
    from ...maps.heatmap import heatmaps

    model = get_model(args.model)
    if args.weights is not None:
        try:
            model.load_state_dict(torch.load(args.weights, map_location="cpu", weights_only=True))
        except Exception as error:  # PyTorch raises errors of any kind about what it cannot make sense of
            told = str(error).strip().partition("\n")[0]
            raise ValueError(f"{args.weights} is no state dict of {args.model}: {told}") from error
    whole = recipes.localisation(args.size)
    loader = ViewLoader(index, whole, len(index), device=options.device(args), shuffle=False, rank=0, world=1)
    (batch,) = list(loader)
    return heatmaps(model.to(loader.device), batch.views[0], args.layer or "layer4").cpu().numpy()
