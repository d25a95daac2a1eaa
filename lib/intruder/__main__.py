"""`python -m intruder` is the command `intruder`."""

from .cli import main

raise SystemExit(main())
