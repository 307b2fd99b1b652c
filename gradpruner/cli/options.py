"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradpruner.cli.data_options import DATA_HELP
from gradpruner.cli.recipe_options import recipe_of, steps_of

if TYPE_CHECKING:
    from gradpruner.model.load import Loaded


def command(commands: Any, name: str, call: Any, summary: str, example: str) -> argparse.ArgumentParser:
    """Add a command with the options that all commands have.

    Args:
        commands: the subparsers.
        name: of the command.
        call: runs it, with the parsed options.
        summary: one sentence for its help.
        example: a call, for its help.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"{DATA_HELP if '--data' in example else ''}example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(call=call, command=name, parser=parser, config_note=None)
    parser.add_argument("--json", action="store_true", help="print the result as JSON, for a program")
    return parser


def model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model is used and how it is loaded, and --config."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML or JSON file with options by their names, or the run.json of a run; options given here override it",
    )
    parser.add_argument("--model", required=True, metavar="M", help="checkpoint folder, hub id, .gguf file, or smollm2")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the loaded weights (default auto: as stored)",
    )
    parser.add_argument(
        "--attention", metavar="A", help="transformers' attn_implementation (default: transformers chooses)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def four_bits_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the option that quantises the model while it loads.

    Args:
        parser: of the command.
        what: what the command does with the model then, for the help.
    """
    parser.add_argument("--load-in-4bit", action="store_true", help=f"{what} (QLoRA, needs bitsandbytes)")


def plan_options(parser: argparse.ArgumentParser, *, auto: bool = False) -> None:
    """Add the options that say how many layers are removed, and which.

    Args:
        parser: of the command.
        auto: whether `--ratio auto` is accepted. It needs a model to try cuts on.
    """
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--ratio",
        type=_ratio if auto else _number,
        metavar="P",
        help=f"share of the layers to remove (default 0.4){', or auto: see --max-lost' if auto else ''}",
    )
    amount.add_argument("--count", type=int, metavar="N", help="how many layers to remove")
    parser.add_argument(
        "--of", choices=("layers", "parameters"), default="layers", help="what --ratio is a share of (default layers)"
    )
    preset_option(parser)
    parser.add_argument("--kind", choices=("squared", "norm", "normalized"), help="layer score (default: the preset's)")
    parser.add_argument(
        "--merge",
        type=_merge,
        metavar="N",
        help="how many of the removed layers are merged into kept ones, or auto (default: the preset's)",
    )


def preset_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that says which preset decides the settings that are not given."""
    parser.add_argument(
        "--preset",
        choices=("default", "paper"),
        default="default",
        help="settings: default did best in our trials, paper is the method as published (default: default)",
    )


def probe_steps_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that says how long the probe is."""
    parser.add_argument(
        "--probe-steps",
        type=int,
        metavar="N",
        help="optimizer steps of the probe (default: 1 %% of --steps, at least 20 and at most half)",
    )


def top_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that says how much of a weight is merged."""
    parser.add_argument(
        "--top", type=float, metavar="P", help="share of a merged weight's entries that is used (default: the preset's)"
    )


def _ratio(text: str) -> str | float:
    return text if text == "auto" else _number(text)


def _number(text: str) -> float:
    if text == "auto":
        raise argparse.ArgumentTypeError("auto tries cuts on a model and its data: gradpruner run --ratio auto")
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid number {text!r}") from None


def _merge(text: str) -> str | int:
    return text if text == "auto" else int(text)


def checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Add the option that says how often a training is saved while it runs."""
    parser.add_argument(
        "--save-steps",
        type=int,
        metavar="N",
        help="optimizer steps between two checkpoints; an interrupted training continues from the newest one "
        "(default: a tenth of all steps, at least 10)",
    )


def job(options: argparse.Namespace, examples: Sequence[Any] | None = None) -> dict[str, Any]:
    """Return the arguments of `Job` that the options of model, data and recipe give.

    Args:
        options: of the command.
        examples: what is trained on, whose rows --epochs counts. Default: --steps is given.
    """
    return {
        "source": options.model,
        "steps": options.steps if examples is None else _steps(options, examples),
        "recipe": recipe_of(options),
        "probe_steps": options.probe_steps,
        "max_length": options.max_length,
        "train_on": options.train_on,
        "too_long": options.too_long,
        "chat_template": chat_template(options),
        "dtype": options.dtype,
        "attention": options.attention,
        "trust_remote_code": options.trust_remote_code,
        "save_steps": options.save_steps,
    }


def _steps(options: argparse.Namespace, examples: Sequence[Any]) -> int:
    """Return --steps, or the steps of --epochs over the rows that examples become."""
    if options.epochs is None:
        return steps_of(options, examples)
    from gradpruner.data.tokens import tokenize
    from gradpruner.model.load import load_tokenizer

    tokenizer = load_tokenizer(
        options.model, chat_template=chat_template(options), trust_remote_code=options.trust_remote_code
    )
    rows = tokenize(
        examples, tokenizer, max_length=options.max_length, train_on=options.train_on, too_long=options.too_long
    )
    return steps_of(options, rows)


def load(options: argparse.Namespace, revision: str | None = None, *, load_in_4bit: bool = False) -> Loaded:
    """Load --model and its tokenizer.

    Args:
        options: with those of `model_options`.
        revision: the commit of a hub id. Default: the newest.
        load_in_4bit: whether its weights are quantised to 4 bits.
    """
    from gradpruner.model.load import load_model
    from gradpruner.run.job import torch_dtype

    return load_model(
        options.model,
        dtype=torch_dtype(options.dtype),
        attention=options.attention,
        chat_template=chat_template(options),
        trust_remote_code=options.trust_remote_code,
        revision=revision,
        load_in_4bit=load_in_4bit,
    )


def chat_template(options: argparse.Namespace) -> str | None:
    """Read the file of --chat-template, if it is given."""
    from pathlib import Path

    from gradpruner.errors import InvalidArgument

    file = getattr(options, "chat_template", None)  # not every command reads data
    if file is None:
        return None
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"--chat-template {file!r} cannot be read as text: {error}") from None


def amount(options: argparse.Namespace) -> dict[str, Any]:
    """Return how many layers the options of `plan_options` ask for."""
    ratio = 0.4 if options.ratio is None and options.count is None else options.ratio
    return {
        "ratio": ratio,
        "count": options.count,
        "of": options.of,
    }


def choice(options: argparse.Namespace) -> dict[str, Any]:
    """Return the preset, and the settings of `plan_options` that differ from it."""
    return {"preset": options.preset, "kind": options.kind, "merge": options.merge}
