"""One Trainer run that starts dense and ends pruned: its schedule, logs and weights."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import training_runs
from attached_runs import RUNS, Stop, trainer
from peft import AutoPeftModelForCausalLM
from thinned import IN_CI, every, thinned
from training_runs import LAYERS, PROBE, STEPS, lora, same, tensors
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer

import gradpruner
from gradpruner.model.decoder import Decoder
from gradpruner.plan import gaps
from gradpruner.pruning.patch import fit_patches


@pytest.mark.parametrize(("kind", "chosen"), thinned(RUNS, every(2)))
def test_a_run_starts_dense_and_ends_pruned(kind, chosen, finished, tmp_path):
    out, callback, made, _ = finished(kind, chosen)
    plan = callback.plan
    assert plan.layers == LAYERS and len(plan.removed) == 3 and callback.igia.steps == PROBE
    assert made.state.global_step == STEPS and len(Decoder(made.model).layers) == LAYERS - 3
    # the schedule of a run that was never cut
    losses = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in losses] == list(range(1, STEPS + 1))
    rates = [entry["learning_rate"] for entry in losses]
    assert rates == pytest.approx([1e-2 * (STEPS - i) / STEPS for i in range(STEPS)])
    # what trackers are told
    (figures,) = [e for e in made.state.log_history if "gradpruner/removed_layers" in e]
    assert figures["step"] == PROBE and figures["gradpruner/removed_layers"] == 3
    for layer, score in enumerate(callback.igia.layer_scores("norm" if chosen == "default" else "squared").tolist()):
        assert figures[f"gradpruner/score/{layer:02d}"] == score
        fate = 1.0 if layer in plan.drop else 2.0 if layer in plan.merge else 0.0
        assert figures[f"gradpruner/fate/{layer:02d}"] == fate
    assert figures["gradpruner/gaps"] == len(gaps(plan)) > 0
    assert figures["gradpruner/patched_gaps"] == sum("/unexplained/" in name for name in figures)
    # of a DoRA whose magnitudes have moved, what is added to a weight is not what is added to the layer's output
    assert (figures["gradpruner/patched_gaps"] > 0) == (kind != "dora" and chosen != "paper")
    # nothing holds a parameter that is gone
    alive = {id(p) for p in made.model.parameters() if p.requires_grad}
    held = [p for group in made.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == alive and len(held) == len(alive)
    assert gradpruner.Plan.load(out / "gradpruner" / "plan.json") == plan
    scores = gradpruner.Igia.load(out / "gradpruner" / "igia.safetensors").layer_scores()
    assert torch.equal(scores, callback.igia.layer_scores())


@pytest.mark.parametrize("kind", training_runs.KINDS)
def test_the_probe_saw_what_a_probe_alone_sees(kind, finished, tmp_path):
    _, callback, _, _ = finished(kind)
    probe = gradpruner.ProbeCallback(steps=PROBE)
    made, _ = trainer(tmp_path, kind, attached=False, callbacks=[probe])
    made.train()
    assert torch.equal(probe.igia.square_norms, callback.igia.square_norms)
    assert probe.igia.plan(0.4, kind="norm", merge=0) == callback.plan


def test_adapters_start_anew_and_merged_weights_are_those_of_apply(finished, tmp_path):
    _out, callback, made, _ = finished("lora", "paper")
    assert callback.plan.merge  # else nothing is shown
    expected = gradpruner.apply(training_runs.llama(), callback.plan, callback.igia)
    decoder = Decoder(made.model)
    for weight in decoder.weights:
        assert torch.equal(decoder.parameter(weight), Decoder(expected).parameter(weight))
    made, _ = trainer(tmp_path, chosen="paper", callbacks=[Stop(PROBE)])
    made.train()
    for name, parameter in made.model.named_parameters():
        assert "lora_B" not in name or not parameter.any()  # a fresh adapter's B is 0
    assert not any(made.optimizer.state.values())


def seen_in_the_probe(out, kind, monkeypatch):
    """A dense Trainer after the probe's steps, and what its model was given in them."""
    made, _ = trainer(out, kind, attached=False, callbacks=[Stop(PROBE)])
    batches, step = [], made.training_step

    def recording(model, given, *args):
        batches.append({name: value.clone() for name, value in given.items() if name != "labels"})
        return step(model, given, *args)

    monkeypatch.setattr(made, "training_step", recording)
    made.train()
    return made, batches


def test_adapters_go_on_and_patched_weights_are_those_of_apply(finished, tmp_path, monkeypatch):
    _out, callback, cut, _ = finished("lora", "merging")
    dense, batches = seen_in_the_probe(tmp_path / "dense", "lora", monkeypatch)
    patches = fit_patches(dense.model, callback.plan, batches)
    assert patches and callback.plan.merge
    expected = Decoder(gradpruner.apply(training_runs.llama(), callback.plan, callback.igia, patches=patches))
    decoder = Decoder(cut.model)
    for weight in decoder.weights:
        assert torch.equal(decoder.parameter(weight), expected.parameter(weight))

    made, _ = trainer(tmp_path / "cut", chosen="merging", callbacks=[Stop(PROBE)])
    made.train()
    for new, old in enumerate(callback.plan.kept):
        learned = dict(Decoder(dense.model).layers[old].named_parameters())
        for name, parameter in Decoder(made.model).layers[new].named_parameters():
            if "lora_" in name:
                assert torch.equal(parameter, learned[name])
                assert int(made.optimizer.state[parameter]["step"]) == PROBE
    assert len(made.optimizer.state) == sum(p.requires_grad for p in made.model.parameters())


