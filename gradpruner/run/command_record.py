"""The options of the command that works in a folder, kept beside its settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradpruner.storage.files import read_json, write_json

COMMAND = "command"


def record_command(settings: Path, command: Mapping[str, Any]) -> None:
    """Write into a file of settings by which command its folder is made.

    No stage depends on this entry: the same data under another path is the same run.

    Args:
        settings: run.json or comparison.json.
        command: name, version and options of the command.
    """
    content = read_json(settings, "settings")
    if content.get(COMMAND) != command:
        write_json(settings, {**content, COMMAND: dict(command)})
