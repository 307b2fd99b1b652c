"""The fine-tuning run: order of the rows, learning rates of a run's beginning, adapters in float32 on bfloat16."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from training_rows import plain, rows
from training_runs import llama
from transformers import TrainerCallback
from word_tokenizers import make_tokenizer

from gradpruner.data.collator import Collator
from gradpruner.errors import GradPrunerError, InvalidArgument
from gradpruner.model.loss import IGNORED
from gradpruner.run.stages import watch
from gradpruner.training import finetune, row_trainer, trainer_arguments
from gradpruner.training.divergence import explained, has_diverged, why_failed
from gradpruner.training.finetune import add_adapters, finish, train
from gradpruner.training.master_weights import float32_masters
from gradpruner.training.recipe import Recipe
from gradpruner.training.schedule import GROUPED, schedule

RECIPE = Recipe(batch_size=2, learning_rate=1e-2, warmup=0.25, rank=4)


class Spy(TrainerCallback):
    """Learning rates when the optimizer steps, and whether adapters widen their inputs meanwhile."""

    def __init__(self, model=None):
        self.rates, self.model, self.casts, self.autocast = [], model, set(), set()
        if model is not None:
            model.get_input_embeddings().register_forward_pre_hook(  # peft before 0.21 does not call the base model's
                lambda *_: self.autocast.add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            )

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        self.rates.append(rate)
        if self.model is not None:
            self.casts |= casts(self.model)


def casts(model):
    return {m.cast_input_dtype_enabled for m in model.modules() if isinstance(m, BaseTunerLayer)}


def trained(steps, of_steps=None, recipe=RECIPE, model=None):
    model = model or add_adapters(llama(), recipe)
    spy = Spy()
    ordered = plain(schedule(rows(), 12, recipe))[: steps * recipe.rows_per_step]
    done = train(model, ordered, Collator(make_tokenizer()), recipe, of_steps=of_steps, callbacks=[spy], quiet=True)
    return model, done, spy.rates


def rate(step, of_steps, recipe=RECIPE):
    """Linear up from 0 in the warm-up, linear down to 0 after it."""
    warm = round(recipe.warmup * of_steps)
    share = step / warm if step < warm else (of_steps - step) / (of_steps - warm)
    return recipe.learning_rate * share


def test_the_beginning_of_a_longer_run():
    _, whole, rates = trained(12)
    assert rates == pytest.approx([rate(step, 12) for step in range(12)])
    _, part, first = trained(5, of_steps=12)
    assert first == rates[:5] and part.losses == whole.losses[:5] and part.steps == len(part.losses) == 5
    _, alone, own = trained(5)
    assert own == pytest.approx([rate(step, 5) for step in range(5)]) and own != first
    assert alone.losses[0] == part.losses[0] and alone.losses[-1] != part.losses[-1]


def test_the_beginning_of_a_longer_run_with_accumulation():
    recipe = Recipe(batch_size=1, accumulation=2, learning_rate=1e-2, warmup=0.25, rank=4)
    _, whole, rates = trained(12, recipe=recipe)
    _, part, first = trained(5, of_steps=12, recipe=recipe)
    assert first == rates[:5] and part.losses == whole.losses[:5]


def test_the_probe_goes_as_the_run_whose_beginning_it_is():
    """The same weights as after so many steps of the longer run, and not those of a short run."""
    tokenizer, ordered = make_tokenizer(), plain(schedule(rows(), 12, RECIPE))
    watched, igia = watch(llama(), tokenizer, ordered[:8], RECIPE, of_steps=12, quiet=True)
    assert igia.steps == 4
    part, _, _ = trained(4, of_steps=12)
    short, _, _ = trained(4)
    state = watched.state_dict()
    assert all(torch.equal(state[name], value) for name, value in part.state_dict().items())
    assert not all(torch.equal(state[name], value) for name, value in short.state_dict().items())


def test_rows_are_seen_in_the_order_given():
    seen, ordered = [], schedule(rows(), 6, RECIPE)
    collate = Collator(make_tokenizer())

    def spying(batch):
        seen.extend(row["number"] for row in batch)
        return collate(batch)

    train(add_adapters(llama(), RECIPE), ordered, spying, RECIPE, of_steps=20, quiet=True)
    assert seen[:12] == [row["number"] for row in ordered]


def test_grouped_by_length():
    data, batch = rows(300), 4
    recipe = Recipe(batch_size=batch, accumulation=2, group_by_length=True, seed=3)
    usual = schedule(data, 60, Recipe(batch_size=batch, accumulation=2, seed=3))
    grouped = schedule(data, 60, recipe)
    assert grouped == schedule(data, 60, recipe)  # seeded
    assert [r["number"] for r in grouped] != [
        r["number"] for r in schedule(data, 60, Recipe(batch_size=batch, accumulation=2, group_by_length=True, seed=4))
    ]

    def numbers(ordered):
        return Counter(row["number"] for row in ordered)

    assert numbers(grouped) == numbers(usual) and len(grouped) == 480  # the same rows, as often
    within = GROUPED * batch
    for start in range(0, len(usual), within):  # no row goes far: a probe's rows stay at the beginning
        assert numbers(grouped[start : start + within]) == numbers(usual[start : start + within])

    def lengths(ordered):
        return [[len(row["input_ids"]) for row in ordered[i : i + batch]] for i in range(0, len(ordered), batch)]

    def padding(ordered):
        return sum(max(part) * len(part) - sum(part) for part in lengths(ordered))

    assert padding(grouped) < 0.1 * padding(usual)
    part = sorted(lengths(grouped[:within]), key=lambda lens: (min(lens), max(lens)))
    assert all(max(a) <= min(b) for a, b in itertools.pairwise(part))  # cut out of one sorted list
    longest = [max(part) for part in lengths(grouped[:within])]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)  # and shuffled


def test_adapters_in_float32_on_a_bfloat16_model():
    recipe = Recipe(batch_size=2, learning_rate=1e-2, rank=4, warmup=0)
    model = add_adapters(llama(torch.bfloat16), recipe)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" not in n}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32} and casts(model) == {True}
    spy = Spy(model)
    ordered = plain(schedule(rows(4), 12, recipe))
    done = train(model, ordered, Collator(make_tokenizer()), recipe, callbacks=[spy], quiet=True)
    assert spy.casts == {False} and spy.autocast == {(True, torch.bfloat16)}
    assert casts(model) == {True} and not torch.is_autocast_enabled("cpu")  # as it was
    assert len(done.losses) == 12 and all(map(math.isfinite, done.losses)) and done.losses[-1] < done.losses[0]
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    adapters = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert {p.dtype for p in adapters} == {torch.float32} and all(p.abs().sum() > 0 for p in adapters)
    assert {p.dtype for p in finish(model).parameters()} == {torch.bfloat16}


def losses_and_lengths(model, ordered, recipe=RECIPE):
    """Of a run: its losses, and how many positions of each training batch had logits."""
    lengths = []

    def note(module, args, output):
        if module.training:
            lengths.append(output.shape[1])

    handle = model.get_output_embeddings().register_forward_hook(note)
    done = train(model, ordered, Collator(make_tokenizer()), recipe, quiet=True)
    handle.remove()
    return done.losses, lengths


def answered(count, of=3):
    """Rows of which only the last `of` tokens have labels."""
    return [
        {**row, "labels": [IGNORED] * (len(row["labels"]) - of) + row["labels"][-of:]} for row in plain(rows(count))
    ]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_logits_of_tokens_without_a_label(accumulation, monkeypatch):
    recipe = dataclasses.replace(RECIPE, accumulation=accumulation)
    ordered = schedule(answered(40), 6, recipe)
    few, lengths = losses_and_lengths(llama(), ordered, recipe)
    batches = [ordered[i : i + 2] for i in range(0, len(ordered), 2)]
    places = [len({len(row["input_ids"]) - k for row in batch for k in (2, 3, 4)}) for batch in batches]
    assert lengths == places
    monkeypatch.setattr(row_trainer, "can_skip_logits", lambda *_: False)
    every, lengths = losses_and_lengths(llama(), ordered, recipe)
    assert min(lengths) >= 8
    assert few == pytest.approx(every, rel=1e-4)


def test_all_logits_where_a_model_would_take_few_of_them_wrongly():
    class Unshifted(type(llama())):
        """As some do: labels are those of the same position."""

        def forward(self, input_ids, attention_mask=None, labels=None, logits_to_keep=0, **kwargs):
            output = super().forward(input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep)
            output.loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
            return output

    model = llama()
    model.__class__ = Unshifted
    _, lengths = losses_and_lengths(model, schedule(answered(8), 2, RECIPE))
    assert min(lengths) >= 8


def test_casts_are_restored_after_a_run_that_failed():
    recipe = Recipe(batch_size=2, learning_rate=1e-2, rank=4)
    model = add_adapters(llama(torch.bfloat16), recipe)
    with torch.no_grad():
        model.get_base_model().lm_head.weight[0, 0] = float("nan")
    with pytest.raises(GradPrunerError, match="the loss of step 1 is nan"):
        train(model, plain(schedule(rows(), 3, recipe)), Collator(make_tokenizer()), recipe, quiet=True)
    assert casts(model) == {True} and not torch.is_autocast_enabled("cpu")


def test_no_autocast_where_all_is_of_float32():
    recipe = Recipe(batch_size=2, learning_rate=1e-2, rank=4)
    model = add_adapters(llama(), recipe)
    spy = Spy(model)
    train(model, plain(schedule(rows(), 2, recipe)), Collator(make_tokenizer()), recipe, callbacks=[spy], quiet=True)
    assert {on for on, _ in spy.autocast} == {False} and spy.casts == {True}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 4])
def test_what_trains_in_half_precision_is_float32_meanwhile(dtype, rank):
    recipe = Recipe(batch_size=2, learning_rate=1e-5, rank=rank, warmup=0, weight_decay=0.0)
    model = add_adapters(llama(), recipe) if rank else llama()
    model.to(dtype)
    trains = [p for p in model.parameters() if p.requires_grad]
    before, held = [p.detach().clone() for p in trains], set()

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            held.update((p.dtype, bool((p - b).abs().sum() > 0)) for p, b in zip(trains, before, strict=True))

    spy = Spy(model)
    ordered = plain(schedule(rows(), 2, recipe))
    done = train(model, ordered, Collator(make_tokenizer()), recipe, callbacks=[spy, Look()], quiet=True)
    # a step of 1e-5 is below what bfloat16 can add to most weights, and is there all the same
    assert (torch.float32, True) in held and {kind for kind, _ in held} == {torch.float32}
    assert spy.autocast == {(True, torch.bfloat16)} and all(map(math.isfinite, done.losses))
    now = [p for p in model.parameters() if p.requires_grad]
    assert all(a is b for a, b in zip(now, trains, strict=True)) and {p.dtype for p in now} == {dtype}


def test_float16_weights_learn_as_float32_weights_do():
    """All weights train: in float16 itself the loss of such a run went from 4 to some hundreds."""
    recipe = Recipe(batch_size=2, learning_rate=1e-2, rank=0, warmup=0)
    ordered = plain(schedule(rows(4), 12, recipe))
    losses = {}
    for dtype in (torch.float16, torch.float32):
        model = llama(dtype)
        losses[dtype] = train(model, ordered, Collator(make_tokenizer()), recipe, quiet=True).losses
        assert {p.dtype for p in model.parameters()} == {dtype}
    assert losses[torch.float16] == pytest.approx(losses[torch.float32], rel=0.1)


def test_weights_beyond_the_range_of_their_dtype_are_told(monkeypatch):
    model = llama(torch.float16)
    with (
        pytest.raises(GradPrunerError, match=r"lm_head.weight was trained beyond the range of torch.float16"),
        float32_masters(model),
    ):
        model.lm_head.weight.data.fill_(1e6)


def test_one_device_where_several_are_visible(caplog):
    """On two GPUs, transformers would train on two batches a step."""
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir="unused", use_cpu=True, per_device_train_batch_size=3)
    arguments._n_gpu = 2  # what a machine with two GPUs gives one process
    assert arguments.train_batch_size == 6
    trainer_arguments.use_one_device(arguments)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 3 and "2 GPUs are visible" in caplog.text
    assert "torchrun --nproc-per-node 2" in caplog.text


def test_training_asks_for_one_device(monkeypatch):
    class TwoGpus(trainer_arguments.TrainingArguments):
        """What transformers makes of a machine with two GPUs and one process."""

        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    seen = []

    class Looking(row_trainer.RowTrainer):
        def __init__(self, *args, **kwargs):
            seen.append((kwargs["args"].n_gpu, kwargs["args"].train_batch_size))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(trainer_arguments, "TrainingArguments", TwoGpus)
    monkeypatch.setattr(row_trainer, "RowTrainer", Looking)
    train(llama(), plain(schedule(rows(), 1, RECIPE)), Collator(make_tokenizer()), RECIPE, quiet=True)
    assert seen == [(1, RECIPE.batch_size)]


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([5.5, 9.0, 40.0, 300.0, 900.0, 1711.0], True),
        ([5.5, 5.4, 5.6, 5.3, 5.2, 5.0], False),
        ([0.02, 0.05, 0.01, 0.3], False),  # ten times, and still next to nothing
        ([3.0, 2.0, 3.0, 6.1], True),
        ([3.0, 2.0, 3.0, 5.9], False),
        ([2.0] * 19 + [9.0], False),  # one bad batch at the end: means of four steps
        ([2.0] * 19 + [9.0] * 1 + [2.0] * 20, False),
        ([1.0] * 100 + [5.0] * 100, True),
        ([4.0], False),
        ([], False),
    ],
)
def test_a_loss_that_rose_is_no_success(losses, diverged):
    assert has_diverged(losses) is diverged
    done = finetune.Training(len(losses), tuple(losses), 0.1, 1, 1.0)
    assert done.diverged is diverged and done.to_dict()["diverged"] is diverged
    assert bool(why_failed("the run", losses, 2.0)) is diverged
    if diverged:
        assert "its loss rose from" in explained("the run", losses) and "--lr" in explained("the run", losses)


def test_a_model_that_answers_with_no_numbers_is_no_success():
    assert "perplexity is nan" in why_failed("the run", [3.0, 2.0], float("nan"))
    assert why_failed("the run", [3.0, 2.0], None) is None and why_failed("the run", [3.0, 2.0], 7.0) is None


def test_a_probe_whose_loss_rose_is_refused(monkeypatch):
    monkeypatch.setattr(finetune.Training, "diverged", property(lambda self: True))
    with pytest.raises(GradPrunerError, match="the probe has diverged"):
        watch(llama(), make_tokenizer(), plain(schedule(rows(), 2, RECIPE)), RECIPE, quiet=True)


def test_a_wider_recipe():
    recipe = Recipe(rank=8, alpha=32, learning_rate=3e-4, seed=5)
    assert recipe.widened(4) == Recipe(rank=32, alpha=64, learning_rate=3e-4, seed=5)
    assert recipe.widened(1) == recipe and Recipe(rank=0).widened(4).rank == 0
    targets = [m for m in add_adapters(llama(), recipe.widened(4)).modules() if isinstance(m, BaseTunerLayer)]
    assert targets and {(m.r["default"], m.scaling["default"]) for m in targets} == {(32, 2.0)}


def test_rows_that_do_not_fill_a_step_are_refused():
    for ordered in ([], plain(rows(3))):
        with pytest.raises(InvalidArgument, match=f"{len(ordered)} rows; expected a multiple of 2"):
            train(llama(), ordered, Collator(make_tokenizer()), RECIPE, quiet=True)


def test_a_run_shorter_than_its_beginning_is_refused():
    with pytest.raises(InvalidArgument, match="of_steps = 3; expected 4 or more"):
        train(llama(), plain(rows(8)), Collator(make_tokenizer()), RECIPE, of_steps=3, quiet=True)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_cache_of_the_config_stays_as_it_was(use_cache):
    """The Trainer switches it off for good. A saved model would then generate without a cache."""
    model = llama()
    model.config.use_cache = use_cache
    train(model, plain(schedule(rows(), 1, RECIPE)), Collator(make_tokenizer()), RECIPE, quiet=True)
    assert model.config.use_cache is use_cache
