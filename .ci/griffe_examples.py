"""Shows the `Example:` section of a docstring as code in the API reference."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:\n((?:(?: {4}.*)?\n)*(?: {4}.*))", re.MULTILINE)


class FencedExamples(griffe.Extension):
    """Turns the indented code below `Example:` into a fenced block."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value)


def fenced(match: re.Match[str]) -> str:
    """The example as Markdown."""
    code = textwrap.dedent(match[1]).strip("\n")
    if code.startswith("```"):
        return f"**Example:**\n\n{code}"
    language = "pycon" if code.startswith(">>>") else "python"
    return f"**Example:**\n\n```{language}\n{code}\n```"
