"""The terms of a comparison, and the folder that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradpruner.compare.settings_file import COMPARISON_SETTINGS as SETTINGS
from gradpruner.data.examples import Example, split_examples
from gradpruner.errors import InvalidArgument
from gradpruner.methods import format_method, parse_method
from gradpruner.probe.selection import how_many
from gradpruner.run.folder import named, recorded
from gradpruner.run.job import Job
from gradpruner.storage.files import write_json

LAYERS = "model.json"  # of the dense model; written once everything that can be checked beforehand was checked
KEPT = (LAYERS, "cells", "trained", "probes", "plans")


def begin_or_continue(folder: Path, terms: Mapping[str, Any]) -> None:
    """Write the terms into a new folder, or check that its comparison is on the same ones.

    Args:
        folder: the folder of the comparison.
        terms: what every model of the folder must have been made on.

    Raises:
        InvalidArgument: the folder holds a comparison on other terms, or parts of one without its terms.
    """
    before = recorded(folder, SETTINGS)
    if before is None:
        _begin(folder, terms)
    else:
        _continue(folder, terms, before)


def _begin(folder: Path, terms: Mapping[str, Any]) -> None:
    """Write the terms into a folder that holds no comparison.

    Raises InvalidArgument if it holds parts of one.
    """
    parts = [name for name in KEPT if (folder / name).exists()]
    if parts:
        raise InvalidArgument(
            f"folder {str(folder)!r} holds {', '.join(parts)} of a comparison, but not its {SETTINGS}; "
            f"expected a new folder, or the {SETTINGS} that belongs to them"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, terms)


def _continue(folder: Path, terms: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Go on with a folder's comparison. Raises InvalidArgument if it is on other terms."""
    changed = sorted(name for name in terms if before.get(name) != terms[name])
    if changed and not (folder / LAYERS).exists():
        write_json(folder / SETTINGS, terms)  # nothing is there that was made on the old terms
    elif changed:
        raise InvalidArgument(
            f"folder {str(folder)!r} holds a comparison with another "
            f"{', '.join(named(changed, before, terms))}; expected a new folder, or the same terms, model "
            "and package versions to go on or to add methods, ratios and seeds"
        )


def held_out_of(examples: Sequence[Example], count: int) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return the examples that nothing is trained on, and those that are trained on.

    Args:
        examples: all training examples.
        count: how many are held out. They are the same in every comparison of these examples. It can be fewer, because
            all copies of an example go to the same part.
    """
    trained, held = split_examples(examples, count, 0)
    return held, trained


def method_names(methods: Sequence[str], job: Job) -> list[str]:
    """Return every method once, by its full name.

    Args:
        methods: as `parse_method` reads them.
        job: how many steps there are.

    Raises:
        InvalidArgument: a probe takes all the steps.
    """
    parsed = {format_method(method): method for method in map(parse_method, methods)}
    for name, method in parsed.items():
        probing = method.probe_steps or job.probing
        if probing >= job.steps:
            raise InvalidArgument(f"{name}: {probing} steps to probe of {job.steps}; expected fewer")
    return list(parsed)


def counts_of(layers: int, ratios: Sequence[float], methods: Sequence[str]) -> list[int]:
    """Return how many layers each ratio removes, every number once.

    Args:
        layers: decoder layers of the dense model.
        ratios: shares of the layers.
        methods: full names of methods, whose options must fit each number.

    Raises:
        InvalidArgument: a ratio, or an option of a method, does not fit the model.
    """
    counts = list(dict.fromkeys(how_many(layers, ratio) for ratio in ratios))
    for name in methods:
        for count in counts:
            try:
                parse_method(name).check_count(layers, count)
            except InvalidArgument as error:
                raise InvalidArgument(f"{name}, {count} of {layers} layers removed: {error}") from None
    return counts
