"""`dali-views`."""

from .tools.cli import main

__all__ = ["main"]

if __name__ == "__main__":  # worker processes import this file too
    raise SystemExit(main())
