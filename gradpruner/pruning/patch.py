"""Linear patches: replace a gap by the linear map that does most of what its layers did.

No parameter is added. The last linear of the kept layer before the gap writes to the residual stream. Its weight gets
the least-squares change that brings the output of its layer closest to what left the gap (docs/method.md, section 4).
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradpruner.distributed.fsdp import resharding
from gradpruner.distributed.processes import Peers, peers_of
from gradpruner.distributed.sharding import local, rows_of
from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.model.decoder import Decoder, Weight, is_packed
from gradpruner.model.modes import evaluating, to_device
from gradpruner.model.wrappers import root_of, wrappers
from gradpruner.plan import Plan, gaps
from gradpruner.pruning.patch_fit import GapFit
from gradpruner.pruning.residual_writer import find_writer


@dataclass(frozen=True)
class Patch:
    """A change of one linear weight of a kept layer, which stands for a gap of removed layers.

    Args:
        weight: the weight that is changed, in the layer before the gap.
        end: the last removed layer of the gap.
        change: what is added to the weight: float32, in the layout in which the weight is stored, in host memory.
        unexplained: share of the squared error at the end of the gap that the patch leaves, 0 to 1, on rows that were
            not fitted. Errors are relative to the size of the state of each token. Without a patch it would be 1.

    Source: docs/method.md, section 4.
    """

    weight: Weight
    end: int
    change: Tensor
    unexplained: float


def fit_patches(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Mapping[str, Any]],
    *,
    layers: str | nn.ModuleList | None = None,
    group: Any = None,
) -> list[Patch]:
    """Fit the linear map that replaces each gap of removed layers, for `apply` or `cut`.

    Memory: the sums of one gap take 8 w (w + h) bytes on the device, where w is the width of what enters its linear
    and h that of the model: 2.1 GB for w = 14336 and h = 4096. Solving takes about twice as much again. If the sums of
    all gaps need more than a third of a GPU's free memory, the gaps are fitted in several passes over the batches, in
    each as many as that third holds, at least one. Then all batches are kept in memory until the last pass. The
    patches are the same.

    Args:
        model: the dense model before the cut, a transformers model or a PEFT model, whose adapters act. It is not
            changed.
        plan: which layers are removed.
        batches: keyword arguments of the model, as a data loader yields them, with `attention_mask` where rows are
            padded. Labels are ignored. Each batch costs one forward per pass. The batches of the probe are a good
            choice.
        layers: path of the ModuleList of decoder layers, or the list itself, for a model that is not Hugging Face's.
        group: the processes that train the model together, see `Probe`. All of them call this function, each with
            batches of its own. Each uses only as many batches as the process with the fewest has. All get the same
            patches.

    Returns:
        One patch per gap, ascending. A gap gets no patch in three cases: no layer comes before it; that layer has no
        single linear that writes straight to the residual stream (in Gemma 2 a norm follows it, and a mixture of
        experts has many); or a patch would not help on held-out rows. An encoder-decoder gets no patches, because the
        inputs of its decoder come from the labels.

    Raises:
        InvalidArgument: `batches` is empty, or the plan is for another number of layers.

    Example:
        patches = gradpruner.fit_patches(model, plan, batches)
        model = gradpruner.apply(model, plan, patches=patches)

    Source: docs/method.md, section 4.
    """
    decoder = Decoder(model, layers)
    if plan.layers != len(decoder.layers):
        raise InvalidArgument(f"the plan is for {plan.layers} decoder layers; the model has {len(decoder.layers)}")
    if getattr(decoder.config, "is_encoder_decoder", False):
        return []
    peers, ends = peers_of(group), gaps(plan)
    called, device = _called(decoder.given), next(decoder.base.parameters()).device

    # logits are not needed, and those of all tokens may take more memory than the model
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(decoder.base.forward).parameters else {}

    def forward(batch: Mapping[str, Any]) -> None:
        called(**{**to_device(batch, device, labels=False), **few, "use_cache": False})

    with evaluating(decoder.given), resharding(called), _uncompiled(called):
        # 1. A part of the first batch finds the linear that each gap's patch is added to.
        remaining = iter(_in_step(batches, peers))
        first = next(remaining, None)
        if first is None:
            raise InvalidArgument("batches is empty; expected at least one")
        one_row = _one_row(first)
        writers = {layer: find_writer(decoder, layer, lambda: forward(one_row)) for layer in ends}
        fitted = {layer: writer for layer, writer in writers.items() if writer is not None}
        # 2. Divide the gaps into passes. All processes fit the same gaps in the same passes.
        room = _room(decoder.base)
        if peers is not None:
            answers = peers.gather((set(fitted), room))
            fitted = {layer: fitted[layer] for layer in fitted if all(layer in found for found, _ in answers)}
            room = min(each for _, each in answers)
        passes = _passes(fitted, room)
        # 3. Sum over the tokens of all batches, and solve.
        every: Iterable[Mapping[str, Any]] = itertools.chain([first], remaining)
        every = list(every) if len(passes) > 1 else every
        patches: list[Patch | None] = []
        for some in passes:
            fits = [GapFit(decoder, *fitted[layer], ends[layer]) for layer in some]
            _sum_up(fits, every, forward)
            while fits:
                patches.append(_patch_of(fits.pop(0), peers))  # nothing else holds the fit: its sums are freed here
    return [patch for patch in patches if patch is not None]


def check_patches(decoder: Decoder, plan: Plan, patches: Iterable[Patch]) -> None:
    """Check that patches can be added to a model.

    Args:
        decoder: the model.
        plan: the plan whose gaps they stand for.
        patches: the patches.

    Raises:
        InvalidArgument: a patch belongs to no gap of this plan, or is the second one of its gap.
        UnsupportedModel: its weight is quantised.
    """
    ends, known = gaps(plan), set(decoder.weights)
    patched: set[int] = set()
    for patch in patches:
        where = f"the patch of layer {patch.weight.layer} {patch.weight.name}"
        if ends.get(patch.weight.layer) != patch.end or patch.weight not in known:
            raise InvalidArgument(f"{where} up to layer {patch.end} does not belong to a gap of this plan and model")
        if patch.weight.layer in patched:
            raise InvalidArgument(f"{where} is not the only one of its gap; expected one at most")
        patched.add(patch.weight.layer)
        if is_packed(decoder.parameter(patch.weight)):
            raise UnsupportedModel(f"{where}: the weight is quantised; patch the full-precision model instead")


def add_patch(decoder: Decoder, patch: Patch, undo: list[tuple[Tensor, Tensor]]) -> None:
    """Add a patch to its weight, or to this process's shard of it.

    Args:
        decoder: the model.
        patch: the patch.
        undo: gets the parameter and a copy of its values.
    """
    stored = decoder.parameter(patch.weight).data
    rows, parameter = rows_of(stored), local(stored)
    change = patch.change if rows is None else patch.change[rows[0] : sum(rows)]
    undo.append((parameter, parameter.to("cpu", copy=True)))
    exact = torch.promote_types(parameter.dtype, change.dtype)  # float64 stays that
    parameter.copy_(parameter.to(exact) + change.to(parameter.device, exact))


def _called(model: nn.Module) -> nn.Module:
    """The module to call: FSDP2's root, else what is inside the wrappers.

    DistributedDataParallel would talk to other processes, and compiled code would not call hooks.
    """
    root = root_of(model)
    if root is not None:
        return root
    return next(
        wrapper
        for wrapper in wrappers(model)
        if "_orig_mod" not in wrapper._modules and not isinstance(wrapper, DistributedDataParallel)
    )


def _one_row(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first row of a batch, or all of it where its tensors are not one entry per row.

    Image patches, the lengths of packed sequences and position ids of several axes are not.
    """
    rows = {len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim}
    other = any(name.startswith(("cu_seq", "pixel_values")) for name in batch)
    positions = batch.get("position_ids")
    if len(rows) > 1 or other or (isinstance(positions, Tensor) and positions.ndim > 2):
        return batch
    return {k: v[:1] if isinstance(v, Tensor) and v.ndim else v for k, v in batch.items()}


