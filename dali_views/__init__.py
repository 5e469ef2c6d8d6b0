"""Views of images for self-supervised learning, decoded and cut by DALI where a model says to look.

A model in training writes a box and a weight per sample into a `RegionTable`; a `ViewLoader` reads the
table once per epoch, draws the crops and lets a DALI graph decode each image once and cut all views.
"""

from . import bad_list, recipes
from .index import SampleIndex
from .loader import Batch, ViewLoader
from .quarantine import BadImageError
from .regions import RegionTable
from .source import Source, SourceGoneError
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
