"""Options that say which data is read, and how; and the examples that they stand for."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradpruner.data.formats import FORMATS
from gradpruner.data.reading import TEXT_ROWS

DATA_HELP = """\
data:
  --data takes files (.jsonl, .json, .csv, .tsv, .txt, .parquet, .arrow, also packed), patterns such as 'data/*.jsonl',
  folders, and ids of data sets on the hub. Templates say how prompt and answer are made from the columns:
    --prompt 'Question: {text}\\nIntent:' --answer '{category}'
  Without templates the format is found by the columns: messages, conversations (ShareGPT), instruction/input/output
  (Alpaca), prompt/completion, question/answer, text/label, question/choices/answer (multiple choice), or text alone.
  docs/data.md shows a row of each.
"""

# Options that are handed to load_examples as they are: those that every source shares.
SHARED = ("prompt", "answer", "format", "system", "as_chat", "delimiter", "encoding", "text_rows", "skip_bad_rows")

logger = logging.getLogger(__name__)


def add(parser: argparse.ArgumentParser, *, testing: bool, required: bool = True, rows: bool = True) -> None:
    """Add the options that say which data is read, and how.

    Args:
        parser: of the command.
        testing: whether the command evaluates too.
        required: whether the command needs data.
        rows: whether the command learns or scores the answers of examples, or else reads all text.
    """
    parser.add_argument(
        "--data", required=required, nargs="+", metavar="D", help="files, patterns, folders or hub ids, see below"
    )
    parser.add_argument(
        "--split",
        default="train",
        help="split of a folder or hub data set, such as train or train[:10%%] (default train)",
    )
    parser.add_argument("--data-config", metavar="NAME", help="configuration of a hub data set")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub data set")
    parser.add_argument(
        "--streaming",
        action="store_true",
        help="read only the first --limit rows of a hub data set, without a download",
    )
    _add_formats(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="use only N examples of --data, after shuffling")
    parser.add_argument("--data-seed", type=int, default=0, metavar="N", help="seed that shuffles the data (default 0)")
    parser.add_argument(
        "--max-length",
        type=int,
        default=512,
        metavar="N",
        help=f"{'most tokens of an example' if rows else 'tokens of a window'} (default 512)",
    )
    if rows:
        _add_rows(parser)
    parser.add_argument(
        "--chat-template", metavar="FILE", help="jinja file that writes messages as text (default: the tokenizer's)"
    )
    if testing:
        parser.add_argument(
            "--test-data", nargs="+", metavar="D", help="test data, as --data (default: a share of --data is held out)"
        )
        parser.add_argument("--test-split", help="split for --test-data (default: test where there is one, else train)")
        parser.add_argument("--test-limit", type=int, metavar="N", help="use only N test examples of each --test-data")
        parser.add_argument(
            "--held-out", type=float, default=0.1, metavar="P", help="share of --data held out (default 0.1)"
        )


def _add_rows(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which tokens a row has, and which of them are learned."""
    parser.add_argument(
        "--train-on",
        choices=("answer", "assistant", "last", "all"),
        default="answer",
        help="tokens that the loss counts: the answer (in a conversation, every turn of the assistant after the "
        "prompt), every turn of the assistant, its last turn, or all (default answer)",
    )
    parser.add_argument(
        "--too-long",
        choices=("cut", "skip", "error", "split"),
        help="what becomes of examples longer than --max-length (default: text without an answer is split into rows, "
        "the rest loses its beginning)",
    )


def _add_formats(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what a row is and how it becomes an example."""
    parser.add_argument("--prompt", metavar="T", help="template of the prompt")
    parser.add_argument("--answer", metavar="T", help="template of the answer")
    parser.add_argument("--format", choices=FORMATS, help="format of the rows, if their columns do not tell")
    parser.add_argument("--system", metavar="TEXT", help="system message of chats that have none; makes chats of pairs")
    parser.add_argument(
        "--as-chat",
        action="store_true",
        help="make a turn of the user and one of the assistant of a prompt and an answer",
    )
    parser.add_argument(
        "--delimiter", metavar="C", help="character between the cells of .csv (default: , or tab for .tsv)"
    )
    parser.add_argument("--encoding", metavar="E", help="encoding of text files, such as latin-1 (default UTF-8)")
    parser.add_argument(
        "--text-rows",
        choices=TEXT_ROWS,
        default="file",
        help="what is one example of a .txt file (default file)",
    )
    parser.add_argument(
        "--skip-bad-rows",
        type=float,
        default=0.0,
        metavar="P",
        help="share of the rows of a source that may be bad, such as 0.01; they are left out (default: none may be)",
    )


def examples(options: argparse.Namespace) -> Any:
    """Read the examples of --data."""
    from gradpruner.data.load import load_examples

    return load_examples(
        options.data,
        split=options.split,
        limit=options.limit,
        seed=options.data_seed,
        config=options.data_config,
        revision=options.revision,
        streaming=options.streaming,
        **_shared(options),
    )


def split(options: argparse.Namespace) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return training and test examples. The latter are of --test-data, or held out.

    Copies of test examples do not stay among those to train on.
    """
    from gradpruner.data.copies import without_copies
    from gradpruner.data.examples import split_examples

    train_examples = examples(options)
    if not options.test_data:
        _say_unused_test_splits(options)
        train_examples, test_examples = split_examples(train_examples, options.held_out, options.data_seed)
        test_examples = test_examples[: options.test_limit]
    else:
        test_examples = _test_examples(options)
    return without_copies(train_examples, test_examples), test_examples


def _say_unused_test_splits(options: argparse.Namespace) -> None:
    """Name the folders with a test split that is not used.

    A held-out share of the training split stands in for it.
    """
    from gradpruner.data.load import sources
    from gradpruner.data.sources import test_split_of

    for source in sources(options.data):
        if Path(source).is_dir() and test_split_of(source) == "test":
            logger.warning("data: the split 'test' of %s is not used; --test-data %s tests on it", source, source)


def _test_examples(options: argparse.Namespace) -> Any:
    from gradpruner.data.load import load_examples, sources
    from gradpruner.data.sources import test_split_of
    from gradpruner.data.table import join

    several, trained_on = sources(options.test_data), set(map(str, sources(options.data)))
    of_hub = {"config": options.data_config, "revision": options.revision}
    sets = [
        load_examples(
            source,
            split=options.test_split or test_split_of(source),
            limit=options.test_limit,
            seed=options.data_seed,
            **(of_hub if str(source) in trained_on else {}),  # the same data set is not read at another commit
            **_shared(options),
        )
        for source in several
    ]
    return join([(str(source), examples) for source, examples in zip(several, sets, strict=True)])


def _shared(options: argparse.Namespace) -> dict[str, Any]:
    return {**{name: getattr(options, name) for name in SHARED}, "quiet": options.json}