def test_a_fully_trained_model_is_patched_as_the_probe_left_it(tmp_path, monkeypatch):
    made, callback = trainer(tmp_path / "cut", "full", chosen="merging", callbacks=[Stop(PROBE)])
    made.train()
    dense, batches = seen_in_the_probe(tmp_path / "dense", "full", monkeypatch)
    patches = fit_patches(dense.model, callback.plan, batches)
    expected = gradpruner.apply(dense.model, callback.plan, callback.igia, patches=patches)
    assert patches and same(expected.state_dict(), tensors(made.model))


def test_a_share_may_be_a_fraction(tmp_path):
    made, _ = trainer(tmp_path, attached=False)
    callback = gradpruner.attach(made, steps=PROBE, ratio=0.4, merge="auto", top=Fraction(1, 3))
    made.train()
    assert callback.plan.merge and list((tmp_path / "gradpruner").glob("base-*"))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("lora", {"gradient_accumulation_steps": 3}, marks=IN_CI),
        pytest.param("lora", {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("lora", {"bf16": True, "neftune_noise_alpha": 5.0}, marks=IN_CI),
        pytest.param("lora", {"optim": "adamw_8bit", "auto_find_batch_size": True}, marks=IN_CI),
        ("full", {"gradient_checkpointing": True, "lr_scheduler_type": "cosine", "warmup_steps": 3}),
        pytest.param("full", {"optim": "adafactor"}, marks=pytest.mark.slow),
        pytest.param("full", {"optim": "adamw_8bit"}, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_a_trainer_can_be_told(kind, options, tmp_path):
    """Each runs across the cut, and resumes within the probe to the same plan and weights."""
    if options.get("optim") == "adamw_8bit":
        pytest.importorskip("bitsandbytes", minversion="0.50", reason="its optimizers did not run on a CPU before")
    made, callback = trainer(tmp_path, kind, chosen="merging", **options)
    made.train()
    plan, final = callback.plan, tensors(made.model)
    assert len(Decoder(made.model).layers) == len(plan.kept) and made.state.global_step == STEPS
    made, again = trainer(tmp_path, kind, chosen="merging", **options)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.plan == plan and same(final, tensors(made.model))


@pytest.mark.slow
@pytest.mark.in_ci
def test_a_compiled_trainer_run_goes_on(finished, tmp_path):
    _, callback, plain, _ = finished("lora")
    made, again = trainer(tmp_path, torch_compile=True, torch_compile_backend="eager")
    made.train()
    assert again.plan == callback.plan and made.state.global_step == STEPS
    figures, compiled = ([e for e in run.state.log_history if "gradpruner/gaps" in e] for run in (plain, made))
    assert compiled[0] == pytest.approx(figures[0], rel=1e-3)  # what the patches leave among them


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """Runs of kind "lora" get a 4-bit base, loaded from tmp_path/dense."""
    pytest.importorskip("bitsandbytes")
    dense = training_runs.llama(hidden=64, intermediate=128)  # the widths that bitsandbytes' kernels take
    dense.save_pretrained(tmp_path / "dense")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def load():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=quantised)

    monkeypatch.setitem(training_runs.KINDS, "lora", lambda: lora(load()))
    return dense


@pytest.mark.slow
@pytest.mark.in_ci
def test_a_quantised_base_is_cut_and_its_full_precision_twin_written(packed, tmp_path, caplog):
    made, _ = trainer(tmp_path / "out", attached=False)
    with pytest.raises(gradpruner.InvalidArgument, match="the base is quantised, accepted is 0"):
        gradpruner.attach(made, steps=PROBE, merge="auto")
    with pytest.raises(gradpruner.UnsupportedModel, match="nothing can be added to packed weights"):
        gradpruner.attach(made, steps=PROBE, merge=0, patch=True)
    callback = gradpruner.attach(made, steps=PROBE, ratio=0.4, merge=0)
    assert caplog.text.count("gaps will not be patched") == 1
    made.train()
    assert max(int(state["step"]) for state in made.optimizer.state.values()) == STEPS  # the adapters went on
    final = tensors(made.model)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-12")
    for new, old in enumerate(callback.plan.kept):
        layer = again.get_base_model().model.layers[new]
        twin = dict(packed.model.layers[old].named_parameters())
        for name, parameter in layer.named_parameters():
            if "lora_" not in name:
                assert torch.equal(parameter, twin[name.replace(".base_layer", "")])
    made, _ = trainer(tmp_path / "out", attached=False)
    gradpruner.attach(made, steps=PROBE, ratio=0.4, merge=0)
    made.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert same(final, tensors(made.model))


def test_a_subclass_of_the_trainer_keeps_its_own_methods(tmp_path):
    saved = []

    class Mine(Trainer):
        def _save_checkpoint(self, model, trial):
            saved.append(self.state.global_step)
            super()._save_checkpoint(model, trial)

    made, _ = trainer(tmp_path, attached=False)
    mine = Mine(model=made.model, args=made.args, train_dataset=made.train_dataset)
    gradpruner.attach(mine, steps=PROBE, ratio=0.4)
    mine.train()
    assert saved == [3, 6, 9, 12]
