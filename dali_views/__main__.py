"""`python -m dali_views`."""

from .cli import main

raise SystemExit(main())
