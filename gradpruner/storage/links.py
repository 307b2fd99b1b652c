"""Refuse symbolic links that lead out of a checkpoint folder.

Otherwise this package would copy and publish what they lead to.
"""

from __future__ import annotations

import os
from pathlib import Path

from gradpruner.errors import CheckpointError


def check_links(folder: str | os.PathLike[str]) -> None:
    """Raise CheckpointError if a link in a folder leads out of it, or to a hidden file in it.

    Links to the `blobs` of the same repository in the hub's cache are accepted. Hidden files and folders are not
    checked, because nothing reads, copies or uploads them.
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
    """Whether a file belongs to a checkpoint folder, also after links are followed.

    A hidden file does not. The blobs of a repository in the hub's cache belong to the folders of its snapshots.

    Args:
        path: a file in the folder, or a link.
        folder: the checkpoint folder.
    """
    target, inside = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if target.is_relative_to(inside):
        return not any(part.startswith(".") for part in target.relative_to(inside).parts)
    repository = inside.parent.parent
    if inside.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    return target.is_relative_to(repository / "blobs")


def names_of(path: Path, folder: str | os.PathLike[str]) -> set[str]:
    """Return the names that say what kind of file this is.

    Args:
        path: a file in the folder, or a link.
        folder: the checkpoint folder.

    Returns:
        The name of the file. If it is a link to another file in the folder, also the name of that one.
    """
    target, inside = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return {path.name, target.name} if target.is_relative_to(inside) else {path.name}  # a blob's name says nothing
