"""What can only fail at the end of a run is found before its first step, and costs nothing."""

from __future__ import annotations

import collections
import json
import logging
import shutil

import pytest
import torch
from preflight_runs import LONG, RECIPE, TEST, TRAIN, config_of, run, write
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
from word_tokenizers import make_tokenizer

import gradpruner
from gradpruner.checkpoint.generation_config import savable
from gradpruner.cli.main import main
from gradpruner.compare.experiment import Compare
from gradpruner.data.examples import Example
from gradpruner.errors import CheckpointError, InvalidArgument, UnsupportedModel
from gradpruner.model.full_precision import check_full_precision, quantisation_of
from gradpruner.presets import Preset
from gradpruner.pruning import preflight as pruning_preflight
from gradpruner.run import speeds, stages
from gradpruner.run.job import Job
from gradpruner.storage.files import need_writable

REFUSED = {
    "a test answer that does not fit": ({"test": LONG}, "test examples: max_length is 48"),
    "a training answer that does not fit": ({"train": LONG}, "training examples: max_length is 48"),
    "a test example without a token": ({"test": [Example("", "")]}, "test examples: row 0 has no label"),
    "a share of no layer": ({"ratio": 0.05}, "ratio = 0.05 of 4 layers rounds to none"),
    "all layers": ({"ratio": None, "count": 4}, "4 of 4 layers to remove"),
    "more merged than removed": ({"preset": Preset.of(merge=3)}, "merge = 3"),
    "no share of a weight": ({"preset": Preset.of(top=0.0)}, "top = 0.0"),
    "an unknown score": ({"preset": Preset.of(kind="median")}, "kind = 'median'"),
    "tokens of an unknown kind": ({"train_on": "prompt"}, "train_on is 'prompt'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_is_refused_before_it_trains(case, base_home, tmp_path, trained):
    options, message = REFUSED[case]
    with pytest.raises(InvalidArgument) as caught:
        run(base_home / "model", tmp_path / "out", **options).everything()
    assert message in str(caught.value) and not trained
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]
    # the folder is not spoilt: the same one goes on with what is right
    with pytest.raises(AssertionError, match="trained"):
        run(base_home / "model", tmp_path / "out").everything()


def test_settings_stay_what_they_were_where_a_stage_is_done(base_home, tmp_path):
    first = run(base_home / "model", tmp_path / "out")
    (first.folder / "dense.json").write_text("{}")
    with pytest.raises(InvalidArgument, match="another max_length"):
        run(base_home / "model", tmp_path / "out", max_length=64)


def test_a_comparison_is_refused_before_it_trains(base_home, tmp_path, trained):
    def compare(**options):
        job = Job(str(base_home / "model"), 6, RECIPE, probe_steps=2, **options)
        return Compare(job, TRAIN, LONG, tmp_path / "out", methods=["drop-last"], held_out=4)

    with pytest.raises(InvalidArgument, match="test examples: max_length is 48, but the answer of example 3"):
        compare(max_length=48).work()
    with pytest.raises(AssertionError, match="trained"):
        compare(max_length=300).work()
    with pytest.raises(InvalidArgument, match="another max_length"):
        compare(max_length=48)


def test_a_report_without_matplotlib_is_refused_before_it_trains(base_home, tmp_path, trained, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] or ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InvalidArgument, match="pip install gradpruner"):
        run(base_home / "model", tmp_path / "out").everything()
    assert not trained


def test_a_folder_that_cannot_be_written_to_or_is_too_small(base_home, tmp_path, trained, monkeypatch):
    model, tokenizer = gradpruner.model.load.load_model(base_home / "model")
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    with pytest.raises(InvalidArgument, match=r"0\.00 GB are free on its disk; expected"):
        run(base_home / "model", tmp_path / "out").everything()
    monkeypatch.undo()

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"could not write a checkpoint to .*No space left"):
        pruning_preflight.check_save(model, tokenizer, tmp_path / "new" / "folder")
    assert not trained and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A checkpoint that is stored in 4 bits."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    folder, tokenizer = tmp_path_factory.mktemp("packed"), make_tokenizer()
    sizes = dict(hidden_size=64, intermediate_size=128)  # the widths that bitsandbytes' kernels take
    write(folder / "dense", config_of(tokenizer, **sizes), tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "dense", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def test_a_base_in_4_bits_is_refused_with_the_way_out(packed, base_home, tmp_path, trained, capsys):
    data, plan = ["--data", str(base_home / "data.jsonl")], tmp_path / "plan.json"
    gradpruner.Plan(4, drop=[1]).save(plan)
    model, out, steps = ["--model", str(packed)], ["--out", str(tmp_path / "out")], ["--steps", "4"]
    calls = {
        "run": ["run", *model, *data, *steps, *out],
        "compare": ["compare", *model, *data, *data[:0], *steps, "--methods", "drop-last", *out],
        "finetune": ["finetune", *model, *data, *steps, *out],
        "sparsify": ["sparsify", *model, *data, "--max-length", "8", "--samples", "1", *out],
        "apply": ["apply", *model, "--plan", str(plan), *out],
        "apply in memory": ["apply", *model, "--plan", str(plan), "--dtype", "float32", *out],
    }
    (tmp_path / "many.jsonl").write_text((base_home / "data.jsonl").read_text() * 3)
    calls["compare"][4] = str(tmp_path / "many.jsonl")
    for name, call in calls.items():
        assert main(call) in (1, 2), name
        error = capsys.readouterr().err
        said = [line for line in error.splitlines() if line.startswith("gradpruner: ")]
        assert len(said) == 1 and "4 bits (bitsandbytes)" in said[0], (name, error)
        assert "a full-precision base is wanted" in said[0], (name, error)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert not trained
    with pytest.raises(InvalidArgument, match="a full-precision base is wanted"):
        gradpruner.save(AutoModelForCausalLM.from_pretrained(packed), tmp_path / "saved")
    with pytest.raises(UnsupportedModel, match="a full-precision base is wanted"):
        gradpruner.apply_folder(packed, tmp_path / "saved", gradpruner.Plan(4, drop=[1]))
    assert not (tmp_path / "saved").exists()


def test_weights_in_float8_are_quantised_too(base_home, tmp_path):
    model, _ = gradpruner.model.load.load_model(base_home / "model")
    check_full_precision(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(InvalidArgument, match=r"model 'tiny' is quantised, .*a full-precision base is wanted"):
        check_full_precision(model, "tiny")


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "4 bits (bitsandbytes)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits (bitsandbytes)"),
        ({"quant_method": "gptq", "bits": 3}, "3 bits (gptq)"),
        ({"quant_method": "fp8"}, "quantised form (fp8)"),
        (None, None),
    ],
)
def test_how_a_config_says_that_weights_are_packed(known, said):
    config = LlamaConfig()
    if known is not None:
        config.quantization_config = known
    assert quantisation_of(config) == said


