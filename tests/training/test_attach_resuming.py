"""Runs with gradpruner attached that stop, die and go on from a checkpoint."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
import training_runs
from attached_runs import Stop, run_and_die, trainer
from forkserver import forking
from peft import AutoPeftModelForCausalLM
from thinned import IN_CI
from training_runs import LAYERS, PROBE, STEPS, same, tensors
from transformers import AutoModelForCausalLM

import gradpruner
from gradpruner.model.decoder import Decoder
from gradpruner.pruning.patch import Patch
from gradpruner.training.probe_batches import load_batches
from gradpruner.training.resume import mark_of


@pytest.mark.slow
@pytest.mark.in_ci
@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 3}, {"torch_compile_backend": "eager"}], ids=str)
def test_every_micro_batch_of_the_probe_is_in_the_checkpoint(options, tmp_path, monkeypatch):
    made, _ = trainer(
        tmp_path / "cut",
        torch_compile="torch_compile_backend" in options,
        callbacks=[Stop(4)],
        eval_dataset=training_runs.rows(8),
        eval_strategy="steps",
        eval_steps=1,
        **options,
    )
    made.train()
    kept = load_batches(tmp_path / "cut" / "checkpoint-3", None)
    count = options.get("gradient_accumulation_steps", 1)
    made, _ = trainer(tmp_path / "dense", attached=False, callbacks=[Stop(3)], **options)
    seen, step = [], made.training_step
    monkeypatch.setattr(made, "training_step", lambda model, given, *a: (seen.append(given), step(model, given, *a))[1])
    made.train()
    assert len(kept) == len(seen) == 3 * count
    for batch, given in zip(kept, seen, strict=True):
        assert torch.equal(batch["input_ids"], given["input_ids"]) and "labels" not in batch


def test_bases_with_other_patches_have_other_names():
    plan, weights = gradpruner.Plan(LAYERS, drop=[2, 5]), Decoder(training_runs.llama()).weights
    patches = [Patch(weights[i], 2, torch.full(weights[i].shape, v), 0.5) for i, v in ((7, 0.0), (7, 1.0), (6, 1.0))]
    marks = {mark_of(plan, {"top": 0.2}, [patch]) for patch in patches}
    assert len({*marks, mark_of(plan, {"top": 0.2}), mark_of(plan, {"top": 0.3})}) == 5


@pytest.mark.parametrize(
    ("kind", "step", "chosen"),
    [
        ("lora", 3, "default"),
        ("lora", 6, "default"),
        pytest.param("lora", 9, "default", marks=IN_CI),
        pytest.param("dora", 6, "default", marks=IN_CI),
        ("full", 3, "default"),
        pytest.param("full", 9, "default", marks=IN_CI),
        ("lora", 3, "paper"),
        pytest.param("lora", 6, "paper", marks=IN_CI),
        pytest.param("lora", 9, "paper", marks=IN_CI),
        ("dora", 6, "paper"),
        pytest.param("full", 3, "paper", marks=IN_CI),
        pytest.param("full", 9, "paper", marks=IN_CI),
        pytest.param("lora", 3, "merging", marks=IN_CI),
        ("lora", 6, "merging"),
        ("dora", 6, "merging"),
        pytest.param("full", 3, "merging", marks=IN_CI),
    ],
)
def test_resuming_gives_the_same_plan_and_weights(kind, step, chosen, finished, tmp_path):
    out, callback, _, final = finished(kind, chosen)
    shutil.copytree(out, tmp_path / "copy")
    made, again = trainer(tmp_path / "copy", kind, chosen=chosen)
    made.train(resume_from_checkpoint=str(tmp_path / "copy" / f"checkpoint-{step}"))
    assert again.plan == callback.plan and made.state.global_step == STEPS
    assert same(final, tensors(made.model))
    assert torch.equal(again.igia.layer_scores(), callback.igia.layer_scores())


@pytest.mark.parametrize("step", [6, 12])
@pytest.mark.parametrize("kind", training_runs.KINDS)
def test_stock_tools_load_a_checkpoint_made_after_the_cut(kind, step, finished):
    out, _, made, _ = finished(kind)
    loader = AutoModelForCausalLM if kind == "full" else AutoPeftModelForCausalLM
    again = loader.from_pretrained(out / f"checkpoint-{step}").eval()
    assert len(Decoder(again).layers) == LAYERS - 3
    if step == STEPS:
        ids = training_runs.rows(1)[0]["input_ids"][None]
        with torch.no_grad():
            assert torch.equal(made.model.eval()(input_ids=ids).logits, again(input_ids=ids).logits)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("probe", marks=pytest.mark.slow),
        pytest.param("apply", marks=IN_CI),
        pytest.param("save of the base", marks=pytest.mark.slow),
        pytest.param("save of step 3", marks=IN_CI),
        pytest.param("save of step 6", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_as_if_nothing_had_happened(moment, finished, tmp_path):
    chosen = "merging" if moment in ("apply", "save of step 6") else "default"
    _, callback, _, final = finished("lora", chosen)
    process = forking().Process(target=run_and_die, args=(str(tmp_path), chosen, moment))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "survived").exists()
    made, again = trainer(tmp_path, chosen=chosen)
    if moment == "save of step 3":
        with pytest.raises(gradpruner.CheckpointError, match="no complete checkpoint"):
            made.train(resume_from_checkpoint=True)
        made.train()
    else:
        made.train(resume_from_checkpoint=True)
    assert again.plan == callback.plan and same(final, tensors(made.model))


def test_a_checkpoint_that_was_not_finished_is_passed_over(finished, tmp_path):
    out, _callback, _, final = finished("lora")
    shutil.copytree(out, tmp_path / "copy")
    for step, content in ((9, None), (12, '{"cut sho')):
        state = tmp_path / "copy" / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text(content) if content else state.unlink()
    made, _again = trainer(tmp_path / "copy")
    with pytest.raises(gradpruner.CheckpointError, match="not complete"):
        made.train(resume_from_checkpoint=str(tmp_path / "copy" / "checkpoint-12"))
    made.train(resume_from_checkpoint=True)
    assert same(final, tensors(made.model))
    assert json.loads((tmp_path / "copy" / "checkpoint-12" / "trainer_state.json").read_text())["global_step"] == 12


def test_a_checkpoint_of_another_base_is_refused(finished, tmp_path):
    out, _, _, _ = finished("lora")
    made, _ = trainer(tmp_path)
    with torch.no_grad():
        for parameter in made.model.get_base_model().model.layers.parameters():
            parameter.mul_(1.5)
    with pytest.raises(gradpruner.ModelMismatch):
        made.train(resume_from_checkpoint=str(out / "checkpoint-9"))
    made, _ = trainer(tmp_path, "full")
    with pytest.raises(gradpruner.ModelMismatch, match="with adapters"):
        made.train(resume_from_checkpoint=str(out / "checkpoint-9"))


def test_a_checkpoint_of_the_dense_model_is_not_loaded_into_the_cut_one(tmp_path):
    made, _ = trainer(tmp_path, "full", save_only_model=True)
    made.train()
    with pytest.raises(gradpruner.ModelMismatch, match="is cut already"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_adams_memory_of_the_first_steps_must_come_back(tmp_path):
    made, _ = trainer(tmp_path, "full", chosen="merging", save_only_model=True)
    made.train()
    made, _ = trainer(tmp_path, "full", chosen="merging", save_only_model=True)
    with pytest.raises(gradpruner.ProbeError, match="its state is lost"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_through_a_symbolic_link(finished, tmp_path):
    _, _, _, final = finished("lora")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    made, _ = trainer(tmp_path / "link")
    made.train()
    made, _ = trainer(tmp_path / "link")
    made.train(resume_from_checkpoint=str(tmp_path / "link" / "checkpoint-9"))
    assert same(final, tensors(made.model))
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "link" / "checkpoint-12")


def test_the_best_checkpoint_is_one_of_the_smaller_model(tmp_path):
    made, callback = trainer(
        tmp_path,
        "full",
        eval_dataset=training_runs.rows(8),
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    made.train()
    assert made.state.best_global_step > PROBE
    assert len(Decoder(made.model).layers) == len(callback.plan.kept)
