"""The command line: it turns arguments into calls of the library and has no logic of its own."""

from gradpruner.cli.main import main

__all__ = ["main"]
