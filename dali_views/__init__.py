"""Views of images for self-supervised learning, decoded and cropped by DALI where a model directs.

A model in training writes a box and a weight per sample into a `RegionTable`. A `ViewLoader` reads the table
once per epoch and draws the crops; a DALI graph decodes each image once and cuts all views.

data     which images there are: `SampleIndex`      regions  what a model has written: `RegionTable`
plan     which crops and colours, in NumPy           maps     from a model to heatmaps and boxes
graph    decoding and cropping, in DALI              tools    the commands
loader   batches in exact order: `ViewLoader`        system   files, ranks, the machine
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data import bad_list
    from .data.index import SampleIndex
    from .data.source import Source, SourceGoneError
    from .loader.batch import Batch
    from .loader.loader import ViewLoader
    from .loader.quarantine import BadImageError
    from .maps import boxes_from_maps, heatmaps
    from .plan import recipes
    from .plan.views import View
    from .regions import RegionTable

_HOME = {
    "BadImageError": "loader.quarantine",
    "Batch": "loader.batch",
    "RegionTable": "regions",
    "SampleIndex": "data.index",
    "Source": "data.source",
    "SourceGoneError": "data.source",
    "View": "plan.views",
    "ViewLoader": "loader.loader",
    "bad_list": "data.bad_list",
    "boxes_from_maps": "maps",
    "heatmaps": "maps",
    "recipes": "plan.recipes",
}
__all__ = [
    "BadImageError",
    "Batch",
    "RegionTable",
    "SampleIndex",
    "Source",
    "SourceGoneError",
    "View",
    "ViewLoader",
    "bad_list",
    "boxes_from_maps",
    "heatmaps",
    "recipes",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: code that only reads an index does not wait for PyTorch and DALI."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOME[name]}")
    return getattr(module, name, module)  # `recipes` and `bad_list` are modules themselves
