"""The model card of a pruned checkpoint: what was removed, how it was chosen, what it cost, and how to load it."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gradpruner.checkpoint.save import PLAN_FILE
from gradpruner.checkpoint.stored_model import config_of
from gradpruner.errors import InvalidArgument, ModelMismatch
from gradpruner.model.load import DEMO_MODEL
from gradpruner.plan import Plan
from gradpruner.probe.igia import SCORES, Igia
from gradpruner.report.tables import markdown_table
from gradpruner.storage.files import atomic_path, read_json
from gradpruner.storage.links import check_links
from gradpruner.storage.tensor_files import read_folder
from gradpruner.version import __version__

CARD_FILE = "README.md"
TAG = "gradpruner"  # marks a card as one of ours
PAPER = "https://arxiv.org/abs/2601.19503"
# of the base model's card: what binds, or describes, whatever is made of it
CARRIED = ("license", "license_name", "license_link", "language")
DEMO_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def model_card(
    source: nn.Module | str | os.PathLike[str],
    plan: Plan | None = None,
    *,
    name: str | None = None,
    base_model: str | os.PathLike[str] | None = None,
    license: str | None = None,
    scores: Igia | Sequence[float] | None = None,
    kind: str | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    trust_remote_code: bool = False,
) -> str:
    """The text of README.md for a pruned model: YAML metadata that the hub reads, and what a person wants to know.

    source: the pruned model, or its checkpoint folder. plan: default the folder's gradpruner.json. name: hub id or
    path that the instructions for loading use. base_model: hub id or folder of the dense model; default where the
    model was loaded from. license: default that of the base model's card, in its folder, in the hub's cache, or left
    in `source`; nothing is downloaded. scores: an igia, or one score a layer. kind: of the scores, by default the kind
    that the plan was chosen by; an igia needs one, and no other is accepted. results: rows of a table with one line a
    measure, as `pipeline.comparison` makes them. trust_remote_code: for a config class that comes with the model.
    Raises InvalidArgument, ModelMismatch (the model does not have the layers that the plan keeps), CheckpointError.
    """
    folder = None if isinstance(source, nn.Module) else Path(source)
    for place in (folder, base_model):  # what their files say goes into the card
        if place is not None and Path(place).is_dir():
            check_links(place)
    if plan is None:
        if folder is None or not (folder / PLAN_FILE).is_file():
            raise InvalidArgument(f"plan = None; expected a plan, or a checkpoint folder with {PLAN_FILE}")
        plan = Plan.from_dict(read_json(folder / PLAN_FILE, "plan"))
    config: Any = config_of(folder, trust_remote_code) if folder is not None else getattr(source, "config", None)
    if config is None:
        raise InvalidArgument(f"source is a {type(source).__name__}; expected a transformers model or a folder")
    layers = config.get_text_config(decoder=True).num_hidden_layers
    if layers != len(plan.kept):
        raise ModelMismatch(f"the model has {layers} decoder layers; the plan keeps {len(plan.kept)}")
    kind = _kind(scores, kind, plan)
    values = _scores(scores, kind, plan)
    base, carried = _base(base_model if base_model is not None else _loaded_from(source, config), folder)
    if license is not None:
        carried = {key: value for key, value in carried.items() if not key.startswith("license")} | {"license": license}
    sections = [
        _metadata(base, carried),
        _introduction(name, base, plan),
        _ratios(plan, _parameter_ratio(plan, scores), _parameters(source)),
        _layers(plan, values, kind),
        "## Results\n\n" + markdown_table(results) if results else "",
        _loading(name),
        _method(),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def write_card(folder: str | os.PathLike[str], text: str) -> Path:
    """Write README.md of a checkpoint folder atomically. Raises InvalidArgument or CheckpointError."""
    path = Path(folder) / CARD_FILE
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def is_ours(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder's README.md is a card of a pruned model, not one that came along with the dense model."""
    return TAG in (_metadata_of(Path(folder) / CARD_FILE).get("tags") or ())


