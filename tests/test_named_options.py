"""Names with options, and the registry that imports a class when it is asked for."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass

import pytest

from gradpruner.errors import InvalidArgument
from gradpruner.named_options import Registry, format_options, parse_options, value_of

REGISTRY: Registry[object] = Registry({})


@dataclass(frozen=True)
class Fast:
    speed: float = 1.0
    safe: bool = True
    road: str | None = None


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """One built-in class, in a module that registers it, and one that is added."""
    (tmp_path / "module_of_slow.py").write_text(
        "from test_named_options import REGISTRY\nclass Slow: pass\nREGISTRY.add('slow', Slow)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "test_named_options", sys.modules[__name__])
    monkeypatch.setitem(globals(), "REGISTRY", Registry({"slow": "module_of_slow"}))
    yield REGISTRY
    sys.modules.pop("module_of_slow", None)


def test_a_class_that_replaces_a_built_in_one_stays(registry):
    """Its module may be imported later, by somebody who wants the class itself."""
    registry.add("slow", Fast)
    importlib.import_module("module_of_slow")
    assert registry["slow"] is Fast


def test_a_built_in_class_is_imported_when_it_is_asked_for(registry):
    assert list(registry) == ["slow"] and len(registry) == 1 and "slow" in registry and "fast" not in registry
    assert "module_of_slow" not in sys.modules
    assert registry["slow"].__name__ == "Slow" and "module_of_slow" in sys.modules


def test_a_class_can_be_added_and_replaced(registry):
    registry.add("fast", int)
    registry.add("fast", Fast)
    assert list(registry) == ["slow", "fast"] and len(registry) == 2 and registry["fast"] is Fast
    with pytest.raises(KeyError):
        registry["medium"]
    assert registry.get("medium") is None


@pytest.mark.parametrize("text", ["fast", "fast:speed=2.5", "fast:speed=3,safe=false,road=north"])
def test_format_is_the_opposite_of_parse(text):
    assert format_options("fast", parse_options(text, {"fast": Fast})) == text


def test_what_is_not_known_is_named():
    with pytest.raises(InvalidArgument, match="method = 'first'; accepted are fast"):
        parse_options("first", {"fast": Fast})
    with pytest.raises(InvalidArgument, match="'colour=red' is no option=value; its options are speed, safe, road"):
        parse_options("fast:colour=red", {"fast": Fast})


def test_values():
    texts = ["true", "False", "none", "3", "0.5", "north"]
    assert [value_of(text) for text in texts] == [True, False, None, 3, 0.5, "north"]
