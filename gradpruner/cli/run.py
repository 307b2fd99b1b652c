"""The commands `run`, `demo` and `report`: the whole job, and its report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradpruner.cli import data_options
from gradpruner.cli import options as given
from gradpruner.cli.config_file import record_of
from gradpruner.cli.harness_options import harness, harness_options
from gradpruner.cli.recipe_options import recipe_options
from gradpruner.compare.settings_file import COMPARISON_SETTINGS


def add_run(commands: Any) -> None:
    """Add the command `run`."""
    parser = given.command(
        commands,
        "run",
        _run,
        "Do the whole job: probe, plan, cut, fine-tune, evaluate, report.",
        "gradpruner run --model meta-llama/Llama-3.2-1B --data train.jsonl --steps 1000 --ratio 0.4 --out small",
    )
    given.model_options(parser)
    data_options.add(parser, testing=True)
    given.plan_options(parser, auto=True)
    recipe_options(parser)
    given.four_bits_option(
        parser, "train adapters beside weights of 4 bits; the cut and all results are in full precision"
    )
    given.checkpoint_options(parser)
    parser.add_argument(
        "--max-lost",
        type=float,
        metavar="P",
        help="with --ratio auto: share of the dense model's score that may be lost (default 0.01)",
    )
    parser.add_argument(
        "--check-steps",
        type=int,
        metavar="N",
        help="with --ratio auto: extra training steps of each model that is tried (default: as many as the probe)",
    )
    parser.add_argument(
        "--check-rows",
        type=int,
        metavar="N",
        help="with --ratio auto: training examples held out for these trials (default: 10 %%, at most 200)",
    )
    given.probe_steps_option(parser)
    given.top_option(parser)
    parser.add_argument("--no-patch", action="store_const", const=False, dest="patch", help="do not patch the gaps")
    parser.add_argument(
        "--adapters",
        choices=("keep", "discard"),
        help="keep or discard what the probe trained (default: the preset's)",
    )
    parser.add_argument(
        "--rank-factor",
        type=int,
        metavar="N",
        help="the adapters of the pruned model have N times the --rank (default: the preset's)",
    )
    harness_options(parser)
    parser.add_argument("--no-dense", action="store_true", help="do not train the dense model for comparison")
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="folder for all results; the same command continues it"
    )


def add_demo(commands: Any) -> None:
    """Add the command `demo`."""
    parser = given.command(
        commands,
        "demo",
        _demo,
        "Do the whole job on a packaged model and data, without a hub: about ten minutes on two cores.",
        "gradpruner demo --out gradpruner-demo",
    )
    parser.add_argument("--out", default="gradpruner-demo", metavar="FOLDER", help="default: gradpruner-demo")


def add_report(commands: Any) -> None:
    """Add the command `report`."""
    parser = given.command(
        commands,
        "report",
        _report,
        "Write the report of a finished run or comparison again.",
        "gradpruner report small",
    )
    parser.add_argument("folder", help="the --out folder of run, compare or sensitivity")


def _run(options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.distributed.processes import first
    from gradpruner.presets import Preset
    from gradpruner.run.auto_ratio import AUTO, hold_out
    from gradpruner.run.command_record import record_command
    from gradpruner.run.folder import SETTINGS
    from gradpruner.run.job import Job
    from gradpruner.run.run import Run

    preset = Preset.of(
        **given.choice(options),
        top=options.top,
        patch=options.patch,
        adapters=options.adapters,
        rank_factor=options.rank_factor,
    )
    tasks = harness(options)

    def job_of(rows: Sequence[Any] | None) -> Job:
        return Job(
            **given.job(options, rows),
            **given.amount(options),
            preset=preset,
            load_in_4bit=options.load_in_4bit,
            max_lost=options.max_lost,
            check_steps=options.check_steps,
            check_rows=options.check_rows,
            harness=tasks,
        )

    job = (
        job_of(None) if options.epochs is None else None
    )  # without epochs, the settings are checked before data is read
    train_examples, test_examples = data_options.split(options)
    if job is None:
        rows = train_examples
        if options.ratio == AUTO:
            rows = hold_out(train_examples, options.check_rows, options.seed)[0]
        job = job_of(rows)
    run = Run(job, train_examples, test_examples, options.out, quiet=options.json)
    first(lambda: record_command(run.folder / SETTINGS, record_of(options)))
    return _results(run.everything(dense=not options.no_dense), options.out)


def _demo(options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.run.demo import demo

    return _results(demo(options.out, quiet=options.json), options.out)


def _results(results: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return what `run` and `demo` print of the results of a run."""
    from gradpruner.report.tables import table
    from gradpruner.run.auto_ratio import trial_rows
    from gradpruner.run.summary import comparison, notes
    from gradpruner.training.harness import harness_note, harness_rows

    auto = results.get("auto")
    rows = results["rows"]
    failed = " ".join(row["failed"] for row in rows if row.get("failed"))
    why = f"{auto['reason']}\n\n{table(trial_rows(auto))}\n\n" if auto else ""
    beside = f"\n\n{notes(rows)}" if notes(rows) else ""
    if "harness" in results:
        beside += f"\n\n{table(harness_rows(results['harness']))}\n\n{harness_note(results['harness'])}"
    line = f"{why}{table(comparison(rows))}{beside}\n\ncheckpoint: {folder}/model    report: {folder}/report.html"
    return {"json": results, "line": line, "failed": failed}


def _report(options: argparse.Namespace) -> dict[str, Any]:
    folder = Path(options.folder)
    if (folder / COMPARISON_SETTINGS).exists():
        from gradpruner.compare.outputs import rewrite

        return {**rewrite(folder), "failed": None}  # the report is written; what it says is no failure of this command
    from gradpruner.run.page import write_report

    path = write_report(folder)
    return {"json": {"report": str(path)}, "line": str(path)}
