"""Regions: what a model has said about each sample. K boxes per sample are its regions.

table     `RegionTable`: one row per sample, written by a model in training
rows      the columns of a table, their first values, and the checks of what is written
snapshot  `Snapshot`: a table frozen for an epoch; the checks of a stored table
sync      how changed rows travel between ranks
queue     updates that are still being copied from a GPU
"""

from .snapshot import Snapshot
from .table import RegionTable

__all__ = ["RegionTable", "Snapshot"]
