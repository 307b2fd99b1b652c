"""The model card of a pruned checkpoint: what was removed, why, and how to load it."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gradpruner.checkpoint.save import PLAN_FILE
from gradpruner.checkpoint.stored_model import StoredModel, config_of
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
TEMPLATE = Path(__file__).parent / "templates" / "card.md"
TAG = "gradpruner"  # marks a card as one of ours
PAPER = "https://arxiv.org/abs/2601.19503"
# Fields of the base model's card that also hold for models made from it.
CARRIED = ("license", "license_name", "license_link", "language")
DEMO_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_METADATA = {"license": "apache-2.0", "language": "en"}


def model_card(
    source: nn.Module | StoredModel | str | os.PathLike[str],
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
    """Return the text of README.md for a pruned model.

    It begins with metadata that the hub reads. Nothing is downloaded.

    Args:
        source: the pruned model, its checkpoint folder, or that folder as `StoredModel` has read it.
        plan: which layers were removed. Default: the folder's gradpruner.json.
        name: hub id or path that the instructions for loading use. Default: "path/to/this/folder".
        base_model: hub id or folder of the dense model. Default: where the model in memory was loaded from, or what
            the folder's README.md says.
        license: a license id such as "mit". Default: that of the base model's card in its folder or in the hub's
            cache, or that of a card of the dense model in `source`.
        scores: the layer scores for a table: an `Igia`, or one number per layer of the dense model. Default: no table.
        kind: which scores they are: "squared", "norm", "normalized", ... Default: the kind that the plan was chosen
            by, and no other is accepted then. An `Igia` needs a kind if the plan names none.
        results: rows of a table with one line per measure, as `gradpruner.run.summary.comparison` makes them.
        trust_remote_code: whether to run Python code from the folder. It is needed if the config class comes with the
            model. Default False.

    Returns:
        Markdown with a YAML header. `write_card` writes it.

    Raises:
        InvalidArgument: there is no plan, `source` has no config, `kind` or the number of scores is wrong, or
            `base_model` is neither a hub id nor a folder.
        ModelMismatch: the model does not have the layers that the plan keeps, or `scores` are another model's.
        CheckpointError: a file in the folder is damaged, or a symbolic link leads out of it.

    Example:
        ```python
        text = gradpruner.model_card("small", base_model="owner/dense", license="mit", name="owner/small")
        ```
    """
    from huggingface_hub import ModelCard

    folder = (
        source.folder if isinstance(source, StoredModel) else None if isinstance(source, nn.Module) else Path(source)
    )
    for place in (folder, base_model):  # what their files say goes into the card
        if place is not None and Path(place).is_dir():
            check_links(place)
    # 1. the plan, checked against the model
    if plan is None:
        if folder is None or not (folder / PLAN_FILE).is_file():
            raise InvalidArgument(f"plan = None; expected a plan, or a checkpoint folder with {PLAN_FILE}")
        plan = Plan.from_dict(read_json(folder / PLAN_FILE, "plan"))
    config = _config(source, folder, trust_remote_code)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    if layers != len(plan.kept):
        raise ModelMismatch(f"the model has {layers} decoder layers; the plan keeps {len(plan.kept)}")
    # 2. the scores that chose the layers
    kind = _kind(scores, kind, plan)
    values = _score_values(scores, kind, plan)
    # 3. the base model, and what its card says that holds for this model too
    base, carried = _base(base_model if base_model is not None else _loaded_from(source, config), folder)
    if license is not None:
        carried = {key: value for key, value in carried.items() if not key.startswith("license")} | {"license": license}
    # 4. the text
    ratio = plan.parameter_ratio
    if ratio is None and isinstance(scores, Igia):
        ratio = scores.parameter_ratio(plan.removed)
    card = ModelCard.from_template(
        _metadata(base, carried),
        template_path=str(TEMPLATE),
        title=Path(name or base or "model").name + ("" if name else ", pruned"),
        base=base,
        plan=plan,
        sizes=markdown_table(_size_rows(plan, ratio, _parameters(source))),
        scores=markdown_table(_score_rows(plan, values)) if values is not None else "",
        kind=kind,
        results=markdown_table(results) if results else "",
        where=repr(name or "path/to/this/folder"),
        paper=PAPER,
        version=__version__,
    )
    return f"{card.content.rstrip()}\n"


def write_card(folder: str | os.PathLike[str], text: str) -> Path:
    """Write README.md of a checkpoint folder, atomically.

    Args:
        folder: an existing folder.
        text: the card, as `model_card` returns it.

    Returns:
        The path of the file.

    Raises:
        InvalidArgument: the folder does not exist.
        CheckpointError: the file cannot be written.
    """
    path = Path(folder) / CARD_FILE
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def is_ours(folder: str | os.PathLike[str]) -> bool:
    """Return whether the folder's README.md is a pruned model's card from this package."""
    return TAG in (_metadata_of(Path(folder) / CARD_FILE).get("tags") or ())


def carry_card(source: Path, folder: Path) -> None:
    """Copy licence and base model from the card of a model to a model made from it.

    The dense model's card is copied whole. A card that this package wrote describes another state of the model. Then
    only its licence, language and base model are written, for `model_card` to read.

    Args:
        source: the checkpoint folder that the model was made from. It need not have a card.
        folder: the folder of the new model.
    """
    card = _metadata_of(source / CARD_FILE)
    if TAG not in (card.get("tags") or ()):
        if (source / CARD_FILE).is_file():
            shutil.copyfile(source / CARD_FILE, folder / CARD_FILE)
    elif _base_of(card) or _carried(card):
        from huggingface_hub import ModelCardData

        metadata = ModelCardData(base_model=_base_of(card), **_carried(card))
        write_card(folder, f"---\n{metadata.to_yaml()}\n---\n")


def _config(source: Any, folder: Path | None, trust_remote_code: bool) -> Any:
    if isinstance(source, StoredModel):
        return source.config
    config = config_of(folder, trust_remote_code) if folder is not None else getattr(source, "config", None)
    if config is None:
        raise InvalidArgument(f"source is a {type(source).__name__}; expected a transformers model or a folder")
    return config


def _kind(scores: Igia | Sequence[float] | None, kind: str | None, plan: Plan) -> str | None:
    """Return the kind of score that chose the layers, so that the table explains the cut."""
    if kind is not None and plan.kind is not None and kind != plan.kind:
        raise InvalidArgument(f"kind = {kind!r}; the plan was chosen by {plan.kind!r} scores: expected that, or None")
    known = kind or plan.kind
    if known is None and isinstance(scores, Igia):
        raise InvalidArgument(
            f"kind = None; the plan does not say which score chose it. Accepted are {', '.join(SCORES)}"
        )
    return known


def _score_values(scores: Igia | Sequence[float] | None, kind: str | None, plan: Plan) -> list[float] | None:
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


def _loaded_from(source: Any, config: Any) -> str | None:
    """Return where a model in memory came from. A pruned folder's config says nothing of that."""
    origin = getattr(config, "name_or_path", None) if isinstance(source, nn.Module) else None
    known = origin and (Path(origin).is_dir() or ("/" in origin and _is_hub_id(origin)))
    return origin if known else None


