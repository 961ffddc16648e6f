"""Lets `python -m gemma_pack` stand in for the `gemma-pack` script."""

from gemma_pack.commands import main

main()
