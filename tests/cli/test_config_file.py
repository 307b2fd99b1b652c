"""`--config`: what a file may say, what is refused, and that what a run records is such a file."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

from gradpruner.cli.config_file import NOT_RECORDED, name_of, record_of
from gradpruner.cli.main import build_parser, main
from gradpruner.cli.recipe_options import recipe_of
from gradpruner.errors import InvalidArgument
from gradpruner.version import __version__

ROOT = Path(__file__).parents[2]
BASE = "model: m\ndata: d.jsonl\nout: o\n"


def commands():
    parser = build_parser()
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {name: p for name, p in action.choices.items() if "--config" in p._option_string_actions}


@pytest.fixture
def parsed(tmp_path):
    """Parse `gradpruner COMMAND --config FILE WORDS`."""

    def parse(text, *words, command="run", name="run.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return build_parser().parse_args([command, "--config", str(tmp_path / name), *words])

    return parse


def test_the_file_gives_options_and_words_override_them(parsed):
    options = parsed(BASE + "steps: 8\nbatch-size: 4\nlearning_rate: 1e-2\nratio: auto\nno_dense: true\ndora: false\n")
    assert (options.model, options.steps, options.batch_size, options.lr) == ("m", 8, 4, 0.01)
    assert (options.ratio, options.no_dense, options.dora, options.patch) == ("auto", True, False, None)
    options = parsed(BASE + "steps: 8\nbatch_size: 4\n", "--batch-size", "2", "--no-patch")
    assert (options.steps, options.batch_size, options.patch, options.rank) == (8, 2, False, 8)


def test_of_options_that_exclude_each_other_the_command_line_wins(parsed):
    options = parsed(BASE + "steps: 8\nratio: 0.3\n", "--epochs", "2", "--count", "3")
    assert (options.steps, options.epochs, options.ratio, options.count) == (None, 2.0, None, 3)


def test_numbers_are_read_as_they_look(parsed):
    """YAML 1.1 reads 010 as 8, and 1e-3 as text."""
    text = BASE + "steps: 010\nrun_name: 2026-01-02\ntraining_arguments:\n  lr_scheduler_kwargs: {min_lr: 1e-3}\n"
    options = parsed(text)
    assert (options.steps, options.run_name) == (10, "2026-01-02")
    assert options.training_arguments == {"lr_scheduler_kwargs": {"min_lr": 0.001}}


def test_a_file_without_options(parsed):
    for text, said in (("", "is empty"), ("# nothing\n", "is empty"), ("- a\n", "holds a list"), ("a", "one value")):
        with pytest.raises(InvalidArgument, match=said):
            parsed(text)


def test_a_shorter_name_of_config_is_refused(parsed, tmp_path, capsys):
    """argparse takes --conf for --config, and the file would not be read."""
    (tmp_path / "other.yaml").write_text("rank: 2\n")
    words = ("--model", "m", "--data", "d", "--steps", "8", "--out", "o")
    with pytest.raises(SystemExit):
        build_parser().parse_args(["run", *words, "--conf", str(tmp_path / "other.yaml")])
    with pytest.raises(SystemExit):
        parsed(BASE + "steps: 8\n", "--conf", str(tmp_path / "other.yaml"))
    assert capsys.readouterr().err.count("write --config in full") == 2


def test_lists(parsed):
    text = BASE + "steps: 8\nratios: [0.2, 0.4]\nseeds: 3\nmethods:\n- gradpruner\n- 'laco:interval=2'\n"
    options = parsed(text, command="compare")
    assert (options.ratios, options.seeds) == ([0.2, 0.4], [3])
    assert options.methods == ["gradpruner", "laco:interval=2"]


def test_training_arguments_are_joined(parsed):
    text = BASE + "steps: 8\ntraining_arguments:\n  adam_beta1: 0.8\n  bf16: true\n"
    options = parsed(text, "--set", "bf16=false", "--set", "optim_args=a=b")
    assert options.training_arguments == {"adam_beta1": 0.8, "bf16": "false", "optim_args": "a=b"}


def test_a_byte_order_mark_and_an_empty_value(parsed):
    assert parsed("\ufeff" + BASE + "steps: 8\nlimit:\n").limit is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("batch_sise: 4", "batch_sise is no option of this command; did you mean batch_size?"),
        ("base_model: x", "did you mean model?"),
        ("lora_r: 4", "did you mean rank?"),
        ("adam_beta1: 0.9", "it belongs under the key training_arguments"),
        ("config: x.yaml", "config cannot stand in a file"),
        ("chat_template: ~/chat.jinja", "~ and environment variables are not expanded"),
        ("chat_template: $HOME/chat.jinja", "~ and environment variables are not expanded"),
        ("accumulation: 1e3", "accumulation = 1000.0; expected a whole number, in digits"),
        ("accumulation: 1:30", "accumulation = '1:30'; expected a whole number"),
        ("\trank: 2", "by spaces, not by tabs"),
        ("batch_size: four", "batch_size = 'four'; expected a whole number"),
        ("batch_size: [4, 8]", "expected one value"),
        ("split: no", "put a word such as yes or no into quotes"),
        ("of: tensors", "of = 'tensors'; accepted are layers, parameters"),
        ("ratio: much", "invalid number 'much'"),
        ("dora: 1", "dora = 1; accepted are true and false"),
        ("training_arguments: cosine", "expected a mapping"),
        ("lr: 1\nlearning_rate: 2", "given twice, under two names"),
        ("rank: 2\nrank: 3", "the key 'rank' is there twice"),
        ("a: b: c", "is no YAML"),
    ],
)
def test_what_is_refused(parsed, line, message):
    with pytest.raises(InvalidArgument) as refused:
        parsed(f"{BASE}steps: 8\n{line}\n")
    assert message in str(refused.value)


def test_a_list_is_no_config(parsed):
    with pytest.raises(InvalidArgument, match="expected a mapping of options"):
        parsed("- steps\n")


def test_what_is_missing_is_named(parsed, capsys):
    for text, message in (
        ("data: d\nsteps: 3\n", "required, in .*: --model, --out"),
        (BASE, "one of --steps, --epochs is required"),
        (BASE + "steps: 3\nepochs: 1\n", "only one of --steps, --epochs is accepted"),
    ):
        with pytest.raises(SystemExit):
            parsed(text)
        assert re.search(message, capsys.readouterr().err), text


def test_a_file_that_is_not_there_ends_with_code_2(tmp_path, capsys):
    assert main(["run", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_option_may_stand_in_a_file(name, tmp_path):
    """What a command records, read back, gives the same options."""
    parser = commands()[name]
    words = ["--model", "m", "--out", "o", "--data", "d", "--steps", "8", "--plan", "p"]
    known = [i for i in range(0, len(words), 2) if words[i] in parser._option_string_actions]
    options = build_parser().parse_args([name, *(word for i in known for word in words[i : i + 2])])
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"source": "m", "recipe": {}, "command": record_of(options)}))
    again = build_parser().parse_args([name, "--config", str(file)])
    kept = {action.dest for action in parser._actions if action.dest not in NOT_RECORDED}
    # as text: values of a sensitivity are text on a command line, and numbers in its defaults
    assert {d: str(getattr(again, d)).replace("'", "") for d in kept} == {
        d: str(getattr(options, d)).replace("'", "") for d in kept
    }
    keys = {name_of(option) for action in parser._actions if action.dest in kept for option in action.option_strings}
    assert record_of(options)["options"].keys() <= keys


def test_another_command_another_version_and_an_old_record(parsed):
    record = {"name": "run", "version": "0.0.1", "options": {"model": "m", "data": "d", "out": "o", "steps": 4}}
    options = parsed(json.dumps({"command": record}), name="run.json")
    assert "written by gradpruner 0.0.1; this is " + __version__ in options.config_note
    with pytest.raises(InvalidArgument, match="written by gradpruner run; expected that command"):
        parsed(json.dumps({"command": record}), command="finetune", name="run.json")
    with pytest.raises(InvalidArgument, match="did not record its options"):
        parsed(json.dumps({"source": "m", "recipe": {}}), name="run.json")


def test_the_page_names_options_that_exist():
    page = (ROOT / "docs" / "config.md").read_text()
    there = {option for parser in commands().values() for option in parser._option_string_actions}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", page)) - {
        "--logdir",
        "--conf",
    }  # TensorBoard's own, and what is refused
    assert len(named) > 20 and named <= there


def test_the_example_is_a_run():
    options = build_parser().parse_args(["run", "--config", str(ROOT / "examples" / "run.yaml")])
    assert options.training_arguments == {"adam_beta2": 0.99, "max_grad_norm": 0.5} and options.warmup == 2
    made = recipe_of(argparse.Namespace(**{**vars(options), "report_to": None}))
    assert made.max_grad_norm == 0.5 and made.trainer_arguments["gradient_checkpointing"] is True
    assert len((ROOT / options.data[0]).read_text().splitlines()) == 80


@pytest.mark.slow
@pytest.mark.in_ci
def test_the_example_runs_on_a_tiny_model(home, tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(home / "model"), "--data", str(home / "data.jsonl"), "--steps", "6", "--probe-steps", "3"]
    assert main(["run", "--config", str(ROOT / "examples" / "run.yaml"), *words, "--json"]) == 0
    assert {folder.name for folder in (tmp_path / "units" / "logs").iterdir()} == {"probe", "dense", "cut", "pruned"}
    recorded = json.loads((tmp_path / "units" / "run.json").read_text())
    assert recorded["recipe"]["max_grad_norm"] == 0.5 and recorded["command"]["options"]["report_to"] == ["tensorboard"]


@pytest.mark.slow
@pytest.mark.in_ci
def test_the_run_that_a_run_records(home, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {home / 'model'}\ndata: {home / 'data.jsonl'}\nepochs: 1\nbatch_size: 4\nprobe_steps: 3\n"
        f"ratio: 0.5\nlr: 1e-2\nheld_out: 0.25\nno_dense: true\nscheduler: cosine\nout: {tmp_path / 'first'}\n"
    )
    assert main(["run", "--config", str(config), "--json"]) == 0
    first = tmp_path / "first"
    settings = json.loads((first / "run.json").read_text())
    assert settings["steps"] == 8 and settings["command"]["options"]["epochs"] == 1.0  # 30 rows of 4
    assert main(["run", "--config", str(first / "run.json"), "--out", str(tmp_path / "second"), "--json"]) == 0
    again = json.loads((tmp_path / "second" / "run.json").read_text())
    assert {k: v for k, v in again.items() if k != "command"} == {k: v for k, v in settings.items() if k != "command"}
    one, two = (json.loads((f / "results.json").read_text())["rows"][-1] for f in (first, tmp_path / "second"))
    assert one["training"]["losses"] == two["training"]["losses"] and one["perplexity"] == two["perplexity"]
    # the folder goes on, whatever the data is called
    other = tmp_path / "other-name.jsonl"
    other.write_bytes((home / "data.jsonl").read_bytes())
    assert main(["run", "--config", str(config), "--data", str(other), "--json"]) == 0
    assert json.loads((first / "run.json").read_text())["command"]["options"]["data"] == [str(other)]
