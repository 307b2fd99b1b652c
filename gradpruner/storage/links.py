"""Symbolic links in a checkpoint folder: none may lead out of it, or this package would copy and publish its target."""

from __future__ import annotations

import os
from pathlib import Path

from gradpruner.errors import CheckpointError


def check_links(folder: str | os.PathLike[str]) -> None:
    """Raises CheckpointError if a symbolic link in the folder leads out of it, or to a hidden file in it.

    Links to the `blobs` of the same repository in the hub's cache are accepted. Hidden files and folders are not
    looked at: nothing reads, copies or uploads them.
    """
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*folders, *files]:
            path = Path(place, name)
            if not name.startswith(".") and path.is_symlink() and not stays(path, folder):
                raise CheckpointError(
                    f"{path} is a symbolic link to {os.path.realpath(path)}; accepted are links to files of the same "
                    "folder that are not hidden. Put a copy in the place of the link if it belongs to the model"
                )


def stays(path: Path, folder: str | os.PathLike[str]) -> bool:
    """Whether a path in a checkpoint folder, its links followed, is no hidden file and still belongs to the folder.

    The blobs of a repository in the hub's cache belong to the folders that are its snapshots.
    """
    target, inside = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if target.is_relative_to(inside):
        return not any(part.startswith(".") for part in target.relative_to(inside).parts)
    repository = inside.parent.parent
    if inside.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    return target.is_relative_to(repository / "blobs")


def names_of(path: Path, folder: str | os.PathLike[str]) -> set[str]:
    """The file's name, and if it is a link the name of its target in the folder: both say what kind of file it is."""
    target, inside = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return {path.name, target.name} if target.is_relative_to(inside) else {path.name}  # a blob's name says nothing
