"""`python -m decompclip.cli`."""

from decompclip.cli import main

main()
