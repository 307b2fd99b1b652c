"""The result of a probe: layer scores, and the importance of every entry of every weight."""

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
from gradpruner.plan import Plan
from gradpruner.presets import Preset
from gradpruner.probe.coverage import Coverage
from gradpruner.probe.igia_header import check_tensors, checked_fields
from gradpruner.probe.importance import Dense, Factors, SharedImportance, StoredImportance
from gradpruner.probe.selection import lowest_first, margin, parameters_in, select
from gradpruner.storage.checked_tensors import read_checked, read_described, write_described

FORMAT = "gradpruner.igia/1"
SCORES = ("squared", "norm", "normalized")
DEFAULT_KIND = Preset().kind


@dataclass(frozen=True)
class Igia:
    """Initial Gradient Information Accumulation: what a probe read in its training steps.

    It belongs to one model on one task and carries the fingerprint of that model. `Probe.igia` makes it.

    Args:
        model: fingerprint of the model.
        estimator: how gradients were read: "lora", "gradient", "adam" or "exact".
        layers: number of decoder layers.
        weights: the n linear weights that were watched.
        square_norms: float64 of shape (t, n), the squared Frobenius norm of each gradient in each usable step.
        structures: one entry per layer; layers with equal entries can be merged.
        layer_parameters: number of parameters per layer, see `gradpruner.model.parameter_counts`.
        total_parameters: number of parameters of the model.
        importance: importance of the entries of a weight, by (layer, name). It is empty if the probe kept scores only.
            After a probe in several processes it is a `SharedImportance`: all processes ask for the same entries in
            the same order.
        skipped: number of steps that were left out because a gradient was not finite.
        shared_parameters: parameters that several layers share, as pairs of these layers and a number of parameters.
            None if the file was written by an earlier version.
        adapters: rank and scale of the adapter of each watched weight; empty without adapters.

    Source: docs/method.md, section 1.
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
        """For each layer, the share of its parameters that the probe watched, 0 to 1."""
        return self._coverage.shares

    def check_comparable(self, protect: Iterable[int] = (0,)) -> None:
        """Check that the scores of the layers can be compared with each other.

        Args:
            protect: layers that are not removed, so that their scores do not matter. Default: the first layer.

        Raises:
            ProbeError: some of the other layers cannot be compared: the probe watched different weights of them, or a
                different share, or they had a gradient in fewer steps. The message names these layers and says what to
                do.
        """
        self._coverage.check_comparable(protect, self.square_norms)

    @property
    def steps(self) -> int:
        """Number of usable optimizer steps, those that were not skipped."""
        return int(self.square_norms.shape[0])

    def layer_scores(self, kind: str | None = None, *, steps: int | None = None) -> Tensor:
        """Score the layers: a plan removes those with the lowest scores.

        Args:
            kind: "norm" sums the norms of the gradients, "squared" averages their squares over the steps, and
                "normalized" does so after every step is scaled to the same total. Default: that of the preset
                "default", "norm".
            steps: how many of the usable steps are used, from the first on. Default: all.

        Returns:
            float64 of shape (L,). A layer of which no weight was watched has 0.

        Raises:
            ProbeError: no step was usable, or every gradient was zero.
            InvalidArgument: there is no such kind.

        Source: docs/method.md, section 1.
        """
        kind = DEFAULT_KIND if kind is None else kind
        check_choice("kind", kind, SCORES)
        squares = self.square_norms[:steps]
        if not bool((squares > 0).any()):
            counts = f"{self.steps} steps, {self.skipped} skipped as not finite"
            raise ProbeError(
                f"the probe saw no usable step ({counts}): no scores{self._why_zero() if self.steps else ''}"
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

    def _why_zero(self) -> str:
        """Say what makes every gradient zero, as the end of an error."""
        causes = ["a teacher or reference that equals the model", "rewards that are all the same", "labels all masked"]
        if self.estimator == "lora":  # it multiplies by B, which is 0 at first
            causes.append("adapters that are still as they began, as with a learning rate of 0")
        return f", because every gradient was zero: look at the loss ({', '.join(causes)})"

    def plan(
        self,
        ratio: float | None = None,
        *,
        count: int | None = None,
        of: str = "layers",
        preset: str = "default",
        kind: str | None = None,
        merge: str | int | None = None,
        protect: Iterable[int] = (0,),
    ) -> Plan:
        """Choose the layers with the lowest scores for removal. Give either `ratio` or `count`.

        Args:
            ratio: share to remove, above 0 and below 1; 0.4 removes 12 of 30 layers.
            count: number of layers to remove.
            of: what `ratio` is a share of: "layers" (default), or "parameters" for all parameters of the model.
            preset: "default" or "paper": decides `kind` and `merge` where they are not given. Its other settings
                concern later stages: patches are fitted by `fit_patches`, with this plan.
            kind: the layer score, see `layer_scores`.
            merge: how many of the removed layers are merged into a kept one instead of dropped. 0 merges none. "auto"
                drops the lowest-scored layers, up to 30 % of all layers, and merges the other removed layers if a kept
                layer of the same structure comes before them. `apply` and `cut` need importance for a merge, see
                `Probe`.
            protect: layers that are kept whatever they score. Default: the first layer.

        Returns:
            The plan, with the fingerprint of the model.

        Raises:
            InvalidArgument: an argument is not accepted, or so many layers cannot be removed.
            ProbeError: as `layer_scores` and `check_comparable`.

        Example:
            plan = probe.igia.plan(ratio=0.4)

        Source: docs/method.md, section 2.
        """
        settings = Preset.of(preset, kind=kind, merge=merge)
        protected = tuple(protect)
        plan = select(
            self.layer_scores(settings.kind).tolist(),
            ratio=ratio,
            count=count,
            of=of,
            merge=settings.merge,
            protect=protected,
            structures=self.structures,
            layer_parameters=None if self.shared_parameters is None else self.layer_parameters,
            shared_parameters=self.shared_parameters or (),
            total_parameters=self.total_parameters,
            model=self.model,
            kind=settings.kind,
        )
        self.check_comparable(protected)  # after `select`, which refuses a wrong `protect`
        watched = min((share for layer, share in enumerate(self.watched) if layer not in protected), default=None)
        return dataclasses.replace(plan, watched=watched)

    def parameter_ratio(self, removed: Iterable[int]) -> float | None:
        """Return the share of all parameters that is removed with some layers.

        Args:
            removed: the removed layers.

        Returns:
            A share, 0 to 1, or None if the file was written by an earlier version, which did not record it.
        """
        if self.shared_parameters is None:
            return None
        return parameters_in(removed, self.layer_parameters, self.shared_parameters) / self.total_parameters

    def margin(self, plan: Plan, kind: str | None = None, *, protect: Iterable[int] = (0,)) -> float:
        """Measure how clear a cut is: 1 - (highest removed score / lowest kept score).

        Args:
            plan: the cut.
            kind: the layer score. Default: the one that chose the plan. If the plan names none, that of the preset
                "default".
            protect: the layers that were protected when the plan was made. They are not compared. Default: the first
                layer.

        Returns:
            0 if the two scores are equal, near 1 if the cut is clear, below 0 if a kept layer scores lower than a
            removed one. Also 0 if the lowest kept score is 0.

        Raises:
            InvalidArgument: there is no such kind.
            ProbeError: as `plan`.

        Source: docs/method.md, section 1.
        """
        scores, protected = self.layer_scores(kind or plan.kind), tuple(protect)
        self.check_comparable(protected)
        return margin(scores.tolist(), plan.removed, protected)

    def stability(self, plan: Plan, kind: str | None = None, *, protect: Iterable[int] = (0,)) -> list[float]:
        """Measure how early the probe settled on the removed layers.

        Args:
            plan: the cut.
            kind: the layer score, as for `margin`.
            protect: the layers that were protected when the plan was made. Default: the first layer.

        Returns:
            For each usable step, the share of `plan.removed` that would also be removed by the scores of the steps up
            to it, 0 to 1.

        Raises:
            InvalidArgument: there is no such kind.
            ProbeError: as `plan`.

        Source: docs/method.md, section 1.
        """
        protected, final = tuple(protect), set(plan.removed)
        self.check_comparable(protected)
        shares = []
        for steps in range(1, self.steps + 1):
            if not final or not bool((self.square_norms[:steps] > 0).any()):
                shares.append(0.0)
                continue
            scores = self.layer_scores(kind or plan.kind, steps=steps).tolist()
            early = lowest_first(scores, protected)[: len(final)]
            shares.append(len(final & set(early)) / len(final))
        return shares

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file atomically, with a checksum of every tensor.

        After a probe in several processes, all of them call it. The first one writes; if that fails, all raise.

        Args:
            path: the file, usually igia.safetensors.

        Raises:
            InvalidArgument: the folder of `path` does not exist, or `path` is a folder.
            CheckpointError: it could not be written; the disk may be full.
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
        """Read what `save` wrote.

        Args:
            path: the file, usually igia.safetensors.
            lazy: leave the importance in the file. The importance of a weight is read, and its checksum compared,
                whenever it is asked for, and is not kept. Default: read all of it now.

        Returns:
            The igia.

        Raises:
            InvalidArgument: there is no such file.
            CheckpointError: the file is damaged.
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
