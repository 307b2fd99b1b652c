"""The parser of the command line, its log and its exit codes.

A command prints its result to standard output. Progress and errors go to standard error. The exit code is 0 if the
command is done, 2 if it was called wrongly, and 1 if anything went wrong later. This module and the modules of the
commands import nothing heavy: what a command needs is imported when it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence

from gradpruner.cli.backends import add_backends
from gradpruner.cli.compare import add_compare, add_sensitivity
from gradpruner.cli.config_file import CommandParser
from gradpruner.cli.evaluate import add_evaluate
from gradpruner.cli.hub import add_push
from gradpruner.cli.launched import call, complain, linger
from gradpruner.cli.run import add_demo, add_report, add_run
from gradpruner.cli.sparsify import add_sparsify
from gradpruner.cli.stages import add_apply, add_finetune, add_plan, add_probe
from gradpruner.distributed.launch import launched_rank, silence_others
from gradpruner.errors import GradPrunerError, InvalidArgument
from gradpruner.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    silence_others()
    try:
        options = _parsed(arguments)
        if options.config_note and not launched_rank():
            print(f"gradpruner: {options.config_note}", file=sys.stderr)
        level = logging.ERROR if launched_rank() else logging.WARNING if options.json else logging.INFO
        with logging_to_stderr(level):
            result = call(options)
    except InvalidArgument as error:
        return _fail(error, 2)
    except (GradPrunerError, OSError, MemoryError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; what is finished is kept, and the same command goes on from there", 1)
    if result is None:
        return 0
    if not launched_rank():
        print(json.dumps(result["json"], indent=2) if options.json else result["line"])
    failed = result.get("failed")  # the result is written, but it is not a success
    if failed and launched_rank():  # the first process says why
        linger()
        return 1
    return _fail(failed, 1) if failed else 0


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments. Of several processes, the first alone prints a help or an error."""
    with contextlib.ExitStack() as stack:
        if launched_rank():
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(nothing))
            stack.enter_context(contextlib.redirect_stdout(nothing))
        try:
            return build_parser().parse_args(arguments)
        except SystemExit as end:
            if launched_rank() and end.code:
                linger()
            raise


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands and their options."""
    parser = argparse.ArgumentParser(
        prog="gradpruner",
        description="Remove the decoder layers that a task does not need, chosen by the gradients of the first steps.",
        epilog="Start with: gradpruner demo    Then, on your own model and data: gradpruner run --help",
    )
    parser.add_argument("--version", action="version", version=f"gradpruner {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=CommandParser)
    for add in (
        add_run,
        add_compare,
        add_sensitivity,
        add_probe,
        add_plan,
        add_apply,
        add_sparsify,
        add_finetune,
        add_evaluate,
        add_report,
        add_push,
        add_demo,
        add_backends,
    ):
        add(commands)
    return parser


@contextlib.contextmanager
def logging_to_stderr(level: int) -> Iterator[None]:
    """Print the bare messages of the package's loggers to standard error, from `level` on."""
    logger, handler = logging.getLogger("gradpruner"), logging.StreamHandler()
    earlier = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(earlier)


def _fail(error: object, code: int) -> int:
    complain(error)
    return code
