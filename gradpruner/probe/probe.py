"""Watch the first steps of any training loop, and make an `Igia` of their gradients."""

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
from gradpruner.distributed.processes import is_lost, lost_process, peers_of
from gradpruner.errors import InvalidArgument, ModelMismatch, ProbeError
from gradpruner.model.decoder import Decoder
from gradpruner.model.optimizers import unwrapped
from gradpruner.model.parameter_counts import count_parameters
from gradpruner.probe.agreement import agreed_norms
from gradpruner.probe.closure import Arguments, ReadAfterClosure, closure_of
from gradpruner.probe.coverage import Coverage, share_range
from gradpruner.probe.estimators import Reader
from gradpruner.probe.estimators.exact import ExactReader
from gradpruner.probe.estimators.gradient import AdamReader, GradientReader, why_not_adam
from gradpruner.probe.estimators.lora import LoraReader, has_lora
from gradpruner.probe.host_copies import Arrival
from gradpruner.probe.igia import Igia
from gradpruner.probe.importance import shared
from gradpruner.probe.optimizer_checks import check_holds, check_watchable

logger = logging.getLogger(__name__)

ESTIMATORS = ("auto", "lora", "gradient", "adam", "exact")
AHEAD = 2  # steps whose copies may be under way; the host waits for the one before, which is long done
HALF = 0.5  # share of a layer's parameters; a warning is logged where fewer are watched


