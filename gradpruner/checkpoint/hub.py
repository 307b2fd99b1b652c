"""Publishing: a pruned checkpoint, verified, with its card, to the Hugging Face hub."""

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
from gradpruner.storage.tensor_files import INDEX, SINGLE, read_folder

# of an earlier upload: vLLM and others read every *.safetensors they find, and transformers takes an adapter first
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
    """Verify a pruned model, write its card and upload both in one commit; the URL of the commit.

    source: a model (with its plan and tokenizer), saved as `save` does, or a checkpoint folder: its files must be
    whole, the stock class must take exactly these keys and shapes, and, where the model fits in memory, answer with
    finite numbers. The card is written into the folder, unless one of ours is there and nothing to write into it is
    given (plan, base_model, license, scores, results: see `model_card`). Weights of an earlier upload are replaced;
    pickles and Python code never leave the machine. private, token, revision: as huggingface_hub has them. api: an
    `huggingface_hub.HfApi` for another endpoint.
    Raises InvalidArgument, ModelMismatch, UnsupportedModel, CheckpointError; GradPrunerError if the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InvalidArgument(f"repo_id = {repo_id!r}: {error}") from None
    known = {"plan": plan, "base_model": base_model, "license": license, "scores": scores, "results": results or None}
    given = {key: value for key, value in known.items() if value is not None}
    with tempfile.TemporaryDirectory() as temporary:
        if isinstance(source, nn.Module):
            if plan is None:
                raise InvalidArgument("plan = None; expected the plan that the model was pruned by")
            folder = save(source, Path(temporary) / "model", tokenizer=tokenizer, plan=plan)
        else:
            if tokenizer is not None:
                raise InvalidArgument("tokenizer is given with a folder; expected it in the folder")
            folder = Path(source)
            verify_folder(folder)
        if given or not is_ours(folder):
            # a model in memory knows where it came from
            write_card(folder, model_card(source, name=repo_id, kind=kind, **given))  # type: ignore[arg-type]
        api = api if api is not None else HfApi()
        try:
            api.create_repo(repo_id, private=private, exist_ok=True, token=token)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                allow_patterns=[glob.escape(file) for file in uploaded_files(folder)],
                delete_patterns=list(REPLACED),
                commit_message=commit_message,
                revision=revision,
                token=token,
            )
        except Exception as error:  # the hub's, the network's, ...: huggingface_hub does not say which it raises
            raise GradPrunerError(f"{repo_id} was not uploaded: {' '.join(str(error).split())[:300]}") from error
    return str(commit.commit_url)


def verify_folder(folder: Path) -> None:
    """Raises CheckpointError unless the folder is a whole, sound checkpoint.

    Also raises InvalidArgument, ModelMismatch (the model does not keep to the masks in the folder), UnsupportedModel.
    """
    stored = StoredModel(folder)
    tensors = read_folder(folder)
    strange = sorted(tensors.keys() - stored.tensors.keys())
    if strange:
        raise CheckpointError(f"{folder} holds tensors that its model has no place for: {strange[:3]}")
    if (folder / MASKS).is_file():
        check_stored(stored, Masks.load(folder / MASKS))
    if 2 * sum(tensor.size for tensor in tensors.values()) >= free_memory():
        return
    kind: Any = type(stored.model)
    with quiet():
        model = kind.from_pretrained(folder, dtype="auto", use_safetensors=True)
    logits = logits_of(model)
    if logits is not None and not bool(torch.isfinite(logits).all()):
        raise CheckpointError(f"the model in {folder} answers with numbers that are not finite")
