"""Trainers with a second model, as their attributes tell: which are refused, and by which words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn
from training_runs import PROBE, trainer
from transformers import Trainer, TrainerCallback

import gradpruner


def attach(made):
    return gradpruner.attach(made, steps=PROBE, ratio=0.4)


def with_attributes(out, kind="lora", arguments=(), **attributes):
    made, _ = trainer(out, kind, attached=False)
    for name, value in attributes.items():
        setattr(made, name, value)
    for name, value in dict(arguments).items():
        setattr(made.args, name, value)
    return made


@pytest.mark.parametrize(
    ("attributes", "arguments", "reason"),
    [
        ({"ref_model": None, "beta": 0.1}, {}, "Accepted are a ref_model of its own"),
        ({"ref_model": None}, {"beta": [0.1, 0.2]}, "with its adapters switched off"),
        ({"ref_model": None, "beta": 0.1}, {"precompute_ref_log_probs": False}, "precompute_ref_log_probs=True"),
        ({"ref_model": None, "beta": 0.1}, {"num_generations": 4}, r"beta=0\.0, which needs no reference"),
        ({}, {"teacher_model_kind": "base"}, "teacher_model_kind='base': its teacher is the trained model"),
        ({"use_vllm": True}, {}, "use_vllm=True: vLLM holds the dense model"),
        ({}, {"use_vllm": True}, "use_vllm=True"),
    ],
)
def test_a_second_model_that_a_cut_would_change_is_refused(attributes, arguments, reason, tmp_path):
    made = with_attributes(tmp_path, arguments=arguments, **attributes)
    with pytest.raises(gradpruner.UnsupportedModel, match=f"^trainer is a Trainer.*{reason}"):
        attach(made)


def test_a_reference_adapter_is_named(tmp_path):
    made = with_attributes(tmp_path, ref_model=None, beta=0.1)
    made.model.add_adapter("ref", made.model.peft_config["default"])
    with pytest.raises(gradpruner.UnsupportedModel, match="is the trained model with the adapter 'ref'"):
        attach(made)


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        ("full", {"ref_model": None, "beta": 0.1}),  # no adapters to switch off
        ("lora", {"ref_model": nn.Linear(1, 1), "beta": 0.1}),  # a model of its own
        ("lora", {"ref_model": None, "beta": 0.0}),
        ("lora", {"ref_model": None}),  # LLaMA-Factory's supervised Trainer
        ("lora", {"ref_model": None, "beta": 0.1, "precompute_ref_logps": True}),
        (
            "lora",
            {"ref_model": None, "beta": 0.1, "finetuning_args": SimpleNamespace(stage="dpo", use_ref_model=False)},
        ),
    ],
)
def test_a_reference_that_a_cut_does_not_change_is_accepted(kind, attributes, tmp_path):
    assert attach(with_attributes(tmp_path, kind, **attributes)).plan is None


def test_llama_factorys_kto_has_a_reference_whatever_its_settings_say(tmp_path):
    settings = SimpleNamespace(stage="kto", use_ref_model=False)
    made = with_attributes(tmp_path, ref_model=None, beta=0.1, finetuning_args=settings)
    with pytest.raises(gradpruner.UnsupportedModel, match="reference"):
        attach(made)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("SyncRefModelCallback", "stays dense"), ("BEMACallback", "averages"), ("LISACallback", "some layers at a time")],
)
def test_a_callback_that_knows_the_dense_layers_is_refused(name, reason, tmp_path):
    made, _ = trainer(tmp_path, attached=False, callbacks=[type(name, (TrainerCallback,), {})()])
    with pytest.raises(gradpruner.UnsupportedModel, match=f"callback {name}.*{reason}"):
        attach(made)


def test_a_trainer_with_a_loop_of_its_own_is_refused(tmp_path):
    kind = type("CustomPPOTrainer", (type("PPOTrainer", (Trainer,), {}),), {})
    made, _ = trainer(tmp_path, attached=False)
    with pytest.raises(
        gradpruner.UnsupportedModel, match="trainer is a CustomPPOTrainer: its loop steps the optimizer"
    ):
        attach(kind(model=made.model, args=made.args, train_dataset=made.train_dataset))


def test_a_module_around_a_model_is_refused(tmp_path):
    made, _ = trainer(tmp_path, "full", attached=False)
    around = Trainer(model=nn.Sequential(made.model), args=made.args, train_dataset=made.train_dataset)
    with pytest.raises(gradpruner.UnsupportedModel, match="model is a Sequential around a transformers model"):
        attach(around)


def test_what_is_known_only_after_the_constructor_is_refused_when_training_begins(tmp_path):
    """The base class calls a callback before a subclass has set its attributes."""

    class Preference(Trainer):
        def __init__(self, **options):
            super().__init__(**options)
            self.ref_model, self.beta = None, 0.1

    made, _ = trainer(tmp_path, attached=False)
    callback = gradpruner.AttachCallback(steps=PROBE)
    preference = Preference(model=made.model, args=made.args, train_dataset=made.train_dataset, callbacks=[callback])
    with pytest.raises(gradpruner.UnsupportedModel, match="trainer is a Preference whose reference"):
        preference.train()


@pytest.mark.parametrize(
    ("flag", "what"), [("cp_enabled", "context"), ("sp_enabled", "sequence"), ("tp_enabled", "tensor")]
)
def test_split_sequences_and_matrices_are_refused(flag, what, tmp_path):
    made, _ = trainer(tmp_path, attached=False)
    made.accelerator.state.__dict__["parallelism_config"] = SimpleNamespace(**{flag: True})
    try:
        with pytest.raises(gradpruner.UnsupportedModel, match=f"{what} parallelism"):
            attach(made)
    finally:
        del made.accelerator.state.__dict__["parallelism_config"]
