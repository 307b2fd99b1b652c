"""Run a command in all processes of a launch. The first process speaks for all."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from typing import Any

from gradpruner.distributed.launch import (
    join,
    launched,
    launched_rank,
    leaving,
    refuse_mpi,
    refuse_unknown_engines,
    said_by_first,
)

LINGER = 10.0  # seconds that a process which fails silently waits for the launcher to end it
TOGETHER = ("run", "demo", "probe", "finetune", "evaluate", "compare", "sensitivity")

logger = logging.getLogger(__name__)


def call(options: argparse.Namespace) -> dict[str, Any] | None:
    """Do a command, in all processes together where it can be shared, else in the first alone.

    Args:
        options: the parsed options, with `command` and `call`.

    Returns:
        The result of the command. None in a process that has nothing to do.
    """
    if options.command not in TOGETHER:
        if launched_rank():
            return None
        if launched() > 1:
            logger.info(f"{options.command} works in one of the {launched()} processes; the others have nothing to do")
        result: dict[str, Any] = options.call(options)
        return result
    refuse_mpi()
    refuse_unknown_engines()
    join()
    with leaving():
        result = options.call(options)
    return result


def complain(error: object) -> None:
    """Print an error to standard error, once for all processes.

    Args:
        error: an exception, or a sentence.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if said_by_first(text):
        linger()
        return
    which = f" (process {launched_rank()} of {launched()})" if launched_rank() else ""
    print(f"gradpruner{which}: {text}", file=sys.stderr, flush=True)


def linger() -> None:
    """Wait a little before a silent end.

    The launcher ends all processes as soon as one has ended with an error, and the first one may not have spoken yet.
    """
    time.sleep(LINGER)