def carry_card(source: Path, folder: Path) -> None:
    """Write what the card of `source` says of its licence and base model into `folder`, with a model made from it.

    The dense model's card comes along whole. A card of ours describes another state of the model, so only these
    lines of it come along, for `model_card` to read.
    """
    card = _metadata_of(source / CARD_FILE)
    if TAG not in (card.get("tags") or ()):
        if (source / CARD_FILE).is_file():
            shutil.copyfile(source / CARD_FILE, folder / CARD_FILE)
    elif _named(card) or _carried(card):
        write_card(folder, _metadata_block(base_model=_named(card), **_carried(card)) + "\n")


def _kind(scores: Igia | Sequence[float] | None, kind: str | None, plan: Plan) -> str | None:
    """The kind of score that the card shows: the one that chose the layers, so that the table explains the cut."""
    if kind is not None and plan.kind is not None and kind != plan.kind:
        raise InvalidArgument(f"kind = {kind!r}; the plan was chosen by {plan.kind!r} scores: expected that, or None")
    found = kind or plan.kind
    if found is None and isinstance(scores, Igia):
        raise InvalidArgument(
            f"kind = None; the plan does not say which score chose it. Accepted are {', '.join(SCORES)}"
        )
    return found


def _scores(scores: Igia | Sequence[float] | None, kind: str | None, plan: Plan) -> list[float] | None:
    if scores is None:
        return None
    if isinstance(scores, Igia):
        if plan.model is not None and scores.model != plan.model:
            raise ModelMismatch("scores is an igia of another model than the plan was made for")
        assert kind is not None
        values = scores.layer_scores(kind).tolist()
    else:
        values = [float(score) for score in scores]
    if len(values) != plan.layers:
        raise InvalidArgument(f"scores has {len(values)} values; expected {plan.layers}, one for every layer")
    return values


def _loaded_from(source: nn.Module | str | os.PathLike[str], config: Any) -> str | None:
    """Where a model in memory came from; a folder is the pruned model's own and says nothing of that."""
    origin = getattr(config, "name_or_path", None) if isinstance(source, nn.Module) else None
    known = origin and (Path(origin).is_dir() or ("/" in origin and HUB_ID.fullmatch(origin)))
    return origin if known else None


def _base(base_model: str | os.PathLike[str] | None, folder: Path | None) -> tuple[str | None, dict[str, Any]]:
    """Hub id of the base model, and what its card says that must be carried over."""
    left = _metadata_of(folder / CARD_FILE) if folder is not None else {}
    own = left if TAG not in (left.get("tags") or ()) else {}  # the dense model's card, copied along
    if base_model is None:
        return _named(own), _carried(own)
    if str(base_model) == DEMO_MODEL:
        return DEMO_BASE, {"license": "apache-2.0", "language": "en"}
    if Path(base_model).is_dir():
        card = _metadata_of(Path(base_model) / CARD_FILE)
        return _named(card), _carried(card) or _carried(own)
    if Path(base_model).is_file():
        return None, _carried(own)
    if not HUB_ID.fullmatch(str(base_model)):
        raise InvalidArgument(
            f"base_model = {str(base_model)!r}; accepted are a hub id ('name' or 'owner/name') and a folder"
        )
    return str(base_model), _carried(_cached_card(str(base_model))) or _carried(own)


def _named(card: Mapping[str, Any]) -> str | None:
    """A folder has no hub id, but its card may name the model that it was made from."""
    base = card.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    return base if isinstance(base, str) and HUB_ID.fullmatch(base) else None


def _carried(card: Mapping[str, Any]) -> dict[str, Any]:
    return {key: card[key] for key in CARRIED if card.get(key)}


def _cached_card(hub_id: str) -> dict[str, Any]:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, CARD_FILE)
    return _metadata_of(Path(found)) if isinstance(found, str) else {}


def _metadata_of(path: Path) -> dict[str, Any]:
    """A card's metadata; nothing where there is no card, or none that can be read."""
    from huggingface_hub import ModelCard

    if not path.is_file():
        return {}
    try:
        return dict(ModelCard.load(path, ignore_metadata_errors=True).data.to_dict())
    except Exception:  # somebody else's file: not UTF-8, not YAML, ...
        return {}


def _metadata(base: str | None, carried: Mapping[str, Any]) -> str:
    return _metadata_block(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[TAG, "pruned", "layer-pruning"],
        **carried,
    )


