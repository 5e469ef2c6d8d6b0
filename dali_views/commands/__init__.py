"""The commands of `dali-views`, one file each."""

from . import bench, check, index, pack, show

ALL = (index, check, show, bench, pack)
"""In the order of the help."""
