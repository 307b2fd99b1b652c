"""Probe: watches the first steps of any training loop and fills an Igia."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.checks import check_choice, check_int
from gradpruner.distributed.deepspeed import factor_to_come, is_deepspeeds
from gradpruner.distributed.fsdp import refuse_flat
from gradpruner.distributed.processes import Peers, is_lost, lost_process, peers_of
from gradpruner.errors import InvalidArgument, ModelMismatch, ProbeError
from gradpruner.model.decoder import Decoder
from gradpruner.model.optimizers import unwrapped
from gradpruner.model.parameter_counts import count_parameters
from gradpruner.probe.closure import Arguments, ReadAfterClosure, check_one_gradient, closure_of
from gradpruner.probe.coverage import Coverage, share_range
from gradpruner.probe.estimators import Reader
from gradpruner.probe.estimators.exact import ExactReader
from gradpruner.probe.estimators.gradient import AdamReader, GradientReader, why_not_adam
from gradpruner.probe.estimators.lora import LoraReader, has_lora
from gradpruner.probe.host_copies import Arrival
from gradpruner.probe.igia import Igia
from gradpruner.probe.importance import shared

logger = logging.getLogger(__name__)

ESTIMATORS = ("auto", "lora", "gradient", "adam", "exact")
AHEAD = 2  # steps whose copies may be under way: the host waits for an older one, which a device has long done
HALF = 0.5  # of a layer's parameters: if fewer are watched, that is said
ALIKE = 1e-3  # relative; what processes that read the same reduced gradient may differ by, and no others stay within


class Probe:
    """Reads the gradients of a model once an optimizer step, as the optimizer is about to use them.

    model: PEFT (LoRA, DoRA) or plain. layers: path of the ModuleList of decoder layers for a model that is not
    Hugging Face's. estimator: "auto" takes "lora" where there are adapters, else "adam" where Adam's state is fit
    for it, else "gradient"; "exact" squares the true gradient of frozen or trainable weights inside the
    backward pass. importance: False keeps layer scores only, for plans that merge nothing. factor_dtype: of
    stored LoRA factors; bfloat16 halves the host memory and changes about 0.1 % of a mask. micro_batches: backward
    calls an optimizer step, needed by "exact" on trainable weights. group: the processes that train this model
    together (DistributedDataParallel, FSDP2): a torch ProcessGroup, by default the default group, False where each
    process has a model of its own. All of them then make, start, end and ask the probe alike, and share the storing
    of what it keeps. Source: P eq. 2 to 4, docs/method.md, section 1.

    Raises InvalidArgument, UnsupportedModel, and ProbeError where gradients cannot be read.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: str | nn.ModuleList | None = None,
        estimator: str = "auto",
        importance: bool = True,
        factor_dtype: torch.dtype = torch.float32,
        micro_batches: int = 1,
        group: Any = None,
    ) -> None:
        check_choice("estimator", estimator, ESTIMATORS)
        if factor_dtype not in (torch.float32, torch.bfloat16):
            raise InvalidArgument(f"factor_dtype = {factor_dtype}; accepted are torch.float32 and torch.bfloat16")
        self._peers = peers_of(group)
        if self._peers is not None and estimator == "exact":
            raise InvalidArgument(
                "estimator = 'exact' reads what one process's backward pass computes, before that is reduced over the "
                f"{self._peers.size} processes of the group; accepted are auto, lora, gradient and adam, or exact with "
                "group=False where each process trains a model of its own"
            )
        refuse_flat(model)
        self._decoder = Decoder(model, layers)
        self._model, self._counts = self._decoder.fingerprint(), count_parameters(self._decoder)
        self._estimator, self._importance, self._factor_dtype = estimator, importance, factor_dtype
        self._micro_batches = micro_batches
        self._reader: Reader | None = None
        self._handles: list[Any] = []
        self._left = 0
        self._pending: list[tuple[Tensor, Arrival]] = []
        self._usable: list[Tensor] = []
        self._skipped = 0
        self._igia: Igia | None = None
        self._closure: ReadAfterClosure | None = None  # of the step under way
        if estimator == "exact":  # the first backward pass already counts
            self._reader = self._make_reader(None, None)

    @property
    def steps(self) -> int:
        """Optimizer steps seen so far, skipped ones included."""
        return len(self._pending) + len(self._usable) + self._skipped

    @contextlib.contextmanager
    def watching(self, optimizer: Any, steps: int) -> Iterator[Probe]:
        """Watch `steps` optimizer steps of the loop inside; stops by itself after them, or when the block ends.

        optimizer: the torch optimizer, or accelerate's wrapper around it. Raises InvalidArgument; ProbeError where
        another process of the group has died.
        """
        self.start(optimizer, steps)
        try:
            yield self
        except BaseException as error:
            if self._peers is None:
                self.stop()
                raise
            self.abandon()  # the others may be anywhere: nothing can be finished with them
            if isinstance(error, RuntimeError) and is_lost(error):
                raise lost_process(error, self._peers.group) from error
            raise
        self.stop()

    def start(self, optimizer: Any, steps: int, *, resume: Igia | None = None) -> None:
        """Begin to watch; `watching` without the block.

        A closure that is given to `optimizer.step` is called first, and what it computed is read.
        resume: the `snapshot` of a probe that was interrupted: its steps count, and this one goes on from them.
        Raises InvalidArgument, ModelMismatch where the snapshot is of another model.
        """
        check_int("steps", steps, 1, "a number of optimizer steps")
        if self._handles or self._igia is not None:
            raise InvalidArgument("this probe is already watching, or has finished; make a new one")
        optimizer = unwrapped(optimizer)  # hooks belong on the one that really steps
        if not hasattr(optimizer, "register_step_pre_hook"):
            raise InvalidArgument(
                f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer (or call probe.record() "
                "before each step)"
            )
        if self._by_deepspeed():
            raise InvalidArgument(
                "optimizer: a DeepSpeed engine trains this model and steps it without a hook; call "
                "probe.record(engine.optimizer) between engine.backward(loss) and engine.step() instead"
            )
        if _steps_in_backward(optimizer, self._decoder):
            raise InvalidArgument(
                f"optimizer {type(optimizer).__name__} steps inside backward (LOMO, layer-wise GaLore): no gradient is "
                "left when its step is called, and none is clipped or accumulated; expected one that steps after it"
            )
        check_one_gradient(optimizer)
        if resume is not None:
            self._go_on(optimizer, steps, resume)
        self._reader = self._reader or self._make_reader(optimizer, steps)
        _check_held(self._reader, optimizer)
        self._say_watched(self._reader)
        self._left = steps - self.steps
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            # the last step has to be in Adam's state before that is read
            optimizer.register_step_post_hook(lambda optimizer, args, kwargs: self._after_step()),
        ]

    def stop(self) -> None:
        """Stop watching and give the model back as it was. What was seen is kept."""
        self.abandon()
        if self._igia is None and self.steps:
            self._finish()

    def abandon(self) -> None:
        """Give the model back as it was without finishing: what was seen is lost, and no other process is asked."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._reader is not None:
            self._reader.close()

    def record(self, optimizer: Any = None) -> None:
        """Read the gradients now, just before optimizer.step(): for loops whose optimizer has no hooks.

        In a loop that gives `step` a closure, call it at the closure's end.
        optimizer: where given, its `grad_scale` and `found_inf` (a fused optimizer under GradScaler) are honoured. They
        are there only inside `scaler.step`: before it, call `scaler.unscale_(optimizer)`. Under DeepSpeed (ZeRO 1 to 3)
        it is `engine.optimizer`, and every process calls this once a step, between engine.backward(loss) and
        engine.step().
        """
        if self._igia is not None:
            raise ProbeError("this probe has finished; make a new one")
        if self._reader is None:
            self._reader = self._make_reader(None, None)
            self._say_watched(self._reader)
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        if found_inf is not None:
            rejected = bool(found_inf > 0)
            if rejected if self._peers is None else self._peers.any(rejected):  # the optimizer is about to reject it
                self._skipped += 1
                return
        inverse = None if scale is None else 1.0 / scale
        if self._by_deepspeed():
            inverse = factor_to_come(optimizer, [p for p in self._decoder.given.parameters() if p.requires_grad])
        norms = self._reader.read(inverse)
        self._pending.append((norms, Arrival(self._reader.devices)))
        self._settle(but=AHEAD)

    @property
    def igia(self) -> Igia:
        """What was seen; asking for it ends the probe. Raises ProbeError if no step was."""
        if self._igia is None:
            if self.steps == 0:
                raise ProbeError("the probe has seen no optimizer step")
            self.stop()
        assert self._igia is not None
        return self._igia

    @property
    def finished(self) -> bool:
        """Whether the probe has seen all its steps, or was ended."""
        return self._igia is not None

    def snapshot(self) -> Igia:
        """What was seen so far, for `start(..., resume=...)` in another process; the probe goes on.

        In several processes all of them call it, save it and start from it.
        """
        if self._igia is not None:
            return self._igia
        if self._reader is None:
            raise ProbeError("the probe has not begun to watch")
        self._settle()
        # an interrupted probe on Adam finds F in the optimizer's state again
        return self._seen(with_importance=self._reader.name != "adam")

    def _go_on(self, optimizer: Any, steps: int, seen: Igia) -> None:
        if not 0 < seen.steps + seen.skipped < steps:
            raise InvalidArgument(f"resume: {seen.steps + seen.skipped} steps are seen; steps = {steps!r} are wanted")
        self._decoder.check_fingerprint(seen.model, "the snapshot")
        if self._reader is None:
            wanted, self._estimator = self._estimator, seen.estimator
            if wanted not in ("auto", seen.estimator):
                raise InvalidArgument(f"resume: the snapshot's estimator is {seen.estimator!r}, not {wanted!r}")
            self._reader = self._make_reader(optimizer, steps, begun=True)
        if self._reader.weights != seen.weights:
            raise ModelMismatch("the snapshot watched other weights than this model trains")
        self._reader.restore(seen.importance)
        self._model, self._usable, self._skipped = seen.model, list(seen.square_norms), seen.skipped

    def _by_deepspeed(self) -> bool:
        return any(is_deepspeeds(p) for p in self._decoder.layers.parameters() if p.requires_grad)

    def check_comparable(self, protect: Iterable[int] = (0,)) -> None:
        """Before any step: raises ProbeError where no plan could be made of what this probe watches.

        See `Coverage.check_comparable`. A probe that is there to look at, not to plan by, need not pass.
        """
        reader = self._reader
        if reader is None:
            known = "gradient" if self._estimator == "adam" else None  # Adam's reader wants the optimizer
            reader = self._make_reader(None, None, kind=known)
        self._coverage(reader).check_comparable(protect)

    def _coverage(self, reader: Reader) -> Coverage:
        return Coverage.of(self._decoder, reader.weights, reader.name, reader.adapters, counts=self._counts)

    def _say_watched(self, reader: Reader) -> None:
        """Say before time is spent that a part of the layers is not looked at."""
        shares = self._coverage(reader).shares
        few = [layer for layer, share in enumerate(shares) if 0 < share < HALF]
        if few:
            logger.warning(
                f"the probe watches {share_range([shares[j] for j in few])} of the parameters of layers {few}: the "
                "scores say nothing of the rest of them"
            )

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        if self._left <= 0:
            return None
        closure = closure_of(args, kwargs)
        if closure is None:
            self.record(optimizer)
            return None
        if getattr(optimizer, "grad_scale", None) is not None:
            raise ProbeError("optimizer.step was given a closure under GradScaler, which supports none")
        self._closure = ReadAfterClosure(closure, lambda: self.record(optimizer))
        return self._closure.arguments(args, kwargs)

    def _after_step(self) -> None:
        closure, self._closure = self._closure, None
        if closure is not None and not closure.calls:
            raise ProbeError("the optimizer did not call the closure that its step was given: no gradient was read")
        self._left -= 1
        if self._left == 0:  # the hooks stay until `stop`: torch is iterating over them just now
            self._finish()

    def _settle(self, *, but: int = 0) -> None:
        """Take in all pending steps but the last `but`: wait until their copies are here, and sort out the bad ones."""
        assert self._reader is not None
        settled = self._pending[: max(len(self._pending) - but, 0)]
        if not settled:
            return
        for _, arrival in settled:  # each: the next step may have read from other devices
            arrival.wait()
        # copies of their own: what they arrived in is pinned
        finite = [norms.clone() if bool(norms.isfinite().all()) else None for norms, _ in settled]
        self._reader.settle(finite)
        self._usable += [norms for norms in finite if norms is not None]
        self._skipped += sum(norms is None for norms in finite)
        del self._pending[: len(settled)]

    def _finish(self) -> None:
        assert self._reader is not None
        self._settle()
        self._reader.close()
        self._igia = self._seen(with_importance=True)

    def _seen(self, *, with_importance: bool) -> Igia:
        assert self._reader is not None
        decoder, reader = self._decoder, self._reader
        n = len(reader.weights)
        if self._peers is not None:
            self._usable = self._agreed(self._peers)
        importance = reader.importance() if with_importance else shared({}, {}, self._peers)
        return Igia(
            model=self._model,
            estimator=reader.name,
            layers=len(decoder.layers),
            weights=reader.weights,
            square_norms=torch.stack(self._usable) if self._usable else torch.zeros(0, n, dtype=torch.float64),
            structures=tuple(decoder.structure(j) for j in range(len(decoder.layers))),
            importance=importance,
            skipped=self._skipped,
            **self._counts,
            adapters=reader.adapters,
        )

    def _agreed(self, peers: Peers) -> list[Tensor]:
        """The first process's square norms, from which all then compute the same plan. Raises ProbeError."""
        assert self._reader is not None
        n = len(self._reader.weights)
        norms = torch.stack(self._usable) if self._usable else torch.zeros(0, n, dtype=torch.float64)
        seen = peers.gather((self._model, self._reader.weights, self._skipped, norms))
        model, weights, skipped, first = seen[0]
        for rank, (other_model, other_weights, other_skipped, other) in enumerate(seen):
            if (other_model, other_weights) != (model, weights):
                difference = "watched another model than process 0"
            elif (len(other), other_skipped) != (len(first), skipped):
                difference = f"saw {len(other)} steps and skipped {other_skipped}, process 0 {len(first)} and {skipped}"
            elif not torch.allclose(other, first, rtol=ALIKE, atol=0):
                difference = "saw other gradients than process 0"
            else:
                continue
            raise ProbeError(
                f"process {rank} {difference}: the gradients are not reduced over the processes (no_sync in every "
                "step, or no DistributedDataParallel), or each trains a model of its own: then pass group=False"
            )
        return list(first)

    def _make_reader(
        self, optimizer: Any, steps: int | None, *, begun: bool = False, kind: str | None = None
    ) -> Reader:
        kind, decoder = kind or self._estimator, self._decoder
        if kind == "auto":
            if has_lora(decoder):
                kind = "lora"
            elif steps is not None and why_not_adam(decoder, optimizer, steps) is None:
                kind = "adam"
            else:
                kind = "gradient"
        if kind == "lora":
            return LoraReader(decoder, importance=self._importance, factor_dtype=self._factor_dtype, peers=self._peers)
        if kind == "exact":
            return ExactReader(decoder, importance=self._importance, micro_batches=self._micro_batches)
        if kind == "gradient":
            return GradientReader(decoder, importance=self._importance, peers=self._peers)
        if steps is None:
            raise InvalidArgument("estimator 'adam' reads the optimizer: use probe.watching(optimizer, steps)")
        return AdamReader(decoder, optimizer, steps=steps, importance=self._importance, begun=begun, peers=self._peers)


def _check_held(reader: Reader, optimizer: Any) -> None:
    """Raises InvalidArgument where the optimizer does not hold all that trains and is watched.

    It would not clear the gradients of the rest, which then add up from step to step; and adapters of which B stays at
    zero show none at all.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    layers = sorted({layer for layer, parameter in reader.trained() if id(parameter) not in held})
    if layers:
        raise InvalidArgument(
            f"optimizer: it does not hold all the watched weights of layers {layers}; expected one that does. Freeze "
            "what is not meant to train (requires_grad_(False)), or, where another optimizer holds it, call "
            "probe.record() before the two step instead"
        )


def _steps_in_backward(optimizer: Any, decoder: Decoder) -> bool:
    """Whether the weights change, and their gradients go, during the backward pass."""
    fused = hasattr(optimizer, "fused_backward")  # lomo_optim's
    per_layer = getattr(optimizer, "optimizer_dict", None) is not None  # transformers' LayerWiseDummyOptimizer
    overlapped = any(hasattr(p, "_in_backward_optimizers") for p in decoder.layers.parameters())  # torch's own
    return fused or per_layer or overlapped
