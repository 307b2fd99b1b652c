"""What a launcher asks for, and who speaks for its processes."""

from __future__ import annotations

import os

import distributed_equality
import launched_jobs
import pytest

from gradpruner.cli.main import main
from gradpruner.distributed import launch
from gradpruner.distributed.processes import alone, first, is_first
from gradpruner.errors import UnsupportedModel

ENGINES = {
    "DeepSpeed": {"ACCELERATE_USE_DEEPSPEED": "true"},
    "FSDP1": {"ACCELERATE_USE_FSDP": "true"},
    "Megatron-LM": {"ACCELERATE_USE_MEGATRON_LM": "true"},
    "tensor, context": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_cannot_be_used_is_refused_by_name(engine, monkeypatch, capsys):
    for name, value in ENGINES[engine].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnsupportedModel, match=rf"{engine}.*--fsdp_version 2"):
        launch.refuse_unknown_engines()
    assert main(["evaluate", "--model", "no-such-model", "--data", "none.jsonl"]) == 1
    assert engine in capsys.readouterr().err  # before anything is read


def test_processes_of_mpi_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert main(["finetune", "--model", "m", "--data", "d.jsonl", "--steps", "2", "--out", "o"]) == 2
    assert "OMPI_COMM_WORLD_SIZE = 2" in capsys.readouterr().err


def test_fsdp2_is_accepted(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    launch.refuse_unknown_engines()
    assert not launch.wants_shards()  # of one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert launch.wants_shards() and launch.launched_rank() == 1


def test_a_command_for_one_process_is_left_to_the_first(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for name in launch.QUIET:
        monkeypatch.setenv(name, "as it was")
    assert (
        main(["plan", str(tmp_path / "none.safetensors"), "--ratio", "0.4", "--out", str(tmp_path / "plan.json")]) == 0
    )
    monkeypatch.setenv("RANK", "0")
    assert (
        main(["plan", str(tmp_path / "none.safetensors"), "--ratio", "0.4", "--out", str(tmp_path / "plan.json")]) == 2
    )
    said = capsys.readouterr()
    assert said.err.count("does not exist") == 1 and said.out == ""


def test_without_a_launcher(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # some clusters set it for all programs
    assert launch.launched() == 1 and first(lambda: 3) == 3 and is_first()
    with alone():
        assert is_first()


@pytest.mark.slow
@pytest.mark.in_ci
def test_processes_decide_together(tmp_path):
    distributed_equality.check(launched_jobs.decide_together, 2, tmp_path)


def test_a_process_of_its_own_is_no_part_of_the_launch(monkeypatch):
    monkeypatch.setattr(os, "environ", {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "HOME": "x"})
    assert launch.launched() == 2 and launch.wants_shards()
    launch.work_apart()
    assert launch.launched() == 1 and not launch.wants_shards() and os.environ == {"HOME": "x"}
