"""`python -m trainers`."""

from .cli import main

raise SystemExit(main())
