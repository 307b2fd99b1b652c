from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

import pytest

from gradpruner.errors import InvalidArgument
from gradpruner.plan import Plan
from gradpruner.report.pages import PAGES, Picture, Tile, base64_png
from gradpruner.report.plots import STYLES, plot_layer_scores
from gradpruner.report.tables import Tagged, markdown_table, table

PNG = b"\x89PNG\r\n\x1a\n and so on"
SCORES = [0.9, 0.01, 0.0, 0.02, 0.004, 2.0]
PLAN = Plan(layers=6, drop=[2, 4], merge=[3])


@pytest.fixture
def axes(monkeypatch):
    """The axes of every figure that is saved while a test runs."""
    from matplotlib.figure import Figure

    seen = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (seen.append(self.axes[0]), savefig(self, *a, **k))[1])
    return seen


def test_plot_is_a_png_and_nothing_else_is_left(tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "scores.png"
    had_pyplot = "matplotlib.pyplot" in sys.modules
    plot_layer_scores(SCORES, PLAN, path, title="cost: $5 <b>")
    assert [file.name for file in tmp_path.iterdir()] == ["scores.png"]
    height, width, _ = imread(path).shape
    assert width >= 1600 and height >= 800
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_bars_have_the_scores_heights_and_the_plans_colours(tmp_path, axes):
    from matplotlib.colors import to_hex

    plot_layer_scores(SCORES, PLAN, tmp_path / "scores.png")
    (ax,) = axes
    assert ax.get_yscale() == "log"
    bars = {round(bar.get_x() + bar.get_width() / 2): bar for bar in ax.patches}
    tops = [bars[layer].get_y() + bars[layer].get_height() for layer in range(6)]
    floor = ax.get_ylim()[0]
    assert tops == pytest.approx([max(score, floor) for score in SCORES])
    assert floor < 0.004
    fates = ["kept", "kept", "dropped", "merged", "dropped", "kept"]
    colours = [to_hex(bars[layer].get_facecolor()).upper() for layer in range(6)]
    assert colours == [STYLES[fate]["color"] for fate in fates]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["kept (3)", "merged (1)", "dropped (2)"]
    assert [text.get_text() for text in ax.texts] == ["0"]


@pytest.mark.parametrize("scores", [[0.0] * 6, [1.0] * 6, [1e-30] * 6])
def test_plot_of_extreme_scores(tmp_path, scores):
    plot_layer_scores(scores, PLAN, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("scores", "words"),
    [([1.0] * 5, "5 values.*6 layers"), ([1.0] * 5 + [float("nan")], "non-finite"), ([-1.0] * 6, "negative")],
)
def test_plot_refusals(tmp_path, scores, words):
    with pytest.raises(InvalidArgument, match=words):
        plot_layer_scores(scores, PLAN, tmp_path / "scores.png")
    assert not list(tmp_path.iterdir())


def test_failed_plot_leaves_the_old_one(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def savefig(self, path, **options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    (tmp_path / "scores.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(KeyboardInterrupt):
        plot_layer_scores(SCORES, PLAN, tmp_path / "scores.png")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("scores.png", b"old")]


def test_plot_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InvalidArgument, match=r"pip install gradpruner\[plot\]"):
        plot_layer_scores(SCORES, PLAN, tmp_path / "scores.png")


class Page(HTMLParser):
    """Collects the tags, attributes and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.values: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [value or "" for _, value in attrs]

    def handle_data(self, data):
        self.text += data


def render(text, **values):
    return PAGES.from_string(f"{{% from 'report/templates/macros.html' import plot, table, tiles %}}{text}").render(
        values
    )


def test_every_value_of_a_page_is_escaped():
    evil = "<script>alert('&')</script>"
    rows = [{evil: evil, "layers": Tagged("ahead", evil)}, {"layers": None}]
    raw = render(
        "{{ table(rows, stressed=evil) }}{{ tiles(figures) }}{{ plot(picture) }}",
        rows=rows,
        figures=[Tile(evil, evil, evil)],
        picture=Picture(base64_png(PNG), evil),
        evil=evil,
    )
    page = Page(raw)
    assert "script" not in page.tags
    assert page.text.count(evil) == 6  # column, two cells, a figure's name, value and note
    assert evil in page.values and page.tags.count("img") == 1 and raw.count("data:image/png;base64,iVBOR") == 1
    assert 'class="ours"' in raw and '<span class="tag ahead">ahead</span>' in raw and "None" not in page.text


def test_the_frame_of_a_page_needs_no_network(tmp_path):
    raw = PAGES.get_template("report/templates/page.html").render(title="<b>", task="&")
    assert raw.startswith("<!DOCTYPE html>") and "&lt;b&gt;" in raw and "&amp;" in raw
    assert not re.search(r"https?:|src=\"(?!data:)|@import|url\(|<link|<script", raw)
    assert "prefers-color-scheme: dark" in raw


def test_what_is_no_png_is_refused(tmp_path):
    for plot in (b"GIF89a", tmp_path / "missing.png"):
        with pytest.raises(InvalidArgument, match="plot"):
            base64_png(plot)


def test_one_table_in_three_forms():
    rows = [
        {"name\nof it": "a | b", "value": 0.123456},
        {"name\nof it": "c", "value": None, "stand": Tagged("level", "0")},
    ]
    assert table(rows).split("\n") == [
        "name of it   value  stand",
        "----------  ------  -------",
        "a | b       0.1235",
        "c                   level 0",
    ]
    assert markdown_table(rows).split("\n") == [
        "| name of it | value | stand |",
        "| --- | --- | --- |",
        "| a \\| b | 0.1235 |  |",
        "| c |  | level 0 |",
    ]
    page = Page(render("{{ table(rows) }}", rows=rows))
    assert "name" in page.text and "0.1235" in page.text and page.tags.count("br") == 1 and page.tags.count("td") == 4


def test_table():
    rows = [
        {"model": "dense", "exact match": 0.84, "layers": 30},
        {"model": "pruned", "exact match": None, "layers": 18, "note": "first"},
    ]
    assert table(rows).split("\n") == [
        "model   exact match  layers  note",
        "------  -----------  ------  -----",
        "dense          0.84      30",
        "pruned                   18  first",
    ]
    assert table([]) == ""
