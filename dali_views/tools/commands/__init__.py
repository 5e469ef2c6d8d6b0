"""The commands of `dali-views`, one file each."""

from ..doctor import examine as doctor
from . import bench, check, index, pack, show

ALL = (index, check, show, bench, pack, doctor)
"""In the order of the help."""
