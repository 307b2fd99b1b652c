"""What the plots of a comparison show, line by line."""

from __future__ import annotations

import math

import pytest
from comparison_pages import BARE, LAYERS, PLAN, RESULTS, Page, make_data, report

from gradpruner.compare.analysis import Comparison
from gradpruner.compare.choice_plots import settled
from gradpruner.compare.page import write_comparison
from gradpruner.compare.plots import method_styles
from gradpruner.report.plots import running_mean


def test_accuracy_plot_shows_means_and_extremes(tmp_path, figures):
    write_comparison(tmp_path, **{**BARE, "results": RESULTS})
    (axes,) = figures["accuracy"].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["gradpruner"].get_xdata()) == [0.2, 0.4]
    assert list(lines["gradpruner"].get_ydata()) == pytest.approx([0.79, 0.76])
    assert list(lines["laco"].get_ydata()) == pytest.approx([0.65])
    assert list(lines["dense"].get_ydata()) == pytest.approx([0.8, 0.8])
    bands = {band.get_label(): band.get_paths()[0].get_extents() for band in axes.collections}
    assert set(bands) == {"gradpruner", "laco"}
    assert (bands["gradpruner"].y0, bands["gradpruner"].y1) == pytest.approx((0.74, 0.78))
    assert bands["gradpruner"].x0 > 0.35  # the one seed at 0.2 has no band
    assert (bands["laco"].y0, bands["laco"].y1) == pytest.approx((0.6, 0.7))
    (span,) = axes.patches
    assert (span.get_y(), span.get_y() + span.get_height()) == pytest.approx((0.78, 0.82))
    widths = {name: line.get_linewidth() for name, line in lines.items() if not name.startswith("_")}
    assert max(widths, key=widths.__getitem__) == "gradpruner"
    names = [text.get_text() for text in figures["accuracy"].legends[0].get_texts()]
    assert names == ["dense", "gradpruner:merge=0", "gradpruner", "laco", "drop-last"]  # as the lines end


def test_many_methods_fit_into_the_legend(tmp_path, figures):
    methods = ("gradpruner", *(f"method {n}" for n in range(9)))
    write_comparison(tmp_path, **make_data(methods=methods))
    for name in ("accuracy", "losses"):
        (legend,) = figures[name].legends
        assert sorted(text.get_text() for text in legend.get_texts()) == sorted(["dense", *methods])
        box, whole = legend.get_window_extent(), figures[name].bbox
        assert (
            box.x0 >= figures[name].axes[0].bbox.x1 and box.x1 <= whole.x1 and whole.y0 <= box.y0 < box.y1 <= whole.y1
        )
    styles = method_styles(Comparison(make_data(methods=methods)["results"]))
    looks = {(style["color"], str(style.get("linestyle")), style.get("marker")) for style in styles.values()}
    assert len(looks) == len({style.get("marker") for style in styles.values()}) == 11


def test_layers_plot_fills_what_each_method_removes(tmp_path, figures):
    data = make_data(methods=("gradpruner", "drop-last", "random"))
    write_comparison(tmp_path, **data)
    bars, grid = figures["layers"].axes
    legends = [text.get_text() for text in grid.get_legend().get_texts()]
    assert legends == ["removed (paler: with some seeds only)", "merged"]
    assert bars.get_yscale() == "log" and len(bars.patches) == LAYERS
    filled: dict = {}
    for patch in grid.patches:
        if patch.get_alpha():
            row = round(patch.get_y() + patch.get_height() / 2)
            filled.setdefault(row, {})[round(patch.get_x() + 0.4)] = patch
    assert [label.get_text() for label in grid.get_yticklabels()] == ["gradpruner", "drop-last", "random"]
    assert sorted(filled[0]) == list(PLAN.removed)
    assert sorted(layer for layer, patch in filled[0].items() if patch.get_hatch()) == [7, 12, 18]
    assert sorted(filled[1]) == list(range(18, 30))
    runs = [set(map(int, r.removed.split())) for r in data["results"] if (r.method, r.count) == ("random", 12)]
    shares = {layer: sum(layer in run for run in runs) / 3 for layer in set().union(*runs)}
    assert {layer: patch.get_alpha() for layer, patch in filled[2].items()} == pytest.approx(
        {layer: 0.15 + 0.85 * share for layer, share in shares.items()}
    )


def test_settling(tmp_path, figures):
    page = report(tmp_path)
    stability = make_data()["probe"]["stability"]
    (axes,) = figures["settling"].axes
    assert list(axes.lines[0].get_ydata()) == stability
    assert "Of 28 probe steps, the removed set is the final one from step 17 on." in page.text
    assert (settled([0.5, 1, 0.9, 1, 1]), settled([1, 1]), settled([1, 0.5])) == (4, 1, None)


def test_losses_start_where_the_cut_was(tmp_path, figures):
    losses = {("dense", 0, 0): [2.0] * 40, ("dense", 0, 1): [1.0] * 40, ("laco", 4, 0): [5.0, 4.0] * 15}
    page = Page(write_comparison(tmp_path, **{**BARE, "results": RESULTS, "losses": losses}))
    lines = {line.get_label(): line for line in figures["losses"].axes[0].lines}
    assert figures["losses"].axes[0].get_yscale() == "log"
    assert list(lines["dense"].get_xdata()) == list(range(40))
    assert set(lines["dense"].get_ydata()) == {1.5}
    assert list(lines["laco"].get_xdata()) == list(range(10, 40))
    assert list(lines["laco"].get_ydata()) == [5.0, 4.0] * 15
    assert "gradpruner" not in lines
    assert page.tables[-1][1] == ["dense", "2.000", "0.500", "40"]
    assert running_mean([1, 2, 3, 6], 2) == [1, 1.5, 2.5, 4.5]


def test_losses_that_are_not_numbers(tmp_path):
    losses = {("laco", 4, 0): [2.0, math.nan, math.nan], ("gradpruner", 4, 0): [math.inf]}
    write_comparison(tmp_path, **{**BARE, "results": RESULTS, "losses": losses})
    assert (tmp_path / "losses.png").exists()


def test_sensitivity_marks_the_default(tmp_path, figures):
    page = report(tmp_path)
    panels = figures["sensitivity"].axes
    assert [panel.get_xlabel() for panel in panels] == ["probe steps", "merge", "score", "LoRA rank"]
    points = [line for line in panels[1].lines if line.get_marker() == "o"]
    assert [point.get_ydata()[0] for point in points] == [0.799, 0.815, 0.806]
    assert [point.get_markerfacecolor() != "white" for point in points] == [False, True, False]
    assert "merge auto (default): 0.815" in page.images[-1]["alt"]
    assert len(panels[0].lines) == 4 + 2 and len(panels[1].lines) == 3 + 1  # words are not joined by a line
