"""The command line. It turns arguments into calls and has no logic of its own."""

from gradpruner.cli.main import main

__all__ = ["main"]
