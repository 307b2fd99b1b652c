"""Fields of TrainingArguments and of adapters: what is read, what is refused, and that they take effect."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from peft.tuners.lora import LoraLayer
from training_rows import plain, rows
from training_runs import llama
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from word_tokenizers import make_tokenizer

from gradpruner.data.collator import Collator
from gradpruner.errors import InvalidArgument, ProbeError
from gradpruner.model.loss import IGNORED
from gradpruner.run.stages import tune, watch
from gradpruner.training import trainer_fields
from gradpruner.training.finetune import add_adapters, check_comparable
from gradpruner.training.recipe import Recipe
from gradpruner.training.schedule import schedule, steps_of_epochs
from gradpruner.training.trainer_arguments import training_arguments
from gradpruner.training.trainer_fields import DECIDED

STEPS = 4
RECIPE = Recipe(batch_size=2, learning_rate=1e-2, warmup=0, rank=4)


def recipe(**arguments):
    return dataclasses.replace(RECIPE, trainer_arguments=arguments)


def probed(recipe, model=None):
    """Return the trained model and its igia after a probe of a few steps."""
    ordered = plain(schedule(rows(), STEPS, recipe))
    return watch(model or llama(), make_tokenizer(), ordered, recipe, quiet=True)


class Rates(TrainerCallback):
    def __init__(self):
        self.rates, self.optimizer = [], None

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.optimizer = type(getattr(optimizer, "optimizer", optimizer)).__name__


def tuned(recipe, model=None):
    spy = Rates()
    ordered = plain(schedule(rows(), STEPS, recipe))
    model, training = tune(model or llama(), make_tokenizer(), ordered, recipe, quiet=True, callbacks=[spy])
    return model, training, spy


def test_values_are_read_by_their_types():
    given = {"adam_beta1": "0.8", "bf16": "true", "lr_scheduler_kwargs": '{"num_cycles": 1}', "optim_args": None}
    given |= {"lr_scheduler_type": "cosine", "dataloader_num_workers": "2", "report_to": "none"}
    made = recipe(**given)
    assert made.trainer_arguments == {
        **{"adam_beta1": 0.8, "bf16": True, "lr_scheduler_kwargs": {"num_cycles": 1}},
        **{"lr_scheduler_type": "cosine", "dataloader_num_workers": 2, "report_to": "none"},
    }
    kept = {"adam_beta1", "bf16", "lr_scheduler_kwargs", "lr_scheduler_type"}  # these change weights
    assert set(made.to_dict()["trainer_arguments"]) == kept
    assert RECIPE.to_dict()["trainer_arguments"] == {}
    lists = {"optim_target_modules": ["attn", "mlp"], "report_to": []}
    assert trainer_fields.typed_arguments(lists) == lists


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_schedular_type": "cosine"}, "did you mean 'lr_scheduler_type'?"),
        ({"lr_scheduler_type": "cosinus"}, "lr_scheduler_type = 'cosinus': invalid choice"),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"least": 1}}, "least"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "expected a schedule of steps"),
        ({"bf16": "perhaps"}, "bf16 = 'perhaps'"),
        ({"bf16": True, "fp16": True}, "fp16"),
        ({"adam_beta1": {"a": 1}}, "expected one value"),
        ({"adam_beta1": [0.8, 0.9]}, "expected one value"),
        ({"output_dir": "x"}, "output_dir cannot be set: use --out"),
        ({"learning_rate": 1}, "use --lr"),
        ({"eval_steps": 5}, "gradpruner evaluate"),
        ({"hub_token": "x"}, "gradpruner push"),
        ({"optim": "lomo"}, "cannot be watched: it steps inside the backward pass"),
        ({"optim": "galore_adamw_layerwise"}, "cannot be watched"),
        ({"optim": "schedule_free_adamw"}, "cannot be watched"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "expected False"),
        ({"report_to": "notebook"}, "report_to = 'notebook'"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(InvalidArgument) as refused:
        recipe(**arguments)
    assert message in str(refused.value)


def test_a_tracker_whose_package_is_missing_is_named(monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(InvalidArgument, match="report_to = 'wandb': its package is missing: pip install wandb"):
        recipe(report_to=["wandb"])


def test_every_field_of_a_run_is_decided_or_left_to_the_user(tmp_path):
    """What `training_arguments` sets from the recipe cannot be set a second time."""
    made = training_arguments(RECIPE, str(tmp_path), schedule_steps=10, save_steps=None, bf16=False, quiet=True)
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    usual = TrainingArguments(output_dir="x", report_to="none")
    differing = {n for n in names if str(getattr(made, n)) != str(getattr(usual, n))}
    of_cpu = {"accelerator_config", "dataloader_pin_memory"}  # without a GPU, transformers changes them
    assert differing - {"disable_tqdm", *of_cpu} <= DECIDED.keys()


@pytest.mark.slow
def test_the_cosine_schedule():
    rates = tuned(recipe(lr_scheduler_type="cosine"))[2].rates
    assert rates == pytest.approx([1e-2 * (1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)])


def test_warm_up_in_steps():
    rates = tuned(dataclasses.replace(RECIPE, warmup=2))[2].rates
    assert rates == pytest.approx([0, 5e-3, 1e-2, 5e-3])


@pytest.mark.parametrize("rank", [4, 0])
def test_a_probe_under_gradient_checkpointing_sees_the_same(rank):
    usual = dataclasses.replace(RECIPE, rank=rank)
    model, igia = probed(usual)
    again, same = probed(dataclasses.replace(usual, trainer_arguments={"gradient_checkpointing": True}))
    assert any(getattr(module, "gradient_checkpointing", False) for module in again.modules())
    assert torch.equal(igia.layer_scores(), same.layer_scores())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("optim", ["adafactor", "sgd"])
@pytest.mark.slow
def test_another_optimizer_with_a_probe(optim):
    igia = probed(recipe(optim=optim))[1]
    assert igia.steps == STEPS and torch.isfinite(igia.layer_scores()).all()
    assert tuned(recipe(optim=optim))[2].optimizer.lower() == optim


@pytest.mark.slow
def test_label_smoothing_counts_all_labels():
    """The loss of the first step, written out. Logits are not skipped, which would pair them with other labels."""
    ordered = plain(schedule(rows(), STEPS, RECIPE))
    batch = Collator(make_tokenizer())(ordered[:2])
    with torch.no_grad():
        logits = llama()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    log_p = torch.log_softmax(logits.double(), -1)[labels != IGNORED]
    right = log_p.gather(1, labels[labels != IGNORED][:, None])
    expected = -(0.7 * right.mean() + 0.3 * log_p.mean())
    loss = tuned(recipe(label_smoothing_factor=0.3))[1].losses[0]
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert loss != pytest.approx(-right.mean().item(), rel=1e-4)


def test_label_smoothing_of_an_older_transformers_is_refused_with_accumulation(monkeypatch):
    class Older(LabelSmoother):
        def __call__(self, model_output, labels, shift_labels=False):
            raise AssertionError

    monkeypatch.setattr("transformers.trainer_pt_utils.LabelSmoother", Older)
    with pytest.raises(InvalidArgument, match="label_smoothing_factor with 2 forward passes"):
        tuned(dataclasses.replace(recipe(label_smoothing_factor=0.3), batch_size=1, accumulation=2))


def test_label_smoothing_is_refused_where_transformers_would_not_shift():
    class Other(type(llama())):
        pass

    model = llama()
    model.__class__ = Other
    with pytest.raises(InvalidArgument, match="label_smoothing_factor: transformers smooths the loss of a Other"):
        tuned(recipe(label_smoothing_factor=0.3), model)


@pytest.mark.slow
def test_neftune_adds_noise_only_in_training():
    usual, noisy = tuned(RECIPE), tuned(recipe(neftune_noise_alpha=50))
    assert usual[1].losses[0] != noisy[1].losses[0]
    ids = torch.arange(3, 20)[None]
    assert torch.equal(noisy[0].train()(input_ids=ids).logits, noisy[0](input_ids=ids).logits)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q_proj", "v_proj"), {"q_proj", "v_proj"}),
        (("mlp.up_proj",), {"up_proj"}),
        (r".*\.(k|o)_proj", {"k_proj", "o_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_target_modules(targets, expected):
    model = add_adapters(llama(), dataclasses.replace(RECIPE, target_modules=targets))
    found = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert found == expected


@pytest.mark.parametrize("targets", [("q_proj", "lm_head"), ("query",), r"encoder\..*", "(", ()])
def test_target_modules_that_mean_nothing(targets):
    with pytest.raises(InvalidArgument, match="target_modules"):
        add_adapters(llama(), dataclasses.replace(RECIPE, target_modules=targets))


def test_layers_that_adapters_leave_out_are_not_compared():
    some = dataclasses.replace(RECIPE, target_modules=r".*layers\.[0-4]\..*q_proj")
    with pytest.raises(ProbeError):
        check_comparable(llama(), some)
    check_comparable(llama(), dataclasses.replace(RECIPE, target_modules=("q_proj",)))


@pytest.mark.slow
def test_dora_rslora_and_dropout_are_trained_and_merged():
    made = dataclasses.replace(RECIPE, dora=True, rslora=True, dropout=0.1, target_modules=("q_proj", "down_proj"))
    model = add_adapters(llama(), made)
    config = model.peft_config["default"]
    assert (config.use_dora, config.use_rslora, config.lora_dropout) == (True, True, 0.1)
    assert probed(made)[1].steps == STEPS
    before, after = llama(), tuned(made)[0]
    changed = {n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "down_proj"}


def test_a_wider_adapter_with_rslora_keeps_alpha():
    assert dataclasses.replace(RECIPE, rslora=True).widened(4).alpha == RECIPE.alpha
    assert RECIPE.widened(4).alpha == 2 * RECIPE.alpha


@pytest.mark.parametrize("field", [{"dora": True}, {"dropout": 0.1}, {"target_modules": ("q_proj",)}])
def test_adapters_need_a_rank(field):
    with pytest.raises(InvalidArgument, match="belongs to adapters"):
        Recipe(rank=0, **field)


def test_epochs():
    assert steps_of_epochs(range(30), 1, RECIPE) == 15 and steps_of_epochs(range(31), 0.5, RECIPE) == 8
    assert steps_of_epochs(range(30), 0.1, Recipe(batch_size=1)) == 3  # not 4: 0.1 * 30 is 3.0000000000000004
    with pytest.raises(InvalidArgument, match="epochs is 0"):
        steps_of_epochs(range(30), 0, RECIPE)


def test_every_option_that_is_decided_says_what_to_use():
    assert all(DECIDED.values()) and trainer_fields.changing({"report_to": "none", "seed": 1}) == {"seed": 1}
