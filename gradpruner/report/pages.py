"""What a person looks at: a plot of the layer scores, a self-contained HTML page, a plain-text table."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradpruner.errors import InvalidArgument
from gradpruner.report.tables import _columns, _is_numeric, _shown
from gradpruner.storage.files import atomic_path

CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #f3f5f7; --line: #d5dae0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --paper: #14171a; --soft: #1f2429; --line: #39414a; }
}
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .75rem; }
dl div { padding: .6rem .9rem; background: var(--soft); border-radius: .5rem; overflow-wrap: anywhere; }
dt { font-size: .85rem; opacity: .8; }
dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; border-bottom: 1px solid var(--line); text-align: left; }
.number { text-align: right; }
img { display: block; width: 100%; margin: 1.5rem 0; background: #ffffff; border-radius: .5rem; }
"""


def html_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    plots: Sequence[Path | bytes] = (),
    explained: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> None:
    """Write one HTML page that needs nothing else: key figures, plots (PNG), and a table of `rows`.

    explained: below them, sentences, each with a table of its own.

    Raises:
        InvalidArgument: a plot does not exist or is not a PNG.
        CheckpointError: the file cannot be written.
    """
    figures = "".join(f"<div><dt>{escaped(key)}</dt><dd>{escaped(value)}</dd></div>" for key, value in summary.items())
    images = "".join(
        f'<img alt="Plot {number}" src="data:image/png;base64,{base64_png(plot)}">\n'
        for number, plot in enumerate(plots, 1)
    )
    body = f"<h1>{escaped(title)}</h1>\n<dl>{figures}</dl>\n{images}{_html_table(rows)}"
    body += "".join(f"<p>{escaped(text)}</p>\n{_html_table(of_it)}" for text, of_it in (explained or {}).items())
    write_page(path, title, body)


def write_page(path: str | os.PathLike[str], title: str, body: str, css: str = CSS) -> None:
    """Write an HTML page around a `body` that is HTML already. Raises CheckpointError if it cannot be written."""
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    columns = _columns(rows)
    kinds = [' class="number"' if _is_numeric(rows, column) else "" for column in columns]
    head = "".join(f"<th{kind}>{escaped(c)}</th>" for c, kind in zip(columns, kinds, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{escaped(row.get(c))}</td>" for c, kind in zip(columns, kinds, strict=True))
        + "</tr>\n"
        for row in rows
    )
    content = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>"
    return f'<div class="scroll"><table>\n{content}</table></div>\n'


def base64_png(plot: Path | bytes) -> str:
    """A PNG as a data address holds it. Raises InvalidArgument if it does not exist or is not a PNG."""
    try:
        png = plot if isinstance(plot, bytes) else plot.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"plots: {error.filename} cannot be read: {error.strerror}") from None
    if not png.startswith(b"\x89PNG"):
        raise InvalidArgument("plots: a plot is not a PNG image")
    return base64.b64encode(png).decode("ascii")


def escaped(value: Any) -> str:
    """A value as HTML text or attribute."""
    return html.escape(_shown(value))
