"""A comparison that several files look at, made once."""

from __future__ import annotations

import shutil

import pytest
from small_comparisons import comparison, counting, logged, make_home

from gradpruner.compare import outputs


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def base(home, tmp_path_factory):
    """A finished comparison, what was written of it, and the calls that made it."""
    out, said = tmp_path_factory.mktemp("base") / "out", []
    with counting() as calls, logged(said):
        made = comparison(home, out)
        made.work()
    return made, outputs.write(made, costs=False), calls, said


@pytest.fixture
def copied(base, tmp_path):
    shutil.copytree(base[0].folder, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved while a test runs, by its file's name."""
    from matplotlib.figure import Figure

    seen = {}
    savefig = Figure.savefig

    def save(self, path, **options):
        seen[path.name.split(".png")[0].lstrip(".")] = self
        savefig(self, path, **options, dpi=40)  # soon done

    monkeypatch.setattr(Figure, "savefig", save)
    return seen
