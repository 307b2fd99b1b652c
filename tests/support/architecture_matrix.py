"""Every architecture that transformers registers for text: a tiny random one, cut, saved, reloaded, compared.

`python tests/support/architecture_matrix.py` prints the results; architecture_page.py writes them to docs/decoders.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import inspect
import re
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers as hf
from tiny_configs import LAYERS, REGISTERED, sub_configs, tiny_config

import gradpruner
from gradpruner.model.decoder import Decoder
from gradpruner.model.parameter_counts import count_parameters
from gradpruner.probe.igia import Igia
from gradpruner.probe.importance import Dense

WORKS, LAST, REFUSED, UNBUILT, WRONG = "works", "last layers only", "refused", "not built", "WRONG"
# The layers to remove, until a choice is accepted. The last ones need no renumbering and prove little.
SCATTERED = ((1, 3, 4), (1, 3), (2, 4), (1, 4), (2, 5), (3, 5), (1, 2, 3), (2, 3), (1,), (3,))
CHOICES = (*SCATTERED, (4, 5), (5,))
LARGEST = 500_000_000  # parameters
IMAGES = {"pixel_values": (3, 16, 16)}


@dataclasses.dataclass
class Outcome:
    """What became of one architecture; WRONG, a failure that nothing reported, must never be."""

    group: str
    model_type: str
    kind: str
    status: str = UNBUILT
    removed: tuple[int, ...] = ()
    merged: bool = False
    note: str = ""

    def row(self) -> str:
        removed = ", ".join(map(str, self.removed)) + (", one merged" if self.merged else "")
        return f"| {self.model_type} | {self.kind} | {self.status} | {removed} | {plain(self.note)} |"


def plain(note: str) -> str:
    """One short line that is the same in every run."""
    line = re.sub(r"\s+", " ", note).replace("|", "/").replace("<", "").replace(">", "")
    line = re.sub(r" \(by [^)]*\)", "", line).replace("Class validation error for validator ", "")
    return line if len(line) <= 220 else line[:217] + "..."


def architectures() -> list[tuple[str, str]]:
    """(group, model type), each class once for each model type."""
    names = [(group, name, kind) for group, (_, mapping) in REGISTERED.items() for name, kind in mapping.items()]
    first = {(name, kind): (group, name) for group, name, kind in reversed(names)}
    return [(group, name) for group, name, kind in names if first[name, kind] == (group, name)]


def build(group: str, model_type: str) -> torch.nn.Module:
    """A random model whose norms, biases and weights are all different, so that a mix-up shows."""
    automatic, names = REGISTERED[group]
    kind, registered = getattr(hf, names[model_type]), hf.CONFIG_MAPPING[model_type]
    own = kind.config_class if kind.config_class in sub_configs(registered).values() else registered
    config = tiny_config(own)
    _check_size(kind, config)
    torch.manual_seed(0)
    model = automatic.from_config(config) if config.__class__ in automatic._model_mapping else kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.requires_grad:
                parameter.copy_(torch.nan_to_num(parameter) + torch.randn_like(parameter) * 0.05)
    return model.float().eval()


def _check_size(kind, config) -> None:
    """Raises ValueError where a part that the shrinker does not know is as large as in earnest."""
    size = 0
    with contextlib.suppress(Exception), torch.device("meta"):  # what cannot be built says so itself, later
        size = sum(parameter.numel() for parameter in kind(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"its tiny config describes {size / 1e9:.1f} billion parameters")


def inputs_of(model, rows: int = 2, length: int = 14) -> dict[str, torch.Tensor]:
    """Token ids, and what else the model cannot do without."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (rows, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.flip(1)[:, :9]
    wanted = inspect.signature(model.forward).parameters
    for name, shape in IMAGES.items():
        if name in wanted and wanted[name].default is inspect.Parameter.empty:
            inputs[name] = torch.rand((rows, *shape), generator=generator)
    if "bbox" in wanted:
        inputs["bbox"] = torch.zeros(rows, length, 4)
    return inputs


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


def generated(model, inputs, cache: bool) -> torch.Tensor:
    """Logits of every step of greedy generation."""
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    torch.manual_seed(0)
    output = model.generate(
        **given,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        use_cache=cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.logits)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return False
    finite = a.isfinite()
    return bool((a[finite] - b[finite]).abs().max() <= tolerance * a[finite].abs().max())


