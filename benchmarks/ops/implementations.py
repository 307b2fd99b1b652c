"""Who is compared: one small class each, its methods named as the ops are and taking what they take."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.base import KINDS, Implementation
from gradpruner import ops
from gradpruner.errors import InvalidArgument


class _Backend(Implementation):
    """`gradpruner.ops` with one backend forced, so that a missing one is an error and not another's time."""

    backend = ""

    def __getattr__(self, op: str) -> Callable[..., Any]:
        function = getattr(ops, op)

        def call(*arguments: Any) -> Any:
            before = os.environ.get("GRADPRUNER_BACKEND")
            os.environ["GRADPRUNER_BACKEND"] = self.backend
            try:
                return function(*arguments)
            finally:
                os.environ.pop("GRADPRUNER_BACKEND")
                if before is not None:
                    os.environ["GRADPRUNER_BACKEND"] = before

        return call

    def factor_merge(self, weight: Tensor, donor: Tensor, a: Tensor, b: Tensor, k: int) -> Tensor:
        """Threshold, then merge; F exists in neither."""
        value, index = self.factor_threshold(a, b, k)
        self.factor_sign_merge_(weight, [donor], [a], [b], [value], [index], [1.0])
        return value


class Reference(_Backend):
    """Plain torch in float64, written to be read."""

    name, kind, backend = "reference", "reference", "reference"


class Ours(_Backend):
    """The kernels: C++ on the CPU, Triton elsewhere."""

    name, kind = "ours", "ours"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.backend = "cpp" if device.type == "cpu" else "triton"


def implementations(also: Sequence[str] = (), skip: Sequence[str] = ()) -> list[type[Implementation]]:
    """Every class to compare. also: "package.module:Class" of somebody's own; skip: names to leave out.

    Raises InvalidArgument for a name or a class that does not exist, or to skip the reference or ours.
    """
    from benchmarks.ops import plain_torch  # these two import this file
    from benchmarks.ops.released import Released

    found: list[type[Implementation]] = [Reference, Released, *plain_torch.ALL, Ours, *map(_imported, also)]
    names = [each.name for each in found]
    if len(set(names)) != len(names):
        raise InvalidArgument(f"also: a name is taken twice in {names}")
    accepted = [name for name in names if name not in (Reference.name, Ours.name)]
    for name in skip:
        if name not in accepted:
            raise InvalidArgument(f"skip = {name!r}; accepted are {', '.join(accepted)}")
    return [each for each in found if each.name not in skip]


def _imported(path: str) -> type[Implementation]:
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidArgument(f"also = {path!r}; expected package.module:Class ({error})") from error
    if not (isinstance(found, type) and issubclass(found, Implementation) and found.name and found.kind in KINDS):
        raise InvalidArgument(f"also = {path!r}; expected a subclass of Implementation with a name and a known kind")
    return found
