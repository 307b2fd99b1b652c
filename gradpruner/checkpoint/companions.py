"""Keep what lies in a checkpoint beside its weights: plan, masks, card and licence.

Loading a model ignores these files. So every command that loads a model to train, cut or save it asks this module for
them, and passes them on or refuses.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from gradpruner.checkpoint.card import carry_card
from gradpruner.checkpoint.masks import Masks
from gradpruner.checkpoint.other_files import is_license
from gradpruner.checkpoint.save import PLAN_FILE, plan_in, save
from gradpruner.checkpoint.save_sparse import MASKS
from gradpruner.errors import CheckpointError, InvalidArgument, ModelMismatch
from gradpruner.model.decoder import Decoder
from gradpruner.model.load import DEMO_MODEL
from gradpruner.plan import Plan
from gradpruner.storage.links import names_of

PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)


def plan_of(source: str, model: Any, revision: str | None = None) -> Plan | None:
    """Return the plan that a loaded model was pruned by, None if there is none.

    Args:
        source: the folder or hub id that the model was loaded from.
        model: the model.
        revision: the commit that it was loaded from, of a hub id.

    Raises:
        ModelMismatch: the model has another number of layers than the plan leaves.
        CheckpointError: the plan is damaged, or the hub could not be asked.
    """
    path = _beside(source, PLAN_FILE, revision)
    if path is None:
        return None
    return plan_in(path.parent, len(Decoder(model).layers))


def masks_of(source: str, model: Any, revision: str | None = None) -> Masks | None:
    """Return the masks that a loaded model keeps to, None if there are none.

    Args:
        source: the folder or hub id that the model was loaded from.
        model: the model.
        revision: the commit that it was loaded from, of a hub id.

    Raises:
        ModelMismatch: the model does not keep to them.
        CheckpointError: the masks are damaged, or the hub could not be asked.
    """
    path = _beside(source, MASKS, revision)
    if path is None:
        return None
    masks = Masks.load(path)
    try:
        masks.check(model)
    except ModelMismatch as error:
        raise ModelMismatch(f"{path}: {error}. Remove the file if the model need not keep to it") from None
    return masks


def refuse_masks(source: str, what: str, revision: str | None = None) -> None:
    """Refuse a checkpoint with masks, on behalf of a command that would not keep to them.

    Args:
        source: the folder or hub id.
        what: the command, for the message.
        revision: the commit, of a hub id.

    Raises:
        InvalidArgument: the checkpoint holds masks.
        CheckpointError: the hub could not be asked.
    """
    if _beside(source, MASKS, revision) is not None:
        raise InvalidArgument(
            f"{what}: source {source!r} holds {MASKS}, and {what} would not keep to these masks. The commands probe, "
            "plan, apply and finetune do. Or remove the file, if the zeros need not stay"
        )


def carry_processor(source: str, model: Any, folder: Path, revision: str | None = None) -> None:
    """Copy what prepares images and videos for a vision-language model.

    Other models have nothing of it.

    Args:
        source: the folder or hub id that the model was made from.
        model: the model.
        folder: the folder to copy into.
        revision: the commit, of a hub id.

    Raises:
        CheckpointError: the hub could not be asked.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return
    for name in PROCESSOR:
        path = _beside(source, name, revision)
        if path is not None and not (folder / name).exists():
            shutil.copyfile(path, folder / name)


def save_from(
    source: str,
    model: Any,
    folder: str,
    *,
    tokenizer: Any,
    plan: Plan | None,
    masks: Masks | None,
    overwrite: bool,
    revision: str | None = None,
) -> Path:
    """Save a model made from another checkpoint, with what must not be lost on the way.

    Args:
        source: what the model was made from. If it is a folder, its licence files are copied, and the licence and the
            base model that its card names.
        model: the model.
        folder: see `save`.
        tokenizer: see `save`.
        plan: the plan that the model was pruned by, None if it was not.
        masks: the masks that it keeps to, None if there are none.
        overwrite: see `save`.
        revision: the commit of the source, if it is a hub id. Default: the newest.

    Returns:
        The folder.

    Raises:
        ModelMismatch: a masked entry is not zero. Nothing is written then.
        InvalidArgument: see `save`.
        CheckpointError: see `save`.
    """
    if masks is not None:
        masks.check(model)

    def beside(inside: Path) -> None:
        carry_processor(source, model, inside, revision)
        if masks is not None:
            masks.save(inside / MASKS)
        if Path(source).is_dir():
            carry_card(Path(source), inside)
            for file in Path(source).iterdir():
                if file.is_file() and all(map(is_license, names_of(file, source))):
                    shutil.copyfile(file, inside / file.name)

    return save(model, folder, tokenizer=tokenizer, plan=plan, overwrite=overwrite, beside=beside)


def _beside(source: str, name: str, revision: str | None) -> Path | None:
    """Return a file of a checkpoint folder or hub repository, None if there is no such file.

    Where the hub cannot be reached, only its cache on this machine is asked.
    """
    if source == DEMO_MODEL or Path(source).is_file():
        return None  # one GGUF file
    if Path(source).is_dir():
        return path if (path := Path(source, name)).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except EntryNotFoundError:  # also raised offline, for a file that is not in the cache
        return None
    except HfHubHTTPError as error:
        raise CheckpointError(f"whether {source} holds {name} could not be looked up: {error}") from error