def _base(base_model: str | os.PathLike[str] | None, folder: Path | None) -> tuple[str | None, dict[str, Any]]:
    """Return the hub id of the base model, and the fields of its card that hold for this model."""
    beside = _metadata_of(folder / CARD_FILE) if folder is not None else {}
    dense = beside if TAG not in (beside.get("tags") or ()) else {}  # the dense model's card, copied along
    if base_model is None:
        return _base_of(dense), _carried(dense)
    if str(base_model) == DEMO_MODEL:
        return DEMO_BASE, dict(DEMO_METADATA)
    if Path(base_model).is_dir():
        card = _metadata_of(Path(base_model) / CARD_FILE)
        return _base_of(card), _carried(card) or _carried(dense)
    if Path(base_model).is_file():
        return None, _carried(dense)
    if not _is_hub_id(str(base_model)):
        raise InvalidArgument(
            f"base_model = {str(base_model)!r}; accepted are a hub id ('name' or 'owner/name') and a folder"
        )
    return str(base_model), _carried(_cached_card(str(base_model))) or _carried(dense)


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _base_of(card: Mapping[str, Any]) -> str | None:
    """Return the hub id of the model that a card says its model was made from."""
    base = card.get("base_model")
    base = base[0] if isinstance(base, list) and base else base
    return base if isinstance(base, str) and _is_hub_id(base) else None


def _carried(card: Mapping[str, Any]) -> dict[str, Any]:
    return {key: card[key] for key in CARRIED if card.get(key)}


def _cached_card(hub_id: str) -> dict[str, Any]:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(hub_id, CARD_FILE)
    return _metadata_of(Path(path)) if isinstance(path, str) else {}


def _metadata_of(path: Path) -> dict[str, Any]:
    """Return a card's metadata; nothing where there is no card, or none that can be read."""
    from huggingface_hub import ModelCard

    if not path.is_file():
        return {}
    try:
        return dict(ModelCard.load(path, ignore_metadata_errors=True).data.to_dict())
    except Exception:  # somebody else's file: not UTF-8, not YAML, ...
        return {}


def _metadata(base: str | None, carried: Mapping[str, Any]) -> Any:
    from huggingface_hub import ModelCardData

    return ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[TAG, "pruned", "layer-pruning"],
        **carried,
    )


def _parameters(source: nn.Module | StoredModel | str | os.PathLike[str]) -> int:
    if isinstance(source, nn.Module):
        return sum(parameter.numel() for parameter in source.parameters())
    stored = source.stored if isinstance(source, StoredModel) else read_folder(Path(source))
    return sum(math.prod(tensor.shape) for tensor in stored.values())


def _size_rows(plan: Plan, parameter_ratio: float | None, parameters: int) -> list[dict[str, Any]]:
    """Return the table of sizes.

    The dense model's parameters are not known without the share that was removed.
    """
    before = "dense" if plan.before is None else "before"
    dense, removed = "", "not recorded"
    if parameter_ratio is not None:
        dense, removed = f"{parameters / (1 - parameter_ratio) / 1e6:.1f}", f"{parameter_ratio:.1%}"
    layers = {before: plan.layers, "pruned": len(plan.kept), "removed": f"{plan.layer_ratio:.1%}"}
    return [
        {"": "decoder layers", **layers},
        {"": "all parameters (M)", before: dense, "pruned": f"{parameters / 1e6:.1f}", "removed": removed},
    ]


def _score_rows(plan: Plan, scores: Sequence[float]) -> list[dict[str, Any]]:
    assert isinstance(plan.merge, Mapping)
    merged = {layer: f"merged into {target}" for layer, target in plan.merge.items()}
    fates = {**dict.fromkeys(plan.drop, "dropped"), **merged}
    return [{"layer": layer, "score": score, "": fates.get(layer, "kept")} for layer, score in enumerate(scores)]
