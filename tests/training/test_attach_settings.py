"""What people set on a Trainer, with attach: evaluation, metrics, the best model, grouped lengths, smaller batches."""

from __future__ import annotations

import pytest
import torch
import training_runs
from training_runs import LAYERS, PROBE, STEPS
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    Trainer,
    TrainingArguments,
)
from word_tokenizers import make_tokenizer

import gradpruner
from gradpruner.model.decoder import Decoder

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
COMMON = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "save_steps": 3,
    "logging_steps": 1,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}
EVALUATED = {
    "eval_strategy": "steps",
    "eval_steps": 3,
    "load_best_model_at_end": True,
    "metric_for_best_model": "share_right",
    "greater_is_better": True,
}


def rows(count):
    """Rows of many lengths."""
    generator = torch.Generator().manual_seed(7)

    def ids(low=3, high=12):
        return torch.randint(5, 60, (int(torch.randint(low, high, (1,), generator=generator)),), generator=generator)

    made = [{"input_ids": ids().tolist()} for _ in range(count)]
    return [{**row, "attention_mask": [1] * len(row["input_ids"]), "labels": row["input_ids"]} for row in made]


def share_right(prediction):
    found = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    found = found.argmax(-1) if found.ndim == 3 else found
    width = min(found.shape[1], prediction.label_ids.shape[1])
    return {"share_right": float((found[:, :width] == prediction.label_ids[:, :width]).mean())}


def check_best(made, callback, folder, kind):
    """The run ended with a checkpoint of the smaller model, which stock classes load."""
    assert made.state.global_step == STEPS and len(Decoder(made.model).layers) == LAYERS - 2
    measured = {e["step"]: e["eval_share_right"] for e in made.state.log_history if "eval_share_right" in e}
    assert list(measured) == [3, 6, 9, 12]
    assert made.state.best_global_step > PROBE
    assert made.state.best_metric == max(value for step, value in measured.items() if step > PROBE)
    best = kind.from_pretrained(folder / f"checkpoint-{made.state.best_global_step}")
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), made.model.parameters(), strict=True))
    assert callback.plan.layers == LAYERS


def test_a_trainer_that_evaluates_and_groups_by_length(tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), train_sampling_strategy="group_by_length", **COMMON, **EVALUATED
    )
    tokenizer = make_tokenizer()
    made = Trainer(
        model=training_runs.llama(),
        args=arguments,
        train_dataset=rows(80),
        eval_dataset=rows(8),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        compute_metrics=share_right,
    )
    callback = gradpruner.attach(made, steps=PROBE, count=2)
    made.train()
    assert callback._cut.patched
    check_best(made, callback, tmp_path, AutoModelForCausalLM)


def test_a_sequence_to_sequence_trainer_that_generates(tmp_path):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=61,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=LAYERS,  # transformers sizes the cache by the encoder
        num_decoder_layers=LAYERS,
        num_heads=2,
        decoder_start_token_id=0,
    )
    model, tokenizer = AutoModelForSeq2SeqLM.from_config(config), make_tokenizer()
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), predict_with_generate=True, generation_max_length=8, **COMMON, **EVALUATED
    )
    made = Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=rows(80),
        eval_dataset=rows(8),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=share_right,
    )
    callback = gradpruner.attach(made, steps=PROBE, count=2)
    made.train()
    check_best(made, callback, tmp_path, AutoModelForSeq2SeqLM)


@pytest.mark.parametrize("step", [2, PROBE + 2])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_batch_that_does_not_fit_is_made_smaller(kind, step, tmp_path):
    """The Trainer begins again with fewer rows: the probe too, if nothing was cut, else the smaller model goes on."""

    class Small(Trainer):
        failures = 0

        def training_step(self, model, inputs, *args):
            if len(inputs["input_ids"]) == 4 and self.state.global_step == step:
                self.failures += 1
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args)

    made = Small(
        model=training_runs.KINDS[kind](),
        args=TrainingArguments(output_dir=str(tmp_path), auto_find_batch_size=True, **COMMON),
        train_dataset=training_runs.rows(),
    )
    callback = gradpruner.attach(made, steps=PROBE, count=2)
    made.train()
    assert made.failures == 1 and made.state.train_batch_size < 4 and made.state.global_step == STEPS
    assert len(Decoder(made.model).layers) == LAYERS - 2 and callback.igia.steps == PROBE
    alive = {id(p) for p in made.model.parameters() if p.requires_grad}
    assert {id(p) for group in made.optimizer.param_groups for p in group["params"]} == alive
