"""`python -m lmexp`."""

from lmexp.cli import main

main()
