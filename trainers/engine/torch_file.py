"""Files that torch.save wrote, read without executing anything in them; what is wrong is told in one line."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from dali_views.system.archive import verify

__all__ = ["read"]


def read(path: Path, map_location: str | torch.device = "cpu", old: bool = False) -> Any:
    """Tensors, dicts, lists, tuples, text and numbers of a file, every byte held against its checksum first.

    Args:
        old: also read what PyTorch wrote before version 1.6, which is no archive and has no checksums.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, or holds something else.
    """
    with open(path, "rb"):
        pass  # a file that one may not or cannot open is not a damaged one
    try:
        if not old or is_zipfile(path):
            verify(path)
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:  # its own words advise to execute what is in the file
        raise ValueError("it is damaged or holds more than tensors, lists, dicts, text and numbers") from None
    except Exception as error:  # PyTorch raises errors of any kind about what it cannot make sense of
        raise ValueError(str(error).strip().partition("\n")[0] or type(error).__name__) from error
