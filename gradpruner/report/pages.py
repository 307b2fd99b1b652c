"""HTML pages from jinja2 templates. A page needs no other file and no network.

A page's template extends `report/templates/page.html`, lies in the `templates` folder of the room that fills it, and is
named by its path inside the package. Every value is escaped unless a template asks otherwise, and none does.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from gradpruner.errors import InvalidArgument
from gradpruner.report.tables import columns_of, is_numeric, shown
from gradpruner.storage.files import atomic_path

PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("gradpruner", ""),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
PAGES.globals.update(columns_of=columns_of, is_numeric=is_numeric)
PAGES.filters["shown"] = shown


class Tile(NamedTuple):
    """A key figure at the top of a page.

    Args:
        name: what the figure is: "exact match".
        value: the figure as text, with its unit.
        note: a few words below it: "dense 0.843".
    """

    name: str
    value: str
    note: str = ""


class Picture(NamedTuple):
    """A plot inside a page.

    Args:
        png: the image in base64, as `base64_png` makes it.
        says: what the plot shows, for those who cannot see it.
    """

    png: str
    says: str


def write_page(path: str | os.PathLike[str], template: str, **content: Any) -> None:
    """Fill a template and write the page, atomically.

    Args:
        path: the HTML file.
        template: path of the template inside the package: "run/templates/run.html".
        content: the variables of the template. A missing one is an error.

    Raises:
        CheckpointError: the file cannot be written.
        ValueError: a value is missing, or of another kind than the template needs.
    """
    try:
        text = PAGES.get_template(template).render(content)
    except jinja2.UndefinedError as error:  # a value is missing, or of another kind
        raise ValueError(f"{template} cannot be filled: {error}") from error
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def base64_png(plot: Path | bytes) -> str:
    """Return a PNG in base64, as the address of an image in a page holds it.

    Args:
        plot: the file, or its content.

    Raises:
        InvalidArgument: the file does not exist, or it is not a PNG.
    """
    try:
        png = plot if isinstance(plot, bytes) else plot.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"plot: {error.filename} cannot be read: {error.strerror}") from None
    if not png.startswith(b"\x89PNG"):
        raise InvalidArgument("plot: the content is not a PNG image")
    return base64.b64encode(png).decode("ascii")
