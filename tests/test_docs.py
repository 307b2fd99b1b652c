"""The pages of docs/ say what the package does: the messages they quote are raised, the names they list exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import gradpruner
from gradpruner import methods, ops, sparsity

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def texts(source: Path) -> list[str]:
    """The string constants of a file, and the parts of its f-strings between the values."""
    return [
        node.value
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_every_message_on_the_page_of_errors_is_in_the_sources():
    quoted = re.findall(r"^\| `([^`]+)` \|", (DOCS / "errors.md").read_text(), re.MULTILINE)
    said = [text for source in (ROOT / "gradpruner").rglob("*.py") for text in texts(source)]
    classes = set(gradpruner.errors.__dict__)
    assert len(quoted) > 50
    assert [message for message in quoted if message not in classes and not any(message in s for s in said)] == []


def test_the_reference_has_every_public_name():
    pages = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    targets = re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)
    shown = {target.rpartition(".")[2] for target in targets}
    shown |= {name.strip() for group in re.findall(r"members: \[(.*)\]", pages) for name in group.split(",")}
    errors = {name for name, value in vars(gradpruner.errors).items() if isinstance(value, type)}
    registries = {"__version__", "BACKENDS", "METHODS", "METHOD_NAMES", "CRITERION_NAMES", "format_method"}
    public = {*gradpruner.__all__, *ops.__all__, *methods.__all__, *sparsity.__all__}
    assert public - shown - errors - registries == set()


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert [page for page in pages if f": {page}\n" not in navigation] == []


def test_links_between_files_lead_somewhere():
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *DOCS.rglob("*.md")]
    broken = []
    for file in files:
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL)):
            path, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", path):
                continue
            place = (file.parent / path).resolve() if path else file
            if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place)):
                broken.append(f"{file.relative_to(ROOT)}: {target}")
    assert broken == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them, and of the names that the reference renders."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))
