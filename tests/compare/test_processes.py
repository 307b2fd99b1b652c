"""A comparison by several processes, of which some die."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_comparisons import LAYERS, comparison, counting, lines, logged, results

from gradpruner.compare import experiment, outputs, processes
from gradpruner.compare.results import read_results
from gradpruner.errors import GradPrunerError, InvalidArgument
from gradpruner.storage import locks
from gradpruner.storage.locks import claim


def test_a_wrong_ratio_is_told_before_processes_start(home, tmp_path):
    made = comparison(home, tmp_path / "out", ratios=(0.05,))
    with pytest.raises(InvalidArgument, match=r"ratio = 0\.05 of 6 layers rounds to none"):
        processes.work_in_processes(made, 2)


@pytest.mark.slow
@pytest.mark.in_ci
def test_two_processes_find_what_one_finds(base, home, tmp_path):
    made, messages = comparison(home, tmp_path / "out", ["drop-last"]), []
    with logged(messages):
        processes.work_in_processes(made, 2)
    assert sum("exact match" in line for line in messages) == 4  # of both processes
    outputs.write(made, costs=False)
    assert_same_where_made(made.folder, base[0].folder, 4)


def assert_same_where_made(folder, whole, count):
    """The results and losses of `folder`, `count` models, are to the bit those that `whole` has of the same models."""
    made = {(result.method, result.seed): result for result in results(folder)}
    known = {(result.method, result.seed): result for result in results(whole)}
    assert len(made) == count and made == {name: known[name] for name in made}
    losses = [line for line in lines(whole / "losses.csv") if (line["method"], int(line["seed"])) in made]
    assert losses and lines(folder / "losses.csv") == losses


DYING = """
import os, signal, sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
import small_comparisons
from gradpruner.compare import experiment
real, calls = experiment.tune, []
def dying(*args, **options):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **options)
experiment.tune = dying
small_comparisons.comparison(Path({home!r}), {out!r}, ["gradpruner"]).work()
"""


@pytest.mark.slow
@pytest.mark.in_ci
def test_killed_and_resumed(base, home, tmp_path):
    out = tmp_path / "out"
    code = DYING.format(path=[str(Path(__file__).parent), *sys.path], home=str(home), out=str(out))
    died = subprocess.run(
        [sys.executable, "-c", code], env=os.environ.copy(), capture_output=True, text=True, timeout=300
    )
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    assert len(list((out / "cells").iterdir())) == 1
    unfinished = comparison(home, out, ["gradpruner"]).cells(LAYERS)[1]
    with claim(out / "locks" / unfinished.name) as mine:
        assert mine  # the dead hold nothing
    with counting() as calls:
        made = comparison(home, out, ["gradpruner"])
        made.work()
        outputs.write(made, costs=False)
    assert len(calls["tune"]) == 3
    assert_same_where_made(out, base[0].folder, 4)


def test_what_another_is_making_is_left_to_it(copied, home):
    made = comparison(home, copied)
    lost = made.cells(LAYERS)[4]
    (copied / "cells" / f"{lost.name}.json").unlink()
    with claim(copied / "locks" / lost.name) as mine:
        assert mine
        made.work(wait=False)
        assert not (copied / "cells" / f"{lost.name}.json").exists() and len(made.finished()) == 7
        outputs.write(made, costs=False)  # of what there is
        assert len(read_results(copied / "results.csv")) == 7
    with counting() as calls:
        made.work()
    assert len(made.finished()) == 8 and calls["tune"] == []  # it was trained, only its cell was lost


HOLDING = """
import socket, sys, time
sys.path[:0] = {path!r}
socket.gethostname = lambda: "another-machine"
from pathlib import Path
from gradpruner.storage import locks
locks.LEASE = {lease}
with locks.claim(Path({lock!r})) as mine:
    print(mine, flush=True)
    time.sleep(600)
"""


def test_a_model_of_a_machine_that_died_is_made_by_one_that_waits(copied, home, monkeypatch):
    monkeypatch.setattr(locks, "LEASE", 1.0)
    monkeypatch.setattr(experiment, "POLL", 0.1)
    made, messages = comparison(home, copied), []
    lost = made.cells(LAYERS)[4]
    (copied / "cells" / f"{lost.name}.json").unlink()
    code = HOLDING.format(path=sys.path, lock=str(copied / "locks" / lost.name), lease=locks.LEASE)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        real = experiment.holder  # asked once the comparison has found nothing else to do
        monkeypatch.setattr(experiment, "holder", lambda path: (real(path), other.kill())[0])
        with logged(messages):
            made.work()
    assert len(made.finished()) == 8
    assert [line for line in messages if f"process {other.pid} on another-machine is making it; waiting" in line]


def test_a_failed_process_is_told_of(home, tmp_path, monkeypatch):
    class Child:
        exitcode = 1

        def __init__(self, target, args):
            assert target is processes._work and args[1:3] in ((0, 2), (1, 2))

        start = join = lambda self: None

    spawn = SimpleNamespace(Process=Child, Queue=queue.SimpleQueue)
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda kind: spawn)
    with pytest.raises(GradPrunerError, match="2 of 2 processes failed"):
        processes.work_in_processes(comparison(home, tmp_path / "out"), 2)
