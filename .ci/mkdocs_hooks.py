"""Makes links of the documentation work on GitHub and on the site alike.

On GitHub a page may link to any file of the repository (`../examples/qlora.py`). The site holds the pages of docs/
only. So a linked file is copied into the site, benchmarks/README.md becomes a page, and a link to a folder becomes
plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"benchmarks/README.md": "benchmarks.md", "README.md": "index.md"}  # file of the repository to page of the site
COPIES = "repository"  # folder of the site for files that are linked from a page
LINK = re.compile(r"\[([^\[\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Add the page of the benchmarks, and every file that a page links to."""
    benchmarks = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "benchmarks.md", content=benchmarks))
    linked = {target for page in files.documentation_pages() for target in outside(page.src_uri, page.content_string)}
    for path in sorted(linked):
        if (ROOT / path).is_file():
            files.append(File.generated(config, f"{COPIES}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point each link that leaves docs/ to where the site has its target."""
    start = posixpath.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        text, address, anchor = match.groups()
        path = in_repository(page.file.src_uri, address)
        if path is None:
            return match[0]
        if (ROOT / path).is_dir():
            return text
        target = PAGES.get(path) or path.removeprefix("docs/")
        if target == path:  # neither a page nor below docs/
            target = f"{COPIES}/{path}"
        return f"[{text}]({posixpath.relpath(target, start or '.')}{anchor or ''})"

    return LINK.sub(moved, markdown)


def outside(page: str, markdown: str) -> set[str]:
    """The files of the repository that a page links to, except pages of the site."""
    paths = {in_repository(page, match[2]) for match in LINK.finditer(markdown)}
    return {path for path in paths if path and path not in PAGES and not path.startswith("docs/")}


def in_repository(page: str, target: str) -> str | None:
    """The path from the repository's root of what a page links to; None for an address and for a page of docs/."""
    if re.match(r"[a-z]+:|/", target):
        return None
    source = "benchmarks/README.md" if page == "benchmarks.md" else f"docs/{page}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    return None if path.startswith("docs/") and source.startswith("docs/") else path
