"""Commands that fail in the middle: a loss that diverges, a full disk, an interrupt."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from folder_contents import contents
from transformers import AutoModelForCausalLM

from gradpruner.cli.main import main

pytestmark = pytest.mark.in_ci  # the slow ones among them


def test_a_loss_that_is_not_a_number_stops_the_run(home, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(home / "model")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    shutil.copytree(home / "model", tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    code = main(
        [
            "probe",
            "--model",
            str(tmp_path / "model"),
            "--data",
            str(home / "data.jsonl"),
            "--steps",
            "3",
            "--batch-size",
            "4",
            "--out",
            str(tmp_path / "igia.safetensors"),
        ]
    )
    error = capsys.readouterr().err
    assert code == 1 and "gradpruner: the loss of step 1 is nan" in error
    assert not (tmp_path / "igia.safetensors").exists()


def test_a_loss_that_rises_is_no_success(home, tmp_path, capsys):
    call = [
        "finetune",
        "--model",
        str(home / "model"),
        "--data",
        str(home / "data.jsonl"),
        "--steps",
        "6",
        "--rank",
        "0",
        "--batch-size",
        "4",
        "--lr",
        "1",
        "--out",
        str(tmp_path / "tuned"),
        "--json",
    ]
    assert main(call) == 1
    said = capsys.readouterr()
    result = json.loads(said.out[said.out.index("{\n") :])
    assert result["diverged"] is True and result["losses"][-1] > 2 * result["losses"][0]
    assert "has diverged: its loss rose from" in said.err and "a lower learning rate (--lr)" in said.err
    assert (tmp_path / "tuned" / "config.json").is_file()  # what was trained is there to be looked at


def test_a_run_that_diverged_says_so_everywhere(home, tmp_path, capsys, monkeypatch):
    from gradpruner.run import speeds
    from gradpruner.training import divergence

    monkeypatch.setattr(divergence, "has_diverged", lambda losses: True)
    monkeypatch.setattr(speeds, "speeds_in_turns", lambda *args: {"pruned": [3.0, 2.0, 4.0]})
    out = tmp_path / "out"
    call = [
        "run",
        "--model",
        str(home / "model"),
        "--data",
        str(home / "data.jsonl"),
        "--steps",
        "4",
        "--probe-steps",
        "2",
        "--batch-size",
        "4",
        "--ratio",
        "0.5",
        "--no-dense",
        "--out",
        str(out),
    ]
    assert main(call) == 1
    said = capsys.readouterr()
    assert "gradpruner: the pruned run has diverged" in said.err and "3.0 (2.0 to 4.0)" in said.out
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert row["failed"] in said.err and row["tokens_per_second"] == 3.0
    assert "the pruned run has diverged" in (out / "report.html").read_text()
    assert main(call) == 1  # nothing is trained again, and it is still no success


def test_a_model_that_is_no_decoder(home, tmp_path, capsys):
    import transformers as hf

    shutil.copytree(home / "model", tmp_path / "model")
    config = hf.T5Config(vocab_size=260, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8)
    hf.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    code = main(["evaluate", "--model", str(tmp_path / "model"), "--data", str(home / "data.jsonl")])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gradpruner: ")]
    assert code == 2 and len(said) == 1 and "T5" in said[0]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            ["apply", "--model", "model", "--plan", "plan.json", "--igia", "igia.safetensors", "--out", "small"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [
                *("apply", "--model", "model", "--plan", "plan.json", "--igia", "igia.safetensors"),
                *("--out", "old", "--overwrite"),
            ],
            marks=pytest.mark.slow,
        ),
        ["plan", "igia.safetensors", "--count", "3", "--out", "plan.json"],
        pytest.param(
            [
                "probe",
                "--model",
                "model",
                "--data",
                "data.jsonl",
                "--steps",
                "3",
                "--batch-size",
                "4",
                "--out",
                "igia.safetensors",
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["apply", "apply over an old one", "plan", "probe"],
)
def test_a_full_disk(home, tmp_path, command):
    here = tmp_path / "here"
    shutil.copytree(home, here)
    (here / "old").mkdir()
    (here / "old" / "precious.txt").write_text("precious")
    before = contents(here)
    limit = 200 if command[0] == "plan" else 20_000
    run = subprocess.run(
        [sys.executable, "-m", "gradpruner.cli", *command],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    said = [line for line in run.stderr.splitlines() if line.startswith("gradpruner: ")]
    assert run.returncode == 1 and len(said) == 1 and "could not write" in said[0], run.stderr[-2000:]
    assert "Traceback" not in run.stderr
    assert contents(here) == before


def test_interrupting_keeps_what_is_finished(home, tmp_path, capsys, monkeypatch):
    from gradpruner.run import models

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "apply", interrupt)
    out = tmp_path / "out"
    code = main(
        [
            "run",
            "--model",
            str(home / "model"),
            "--data",
            str(home / "data.jsonl"),
            "--steps",
            "6",
            "--probe-steps",
            "3",
            "--batch-size",
            "4",
            "--no-dense",
            "--out",
            str(out),
        ]
    )
    assert code == 1 and "interrupted" in capsys.readouterr().err
    assert sorted(p.name for p in out.iterdir()) == ["plan.json", "probe", "run.json"]
