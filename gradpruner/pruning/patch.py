"""Patch: what a gap of removed layers did, as far as it is linear, folded into the layer before the gap.

No parameter is added: the last linear of the kept layer, which writes to the residual stream, gets the least-squares
change that brings the layer's output closest to what left the last removed layer (source: D).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradpruner.distributed.fsdp import resharding
from gradpruner.distributed.processes import Peers, peers_of, summed, together
from gradpruner.errors import InvalidArgument, UnsupportedModel
from gradpruner.model.decoder import Decoder, Weight, is_packed, linear_modules
from gradpruner.model.hidden_states import leaving_state
from gradpruner.model.linears import is_linear
from gradpruner.model.modes import evaluating, to_device
from gradpruner.model.wrappers import root_of, wrappers
from gradpruner.plan import Plan, gaps

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean square of an input
HELD_OUT = 5  # every fifth row chooses the ridge, and is fitted with it afterwards
NEARLY = 0.02  # how exactly a shift of a linear must come out of its layer; half precision rounds it


@dataclass(frozen=True)
class Patch:
    """A change of one linear weight of a kept layer.

    change: float32, in the layout in which the weight is stored. left: share of the squared error (of each token,
    relative to its state) at the gap's end that remains on rows that were not fitted; 1 without a patch.
    """

    weight: Weight
    end: int
    change: Tensor
    left: float


def fit_patches(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Mapping[str, Any]],
    *,
    layers: str | nn.ModuleList | None = None,
    group: Any = None,
) -> list[Patch]:
    """The patch of every gap of the plan, fitted on what the dense model computes on `batches`: one forward each.

    A gap's sums take 8 w (w + h) bytes on the device, w being the width of what enters its linear and h that of the
    model: 2.1 GB for w = 14336 and h = 4096; solving takes about twice that again. Where the sums of all gaps are more
    than a third of a GPU's free memory, gaps are fitted in several passes over the batches, in each as many as that
    third holds, or one. Every pass is a forward of every batch, and the batches are held until the last; the patches
    are the same.

    model: dense, before the cut; adapters count. batches: keyword arguments of the model, with attention_mask where
    rows are padded; labels are ignored. Give the patches to `apply`. A gap gets none where the layer before it has no
    linear that writes straight to the residual stream (Gemma 2's norm is in between, experts are many), or where it
    would not help on held-out rows. An encoder-decoder gets none: its decoder's inputs come from the labels.

    group: the processes that train the model together, see `Probe`; all of them call it, each with batches of its own,
    of which as many are used as every process has, and get the same patches.
    Raises InvalidArgument where batches are empty or the plan is of another depth.
    """
    decoder = Decoder(model, layers)
    if plan.layers != len(decoder.layers):
        raise InvalidArgument(f"the plan is for {plan.layers} decoder layers; the model has {len(decoder.layers)}")
    if getattr(decoder.config, "is_encoder_decoder", False):
        return []
    peers = peers_of(group)
    asked = _asked(decoder.given)
    device = next(decoder.base.parameters()).device
    with evaluating(decoder.given), resharding(asked), _uncompiled(asked):
        given = iter(_in_step(batches, peers))
        first = next(given, None)
        if first is None:
            raise InvalidArgument("batches is empty; expected at least one")
        one = {k: v[:1] if isinstance(v, Tensor) and v.ndim else v for k, v in first.items()}
        writers = _writers(decoder, plan, lambda: _forward(asked, _moved(one, device)))
        room = _room(decoder.base)
        if peers is not None:  # all fit the same gaps in the same passes
            said = peers.gather((set(writers), room))
            writers = {layer: writers[layer] for layer in writers if all(layer in found for found, _ in said)}
            room = min(each for _, each in said)
        passes = _passes(writers, room)
        every: Iterable[Mapping[str, Any]] = itertools.chain([first], given)
        every = list(every) if len(passes) > 1 else every
        patches: list[Patch | None] = []
        for some in passes:
            fits = [_Fit(decoder, *writers[layer], gaps(plan)[layer]) for layer in some]
            _sum_up(fits, every, lambda batch: _forward(asked, batch), device)
            while fits:
                patches.append(fits.pop(0).patch(peers))  # and its sums are gone
    return [patch for patch in patches if patch is not None]


def _asked(model: nn.Module) -> nn.Module:
    """FSDP2's root; else what is in DistributedDataParallel, which talks to others, and in what is compiled."""
    root = root_of(model)
    if root is not None:
        return root
    return next(
        wrapper
        for wrapper in wrappers(model)
        if "_orig_mod" not in wrapper._modules and not isinstance(wrapper, DistributedDataParallel)
    )


def _moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return to_device(batch, device, labels=False)


def _forward(model: nn.Module, batch: Mapping[str, Any]) -> None:
    model(**batch, use_cache=False)


def _in_step(batches: Iterable[Mapping[str, Any]], peers: Peers | None) -> Iterator[Mapping[str, Any]]:
    """As many of the batches as every process has: a sharded model is asked by all of them together."""
    for batch in batches:
        if peers is not None and peers.any(False):
            return
        yield batch
    if peers is not None:
        peers.any(True)


def _uncompiled(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Compiled code would not call hooks that it has not seen when it was made."""
    compiled = any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


class _Fit:
    """Sums over tokens, and hooks that add to them, for one gap."""

    def __init__(self, decoder: Decoder, weight: Weight, linear: nn.Module, end: int) -> None:
        self.weight, self.end = weight, end
        self._rows = 0
        self._mask: Tensor | None = None
        self._entered = self._left = torch.empty(0)
        # of the rows that are fitted, and of those that choose the ridge
        self._sums: tuple[list[Tensor], list[Tensor]] = ([], [])
        layer, last = decoder.layers[weight.layer], decoder.layers[end]
        self._handles = [
            linear.register_forward_pre_hook(self._on_input),
            layer.register_forward_hook(self._on_layer),
            last.register_forward_hook(self._on_end),
        ]

    def begin(self, mask: Tensor | None) -> None:
        """Before each batch: which tokens count."""
        self._mask = mask

    def stop(self) -> None:
        """Let go of the model."""
        for handle in self._handles:
            handle.remove()

    def _on_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._entered = args[0].detach()

    def _on_layer(self, module: nn.Module, args: Any, output: Any) -> None:
        self._left = leaving_state(output).detach()

    def _on_end(self, module: nn.Module, args: Any, output: Any) -> None:
        target = leaving_state(output).detach().float()
        with torch.autocast(target.device.type, enabled=False):  # the sums need their precision
            self._add(target)
        self._entered = self._left = torch.empty(0)

    def _add(self, target: Tensor) -> None:
        rows = torch.arange(self._rows, self._rows + len(target), device=target.device)
        self._rows += len(target)
        chooses = (rows % HELD_OUT == HELD_OUT - 1)[:, None].expand(target.shape[:2])
        counts = torch.ones_like(chooses) if self._mask is None else self._mask.bool().to(target.device)
        entered, left = (state.to(target.device) for state in (self._entered, self._left))  # layers may be spread
        for sums, which in zip(self._sums, (counts & ~chooses, counts & chooses), strict=True):
            wanted = target[which]
            # what follows a gap normalises its input: an error counts relative to the size of the state
            scale = wanted.norm(dim=1, keepdim=True).clamp_min(1e-12).reciprocal()
            x = entered[which].float() * scale
            error = (wanted - left[which].float()) * scale
            if not sums:
                sums[:] = [x.new_zeros(x.shape[1], n) for n in (x.shape[1], error.shape[1])] + [x.new_zeros(())]
            sums[0].addmm_(x.T, x)  # in place: a gram matrix of a wide linear is not to be had twice
            sums[1].addmm_(x.T, error)
            sums[2].add_(error.square().sum())

    def patch(self, peers: Peers | None) -> Patch | None:
        """The best change, None where it does not help on held-out rows (or there were too few rows to tell).

        With peers: of the sums over them all, which the first of them solves. A collective.
        """
        if peers is None:
            return self._solved()
        for sums in self._sums:
            sums[:] = [summed(part, peers.group).to(part.device) for part in sums]
        with together(peers):  # others' solvers may round otherwise
            mine = self._solved() if peers.rank == 0 else None
        left = peers.gather(None if mine is None else mine.left)[0]
        if left is None:
            return None
        like = torch.empty(self.weight.shape)
        return Patch(self.weight, self.end, peers.broadcast(None if mine is None else mine.change, like, 0), left)

    def _solved(self) -> Patch | None:
        fitted, held = self._sums
        if not float(held[2]) > 0 or not float(fitted[2]) > 0:
            return None
        shares = {ridge: _share_left(_solve(fitted, ridge), held) for ridge in RIDGES}
        best = min(shares, key=lambda ridge: shares[ridge])
        if not shares[best] < 1:
            return None
        for part, other in zip(fitted, held, strict=True):
            part.add_(other)
        change = _solve(fitted, best).float()  # (in, out)
        stored = change if self.weight.transposed else change.T
        return Patch(self.weight, self.end, stored.contiguous().cpu(), shares[best])


def _solve(sums: list[Tensor], ridge: float) -> Tensor:
    gram = sums[0].double()
    gram.diagonal().add_(ridge * float(gram.diagonal().mean()))
    return torch.linalg.solve(gram, sums[1].double())


def _share_left(change: Tensor, sums: list[Tensor]) -> float:
    gram, cross, square = sums[0].double(), sums[1].double(), float(sums[2])
    return float((square - 2 * (change * cross).sum() + (change * (gram @ change)).sum()) / square)


def _sum_up(
    fits: list[_Fit],
    batches: Iterable[Mapping[str, Any]],
    forward: Callable[[Mapping[str, Any]], None],
    device: torch.device,
) -> None:
    """Fill the sums of some gaps in one pass over the batches, and let go of the model."""
    try:
        for batch in batches:
            moved = _moved(batch, device)
            for fit in fits:
                fit.begin(moved.get("attention_mask"))
            forward(moved)
    finally:
        for fit in fits:
            fit.stop()


def _writers(decoder: Decoder, plan: Plan, forward: Callable[[], None]) -> dict[int, tuple[Weight, nn.Module]]:
    """The linear that writes to the residual stream in each layer before a gap, found by trying; some have none."""
    found = {layer: find_writer(decoder, layer, forward) for layer in gaps(plan)}
    return {layer: writer for layer, writer in found.items() if writer is not None}


def _room(model: nn.Module) -> float:
    """Bytes that the sums may take: a third of what the fullest GPU has left, any number without one."""
    devices = {parameter.device for parameter in model.parameters()}
    free = [
        torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        for device in devices
        if device.type == "cuda"
    ]
    return min(free, default=math.inf) / 3


def _passes(writers: Mapping[int, tuple[Weight, nn.Module]], room: float) -> list[list[int]]:
    """The layers before gaps, in order, as many at a time as there is room for the sums of; at least one."""
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


def find_writer(decoder: Decoder, layer: int, forward: Callable[[], None]) -> tuple[Weight, nn.Module] | None:
    """The last linear of a layer to run, if what is added to its output is added to the layer's output."""
    names = {name: module for name, module in linear_modules(decoder, layer).items() if is_linear(module)}
    order: list[str] = []
    handles = [m.register_forward_hook(lambda *_, name=n: order.append(name)) for n, m in names.items()]
    states: list[Tensor] = []
    handles.append(decoder.layers[layer].register_forward_hook(lambda *a: states.append(leaving_state(a[2]).detach())))
    try:
        forward()
        if not order:
            return None
        linear = names[order[-1]]
        shifts: list[Tensor] = []

        def shift(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
            shifts.append(states[0].float().square().mean().sqrt() * noise.float())
            return output + shifts[0].to(output.dtype)

        handles.append(linear.register_forward_hook(shift))
        forward()
    finally:
        for handle in handles:
            handle.remove()
    weight = next(w for w in decoder.weights if (w.layer, w.name) == (layer, order[-1]))
    if is_packed(decoder.parameter(weight)) or shifts[0].shape != states[0].shape or len(shifts) != 1:
        return None
    moved = states[1].float() - states[0].float()
    return (weight, linear) if float((moved - shifts[0]).norm()) < NEARLY * float(shifts[0].norm()) else None


def check_patches(decoder: Decoder, plan: Plan, patches: Iterable[Patch]) -> None:
    """Raises InvalidArgument unless the patches belong to this plan, UnsupportedModel if a weight cannot take one."""
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
