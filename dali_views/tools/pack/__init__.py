"""A data set written anew, as tar shards or as a folder of bounded images."""

from .folder import Packed, pack
from .shards import pack_shards

__all__ = ["Packed", "pack", "pack_shards"]