def test_places_that_cannot_be_written_to_are_found_before_training(base_home, tmp_path, trained, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious.txt").write_text("precious")
    gradpruner.Plan(4, drop=[1]).save(tmp_path / "plan.json")
    base = ["--model", str(base_home / "model")]
    data = ["--data", str(base_home / "data.jsonl"), "--steps", "2"]
    for call, message in (
        (["finetune", *base, *data, "--out", str(tmp_path / "used")], "exists and is not empty"),
        (
            [
                "apply",
                *base,
                "--plan",
                str(tmp_path / "plan.json"),
                "--dtype",
                "float32",
                "--out",
                str(tmp_path / "used"),
            ],
            "exists and is not empty",
        ),
        (["probe", *base, *data, "--out", str(tmp_path / "no" / "igia.safetensors")], "does not exist"),
        (["probe", *base, *data, "--out", str(tmp_path / "used")], "is a folder"),
    ):
        assert main(call) == 2 and message in capsys.readouterr().err, call
    assert not trained
    (tmp_path / "file").write_text("kept")
    need_writable(tmp_path / "file")
    need_writable(tmp_path / "new")
    assert (tmp_path / "file").read_text() == "kept" and not (tmp_path / "new").exists()


def test_rouge_without_its_package_is_refused_before_anything_is_measured(base_home, monkeypatch):
    import sys

    for name in ("rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    model, tokenizer = gradpruner.model.load.load_model(base_home / "model")
    monkeypatch.setattr(stages, "exact_match", lambda *args, **options: pytest.fail("measured"))
    with pytest.raises(InvalidArgument, match="pip install gradpruner"):
        stages.measure(model, tokenizer, TEST, max_length=48, train_on="answer", batch_size=2, rouge_tokens=4)


GREEDY = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 7, "repetition_penalty": 1.1}


def test_what_of_a_generation_config_can_be_saved():
    kept, dropped = savable(GenerationConfig(**GREEDY, num_beams=1, early_stopping=True))
    assert dropped == ["early_stopping", "temperature", "top_p"]
    assert kept.max_new_tokens == 7 and kept.repetition_penalty == 1.1 and kept.do_sample is False
    for whole in (GenerationConfig(do_sample=True, temperature=0.6), GenerationConfig()):
        assert savable(whole) == (whole, [])


@pytest.mark.parametrize("how", ["save", "apply_folder"])
def test_a_generation_config_that_is_read_and_not_written(how, base_home, tmp_path, caplog):
    source = tmp_path / "model"
    shutil.copytree(base_home / "model", source)
    written = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**written, **GREEDY}))
    model, tokenizer = gradpruner.model.load.load_model(source)
    model.generation_config.pad_token_id = tokenizer.eos_token_id  # as a chat script sets it
    own = model.generation_config
    with caplog.at_level(logging.WARNING):
        if how == "save":
            gradpruner.save(model, tmp_path / "out", tokenizer=tokenizer)
        else:
            gradpruner.apply_folder(source, tmp_path / "out", gradpruner.Plan(4, drop=[1]))
    assert "without temperature = 0.6, top_p = 0.9" in caplog.text
    again = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (again.max_new_tokens, again.repetition_penalty, again.temperature) == (7, 1.1, None)
    again.save_pretrained(tmp_path)  # and it is written
    again.validate(strict=True)
    assert model.generation_config is own and own.temperature == 0.6


def test_a_chat_model_goes_through_a_whole_run(base_home, tmp_path, monkeypatch):
    """Its generation config has no padding token, so load_model sets one: transformers then refuses to write it."""
    source = tmp_path / "model"
    shutil.copytree(base_home / "model", source)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **GREEDY}))
    monkeypatch.setattr(speeds, "speeds_in_turns", lambda *args: {"dense": [1.0], "pruned": [2.0]})
    results = run(source, tmp_path / "out").everything()
    assert [row["name"] for row in results["rows"]] == ["dense", "pruned"]
    assert (tmp_path / "out" / "model" / "generation_config.json").is_file()


def test_a_failure_to_write_says_why(base_home, tmp_path, monkeypatch):
    model, _ = gradpruner.model.load.load_model(base_home / "model")

    def refuse(*args, **options):
        raise NotImplementedError

    monkeypatch.setattr(model, "save_pretrained", refuse)
    with pytest.raises(CheckpointError, match=r"could not write .*: NotImplementedError; nothing was written"):
        gradpruner.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
