"""Options of the commands that score models on tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from gradpruner.errors import InvalidArgument

if TYPE_CHECKING:
    from gradpruner.training.harness import Harness

BELONGING = {  # options that say nothing without --tasks
    "tasks_folder": "--tasks-folder",
    "num_fewshot": "--num-fewshot",
    "tasks_limit": "--tasks-limit",
    "apply_chat_template": "--apply-chat-template",
}


def harness_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which tasks are scored, and how."""
    group = parser.add_argument_group("tasks of lm-evaluation-harness (pip install gradpruner[harness])")
    group.add_argument(
        "--tasks", metavar="T,T", help="names of tasks, groups or tags, with commas between: arc_easy,hellaswag"
    )
    group.add_argument("--tasks-folder", metavar="FOLDER", help="folder with task files (YAML) of your own")
    group.add_argument(
        "--num-fewshot", type=int, metavar="N", help="solved examples before each question (default: the task's)"
    )
    group.add_argument(
        "--tasks-limit", type=float, metavar="N", help="use only N examples of each task, or below 1 a share of them"
    )
    group.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="make each request a chat message by the tokenizer's template",
    )


def harness(options: argparse.Namespace) -> Harness | None:
    """Return what the options of `harness_options` ask for, None without --tasks.

    The package and the tasks are checked here, before anything is loaded.
    """
    if options.tasks is None:
        given = [name for field, name in BELONGING.items() if getattr(options, field) not in (None, False)]
        if given:
            raise InvalidArgument(f"{', '.join(given)} belongs to --tasks, which is not given")
        return None
    from gradpruner.training.harness import Harness

    harness = Harness(
        tuple(name.strip() for name in options.tasks.split(",")),
        folder=options.tasks_folder,
        num_fewshot=options.num_fewshot,
        limit=options.tasks_limit,
        apply_chat_template=options.apply_chat_template,
    )
    harness.check()
    return harness
