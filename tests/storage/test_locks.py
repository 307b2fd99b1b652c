"""Locks in a folder that several machines share; another machine is a process that gives another host's name."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradpruner.errors import GradPrunerError
from gradpruner.storage import locks
from gradpruner.storage.locks import claim, holder, lock

HOLDING = """
import socket, sys, time
socket.gethostname = lambda: sys.argv[2]
from pathlib import Path
from gradpruner.storage import locks
locks.LEASE = float(sys.argv[3])
with locks.claim(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def held_by(monkeypatch):
    """Start a process of a machine that holds a lock; it is killed at the end."""
    started = []

    def start(path, host, lease=1.0):
        monkeypatch.setattr(locks, "LEASE", lease)
        code = [sys.executable, "-c", HOLDING, str(path), host, str(lease)]
        process = subprocess.Popen(code, stdout=subprocess.PIPE, text=True, env=os.environ.copy())
        started.append(process)
        assert process.stdout.readline() == "True\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def seconds_until_free(path, limit=10.0):
    start = time.monotonic()
    while time.monotonic() < start + limit:
        with claim(path) as mine:
            if mine:
                return time.monotonic() - start
        time.sleep(0.02)
    raise AssertionError("it stays locked")


def test_a_living_holder_keeps_its_lock_and_a_dead_machine_loses_it(held_by, tmp_path):
    path = tmp_path / "model"
    process = held_by(path, "another-machine")
    end = time.monotonic() + 2.5  # longer than the lease, which the holder renews
    while time.monotonic() < end:
        with claim(path) as mine:
            assert not mine
        time.sleep(0.05)
    assert holder(path) == f"process {process.pid} on another-machine"
    process.kill()
    process.wait()
    assert 0.5 < seconds_until_free(path) < 5
    assert holder(path) is None


def test_a_dead_process_of_this_machine_loses_its_lock_at_once(held_by, tmp_path):
    import socket

    process = held_by(tmp_path / "model", socket.gethostname(), lease=100.0)
    process.kill()
    process.wait()
    assert seconds_until_free(tmp_path / "model") < 5
    with lock(tmp_path / "model"):  # nor does one who waits
        assert holder(tmp_path / "model").startswith(f"process {os.getpid()} on ")


def test_claimed_twice_by_one_process(tmp_path):
    with claim(tmp_path / "deep" / "model") as mine, claim(tmp_path / "deep" / "model") as again:
        assert mine and not again
    with claim(tmp_path / "deep" / "model") as mine:
        assert mine


def test_a_lost_lock_stops_its_holder(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(locks, "LEASE", 0.3)
    with pytest.raises((GradPrunerError, KeyboardInterrupt)), lock(tmp_path / "model"):
        Path(f"{tmp_path / 'model'}.lock").unlink()
        time.sleep(30)
    assert "was lost (marker-missing)" in caplog.text
