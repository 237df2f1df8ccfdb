"""`python -m convtool`."""

from convtool.cli import main

main()
