"""The files beside the weights: which are copied with a checkpoint, and which may be uploaded."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from gradpruner.checkpoint.card import CARD_FILE
from gradpruner.checkpoint.save_sparse import MASKS
from gradpruner.storage.links import names_of, stays
from gradpruner.storage.provenance import RECORD
from gradpruner.storage.tensor_files import (
    INDEX,
    SINGLE,
    holds_safetensors,
    read_folder,
)

# of other weights, or able to hold code; they would describe the model as it was
LEFT_BEHIND = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".msgpack",
    ".h5",
    ".gguf",
    ".onnx",
    ".state",
    ".index.json",
    MASKS,
    CARD_FILE,
    RECORD,
)


FOLDERS = ("additional_chat_templates",)  # of a tokenizer


def copy_others(source: Path, folder: Path, *, code: bool) -> None:
    files = [file for file in source.iterdir() if file.is_file()]
    for name in FOLDERS:
        if (source / name).is_dir():
            (folder / name).mkdir()
            files += [file for file in (source / name).iterdir() if file.is_file()]
    left_behind = LEFT_BEHIND if code else (*LEFT_BEHIND, ".py")
    for file in files:
        names, copy = names_of(file, source), folder / file.relative_to(source)
        if not stays(file, source) or any(name.startswith(".") or name.endswith(left_behind) for name in names):
            continue
        if not copy.exists():  # config.json is written already
            shutil.copyfile(file, copy)


# nothing else leaves the machine: no pickle, no Python code, no optimizer state
UPLOADED = (".safetensors", ".json", ".jinja", ".txt", ".md")


SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


LICENSES = ("license", "notice", "use_policy")


def uploaded_files(folder: Path) -> list[str]:
    """What of a checkpoint folder may leave the machine, relative to it, sorted."""
    weights = {tensor.file for tensor in read_folder(folder).values()} if holds_safetensors(folder) else set[Path]()
    files = [file for file in folder.iterdir() if file.is_file() and not _is_stray(file, weights)]
    files += [file for name in FOLDERS if (folder / name).is_dir() for file in (folder / name).iterdir()]
    return sorted(str(file.relative_to(folder)) for file in files if _may_leave(file, folder))


def _may_leave(file: Path, folder: Path) -> bool:
    return file.is_file() and stays(file, folder) and all(map(_may_be_called, names_of(file, folder)))


def is_license(name: str) -> bool:
    """Whether a file of this name holds the terms of a model."""
    return not Path(name).suffix and name.lower().startswith(LICENSES)


def _is_stray(file: Path, weights: Collection[Path]) -> bool:
    """Whether a server would take a file for weights, or for their index, though the model is stored without it."""
    if file.name == INDEX:
        return (file.parent / SINGLE).is_file()
    return file.suffix == ".safetensors" and file not in weights


def _may_be_called(name: str) -> bool:
    if name.startswith("."):
        return False
    if name == RECORD:  # of the run that wrote the folder
        return False
    if Path(name).suffix in UPLOADED or name in SENTENCEPIECE or name == MASKS:
        return True
    return is_license(name)
