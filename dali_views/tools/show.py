"""dali-views show: a picture or a page of images, boxes, crops and views."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..plan import recipes
from ..plan.views import CROPS, GUIDED, View
from ..regions.table import RegionTable
from . import options
from .command_line import Answer

EXAMPLES = """
dali-views show photos --out views.png
dali-views show photos --out views.html
dali-views show photos --regions regions.safetensors --crop contrastive --out guided.png
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    options.add_images(parser)
    options.add_views(parser)
    at_least, option = options.at_least, parser.add_argument
    option("--out", type=Path, default=Path("views.png"), help="picture or page (.html) to write (views.png)")
    option("--count", type=at_least(1), default=6, help="images to show (6)")
    option("--epoch", type=int, default=0, help="epoch of the draw (0)")
    option("--crop", choices=CROPS, help="crop mode, instead of the recipe's")
    option("--alpha", type=float, help="Beta distribution of contrastive crops (0.6)")
    option("--second-crop", choices=CROPS, help="crop of the second view (as --crop)")
    option("--dilate", type=float, nargs=2, metavar="FACTOR", help="enlarge the box of views 1 and 2 (1 1)")
    option("--joint", type=float, metavar="BETA", help="JointCrop: draw the areas of views 1 and 2 together")
    option("--vflip", type=float, metavar="P", help="probability of a vertical flip (0)")
    option(
        "--rotate90", type=float, metavar="P", help="probability of a rotation by 90, 180 or 270 degrees (0)"
    )
    option("--local-crop", choices=CROPS, help="crop of local views, for the recipe dino (as --crop)")
    option("--locals", type=at_least(0), help="number of local views, for the recipe dino (8)")
    option("--local-size", type=at_least(1), help="pixels along a local view's side (96)")
    option("--regions", type=Path, metavar="TABLE", help="region table that guides the crops")
    told = "cut the second view (replace, the default), or one more (add), from the partner in --regions"
    option("--partner", nargs="?", choices=recipes.PARTNER, const="replace", default="none", help=told)
    option("--model", help="torchvision model whose heatmaps are drawn (random weights unless --weights)")
    option("--weights", type=Path, help="state dict of --model (.pt)")
    option("--layer", help="layer of --model whose heatmap is drawn (layer4)")


def run(args: argparse.Namespace) -> Answer:
    """Draws what the loader returns for a few images, evenly spread over the data set."""
    from ..loader.loader import ViewLoader
    from .page import render
    from .sample import drawings, sheet

    _check_out(args.out)
    index, views = options.open_index(args), _views(args)
    table = RegionTable.load(args.regions, index.fingerprint) if args.regions else RegionTable(len(index))
    if len(table) != len(index):
        raise ValueError(
            f"The table {args.regions} has {len(table)} rows, and there are {len(index)} images; "
            "give the table that was made with these."
        )
    rows = np.linspace(0, len(index) - 1, min(args.count, len(index))).astype(np.int64)
    partner = table.partner[rows]
    everyone = np.concatenate([rows, np.setdiff1d(partner, rows)])  # partners come last
    part, regions = index.subset(everyone), table.subset(everyone)
    regions.update(np.arange(len(rows)), partner=[everyone.tolist().index(row) for row in partner.tolist()])

    how: dict[str, Any] = {"device": options.device(args), "shuffle": False, "rank": 0, "world": 1}
    loader = ViewLoader(part, views, len(rows), regions=regions, seed=args.seed, max_bad_share=1.0, **how)
    loader.set_epoch(args.epoch)
    batch = next(iter(loader))
    maps = None
    if args.model is not None:
        shown = part.subset(batch.index.cpu().numpy())  # an unreadable image has been replaced
        whole = ViewLoader(shown, recipes.localisation(args.size), len(shown), **how)
        maps = _heatmaps(args, next(iter(whole)).views[0])
    samples = drawings(part, batch, views, regions, heatmaps=maps)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.suffix.lower() in (".html", ".htm"):
        title = f"{args.recipe} on {Path(args.images[0]).name}, epoch {args.epoch}"
        page = render(Path(__file__).with_suffix(".html"), title=title, samples=samples)
        args.out.write_text(page, encoding="utf-8")
    else:
        lines = [(f"{each.name}  {each.facts}", [*each.images, *each.views]) for each in samples]
        sheet(lines).save(args.out)
    facts = {"out": args.out, "images": len(batch), "views": len(views)}
    return Answer(facts, f"{args.out}: {len(batch)} images, {len(views)} views each")


def _check_out(path: Path) -> None:
    """Refuses a name that no picture can have before images are decoded for it."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".html", ".htm"):
        raise ValueError(f"--out {path} has no ending that is known here; use .png, .jpg, .pdf or .html.")


def _views(args: argparse.Namespace) -> list[View]:
    """The recipe with the changes that were given."""
    recipe = recipes.BY_NAME[args.recipe]
    names = (
        "crop", "alpha", "second_crop", "dilate", "joint", "vflip", "rotate90", "local_crop", "locals",
        "local_size",
    )  # fmt: skip
    changes = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.model is None and (args.weights is not None or args.layer is not None):
        raise ValueError("--weights and --layer are of --model; name one, or leave them out.")
    if args.alpha is not None and "contrastive" not in (args.crop, args.second_crop, args.local_crop):
        raise ValueError("--alpha is the law of --crop contrastive; give both, or neither.")
    if strange := recipes.not_taken(args.recipe, changes):
        option = "--" + strange[0].replace("_", "-")
        raise ValueError(f"The recipe {args.recipe} takes no {option}; leave it out or change --recipe.")
    views: list[View] = recipe(args.size, **changes)
    if args.partner != "none" and (args.regions is None or len(views) < 2):
        raise ValueError("--partner needs the --regions that name partners, and a --recipe of two views.")
    guided = [view.crop for view in views if view.crop in GUIDED]
    if args.regions is None and guided:
        told = f"without --regions there are no boxes, so {guided[0]} crops are random; give a table of boxes"
        warnings.warn(told, stacklevel=2)
    return recipes.with_partner(views, args.partner)


def _heatmaps(args: argparse.Namespace, images: Any) -> NDArray[np.float32]:
    """(B, h, w) heatmaps of whole images (B, 3, S, S) by a torchvision model."""
    import torch
    from torchvision.models import get_model

    from ..maps.heatmap import heatmaps
    from ..system.stored import alike, check

    model = get_model(args.model)
    if args.weights is not None:
        try:
            state = torch.load(args.weights, map_location="cpu", weights_only=True)
            own = alike(model.state_dict())
            model.load_state_dict(
                check(state, own, "it", f"save the state dict of a {args.model} that is trained")
            )
        except Exception as error:  # PyTorch raises errors of any kind for a file that it cannot read
            told = str(error).strip().partition("\n")[0]
            raise ValueError(f"{args.weights} is not a state dict of {args.model}: {told}") from error
    return heatmaps(model.to(images.device), images, args.layer or "layer4").cpu().numpy()
