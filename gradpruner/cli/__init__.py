"""The command line: arguments to calls, no logic."""

from gradpruner.cli.main import main

__all__ = ["main"]
