"""The files beside the weights: which are copied, and which may be uploaded."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from gradpruner.checkpoint.card import CARD_FILE
from gradpruner.checkpoint.save_sparse import MASKS
from gradpruner.storage.links import names_of, stays
from gradpruner.storage.provenance import RECORD
from gradpruner.storage.tensor_files import INDEX, SINGLE, TensorInFile, holds_safetensors, read_folder

FOLDERS = ("additional_chat_templates",)  # folders of a tokenizer
# endings of files that are not copied: other weights, what can hold code, what describes the model as it was
NOT_COPIED = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".gguf", ".onnx"),
    *(".state", ".index.json", MASKS, CARD_FILE, RECORD),
)
# nothing else is uploaded: no pickle, no Python code, no optimizer state
UPLOADED = (".safetensors", ".json", ".jinja", ".txt", ".md")
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
LICENSES = ("license", "notice", "use_policy")


def copy_others(source: Path, folder: Path, *, code: bool) -> None:
    """Copy the files beside the weights of a checkpoint folder into another one.

    Args:
        source: the folder to copy from. Hidden files, and links that lead out of it, are not copied.
        folder: the folder to copy into. What it holds already, such as config.json, stays.
        code: copy Python files too.
    """
    files = [file for file in source.iterdir() if file.is_file()]
    for name in FOLDERS:
        if (source / name).is_dir():
            (folder / name).mkdir()
            files += [file for file in (source / name).iterdir() if file.is_file()]
    not_copied = NOT_COPIED if code else (*NOT_COPIED, ".py")
    for file in files:
        names, copy = names_of(file, source), folder / file.relative_to(source)
        if not stays(file, source) or any(name.startswith(".") or name.endswith(not_copied) for name in names):
            continue
        if not copy.exists():
            shutil.copyfile(file, copy)


def uploaded_files(folder: Path, tensors: Mapping[str, TensorInFile] | None = None) -> list[str]:
    """Return which files of a checkpoint folder may be uploaded, relative to it, sorted.

    Args:
        folder: the folder.
        tensors: its tensors, if they were read already. Other safetensors files are not uploaded.
    """
    if tensors is None:
        tensors = read_folder(folder) if holds_safetensors(folder) else {}
    weights = {tensor.file for tensor in tensors.values()}
    files = [file for file in folder.iterdir() if file.is_file() and not _is_stray(file, weights)]
    files += [file for name in FOLDERS if (folder / name).is_dir() for file in (folder / name).iterdir()]
    return sorted(str(file.relative_to(folder)) for file in files if _may_be_uploaded(file, folder))


def is_license(name: str) -> bool:
    """Return whether a file of this name holds the terms of a model."""
    return not Path(name).suffix and name.lower().startswith(LICENSES)


def _is_stray(file: Path, weights: Collection[Path]) -> bool:
    """Return whether a server would take a file for weights that the model does not have."""
    if file.name == INDEX:
        return (file.parent / SINGLE).is_file()
    return file.suffix == ".safetensors" and file not in weights


def _may_be_uploaded(file: Path, folder: Path) -> bool:
    return file.is_file() and stays(file, folder) and all(map(_has_good_name, names_of(file, folder)))


def _has_good_name(name: str) -> bool:
    if name.startswith(".") or name == RECORD:  # the record is of the run that wrote the folder
        return False
    return Path(name).suffix in UPLOADED or name in SENTENCEPIECE or name == MASKS or is_license(name)
