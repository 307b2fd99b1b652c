"""Every task that peft has a model class for: probed, cut and trained on in one run, and its checkpoint reloaded."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from peft import LoraConfig, TaskType, get_peft_model
from thinned import every, thinned
from torch import nn
from training_runs import LAYERS, PROBE, STEPS
from training_runs import llama as causal

import gradpruner
from gradpruner.model.decoder import Decoder

ROWS, LENGTH, VOCABULARY, LABELS = 48, 9, 61, 3


class HiddenLoss(hf.Trainer):
    """Of a model without a head: its hidden states are to be small."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        output = model(**inputs)
        loss = output.last_hidden_state.pow(2).mean()
        return (loss, output) if return_outputs else loss


@dataclass(frozen=True)
class Task:
    kind: Any  # the Auto class
    labels: dict[str, tuple[int, tuple[int, ...]]]  # name to how many classes, and the shape of a row's
    trainer: type[hf.Trainer] = hf.Trainer


TASKS = {
    TaskType.CAUSAL_LM: Task(hf.AutoModelForCausalLM, {"labels": (VOCABULARY, (LENGTH,))}),
    TaskType.SEQ_CLS: Task(hf.AutoModelForSequenceClassification, {"labels": (LABELS, ())}),
    TaskType.TOKEN_CLS: Task(hf.AutoModelForTokenClassification, {"labels": (LABELS, (LENGTH,))}),
    TaskType.QUESTION_ANS: Task(
        hf.AutoModelForQuestionAnswering, {"start_positions": (LENGTH, ()), "end_positions": (LENGTH, ())}
    ),
    TaskType.FEATURE_EXTRACTION: Task(hf.AutoModel, {}, HiddenLoss),
    TaskType.SEQ_2_SEQ_LM: Task(hf.AutoModelForSeq2SeqLM, {"labels": (VOCABULARY, (LENGTH,))}),
}


NAMES = {
    TaskType.CAUSAL_LM: "CausalLM",
    TaskType.SEQ_CLS: "SequenceClassification",
    TaskType.TOKEN_CLS: "TokenClassification",
    TaskType.QUESTION_ANS: "QuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "FeatureExtraction",
    TaskType.SEQ_2_SEQ_LM: "Seq2SeqLM",
}


def build(task: TaskType) -> nn.Module:
    torch.manual_seed(0)
    if task == TaskType.SEQ_2_SEQ_LM:
        config: Any = hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_decoder_layers=LAYERS,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    else:
        config = copy.deepcopy(causal().config)
        config.num_labels, config.pad_token_id = LABELS, 0
    return TASKS[task].kind.from_config(config)


def rows(task: TaskType) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    made = {"input_ids": torch.randint(1, VOCABULARY, (ROWS, LENGTH), generator=generator)}
    for name, (classes, shape) in TASKS[task].labels.items():
        made[name] = torch.randint(0, classes, (ROWS, *shape), generator=generator)
    return [{name: values[i] for name, values in made.items()} for i in range(ROWS)]


def answer(model: Any, task: TaskType) -> torch.Tensor:
    inputs = {"input_ids": rows(task)[0]["input_ids"][None]}
    if task == TaskType.SEQ_2_SEQ_LM:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        return model.eval()(**inputs, use_cache=False).to_tuple()[0]


def test_peft_has_no_other_task():
    assert set(TASKS) == set(TaskType)


@pytest.mark.parametrize("adapters", ["keep", pytest.param("discard", marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", thinned(TASKS, every(2)))
@pytest.mark.filterwarnings("ignore")
def test_a_run_is_cut_and_its_checkpoint_loads(task, adapters, tmp_path):
    config = LoraConfig(task_type=task, r=4, target_modules=["q", "v", "wi", "q_proj", "v_proj", "up_proj"])
    model = get_peft_model(build(task), config)
    arguments = hf.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=STEPS,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = TASKS[task].trainer(model=model, args=arguments, train_dataset=rows(task))
    callback = gradpruner.attach(trainer, steps=PROBE, count=3, adapters=adapters)
    trainer.train()
    assert len(callback.plan.removed) == 3 and len(Decoder(model).layers) == LAYERS - 3
    again = getattr(peft, f"AutoPeftModelFor{NAMES[task]}").from_pretrained(tmp_path / f"checkpoint-{STEPS}")
    assert torch.equal(answer(again, task), answer(model, task))


@pytest.mark.parametrize("task", thinned((task for task in TASKS if TASKS[task].trainer is hf.Trainer), every(3)))
def test_prune_in_one_call(task, tmp_path):
    model = build(task)
    batches = [
        {name: torch.stack([row[name] for row in rows(task)[i : i + 4]]) for name in rows(task)[0]}
        for i in range(0, 12, 4)
    ]
    small = gradpruner.prune(model, batches, ratio=0.4, steps=3, patch=False)
    assert small is model and len(Decoder(small).layers) == LAYERS - 3
    gradpruner.save(small, tmp_path / "small")
    again = TASKS[task].kind.from_pretrained(tmp_path / "small")
    assert torch.equal(answer(again, task), answer(small, task))
