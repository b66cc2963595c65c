"""`python -m hbi`."""

from hbi.cli import main

main()