def layers_that_run(model, inputs) -> str | None:
    """The path of the list of decoder layers, told by what runs: the oracle does not ask the code under test."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS}
    ran: set[str] = set()
    handles = [
        layer.register_forward_hook(lambda *_, name=f"{n}.{i}": ran.add(name))
        for n, m in lists.items()
        for i, layer in enumerate(m)
    ]
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    # without an image some layers do not run (Mllama's cross-attention)
    running = [n for n in lists if sum(f"{n}.{i}" in ran for i in range(LAYERS)) > LAYERS // 2]
    outer = [n for n in running if not any(n.startswith(f"{o}.") for o in running if o != n)]
    if len(outer) > 1:  # an encoder's too
        outer = [n for n in outer if any(part.endswith("decoder") for part in n.split("."))]
    return outer[0] if len(outer) == 1 else None


@contextlib.contextmanager
def skipping(model, path: str, removed: tuple[int, ...]):
    """The dense model with those layers handing on what they are given, nothing renumbered."""

    def hand_on(module, args, kwargs, output):
        given = args or (kwargs["hidden_states"],)
        if torch.is_tensor(output):
            return given[0]
        # XLNet's second stream is an input and an output too
        through = [
            torch.is_tensor(x) and torch.is_tensor(y) and x.shape == y.shape and x.is_floating_point()
            for x, y in zip(given, output, strict=False)
        ]
        return tuple(given[i] if i < len(through) and through[i] else y for i, y in enumerate(output))

    layers = model.get_submodule(path)
    handles = [layers[i].register_forward_hook(hand_on, with_kwargs=True) for i in removed]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def igia_of(model) -> Igia:
    """Random importance of every weight: what is under test here is the surgery."""
    decoder, generator = Decoder(model), torch.Generator().manual_seed(0)
    layers = range(len(decoder.layers))
    return Igia(
        model=decoder.fingerprint(),
        estimator="gradient",
        layers=len(layers),
        weights=tuple(decoder.weights),
        square_norms=torch.rand(2, len(decoder.weights), generator=generator, dtype=torch.float64),
        structures=tuple(decoder.structure(j) for j in layers),
        **count_parameters(decoder),
        importance={(w.layer, w.name): Dense(torch.rand(w.shape, generator=generator)) for w in decoder.weights},
    )


def plan_of(removed: tuple[int, ...], igia: Igia) -> gradpruner.Plan:
    """Removes these layers, the first that can be merged into a kept one before it so."""
    weighted = {weight.layer for weight in igia.weights}
    for layer in removed:
        before = [i for i in range(layer) if i not in removed and igia.structures[i] == igia.structures[layer]]
        if before and layer in weighted:
            return gradpruner.Plan(LAYERS, drop=[i for i in removed if i != layer], merge={layer: before[-1]})
    return gradpruner.Plan(LAYERS, drop=removed)


def examine(group: str, model_type: str) -> Outcome:
    """Cut one architecture and compare everything; never raises."""
    outcome = Outcome(group, model_type, REGISTERED[group][1][model_type])
    try:
        model = build(group, model_type)
        inputs = inputs_of(model)
        path = layers_that_run(model, inputs)
        assert logits(model, inputs).isfinite().any(), "no finite logits"
    except Exception as error:
        outcome.note = f"{type(error).__name__}: {error}"
        return outcome
    try:
        cut(outcome, model, inputs, path)
    except gradpruner.UnsupportedModel as error:
        outcome.status, outcome.note = REFUSED, str(error)
    except Exception as error:
        reason = unsavable(group, model_type) if isinstance(error, gradpruner.CheckpointError) else None
        outcome.status, outcome.note = (UNBUILT, reason) if reason else (WRONG, f"{type(error).__name__}: {error}")
    return outcome


def unsavable(group: str, model_type: str) -> str | None:
    """Why the uncut model cannot be saved and read back either, None if it can."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            gradpruner.save(build(group, model_type), Path(folder) / "dense")
        except Exception as error:
            return f"does not read back even uncut: {error}"
    return None


