"""`dali-views doctor`: what this machine can do, and what to change, before a run finds out."""

from .examine import EXAMPLES, add, run

__all__ = ["EXAMPLES", "add", "run"]
