"""Views of images for self-supervised learning, decoded and cut by DALI where a model says to look.

A model in training writes a box and a weight per sample into a `RegionTable`; a `ViewLoader` reads the
table once per epoch, draws the crops and lets a DALI graph decode each image once and cut all views.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import bad_list, recipes
    from .index import SampleIndex
    from .loader import Batch, ViewLoader
    from .quarantine import BadImageError
    from .regions import RegionTable
    from .sources.source import Source, SourceGoneError
    from .views import View

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
    "recipes",
]

_HOME = {
    "BadImageError": "quarantine",
    "Batch": "loader",
    "RegionTable": "regions",
    "SampleIndex": "index",
    "Source": "sources.source",
    "SourceGoneError": "sources.source",
    "View": "views",
    "ViewLoader": "loader",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: to index files need not wait for PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME.get(name)
    module = import_module(f".{home or name}", __name__)
    return module if home is None else getattr(module, name)
