"""The command `evaluate`: on data, on windows of text, and on published tasks."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from gradpruner.cli import data_options
from gradpruner.cli import options as given
from gradpruner.cli.harness_options import harness, harness_options
from gradpruner.errors import InvalidArgument

if TYPE_CHECKING:
    from gradpruner.training.harness import Harness


def add_evaluate(commands: Any) -> None:
    """Add the command `evaluate`."""
    parser = given.command(
        commands,
        "evaluate",
        _evaluate,
        "Measure a checkpoint on your data (exact match, perplexity, ROUGE-L), on tasks of lm-eval, or on both.",
        "gradpruner evaluate --model tuned --data test.jsonl --tasks arc_easy,hellaswag",
    )
    given.model_options(parser)
    data_options.add(parser, testing=False, required=False)
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="examples per batch (default 16)")
    parser.add_argument(
        "--window",
        type=int,
        metavar="TOKENS",
        help="measure only perplexity: all text is joined and cut into windows of TOKENS tokens",
    )
    parser.add_argument("--rouge", type=int, metavar="TOKENS", help="generate up to TOKENS tokens, score ROUGE-L")
    harness_options(parser)


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.model.accelerator import to_accelerator

    tasks = harness(options)
    if options.data is None and tasks is None:
        raise InvalidArgument("neither --data nor --tasks is given; expected one of them, or both")
    if options.data is None and (options.window is not None or options.rouge is not None):
        raise InvalidArgument("--window and --rouge measure on --data, which is not given")
    if options.window is not None:
        _refuse_beside_window(options)
    examples = None if options.data is None else data_options.examples(options)
    model, tokenizer = given.load(options)
    to_accelerator(model)
    parts = []
    if examples is not None:
        measured = _windows if options.window is not None else _measured
        parts.append(measured(options, model, tokenizer, examples))
    if tasks is not None:
        parts.append(_tasks(options, model, tokenizer, tasks))
    return {
        "json": {name: value for part in parts for name, value in part["json"].items()},
        "line": "\n\n".join(part["line"] for part in parts),
    }


def _measured(options: argparse.Namespace, model: Any, tokenizer: Any, examples: list[Any]) -> dict[str, Any]:
    from gradpruner.run.stages import measure

    result = measure(
        model,
        tokenizer,
        examples,
        max_length=options.max_length,
        train_on=options.train_on,
        too_long=options.too_long,
        batch_size=options.batch_size,
        rouge_tokens=options.rouge,
    ).to_dict()
    shown = [f"{name} {value:.4g}" for name, value in result.items() if value is not None and name != "examples"]
    return {"json": result, "line": f"{options.model}: {', '.join(shown)} on {result['examples']} examples"}


def _tasks(options: argparse.Namespace, model: Any, tokenizer: Any, tasks: Harness) -> dict[str, Any]:
    from gradpruner.report.tables import table
    from gradpruner.training.harness import harness_note, harness_rows

    result = tasks.evaluate(model, tokenizer, batch_size=options.batch_size)
    found = {options.model: result}
    return {"json": {"harness": result}, "line": f"{table(harness_rows(found))}\n\n{harness_note(found)}"}


def _refuse_beside_window(options: argparse.Namespace) -> None:
    """Refuse options that say which rows examples become: windows are cut of all text."""
    rows = {"--train-on": options.train_on != "answer", "--too-long": options.too_long, "--rouge": options.rouge}
    given_too = [name for name, is_given in rows.items() if is_given]
    if given_too:
        raise InvalidArgument(
            f"--window takes the perplexity of all text, cut into windows; {' and '.join(given_too)} would change "
            "nothing: expected --window without them"
        )


def _windows(options: argparse.Namespace, model: Any, tokenizer: Any, examples: list[Any]) -> dict[str, Any]:
    from gradpruner.data.collator import Collator
    from gradpruner.data.text_windows import consecutive, text_of, tokens_of
    from gradpruner.run.preflight import check_rows
    from gradpruner.training.evaluate import perplexity

    rows = consecutive(tokens_of(text_of(examples, tokenizer), tokenizer, options.window), options.window)
    check_rows(model, tokenizer, rows)
    value = perplexity(model, rows, collate=Collator(tokenizer), batch_size=options.batch_size)
    return {
        "json": {"perplexity": value, "windows": len(rows), "tokens": options.window},
        "line": f"{options.model}: perplexity {value:.4g} on {len(rows)} windows of {options.window} tokens",
    }
