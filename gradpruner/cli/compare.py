"""The commands `compare` and `sensitivity`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from gradpruner.cli import data_options
from gradpruner.cli import options as given
from gradpruner.cli.config_file import record_of
from gradpruner.cli.harness_options import harness, harness_options
from gradpruner.cli.recipe_options import recipe_options
from gradpruner.compare.sensitivity_factors import FACTORS
from gradpruner.compare.settings_file import HELD_OUT
from gradpruner.methods.names import METHOD_NAMES


def add_compare(commands: Any) -> None:
    """Add the command `compare`."""
    parser = given.command(
        commands,
        "compare",
        _compare,
        "Compare methods on your model and data, all with the same number of steps.",
        "gradpruner compare --model M --data train.jsonl --steps 250 --ratios 0.2 0.4 --seeds 0 1 2 --out comparison",
    )
    _options(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[name for name in METHOD_NAMES if name != "sparse"],
        metavar="M",
        help="name or name:option=value,... (default: all but sparse, which also zeroes single weights)",
    )
    parser.add_argument(
        "--ratios",
        nargs="+",
        type=float,
        default=[0.4],
        metavar="P",
        help="shares of the layers to remove (default 0.4)",
    )
    harness_options(parser)
    parser.add_argument("--no-costs", action="store_true", help="do not measure time and memory at the end")


def add_sensitivity(commands: Any) -> None:
    """Add the command `sensitivity`."""
    parser = given.command(
        commands,
        "sensitivity",
        _sensitivity,
        "Change one setting of the default method at a time, and compare.",
        "gradpruner sensitivity --model M --data train.jsonl --steps 250 --out sensitivity",
    )
    _options(parser)
    for factor, (option, _, values) in FACTORS.items():
        parser.add_argument(
            f"--{option.replace('_', '-')}-values",
            nargs="*",
            default=list(values),
            metavar="V",
            help=f"values of: {factor} (default: {' '.join(map(str, values))}; without a value: skipped)",
        )
    parser.add_argument(
        "--ratio", type=float, default=0.4, metavar="P", help="share of the layers to remove (default 0.4)"
    )


def _options(parser: argparse.ArgumentParser) -> None:
    given.model_options(parser)
    data_options.add(parser, testing=True)
    recipe_options(parser)
    given.checkpoint_options(parser)
    given.probe_steps_option(parser)
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0],
        metavar="N",
        help="seeds of data order and adapters, used in place of --seed (default 0)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="models trained at a time, each on a GPU of its own or on its share of the CPU cores (default 1)",
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="folder for all results; the same command continues it"
    )


def _trained_on(examples: Sequence[Any]) -> Sequence[Any]:
    """Return the examples that a comparison trains on."""
    from gradpruner.compare.terms import held_out_of

    return held_out_of(examples, HELD_OUT)[1]


def _sensitivity(options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.compare.experiment import SETTINGS, Compare
    from gradpruner.compare.outputs import write
    from gradpruner.compare.processes import work_in_processes
    from gradpruner.compare.sensitivity import variants
    from gradpruner.distributed.processes import first
    from gradpruner.run.command_record import record_command
    from gradpruner.run.job import Job

    train_examples, test_examples = data_options.split(options)
    job = Job(**given.job(options, _trained_on(train_examples)))
    factors = {factor: getattr(options, f"{option}_values") for factor, (option, _, _) in FACTORS.items()}
    rows = variants(factors, {"probe_steps": job.probing, "rank": job.recipe.rank, "share": 1.0})
    comparison = Compare(
        job,
        train_examples,
        test_examples,
        options.out,
        ratios=[options.ratio],
        seeds=options.seeds,
        methods=list(dict.fromkeys(row["method"] for row in rows)),
    )
    first(lambda: record_command(comparison.folder / SETTINGS, record_of(options)))
    work_in_processes(comparison, options.processes)
    return write(comparison, costs=False, sensitivity=rows)


def _compare(options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.compare.experiment import SETTINGS, Compare
    from gradpruner.compare.outputs import write
    from gradpruner.compare.processes import work_in_processes
    from gradpruner.distributed.processes import first
    from gradpruner.run.command_record import record_command
    from gradpruner.run.job import Job

    tasks = harness(options)
    train_examples, test_examples = data_options.split(options)
    comparison = Compare(
        Job(**given.job(options, _trained_on(train_examples)), harness=tasks),
        train_examples,
        test_examples,
        options.out,
        methods=options.methods,
        ratios=options.ratios,
        seeds=options.seeds,
    )
    first(lambda: record_command(comparison.folder / SETTINGS, record_of(options)))
    work_in_processes(comparison, options.processes)
    return write(comparison, costs=not options.no_costs)