def _uncompiled(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Run compiled code uncompiled: it would not call hooks that came after it was compiled."""
    compiled = any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def _in_step(batches: Iterable[Mapping[str, Any]], peers: Peers | None) -> Iterator[Mapping[str, Any]]:
    """Yield as many batches as every process has: all call a sharded model together."""
    for batch in batches:
        if peers is not None and peers.any(False):
            return
        yield batch
    if peers is not None:
        peers.any(True)


def _patch_of(fit: GapFit, peers: Peers | None) -> Patch | None:
    """Solve a fit; None where no patch would help."""
    solution = fit.solve(peers)
    return None if solution is None else Patch(fit.weight, fit.end, *solution)


def _room(model: nn.Module) -> float:
    """Bytes that the sums may take: a third of the least free GPU memory, or infinity."""
    devices = {parameter.device for parameter in model.parameters()}
    free = [
        torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        for device in devices
        if device.type == "cuda"
    ]
    return min(free, default=math.inf) / 3


def _passes(writers: Mapping[int, tuple[Weight, nn.Module]], room: float) -> list[list[int]]:
    """Divide the layers before gaps into passes whose sums fit; at least one layer each."""
    passes: list[list[int]] = []
    taken = 0
    for layer, (weight, _) in writers.items():
        inputs, outputs = weight.shape if weight.transposed else weight.shape[::-1]
        size = 2 * 4 * inputs * (inputs + outputs)  # fitted and held out, float32
        if not passes or taken + size > room:
            passes.append([])
            taken = 0
        passes[-1].append(layer)
        taken += size
    return passes


def _sum_up(
    fits: Sequence[GapFit], batches: Iterable[Mapping[str, Any]], forward: Callable[[Mapping[str, Any]], None]
) -> None:
    """Fill the sums of some gaps in one pass over the batches, and remove the hooks."""
    try:
        for batch in batches:
            for fit in fits:
                fit.begin(batch)
            forward(batch)
    finally:
        for fit in fits:
            fit.stop()