class Probe:
    """Reads the gradients of a model once per optimizer step, just before they are used.

    In several processes (DistributedDataParallel, FSDP2), every process makes a probe and calls the same methods in the
    same order. Each process stores a part of the importance.

    Args:
        model: a PEFT model (LoRA, DoRA) or a plain one, wrapped or not.
        layers: path of the ModuleList of decoder layers, or the list itself, for a model that is not Hugging Face's.
        estimator: how gradients are read. "lora" multiplies the gradients of the two factors of each adapter.
            "gradient" reads the gradients of the weights, "adam" Adam's running mean of their squares. "exact" squares
            the true gradient of frozen or trained weights inside the backward pass, in one process only. "auto"
            (default) takes "lora" if there are adapters, else "adam" if Adam's state can be used, else "gradient".
        importance: False keeps layer scores only. That is enough for plans that merge nothing, such as those of the
            preset "default". Default True.
        factor_dtype: dtype of stored LoRA factors. torch.bfloat16 halves the host memory and changes about 0.1 % of a
            mask. Default torch.float32.
        micro_batches: backward calls per optimizer step; "exact" needs it for weights that train. Default 1.
        group: the processes that train this model together: a torch ProcessGroup. None (default) means the default
            group, False that each process trains a model of its own.

    Raises:
        InvalidArgument: an argument is not accepted.
        UnsupportedModel: the decoder layers are not found, or are sharded in a way that cannot be read.
        ProbeError: gradients cannot be read.

    Example:
        probe = gradpruner.Probe(model)
        with probe.watching(optimizer, steps=40):
            train(model, optimizer)
        plan = probe.igia.plan(ratio=0.4)

    Source: docs/method.md, section 1.
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
        self._remaining = 0  # steps that are still to be watched
        self._pending: list[tuple[Tensor, Arrival]] = []
        self._usable: list[Tensor] = []
        self._skipped = 0
        self._igia: Igia | None = None
        self._closure: ReadAfterClosure | None = None  # of the step under way
        if estimator == "exact":  # the first backward pass already counts
            self._reader = self._make_reader(None, None)

    @property
    def steps(self) -> int:
        """Number of optimizer steps so far, skipped ones included."""
        return len(self._pending) + len(self._usable) + self._skipped

    @contextlib.contextmanager
    def watching(self, optimizer: Any, steps: int) -> Iterator[Probe]:
        """Watch the first optimizer steps of the loop inside the block.

        The probe stops by itself after `steps` steps, or when the block ends.

        Args:
            optimizer: the torch optimizer, or accelerate's wrapper around it.
            steps: number of steps to watch; 1 % of the run, but at least 20, is a good choice.

        Yields:
            The probe.

        Raises:
            InvalidArgument: as `start`.
            ProbeError: gradients cannot be read, or another process of the group has died.
        """
        self.start(optimizer, steps)
        try:
            yield self
        except BaseException as error:
            if self._peers is None:
                self.stop()
                raise
            self.abandon()  # the other processes may be anywhere: nothing can be finished together
            if isinstance(error, RuntimeError) and is_lost(error):
                raise lost_process(error, self._peers.group) from error
            raise
        self.stop()

    def start(self, optimizer: Any, steps: int, *, resume: Igia | None = None) -> None:
        """Begin to watch, as `watching` does, but without a block.

        The probe finishes after `steps` steps. `stop` ends it earlier, and removes its hooks. If `optimizer.step` gets
        a closure, the closure is called first, and the gradients that it computed are read.

        Args:
            optimizer: the torch optimizer, or accelerate's wrapper around it.
            steps: number of steps to watch, those before an interruption included.
            resume: the `snapshot` of a probe that was interrupted. This probe goes on from its steps.

        Raises:
            InvalidArgument: the steps of this optimizer cannot be watched, or the probe has watched already.
            ModelMismatch: the snapshot belongs to another model, or watched other weights.
            ProbeError: gradients cannot be read.
        """
        check_int("steps", steps, 1, "a number of optimizer steps")
        if self._handles or self._igia is not None:
            raise InvalidArgument("this probe is already watching, or has finished; make a new one")
        optimizer = unwrapped(optimizer)  # hooks belong on the one that really steps
        check_watchable(optimizer, self._decoder, by_deepspeed=self._by_deepspeed())
        if resume is not None:
            self._go_on(optimizer, steps, resume)
        self._reader = self._reader or self._make_reader(optimizer, steps)
        check_holds(optimizer, self._reader)
        self._warn_of_unwatched(self._reader)
        self._remaining = steps - self.steps
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            # the last step has to be in Adam's state before that is read
            optimizer.register_step_post_hook(lambda optimizer, args, kwargs: self._after_step()),
        ]

    def stop(self) -> None:
        """Stop watching, and undo all changes to the model. The steps so far are kept."""
        self.abandon()
        if self._igia is None and self.steps:
            self._finish()

    def abandon(self) -> None:
        """Undo all changes to the model, without a result and without waiting for other processes."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._reader is not None:
            self._reader.close()

    def record(self, optimizer: Any = None) -> None:
        """Read the gradients now, before `optimizer.step()`: for optimizers without hooks.

        In a loop that gives `step` a closure, call it at the end of the closure.

        Args:
            optimizer: needed in two cases, otherwise None (default). First, a fused optimizer under GradScaler: its
                attributes `grad_scale` and `found_inf` say whether gradients are still scaled. They exist only inside
                `scaler.step`. Before `scaler.step`, call `scaler.unscale_(optimizer)` instead. Second, DeepSpeed
                (ZeRO 1 to 3): pass `engine.optimizer`. Every process then calls this method once per step, between
                `engine.backward(loss)` and `engine.step()`.

        Raises:
            InvalidArgument: the estimator is "adam", which needs `start` or `watching`; or the model is DeepSpeed's,
                and `optimizer` is not `engine.optimizer`.
            ProbeError: the probe has finished, or gradients cannot be read.
        """
        if self._igia is not None:
            raise ProbeError("this probe has finished; make a new one")
        if self._reader is None:
            self._reader = self._make_reader(None, None)
            self._warn_of_unwatched(self._reader)
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        if found_inf is not None:
            rejected = bool(found_inf > 0)
            if self._peers is not None:
                rejected = self._peers.any(rejected)
            if rejected:  # the optimizer is about to leave this step out
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
        """The result. Reading it ends the probe. Raises ProbeError before the first step."""
        if self._igia is None:
            if self.steps == 0:
                raise ProbeError("the probe has seen no optimizer step")
            self.stop()
        assert self._igia is not None
        return self._igia

    @property
    def finished(self) -> bool:
        """Whether the probe has watched all its steps, or was ended."""
        return self._igia is not None

    def snapshot(self) -> Igia:
        """Return the result so far, for `start(..., resume=...)`. The probe goes on.

        In several processes, all of them call this method, save the result, and resume from it.

        Returns:
            An igia. It has no importance if the optimizer's own state holds it (estimator "adam").

        Raises:
            ProbeError: the probe has not begun.
        """
        if self._igia is not None:
            return self._igia
        if self._reader is None:
            raise ProbeError("the probe has not begun to watch")
        self._settle()
        # an interrupted probe on Adam finds F in the optimizer's state again
        return self._result(with_importance=self._reader.name != "adam")

    def check_comparable(self, protect: Iterable[int] = (0,)) -> None:
        """Check, before the first step, that the layer scores of this probe will be comparable.

        `Igia.plan` refuses a probe that does not pass. If you only want to look at the scores, it need not pass.

        Args:
            protect: layers that will not be removed. Default: the first layer.

        Raises:
            ProbeError: the scores of some layers could not be compared. The message names them and says what to do.
        """
        reader = self._reader
        if reader is None:
            known = "gradient" if self._estimator == "adam" else None  # Adam's reader needs the optimizer
            reader = self._make_reader(None, None, kind=known)
        self._coverage(reader).check_comparable(protect)

    def _go_on(self, optimizer: Any, steps: int, snapshot: Igia) -> None:
        """Take over the steps of a probe that was interrupted."""
        known = snapshot.steps + snapshot.skipped
        if not 0 < known < steps:
            raise InvalidArgument(f"resume: the snapshot has {known} steps; expected 1 to {steps - 1} (steps - 1)")
        self._decoder.check_fingerprint(snapshot.model, "the snapshot")
        if self._reader is None:
            requested, self._estimator = self._estimator, snapshot.estimator
            if requested not in ("auto", snapshot.estimator):
                raise InvalidArgument(f"resume: the snapshot's estimator is {snapshot.estimator!r}, not {requested!r}")
            self._reader = self._make_reader(optimizer, steps, begun=True)
        if self._reader.weights != snapshot.weights:
            raise ModelMismatch("the snapshot watched other weights than this model trains")
        self._reader.restore(snapshot.importance)
        self._model, self._usable, self._skipped = snapshot.model, list(snapshot.square_norms), snapshot.skipped

    def _by_deepspeed(self) -> bool:
        return any(is_deepspeeds(p) for p in self._decoder.layers.parameters() if p.requires_grad)

    def _coverage(self, reader: Reader) -> Coverage:
        return Coverage.of(self._decoder, reader.weights, reader.name, reader.adapters, counts=self._counts)

    def _warn_of_unwatched(self, reader: Reader) -> None:
        """Log, before time is spent, which layers are watched to less than half."""
        shares = self._coverage(reader).shares
        few = [layer for layer, share in enumerate(shares) if 0 < share < HALF]
        if few:
            logger.warning(
                f"the probe watches {share_range([shares[j] for j in few])} of the parameters of layers {few}: the "
                "scores say nothing about their other parameters"
            )

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Read the gradients, or arrange that they are read after the closure."""
        if self._remaining <= 0:
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
        """Count the step, and finish after the last one."""
        closure, self._closure = self._closure, None
        if closure is not None and not closure.calls:
            raise ProbeError("the optimizer did not call the closure that its step was given: no gradient was read")
        self._remaining -= 1
        if self._remaining == 0:  # the hooks stay until `stop`: torch is iterating over them just now
            self._finish()

    def _settle(self, *, but: int = 0) -> None:
        """Take in all pending steps but the last `but`, and leave out those that are not finite."""
        assert self._reader is not None
        settled = self._pending[: max(len(self._pending) - but, 0)]
        if not settled:
            return
        for _, arrival in settled:  # every one: each step may have read from other devices
            arrival.wait()
        # Copies, because the memory in which the norms arrived is pinned, and later steps reuse it.
        finite = [norms.clone() if bool(norms.isfinite().all()) else None for norms, _ in settled]
        self._reader.settle(finite)
        self._usable += [norms for norms in finite if norms is not None]
        self._skipped += sum(norms is None for norms in finite)
        del self._pending[: len(settled)]

    def _finish(self) -> None:
        assert self._reader is not None
        self._settle()
        self._reader.close()
        self._igia = self._result(with_importance=True)

    def _result(self, *, with_importance: bool) -> Igia:
        """Make an igia of the steps so far. This is a collective."""
        assert self._reader is not None
        decoder, reader = self._decoder, self._reader
        norms = torch.zeros(0, len(reader.weights), dtype=torch.float64)
        norms = torch.stack(self._usable) if self._usable else norms
        if self._peers is not None:
            norms = agreed_norms(self._peers, self._model, reader.weights, self._skipped, norms)
            self._usable = list(norms)
        importance = reader.importance() if with_importance else shared({}, {}, self._peers)
        return Igia(
            model=self._model,
            estimator=reader.name,
            layers=len(decoder.layers),
            weights=reader.weights,
            square_norms=norms,
            structures=tuple(decoder.structure(j) for j in range(len(decoder.layers))),
            importance=importance,
            skipped=self._skipped,
            **self._counts,
            adapters=reader.adapters,
        )

    def _make_reader(
        self, optimizer: Any, steps: int | None, *, begun: bool = False, kind: str | None = None
    ) -> Reader:
        """Make the reader of an estimator; "auto" chooses it here."""
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
