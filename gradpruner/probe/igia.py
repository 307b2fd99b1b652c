"""Igia: what a probe has seen of a model. Layer scores, and the importance of every entry of every weight."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gradpruner.checks import check_choice
from gradpruner.distributed.processes import together
from gradpruner.errors import InvalidArgument, ProbeError
from gradpruner.model.decoder import Weight
from gradpruner.plan import Plan, parameters_in, select
from gradpruner.probe.coverage import Coverage
from gradpruner.probe.igia_header import check_tensors, checked_fields
from gradpruner.probe.importance import Dense, Factors, SharedImportance, StoredImportance
from gradpruner.storage.checked_tensors import read_checked, read_described, write_described

FORMAT = "gradpruner.probe.igia/1"
SCORES = ("squared", "norm", "normalized")


@dataclass(frozen=True)
class Igia:
    """Scores and importance of one model on one task, with the fingerprint of the model they belong to.

    weights: the linear weights watched, n of them. square_norms: float64 (t, n), ||G_i||_F^2 of each usable
    optimizer step. importance: by (layer, name); may lack weights when only scores were asked for. Of a probe in
    several processes it is a SharedImportance: every process asks for the same entries in the same order.
    skipped: steps with a non-finite gradient, left out. estimator: "lora", "gradient", "adam" or "exact".
    structures: one entry a layer. layer_parameters, shared_parameters, total_parameters: see
    `gradpruner.model.parameter_counts`; shared_parameters is None where a file of an earlier version does not say them.
    adapters: of each watched weight, rank and scale of what adapts it; () where nothing does, or in files that did not
    keep it.
    """

    model: str
    estimator: str
    layers: int
    weights: tuple[Weight, ...]
    square_norms: Tensor
    structures: tuple[str, ...]
    layer_parameters: tuple[int, ...]
    total_parameters: int
    importance: Mapping[tuple[int, str], Factors | Dense] = field(default_factory=dict)
    skipped: int = 0
    shared_parameters: tuple[tuple[tuple[int, ...], int], ...] | None = ()
    adapters: tuple[str, ...] = ()

    @property
    def _coverage(self) -> Coverage:
        return Coverage(self.estimator, self.weights, self.structures, self.layer_parameters, self.adapters)

    @property
    def watched(self) -> tuple[float, ...]:
        """The watched share of each layer: entries of the watched weights / parameters that go with it."""
        return self._coverage.shares

    def check_comparable(self, protect: Iterable[int] = (0,)) -> None:
        """Raises ProbeError where scores of layers outside `protect` say nothing of each other: see `Coverage`."""
        self._coverage.check_comparable(protect, self.square_norms)

    @property
    def steps(self) -> int:
        """Number of usable optimizer steps seen."""
        return int(self.square_norms.shape[0])

    def layer_scores(self, kind: str = "squared", *, steps: int | None = None) -> Tensor:
        """One score a layer, float64 (L,), from the first `steps` usable steps (default all).

        kind: "squared" (P eq. 4), "norm" (C) or "normalized" (D). A layer that was not watched has 0 (see `watched`).
        Raises ProbeError if no step was usable, or every gradient was zero; InvalidArgument for another kind.
        """
        check_choice("kind", kind, SCORES)
        squares = self.square_norms[:steps]
        if not bool((squares > 0).any()):
            raise ProbeError(
                f"the probe saw no usable step ({self.steps} steps, {self.skipped} skipped as not finite): no scores"
            )
        layer_of = torch.tensor([weight.layer for weight in self.weights])

        def by_layer(values: Tensor) -> Tensor:
            return torch.zeros(values.shape[0], self.layers, dtype=torch.float64).index_add_(1, layer_of, values)

        if kind == "norm":
            return by_layer(squares.sqrt()).sum(0)
        totals = by_layer(squares)
        if kind == "squared":
            return totals.mean(0)
        usable = totals[totals.sum(1) > 0]
        return (usable / usable.sum(1, keepdim=True)).mean(0)

    def plan(
        self,
        ratio: float | None = None,
        *,
        count: int | None = None,
        of: str = "layers",
        kind: str = "squared",
        merge: str | int = "auto",
        protect: Iterable[int] = (0,),
    ) -> Plan:
        """Decide which layers go (see `gradpruner.plan.select`).

        Raises InvalidArgument, and ProbeError as `layer_scores` and `check_comparable` do.
        """
        protected = tuple(protect)
        scores = self.layer_scores(kind)
        plan = self._plan(scores, ratio, count, of, merge, protected, kind)  # first: it refuses a wrong `protect`
        self.check_comparable(protected)
        watched = min((share for layer, share in enumerate(self.watched) if layer not in protected), default=None)
        return dataclasses.replace(plan, watched=watched)

    def _plan(
        self,
        scores: Tensor,
        ratio: float | None,
        count: int | None,
        of: str,
        merge: str | int,
        protect: Iterable[int],
        kind: str,
    ) -> Plan:
        return select(
            scores.tolist(),
            ratio=ratio,
            count=count,
            of=of,
            merge=merge,
            protect=protect,
            structures=self.structures,
            layer_parameters=None if self.shared_parameters is None else self.layer_parameters,
            shared_parameters=self.shared_parameters or (),
            total_parameters=self.total_parameters,
            model=self.model,
            kind=kind,
        )

    def parameter_ratio(self, removed: Iterable[int]) -> float | None:
        """Share of all parameters that goes with these layers, None where that is not known."""
        if self.shared_parameters is None:
            return None
        return parameters_in(removed, self.layer_parameters, self.shared_parameters) / self.total_parameters

    def margin(self, plan: Plan, kind: str | None = None, *, protect: Iterable[int] = (0,)) -> float:
        """How clear a cut is: 1 - (highest removed score / lowest kept score), 0 if equal (D). Raises like `plan`.

        kind: default the score that chose the plan; "squared" for a plan that names none.
        """
        scores, protected = self.layer_scores(kind or plan.kind or "squared"), set(protect)
        self.check_comparable(protected)
        kept = [float(scores[j]) for j in plan.kept if j not in protected]
        removed = [float(scores[j]) for j in plan.removed]
        if not kept or not removed or min(kept) == 0:
            return 0.0
        return 1.0 - max(removed) / min(kept)

    def stability(self, plan: Plan, kind: str | None = None, *, protect: Iterable[int] = (0,)) -> list[float]:
        """Rank stability: by step, the share of `plan.removed` that would be gone by then (D). Raises like `plan`.

        kind: as for `margin`.
        """
        kind = kind or plan.kind or "squared"
        final, shares = set(plan.removed), []
        protected = list(protect)
        self.check_comparable(protected)
        for steps in range(1, self.steps + 1):
            if not final or not bool((self.square_norms[:steps] > 0).any()):
                shares.append(0.0)
                continue
            early = self._plan(self.layer_scores(kind, steps=steps), None, len(final), "layers", 0, protected, kind)
            shares.append(len(final & set(early.removed)) / len(final))
        return shares

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write igia.safetensors atomically, every tensor with a checksum. Raises CheckpointError (disk full).

        Of a probe in several processes: all of them call it, the first one writes, all of them raise what it does.
        """
        peers = self.importance.peers if isinstance(self.importance, SharedImportance) else None
        writes = peers is None or peers.rank == 0
        tensors = {"square_norms": self.square_norms.contiguous()}
        exponents = {}
        for layer, name in self.importance:
            kept = self.importance[layer, name]
            if not writes:
                continue
            exponents[f"{layer}/{name}"] = kept.exponents
            tensors |= {f"{layer}/{name}/{part}": tensor.contiguous() for part, tensor in kept.parts.items()}
        with together(peers):
            if writes:
                self._write(path, tensors, exponents)

    def _write(
        self, path: str | os.PathLike[str], tensors: dict[str, Tensor], exponents: dict[str, tuple[int, int]]
    ) -> None:
        header = {
            "format": FORMAT,
            "model": self.model,
            "estimator": self.estimator,
            "layers": self.layers,
            "weights": [[w.layer, w.name, list(w.shape), w.transposed] for w in self.weights],
            "structures": list(self.structures),
            "layer_parameters": list(self.layer_parameters),
            "shared_parameters": self.shared_parameters,
            "total_parameters": self.total_parameters,
            "skipped": self.skipped,
            "exponents": exponents,
            "adapters": list(self.adapters),
        }
        write_described(path, tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, lazy: bool = False) -> Igia:
        """Read what `save` wrote. Raises InvalidArgument if there is no file, CheckpointError if it is damaged.

        lazy: leave the importance in the file; each entry is read, and its checksum compared, when it is asked for,
        and is not kept.
        """
        if not Path(path).is_file():
            raise InvalidArgument(f"igia file {str(path)!r} does not exist")
        stored, header = read_described(Path(path), "igia", FORMAT)
        fields = checked_fields(Path(path), header)
        check_tensors(Path(path), fields["weights"], stored)
        importance = StoredImportance(fields["weights"], stored, header["crc32"], header.get("exponents", {}))
        return cls(
            square_norms=read_checked(stored["square_norms"], header["crc32"]),
            importance=importance if lazy else dict(importance),
            **fields,
        )