def _metadata_block(**known: Any) -> str:
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**known).to_yaml()}\n---"


def _introduction(name: str | None, base: str | None, plan: Plan) -> str:
    title = Path(name or base or "model").name + ("" if name else ", pruned")
    of = f"[{base}](https://huggingface.co/{base})" if base else "a larger model"
    again = (
        ""
        if plan.before is None
        else (
            f" It was pruned more than once: the last time from {plan.layers} to {len(plan.kept)} decoder layers, which is "
            "what the tables and lists below describe."
        )
    )
    gone = plan.dense_layers - len(plan.kept)
    return (
        f"# {title}\n\nThis is {of} with {gone} of its {plan.dense_layers} decoder layers removed: those "
        "whose gradients in the first fine-tuning steps said that the task needs them least."
        f"{again} An ordinary checkpoint: nothing but stock `transformers` is needed to load it."
    )


def _parameters(source: nn.Module | str | os.PathLike[str]) -> int:
    if isinstance(source, nn.Module):
        return sum(parameter.numel() for parameter in source.parameters())
    return sum(math.prod(stored.shape) for stored in read_folder(Path(source)).values())


def _parameter_ratio(plan: Plan, scores: Igia | Sequence[float] | None) -> float | None:
    if plan.parameter_ratio is None and isinstance(scores, Igia):
        return scores.parameter_ratio(plan.removed)
    return plan.parameter_ratio


def _ratios(plan: Plan, parameter_ratio: float | None, parameters: int) -> str:
    dense = None if parameter_ratio is None else parameters / (1 - parameter_ratio)
    share = "not recorded" if parameter_ratio is None else f"{parameter_ratio:.1%}"
    dense_name = "dense" if plan.before is None else "before"
    rows: list[dict[str, Any]] = [
        {"": "decoder layers", dense_name: plan.layers, "pruned": len(plan.kept), "removed": f"{plan.layer_ratio:.1%}"},
        {
            "": "all parameters (M)",
            dense_name: "" if dense is None else f"{dense / 1e6:.1f}",
            "pruned": f"{parameters / 1e6:.1f}",
            "removed": share,
        },
    ]
    return "## Size\n\n" + markdown_table(rows)


def _layers(plan: Plan, scores: Sequence[float] | None, kind: str | None) -> str:
    assert isinstance(plan.merge, Mapping)
    merged = ", ".join(f"{donors} into {target}" for target, donors in _merges(plan)) or "none"
    lists = (
        f"* kept: {list(plan.kept)}\n* dropped: {list(plan.drop)}\n* merged, then removed: {merged}\n\n"
        f"Numbers are those of the layers of the {'dense model' if plan.before is None else 'model before'}, from 0."
    )
    if scores is None:
        return f"## Layers\n\n{lists}"
    fates = {**dict.fromkeys(plan.drop, "dropped"), **{j: f"merged into {t}" for j, t in plan.merge.items()}}
    rows = [
        {"layer": layer, "score": f"{score:.4g}", "": fates.get(layer, "kept")} for layer, score in enumerate(scores)
    ]
    named = f" (`{kind}`)" if kind else ""
    return f"## Layers\n\n{lists}\n\nScores{named}, the lowest go first:\n\n{markdown_table(rows)}"


def _merges(plan: Plan) -> list[tuple[int, str]]:
    return [(target, " and ".join(map(str, donors))) for target, donors in plan.donors.items()]


def _loading(name: str | None) -> str:
    where = repr(name or "path/to/this/folder")
    return (
        "## How to load it\n\n```python\nfrom transformers import pipeline\n\n"
        f'generate = pipeline("text-generation", model={where})\nprint(generate("Once upon a time"))\n```'
    )


def _method() -> str:
    return (
        "## How it was made\n\n"
        f"With [GradPruner]({PAPER}) (ICLR 2026, arXiv 2601.19503), as `gradpruner` {__version__} implements it: the "
        "gradients of the first fine-tuning steps score every decoder layer; the lowest go. Of a merged layer, the "
        "most important entries are added to the layer it goes into where their signs agree. `gradpruner.json` holds "
        "the plan. The checkpoint was read back and verified before it got its name."
    )
