"""`python -m decompclip.cli`."""

from __future__ import annotations

from decompclip.cli import main

main()
