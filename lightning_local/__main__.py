"""`python -m lightning_local`."""

from lightning_local.cli import main

main()
