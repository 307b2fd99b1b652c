"""What attach refuses before a run trains, and that it leaves the Trainer alone."""

from __future__ import annotations

import pytest
import training_runs
from attached_runs import Stop, trainer
from training_runs import LAYERS, PROBE, lora
from transformers import AutoModelForCausalLM, GPT2Config, T5Config

import gradpruner
from gradpruner.model.decoder import Decoder


def test_training_that_ends_within_the_probe_says_so(tmp_path, caplog):
    made, callback = trainer(tmp_path, callbacks=[Stop(2)])
    made.train()
    assert "ended in step 2 of 5 of the probe" in caplog.text and callback.plan is None
    assert not made.optimizer.optimizer._optimizer_step_pre_hooks and not made.model._forward_pre_hooks


def test_training_a_second_time_does_not_cut_again(finished):
    _out, callback, made, _ = finished("full")
    plan = callback.plan
    made.train()
    assert callback.plan is plan and len(Decoder(made.model).layers) == len(plan.kept)


def test_a_run_whose_results_could_not_be_written_is_not_cut_again(tmp_path, monkeypatch):
    made, callback = trainer(tmp_path, "full")

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr("gradpruner.training.attach.write_results", fail)
        with pytest.raises(OSError, match="no space left"):
            made.train()
    plan = callback.plan
    assert plan is not None and len(Decoder(made.model).layers) == len(plan.kept)
    made.train()
    assert callback.plan is plan and len(Decoder(made.model).layers) == len(plan.kept)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"steps": True}, "steps = True"),
        ({"ratio": 1.5}, "ratio = 1.5"),
        ({"ratio": 0.4, "count": 99}, "99 of 8 layers"),
        ({"kind": "best"}, "kind = 'best'"),
        ({"preset": "best"}, "preset = 'best'"),
        ({"patch": 1}, "patch = 1"),
        ({"adapters": "merge"}, "adapters = 'merge'"),
        ({"merge": 7}, "merge = 7"),
        ({"top": 0}, "top = 0"),
        ({"protect": [8]}, "protect names layer 8"),
    ],
)
def test_bad_arguments_are_refused_at_once_and_leave_the_trainer_alone(change, reason, tmp_path):
    made, _ = trainer(tmp_path, attached=False)
    before, callbacks = dict(vars(made)), list(made.callback_handler.callbacks)
    with pytest.raises(gradpruner.InvalidArgument, match=reason):
        gradpruner.attach(made, **change)
    assert vars(made).keys() == before.keys() and made.callback_handler.callbacks == callbacks


def test_what_is_no_trainer_and_what_is_attached_twice(tmp_path):
    with pytest.raises(gradpruner.InvalidArgument, match=r"expected a transformers\.Trainer"):
        gradpruner.attach(object())
    made, _ = trainer(tmp_path)
    with pytest.raises(gradpruner.InvalidArgument, match="attached already"):
        gradpruner.attach(made)


def test_adapter_checkpoints_are_not_pushed_from_a_run(tmp_path):
    made, _ = trainer(tmp_path, attached=False)
    made.args.push_to_hub = True
    with pytest.raises(gradpruner.InvalidArgument, match="push_to_hub = True"):
        gradpruner.attach(made, steps=PROBE)


def test_a_run_too_short_for_the_probe_is_refused_before_its_first_step(tmp_path):
    made, _ = trainer(tmp_path, max_steps=PROBE)
    with pytest.raises(gradpruner.InvalidArgument, match="has 5 steps left"):
        made.train()
    assert made.state.global_step == 0 and not list(tmp_path.glob("checkpoint-*"))


def test_adapters_that_changed_the_base_cannot_start_anew(tmp_path, monkeypatch):
    monkeypatch.setitem(training_runs.KINDS, "lora", lambda: lora(training_runs.llama(), init_lora_weights="pissa"))
    with pytest.raises(gradpruner.UnsupportedModel, match="init_lora_weights='pissa'"):
        trainer(tmp_path)


def test_adapters_of_any_start_go_on_and_only_some_start_anew(tmp_path, monkeypatch):
    monkeypatch.setitem(
        training_runs.KINDS, "lora", lambda: lora(training_runs.llama(), init_lora_weights="orthogonal")
    )
    trainer(tmp_path)
    with pytest.raises(gradpruner.UnsupportedModel, match="init_lora_weights='orthogonal'"):
        trainer(tmp_path, chosen="paper")


def test_an_encoder_decoder_is_not_patched(tmp_path, monkeypatch, caplog):
    config = T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=8, num_heads=2)
    from transformers import T5ForConditionalGeneration

    monkeypatch.setitem(training_runs.KINDS, "full", lambda: T5ForConditionalGeneration(config))
    made, _ = trainer(tmp_path, "full", attached=False)
    with pytest.raises(gradpruner.UnsupportedModel, match="an encoder-decoder makes"):
        gradpruner.attach(made, steps=PROBE, patch=True)
    assert "will not be patched" not in caplog.text
    gradpruner.attach(made, steps=PROBE)
    assert "gaps will not be patched: an encoder-decoder" in caplog.text
    config.decoder_start_token_id = config.pad_token_id
    made.train()
    assert len(Decoder(made.model).layers) == LAYERS - 3


def test_an_architecture_that_cannot_be_cut_is_refused_before_training(tmp_path, monkeypatch):
    config = GPT2Config(vocab_size=61, n_embd=16, n_layer=8, n_head=2, scale_attn_by_inverse_layer_idx=True)
    monkeypatch.setitem(training_runs.KINDS, "full", lambda: AutoModelForCausalLM.from_config(config))
    with pytest.raises(gradpruner.UnsupportedModel, match="depends on the layer's index"):
        trainer(tmp_path, "full")


def test_the_exact_estimator_is_refused_where_a_batch_is_dealt_out(tmp_path):
    made, _ = trainer(tmp_path, "full", attached=False)
    made.args._n_gpu = 2  # what transformers finds on a machine with two GPUs: DataParallel
    with pytest.raises(gradpruner.InvalidArgument, match="deals a batch out to 2 GPUs"):
        gradpruner.attach(made, steps=PROBE, estimator="exact")
    gradpruner.attach(made, steps=PROBE)


def test_a_base_that_cannot_be_written_is_found_before_training(tmp_path, monkeypatch):

    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000}))
    made, _ = trainer(tmp_path, "lora", attached=False)
    with pytest.raises(gradpruner.InvalidArgument, match="GB are free on its disk"):
        gradpruner.attach(made, steps=PROBE)
