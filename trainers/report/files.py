"""What the files in a run's folder are called, beside its checkpoints (`checkpoint`)."""

from __future__ import annotations

__all__ = ["CONFIG", "EVALUATIONS", "HISTORY", "INDEX", "METRICS", "PAGE", "PICTURES", "QUARANTINE"]

CONFIG = "config.yaml"
"""The resolved configuration."""
METRICS = "metrics.jsonl"
"""A line for every reading of the loss, every evaluation in training and every pass of the guide."""
EVALUATIONS = "evaluations.jsonl"
"""A line for every evaluation by a command afterwards."""
PICTURES = "pictures"
"""Folder with the views of every evaluation in training."""
QUARANTINE = "quarantine.txt"
"""Images that could not be read, as `SampleIndex.without` takes them."""
INDEX = "index.safetensors"
"""The images that the run was begun with."""
HISTORY = "history"
"""Folder of what the page needs beside the metrics, see `run_history`."""
PAGE = "report.html"
"""The page about the run."""
