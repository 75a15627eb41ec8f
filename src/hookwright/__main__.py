"""`python -m hookwright`: the command line."""

from hookwright.cli import main

main()
