"""The commands end to end on a tiny model, and what they say when they are called wrongly."""

from __future__ import annotations

import json
import shutil

import pytest
from folder_contents import contents
from transformers import AutoModelForCausalLM

from gradpruner.cli.main import main


def test_step_by_step(home, tmp_path, capsys):
    small, tuned = str(tmp_path / "small"), str(tmp_path / "tuned")
    data = ["--data", str(home / "data.jsonl")]
    assert (
        main(
            [
                "apply",
                "--model",
                str(home / "model"),
                "--plan",
                str(home / "plan.json"),
                "--igia",
                str(home / "igia.safetensors"),
                "--out",
                small,
            ]
        )
        == 0
    )
    assert "verified; removes 3 of 6 decoder layers (50.0%" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(small).config.num_hidden_layers == 3
    assert main(["finetune", "--model", small, *data, "--steps", "3", "--batch-size", "4", "--out", tuned]) == 0
    assert main(["evaluate", "--model", tuned, *data, "--rouge", "8", "--json"]) == 0
    text = capsys.readouterr().out
    result = json.loads(text[text.index("{\n") :])
    assert set(result) == {"exact_match", "perplexity", "rouge_l", "examples"} and result["examples"] == 40


@pytest.mark.slow
@pytest.mark.in_ci
def test_run_and_resume(home, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = [
        "run",
        "--model",
        str(home / "model"),
        "--data",
        str(home / "data.jsonl"),
        "--held-out",
        "0.25",
        "--steps",
        "8",
        "--probe-steps",
        "3",
        "--batch-size",
        "4",
        "--lr",
        "1e-2",
        "--ratio",
        "0.5",
        "--out",
        str(out),
    ]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "exact match" in text and "pruned / dense" in text
    for name in (
        "run.json",
        "dense.json",
        "speeds.json",
        "probe/igia.safetensors",
        "plan.json",
        "pruned.json",
        "results.json",
        "report.html",
        "layer_scores.png",
        "cut/config.json",
        "model/config.json",
    ):
        assert (out / name).is_file(), name
    results = json.loads((out / "results.json").read_text())
    dense, pruned = results["rows"]
    assert (dense["layers"], pruned["layers"]) == (6, 3) and pruned["parameters"] < dense["parameters"]
    assert dense["training"]["steps"] == 8 and pruned["training"]["steps"] == 5  # the probe's steps count
    assert AutoModelForCausalLM.from_pretrained(out / "model").config.num_hidden_layers == 3

    # what is finished is not done again, what is missing is
    (out / "pruned.json").unlink()
    shutil.rmtree(out / "cut")
    before = contents(out)
    from gradpruner.run import stages

    trained = []
    real = stages.train
    monkeypatch.setattr(stages, "train", lambda model, *a, **k: trained.append(model) or real(model, *a, **k))
    assert main([*command, "--json"]) == 0
    assert len(trained) == 1
    again = json.loads((out / "results.json").read_text())["rows"][1]
    assert again["training"]["losses"] == pruned["training"]["losses"]
    assert contents(out / "model") == {k.removeprefix("model/"): v for k, v in before.items() if k.startswith("model/")}
    assert main([*command[:-2], "--seed", "5", "--out", str(out)]) == 2
    assert "another recipe" in capsys.readouterr().err
    (tmp_path / "data.jsonl").write_text((home / "data.jsonl").read_text().replace("word 1", "word 9"))
    assert main([*command[:3], "--data", str(tmp_path / "data.jsonl"), *command[5:]]) == 2
    assert "another data" in capsys.readouterr().err


def test_help_teaches(capsys):
    for command in (
        "run",
        "compare",
        "sensitivity",
        "probe",
        "plan",
        "apply",
        "finetune",
        "evaluate",
        "report",
        "demo",
        "backends",
    ):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"example:\n  gradpruner {command}" in capsys.readouterr().out


def test_backends(capsys):
    assert main(["backends", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reference"] == "available"
    assert ("cpp instruction set" in found) == (found["cpp"] == "available")


def test_backends_names_the_instruction_set(capsys, monkeypatch):
    cpp = pytest.importorskip("gradpruner.ops.cpp")
    monkeypatch.setattr(cpp, "ISA", "avx2")
    assert main(["backends"]) == 0
    assert "cpp instruction set: avx2" in capsys.readouterr().out


def test_backends_says_what_triton_lacks_on_a_gpu(capsys, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert main(["backends"]) == 0
    assert "triton on a GPU: needs a C compiler" in capsys.readouterr().out
    (tmp_path / "gcc").touch(0o755)
    assert main(["backends"]) == 0
    assert "C compiler" not in capsys.readouterr().out


def wrong_calls(home):
    model, data = ["--model", str(home / "model")], ["--data", str(home / "data.jsonl")]
    igia, plan = str(home / "igia.safetensors"), str(home / "plan.json")
    out = ["--out", str(home / "new")]
    apply, steps = ["apply", *model, "--plan", plan, "--igia", igia], ["--steps", "2"]
    bad = home.parent / "bad"
    bad.mkdir(exist_ok=True)
    (bad / "broken.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": \n')
    (bad / "empty.csv").write_text("")
    (bad / "corrupt.safetensors").write_bytes((home / "igia.safetensors").read_bytes()[:-100] + b"x" * 100)
    (bad / "short.safetensors").write_bytes((home / "igia.safetensors").read_bytes()[:500])
    (bad / "plan.json").write_text("{]")
    content = json.loads((home / "plan.json").read_text())
    (bad / "other-model.json").write_text(json.dumps({**content, "model": "0123456789abcdef"}))
    shallow = {**content, "layers": 5, "kept": [0, 1, 3], "drop": [4], "merge": {"2": 1}}
    (bad / "wrong-layers.json").write_text(json.dumps(shallow))
    (bad / "unknown-layer.json").write_text(json.dumps({**content, "drop": [77]}))
    return {
        # wrong usage: 2
        "no command": ([], 2),
        "unknown command": (["shrink"], 2),
        "no model": (["run", *data, *steps, *out], 2),
        "model folder missing": (["evaluate", "--model", str(home / "nowhere"), *data], 2),
        "model folder without a model": (["evaluate", "--model", str(home.parent / "bad"), *data], 2),
        "gguf missing": (["evaluate", "--model", "nothing.gguf", *data], 2),
        "data missing": (["evaluate", *model, "--data", "nothing.jsonl"], 2),
        "data empty": (["evaluate", *model, "--data", str(bad / "empty.csv")], 2),
        "data broken": (["evaluate", *model, "--data", str(bad / "broken.jsonl")], 2),
        "column unknown": (["evaluate", *model, *data, "--prompt", "{question}", "--answer", "{category}"], 2),
        "dtype unknown": (["evaluate", *model, *data, "--dtype", "int8"], 2),
        "batch size 0": (["evaluate", *model, *data, "--batch-size", "0"], 2),
        "answers longer than max length": (["evaluate", *model, *data, "--max-length", "3"], 2),
        "steps 0": (["probe", *model, *data, "--steps", "0", *out], 2),
        "rank negative": (["finetune", *model, *data, *steps, "--rank", "-1", *out], 2),
        "learning rate 0": (["finetune", *model, *data, *steps, "--lr", "0", *out], 2),
        "ratio 1.0": (["plan", igia, "--ratio", "1.0", *out], 2),
        "ratio 40": (["plan", igia, "--ratio", "40", *out], 2),
        "ratio and count": (["plan", igia, "--ratio", "0.4", "--count", "2", *out], 2),
        "count of all layers": (["plan", igia, "--count", "6", *out], 2),
        "score unknown": (["plan", igia, "--kind", "median", *out], 2),
        "merge more than removed": (["plan", igia, "--count", "2", "--merge", "3", *out], 2),
        "igia missing": (["plan", "nothing.safetensors", *out], 2),
        "out in no folder": (["plan", igia, "--out", str(home / "no" / "plan.json")], 2),
        "plan missing": (["apply", *model, "--plan", "nothing.json", *out], 2),
        "plan names an unknown layer": (["apply", *model, "--plan", str(bad / "unknown-layer.json"), *out], 2),
        "top 0": ([*apply, "--top", "0", *out], 2),
        "igia not given": (["apply", *model, "--plan", plan, *out], 2),
        "out folder in use": ([*apply, "--out", str(home / "model")], 2),
        "probe longer than the run": (["run", *model, *data, *steps, "--probe-steps", "2", *out], 2),
        "no run to report": (["report", str(home)], 2),
        # right usage, but something is wrong with what was found: 1
        "igia corrupted": (["plan", str(bad / "corrupt.safetensors"), *out], 1),
        "igia cut short": (["plan", str(bad / "short.safetensors"), *out], 1),
        "igia is something else": (["plan", str(home / "model" / "model.safetensors"), *out], 1),
        "plan damaged": (["apply", *model, "--plan", str(bad / "plan.json"), *out], 1),
        "plan of another model": (["apply", *model, "--plan", str(bad / "other-model.json"), "--igia", igia, *out], 1),
        "plan of another depth": (["apply", *model, "--plan", str(bad / "wrong-layers.json"), "--igia", igia, *out], 1),
    }


def test_wrong_calls_end_in_one_line_and_change_nothing(home, capsys):
    calls = wrong_calls(home)
    assert len(calls) >= 20
    before = contents(home)
    for name, (arguments, code) in calls.items():
        try:
            got = main(arguments)
        except SystemExit as stop:  # argparse's own refusals
            got = stop.code
        error = capsys.readouterr().err
        assert got == code, (name, got, error)
        said = [line for line in error.splitlines() if line.startswith("gradpruner") and "error:" in line] or [
            line for line in error.splitlines() if line.startswith("gradpruner: ")
        ]
        assert len(said) == 1 and len(said[0]) > 30, (name, error)
        assert "Traceback" not in error, name
        assert contents(home) == before, name
