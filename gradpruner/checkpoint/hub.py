"""Publish a pruned checkpoint, verified and with its card, on the Hugging Face hub."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradpruner.checkpoint.card import is_ours, model_card, write_card
from gradpruner.checkpoint.masks import Masks
from gradpruner.checkpoint.other_files import uploaded_files
from gradpruner.checkpoint.save import quiet, save
from gradpruner.checkpoint.save_sparse import MASKS, check_stored
from gradpruner.checkpoint.stored_model import StoredModel
from gradpruner.errors import CheckpointError, GradPrunerError, InvalidArgument
from gradpruner.memory import free_memory
from gradpruner.model.logits import logits_of
from gradpruner.plan import Plan
from gradpruner.probe.igia import Igia
from gradpruner.storage.tensor_files import INDEX, SINGLE

# files of an earlier upload: vLLM and others read every *.safetensors they find, and transformers prefers an adapter
REPLACED = (
    SINGLE,
    INDEX,
    "model-*-of-*.safetensors",
    "pytorch_model*.bin",
    "adapter_config.json",
    "adapter_model.*",
    MASKS,
)


def push_to_hub(
    source: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    plan: Plan | None = None,
    tokenizer: Any = None,
    base_model: str | os.PathLike[str] | None = None,
    license: str | None = None,
    scores: Igia | Sequence[float] | None = None,
    kind: str | None = None,
    results: Sequence[Mapping[str, Any]] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a pruned model",
    api: Any = None,
) -> str:
    """Verify a pruned model, write its card, and upload both in one commit.

    Weights of an earlier upload are replaced. Pickles and Python code never leave the machine.

    Args:
        source: a model, or a checkpoint folder. The files of a folder must be whole, and the transformers class must
            take exactly these keys and shapes. If the model fits in memory twice, its logits must be finite. The card
            is written into the folder, unless a card of this package is there and none of plan, base_model, license,
            scores and results is given. A model in memory is saved first, as `save` does it.
        repo_id: hub id to upload to, "owner/name". It is made if it does not exist.
        plan: see `model_card`. Needed for a model in memory.
        tokenizer: saved beside a model in memory. A folder has its own.
        base_model: see `model_card`.
        license: see `model_card`.
        scores: see `model_card`.
        kind: see `model_card`.
        results: see `model_card`.
        private: whether a new repository is private. Default: the setting of the account.
        token: a hub token. True requires the token that is stored on this machine. Default: that token, if there is
            one.
        revision: branch to upload to. Default: "main".
        commit_message: first line of the commit.
        api: a `huggingface_hub.HfApi` for another endpoint.

    Returns:
        The URL of the commit.

    Raises:
        InvalidArgument: `repo_id` is no hub id, a model comes without a plan, a folder comes with a tokenizer, there is
            no such folder, or `model_card` refuses an argument.
        ModelMismatch: the model does not have the layers that the plan keeps, or entries that its masks zero are not
            zero, or `scores` are another model's.
        UnsupportedModel: the model is quantised or holds adapters.
        CheckpointError: the folder is damaged.
        GradPrunerError: the hub refuses the upload or cannot be reached.

    Example:
        ```python
        gradpruner.push_to_hub("small", "owner/small", base_model="owner/dense", license="mit")
        ```
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    # 1. refuse before any work
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InvalidArgument(f"repo_id = {repo_id!r}: {error}") from None
    options = {"plan": plan, "base_model": base_model, "license": license, "scores": scores, "results": results or None}
    about = {name: value for name, value in options.items() if value is not None}
    with tempfile.TemporaryDirectory() as temporary:
        # 2. a verified folder
        shown: nn.Module | StoredModel
        if isinstance(source, nn.Module):
            if plan is None:
                raise InvalidArgument("plan = None; expected the plan that the model was pruned by")
            folder = save(source, Path(temporary) / "model", tokenizer=tokenizer, plan=plan)
            shown, tensors = source, None  # a model in memory knows where it came from
        else:
            if tokenizer is not None:
                raise InvalidArgument("tokenizer is given with a folder; expected it in the folder")
            folder = Path(source)
            shown = verify_folder(folder)
            tensors = shown.stored
        # 3. its card
        if about or not is_ours(folder):
            write_card(folder, model_card(shown, name=repo_id, kind=kind, **about))  # type: ignore[arg-type]
        # 4. one commit
        api = api if api is not None else HfApi()
        try:
            api.create_repo(repo_id, private=private, exist_ok=True, token=token)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                allow_patterns=[glob.escape(file) for file in uploaded_files(folder, tensors)],
                delete_patterns=list(REPLACED),
                commit_message=commit_message,
                revision=revision,
                token=token,
            )
        except Exception as error:  # the hub's, the network's, ...: huggingface_hub does not say which it raises
            raise GradPrunerError(f"{repo_id} was not uploaded: {' '.join(str(error).split())[:300]}") from error
    return str(commit.commit_url)


def verify_folder(folder: Path) -> StoredModel:
    """Check that a folder is a whole, sound checkpoint, and return what was read from it.

    If the model fits in memory twice, it is loaded, and its logits must be finite.

    Raises:
        CheckpointError: a tensor is missing, or has no place in the model, or a logit is not finite.
        InvalidArgument: there is no such folder.
        ModelMismatch: the model does not keep to the masks in the folder.
        UnsupportedModel: the model is quantised or holds adapters.
    """
    stored = StoredModel(folder)
    if stored.unused:
        raise CheckpointError(f"{folder} holds tensors that its model has no place for: {stored.unused[:3]}")
    if (folder / MASKS).is_file():
        check_stored(stored, Masks.load(folder / MASKS))
    if 2 * sum(tensor.size for tensor in stored.stored.values()) < free_memory():
        kind: Any = type(stored.model)
        with quiet():
            model = kind.from_pretrained(folder, dtype="auto", use_safetensors=True)
        logits = logits_of(model)
        if logits is not None and not bool(torch.isfinite(logits).all()):
            raise CheckpointError(f"the model in {folder} answers with numbers that are not finite")
    return stored
