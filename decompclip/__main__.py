"""`python -m decompclip`, for `torchrun -m decompclip` too."""

from __future__ import annotations

from decompclip.cli import main

main()