def cut(outcome: Outcome, model, inputs, path: str | None) -> None:
    """Remove the first accepted choice of layers, then compare; a refusal must leave the model as it was."""
    dense, igia, before_cut = copy.deepcopy(model), igia_of(model), size_of(model)
    before, config, notes = copy.deepcopy(model.state_dict()), model.config.to_dict(), []
    for removed in CHOICES:
        plan = plan_of(removed, igia)
        try:
            small = gradpruner.apply(model, plan, igia)
            break
        except gradpruner.UnsupportedModel as error:
            notes.append(f"without {', '.join(map(str, removed))}: {error}")
            after = model.state_dict()
            assert model.config.to_dict() == config and after.keys() == before.keys(), "a refusal changed the model"
            assert all(torch.equal(before[name], after[name]) for name in before), "a refusal changed weights"
    else:
        raise gradpruner.UnsupportedModel(notes[0].partition(": ")[2])
    share = (before_cut - size_of(small)) / before_cut
    assert igia.parameter_ratio(plan.removed) == share, f"{share:.1%} of all parameters went, not what the igia says"
    outcome.status = WORKS if removed in SCATTERED else LAST
    outcome.removed, outcome.merged = plan.removed, bool(plan.merge)
    wrong, remarks = compare(dense, small, plan, path, inputs, REGISTERED[outcome.group][0])
    if wrong:
        outcome.status = WRONG
    outcome.note = "; ".join([*wrong, *notes[:1], *remarks])


def size_of(model: torch.nn.Module) -> int:
    """The number of its parameters, each once: the oracle does not ask the code under test."""
    return sum(parameter.numel() for parameter in model.parameters())


def changed(before: torch.nn.Module, after: torch.nn.Module) -> dict[str, float]:
    """The share of entries that differ, of every tensor of a layer."""
    old = before.state_dict()
    return {name: (value != old[name]).double().mean().item() for name, value in after.state_dict().items()}


def compare(dense, small, plan, path, inputs, automatic) -> tuple[list[str], list[str]]:
    """What is wrong with the smaller model, and remarks about the uncut one."""
    if path is None or Decoder(dense).path != path:
        return [f"layers found at {Decoder(dense).path}, but those that run are at {path}"], []
    for target in plan.donors:  # the oracle gets the merged weights; merging itself is tested elsewhere
        own, merged = dense.get_submodule(path)[target], small.get_submodule(path)[plan.kept.index(target)]
        names = {weight.name for weight in Decoder(dense).weights if weight.layer == target}
        shares = changed(own, merged)
        if not any(shares.values()):
            return [f"nothing was merged into layer {target}"], []
        if any(share > (0.25 if name in names else 0) for name, share in shares.items()):
            return [f"layer {target} has other weights than its own and the merged ones"], []
        own.load_state_dict(merged.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        gradpruner.save(small, Path(folder) / "small")
        stock = automatic if type(small.config) in automatic._model_mapping else type(small)
        again = stock.from_pretrained(Path(folder) / "small").eval()
    models = {"cut": small, "reloaded": again}
    wrong, remarks = [], []
    with skipping(dense, path, plan.removed):
        expected = logits(dense, inputs)
    wrong += [f"{name} logits" for name, model in models.items() if not same(expected, logits(model, inputs), 5e-5)]
    answers = {}
    for cache in (True, False):
        try:
            with skipping(dense, path, plan.removed):
                answers[cache] = generated(dense, inputs, cache)
        except Exception:
            remarks.append(f"the uncut model does not generate {'with' if cache else 'without'} a cache either")
            continue
        for name, model in models.items():
            try:
                if not same(answers[cache], generated(model, inputs, cache), 1e-4):
                    wrong.append(f"{name} generation, cache={cache}")
            except Exception as error:
                wrong.append(f"{name} generation, cache={cache}: {type(error).__name__}: {error}")
    if len(answers) == 2 and not same(answers[True], answers[False], 1e-4):
        remarks.append("the uncut model too generates differently with a cache")
    return wrong, remarks


def examine_all(names: list[str]) -> list[Outcome]:
    """What becomes of these model types, or of every one; each row is printed when it is known."""
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    outcomes = []
    for group, name in architectures():
        if not names or name in names:
            outcomes.append(examine(group, name))
            print(outcomes[-1].row(), flush=True)
    print(dict(Counter(outcome.status for outcome in outcomes)))
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; by default all")
    outcomes = examine_all(parser.parse_args().names)
    return int(any(outcome.status == WRONG for outcome in outcomes))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.exit(main())
