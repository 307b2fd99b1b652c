"""The command that shows what a card must show, in a dry run: every part ends well, and one that hangs is killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.accuracy import joined
from benchmarks.gpu.isolation import run_apart
from benchmarks.gpu.parts import PARTS, Part
from gradpruner.model import load

ROOT = Path(__file__).parents[2]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a user types it."""
    line = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--device",
        "cpu",
        "--tiny",
        "--budget",
        "3000",
        "--out",
        str(folder),
    ]
    return subprocess.run([*line, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900)


def outcomes(folder: Path) -> dict[str, str]:
    """How each part ended, by the report."""
    report = json.loads((folder / "report.json").read_text())
    return {name: outcome["how"] for name, outcome in report["outcomes"].items()}


@pytest.mark.slow
@pytest.mark.in_ci
def test_a_part_that_is_asked_for_runs_alone(tmp_path):
    ran = run(tmp_path / "out", "--only", "environment")
    assert outcomes(tmp_path / "out") == {"environment": "ok"} and ran.returncode == 0, ran.stdout[-4000:]


@pytest.mark.slow
@pytest.mark.in_ci
def test_every_part_of_the_dry_run_ends_well(tmp_path):
    ran = run(tmp_path)
    assert outcomes(tmp_path) == {part.name: "ok" for part in PARTS if part.by_default}, ran.stdout[-4000:]
    assert ran.returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == {part.name for part in PARTS if part.by_default}
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.json",
        "rows.jsonl",
        "log.txt",
        "kernels.csv",
        "kernels.svg",
        "training.svg",
    }


@pytest.mark.slow
def test_the_sweep_that_is_asked_for(tmp_path):
    ran = run(tmp_path / "out", "--only", "sweep")
    assert outcomes(tmp_path / "out") == {"sweep": "ok"}, ran.stdout[-4000:]
    assert "sweep.svg" in {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.slow  # it loads a real model from GGUF several times
def test_the_accuracy_that_is_asked_for(tmp_path):
    whole, pieces = load._demo_gguf().read_bytes(), tmp_path / "pieces"
    pieces.mkdir()
    for name, part in (("a", whole[: len(whole) // 2]), ("b", whole[len(whole) // 2 :])):
        (pieces / name).write_bytes(part)
    data = tmp_path / "train.csv"
    data.write_text("text,category\n" + "".join(f"question {n},intent {n % 3}\n" for n in range(40)))
    ran = run(tmp_path / "out", "--only", "accuracy", "--model", str(pieces), "--data", str(data), "--seeds", "0")
    assert outcomes(tmp_path / "out") == {"accuracy": "ok"}, ran.stdout[-4000:]
    assert "accuracy.svg" in {path.name for path in (tmp_path / "out").iterdir()}


def hang(session) -> None:
    subprocess.run(["sleep", "600"], timeout=700)


def test_a_part_that_hangs_is_killed_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    after = Part("after", lambda session: session.put(what="reached"), 60, 0)
    monkeypatch.setattr(command, "PARTS", (Part("hangs", hang, 0.4, 0), after))
    began = time.monotonic()
    assert command.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 1
    assert time.monotonic() - began < 30
    assert outcomes(tmp_path) == {"hangs": "killed at its limit", "after": "ok"}
    assert '"what": "reached"' in capsys.readouterr().out


def test_what_a_killed_part_started_is_killed_too(tmp_path):
    marker = tmp_path / "still here"

    def start_a_child() -> None:
        subprocess.run(["sh", "-c", f"sleep 2; touch '{marker}'"], timeout=60)

    assert run_apart(start_a_child, 0.3, tmp_path / "log.txt").how == "killed at its limit"
    time.sleep(2.5)
    assert not marker.exists()


def test_a_part_that_fails_says_why_and_keeps_its_rows(tmp_path, monkeypatch):
    def fail(session) -> None:
        session.put(what="before")
        raise ValueError("no such card")

    monkeypatch.setattr(command, "PARTS", (Part("fails", fail, 60, 0),))
    assert command.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["outcomes"]["fails"]["error"] == "ValueError: no such card"
    assert [row["what"] for row in report["rows"]] == ["before"]


@pytest.mark.parametrize("row", [{"right": False}, {"twice_the_same": False}])
def test_a_wrong_result_is_no_good_end(tmp_path, monkeypatch, row):
    monkeypatch.setattr(command, "PARTS", (Part("judges", lambda session: session.put(what="op", **row), 60, 0),))
    assert command.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 1
    outcome = json.loads((tmp_path / "report.json").read_text())["outcomes"]["judges"]
    assert (outcome["how"], outcome["wrong"]) == ("wrong", ["op"])


def test_a_part_for_which_no_time_is_left_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "PARTS", (Part("long", hang, 500, 400),))
    assert command.main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--budget", "100"]) == 1
    outcome = json.loads((tmp_path / "report.json").read_text())["outcomes"]["long"]
    assert outcome["how"] == "not begun" and "it needs 400" in outcome["why"]


def test_a_second_run_replaces_the_rows_of_its_parts_only(tmp_path, monkeypatch):
    for what in ("first", "second"):
        put = Part("one", lambda session, what=what: session.put(what=what), 60, 0)
        other = Part("two", lambda session, what=what: session.put(what=what), 60, 0, by_default=what == "first")
        monkeypatch.setattr(command, "PARTS", (put, other))
        assert command.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert {(row["part"], row["what"]) for row in rows} == {("one", "second"), ("two", "first")}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "nothing"], "accepted are environment"),
        (["--only", "accuracy"], "--model"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, says):
    with pytest.raises(SystemExit):
        command.main(["--device", "cpu", "--tiny", "--out", str(tmp_path), *arguments])
    assert says in capsys.readouterr().err


def test_a_dry_run_is_never_taken_for_a_measurement(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["--device", "cpu", "--out", str(tmp_path)])
    assert "--tiny" in capsys.readouterr().err


def test_pieces_that_are_no_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a GGUF file"):
        joined(tmp_path / "missing", tmp_path)
    (tmp_path / "piece").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="do not begin as a GGUF"):
        joined(tmp_path, tmp_path)
