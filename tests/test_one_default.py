"""When nothing is said, every entry point means the preset "default"; `preset="paper"` is one word everywhere."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from module_states import same_state
from probing import run
from thinned import thinned
from tiny_llama import LAYERS, batch, llama, lora, trainable

import gradpruner
from gradpruner.cli.main import main
from gradpruner.methods import METHODS
from gradpruner.methods.base import Clues
from gradpruner.plan import Plan
from gradpruner.presets import PRESETS, Preset
from gradpruner.run.job import Job
from gradpruner.training.recipe import Recipe

WORDS = [{}, {"preset": "default"}, {"preset": "paper"}]
NAMES = ["nothing", "default", "paper"]
BATCHES = [{"input_ids": batch(i), "labels": batch(i)} for i in range(30)]
PLANS = {  # what each preset means for a plan of 40 % of 8 layers
    "default": {"kind": "norm", "merge": 0},
    "paper": {"kind": "squared", "merge": "auto"},
}


def meaning(words):
    return words.get("preset", "default")


@pytest.fixture(scope="module")
def probed():
    """A model whose adapters a probe has trained, and its igia."""
    torch.manual_seed(1)
    model = lora(llama())
    return model, run(model)


def folder_of(model, path):
    model.save_pretrained(path)
    return path


def test_the_presets():
    assert PRESETS["default"] == Preset("norm", 0, 0.2, 1.0, patch=True, adapters="keep", rank_factor=4)
    assert PRESETS["paper"] == Preset("squared", "auto", 0.2, 1.0, patch=False, adapters="discard", rank_factor=1)


@pytest.mark.parametrize(
    "function",
    [gradpruner.Igia.plan, gradpruner.apply, gradpruner.apply_folder, gradpruner.cut, gradpruner.attach],
    ids=lambda function: function.__qualname__,
)
def test_signatures_leave_the_settings_to_the_preset(function):
    parameters = inspect.signature(function).parameters
    assert parameters["preset"].default == "default"
    for name in ("kind", "merge", "top", "weight", "patch", "adapters", "rank_factor"):
        assert name not in parameters or parameters[name].default is None, name


@pytest.mark.parametrize("words", WORDS, ids=NAMES)
def test_all_ways_to_a_plan_agree(probed, words, tmp_path):
    model, igia = probed
    expected = igia.plan(0.4, **PLANS[meaning(words)])
    assert bool(expected.merge) == (meaning(words) == "paper")
    assert igia.plan(0.4, **words) == expected and igia.plan(0.4, **words).kind == expected.kind
    # the command
    igia.save(tmp_path / "igia.safetensors")
    options = [f"--preset={words['preset']}"] if words else []
    command = ["plan", str(tmp_path / "igia.safetensors"), "--ratio=0.4", "--out", str(tmp_path / "plan.json")]
    assert main([*command, *options]) == 0
    assert Plan.load(tmp_path / "plan.json") == expected and Plan.load(tmp_path / "plan.json").kind == expected.kind
    # a method of a comparison, and a job of a run
    clues = Clues(model, [], [], 0, lambda: igia)
    assert METHODS["gradpruner"](**words).plan(clues, len(expected.removed)) == expected
    settings = Job("model", 9, **words).preset
    assert settings == PRESETS[meaning(words)]
    assert igia.plan(0.4, kind=settings.kind, merge=settings.merge) == expected
    # what the igia says of it
    assert igia.margin(expected) == igia.margin(expected, expected.kind)
    assert torch.equal(igia.layer_scores(), igia.layer_scores("norm"))


@pytest.mark.parametrize("words", WORDS, ids=NAMES)
def test_apply_keeps_or_discards_as_the_preset_says(probed, words):
    model, igia = probed
    plan = igia.plan(0.4, **words)
    preset = PRESETS[meaning(words)]
    got = gradpruner.apply(copy.deepcopy(model), plan, igia, **words)
    settings = {"top": preset.top, "weight": preset.weight, "adapters": preset.adapters}
    assert same_state(got, gradpruner.apply(copy.deepcopy(model), plan, igia, **settings).state_dict())
    other = {"keep": "discard", "discard": "keep"}[preset.adapters]
    changed = gradpruner.apply(copy.deepcopy(model), plan, igia, **words, adapters=other)  # what is said wins
    assert not same_state(got, changed.state_dict())


@pytest.mark.parametrize("words", WORDS, ids=NAMES)
def test_cut_keeps_or_discards_as_the_preset_says(probed, words):
    model, igia = copy.deepcopy(probed[0]), probed[1]
    learned = {n: p.clone() for n, p in model.named_parameters() if "lora_B" in n and ".layers.0." in n}
    assert learned and all(bool(value.any()) for value in learned.values())
    gradpruner.cut(model, None, igia.plan(0.4, **words), igia, **words)
    now = {name: model.get_parameter(name) for name in learned}
    if meaning(words) == "default":
        assert all(torch.equal(now[name], value) for name, value in learned.items())
    else:
        assert not any(bool(value.any()) for value in now.values())


@pytest.mark.parametrize("words", WORDS, ids=NAMES)
def test_folders_and_the_command_agree_with_apply(probed, words, tmp_path):
    igia = probed[1]
    plan, source = igia.plan(0.4, **words), folder_of(llama(), tmp_path / "dense")
    expected = gradpruner.apply(llama(), plan, igia, **words).state_dict()
    written = gradpruner.apply_folder(source, tmp_path / "streamed", plan, igia, **words)
    assert same_state(type(llama()).from_pretrained(written), expected)
    igia.save(tmp_path / "igia.safetensors")
    plan.save(tmp_path / "plan.json")
    command = ["apply", "--model", str(source), "--plan", str(tmp_path / "plan.json")]
    options = [f"--preset={words['preset']}"] if words else []
    out = tmp_path / "by_command"
    assert main([*command, "--igia", str(tmp_path / "igia.safetensors"), "--out", str(out), *options]) == 0
    assert same_state(type(llama()).from_pretrained(out), expected)


@pytest.mark.parametrize("words", thinned(WORDS, lambda _, words: words != {"preset": "default"}), ids=NAMES)
def test_prune_is_the_stages_one_after_the_other(words):
    torch.manual_seed(1)
    model, preset, recipe = lora(llama()), PRESETS[meaning(words)], Recipe()
    other = copy.deepcopy(model)
    pruned = gradpruner.prune(model, BATCHES, ratio=0.4, **words)
    optimizer = torch.optim.AdamW(trainable(other), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    other.train()
    with gradpruner.Probe(other).watching(optimizer, 40) as probe:
        for row in BATCHES:
            other(**row).loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable(other), recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    plan = probe.igia.plan(0.4, **words)
    assert pruned.gradpruner_plan == plan
    patches = gradpruner.fit_patches(other, plan, BATCHES) if preset.patch else ()
    assert bool(patches) == preset.patch
    assert same_state(pruned, gradpruner.apply(other, plan, probe.igia, patches=patches, **words).state_dict())


def test_the_loop_of_the_default_needs_no_importance_and_no_more_words():
    model = lora(llama())
    igia = run(model, importance=False)
    plan = igia.plan(ratio=0.4)
    assert not plan.merge
    small = gradpruner.apply(model, plan)
    assert small.config.num_hidden_layers == LAYERS - 3 and not any("lora" in n for n, _ in small.named_parameters())


def test_a_model_without_adapters_has_nothing_to_keep():
    plan = Plan(LAYERS, drop=[3])
    expected = gradpruner.apply(llama(), plan, adapters="discard").state_dict()
    for words in WORDS:
        assert same_state(gradpruner.apply(llama(), plan, **words), expected)


def test_what_is_said_beats_the_preset(probed):
    igia = probed[1]
    assert igia.plan(0.4, preset="paper", merge=0) == igia.plan(0.4, kind="squared")
    assert igia.plan(0.4, preset="paper", kind="norm").merge and igia.plan(0.4, merge=1).kind == "norm"
    plan = igia.plan(0.4, preset="paper")
    wide = gradpruner.apply(llama(), plan, igia, preset="paper", top=0.5)
    assert same_state(wide, gradpruner.apply(llama(), plan, igia, top=0.5).state_dict())
    assert not same_state(wide, gradpruner.apply(llama(), plan, igia, preset="paper").state_dict())


def test_other_presets_are_refused_everywhere(probed, tmp_path):
    model, igia = probed
    plan = igia.plan(0.4)
    calls = [
        lambda: igia.plan(0.4, preset="best"),
        lambda: gradpruner.apply(model, plan, preset="best"),
        lambda: gradpruner.apply_folder(tmp_path, tmp_path / "out", plan, preset="best"),
        lambda: gradpruner.cut(model, None, plan, preset="best"),
        lambda: gradpruner.prune(model, BATCHES, preset="best"),
        lambda: Job("model", 9, preset="best"),
    ]
    for call in calls:
        with pytest.raises(gradpruner.InvalidArgument, match="preset = 'best'; accepted are default, paper"):
            call()


@pytest.mark.parametrize("words", WORDS, ids=NAMES)
def test_the_card_shows_the_score_that_chose_the_plan(probed, words):
    model, igia = probed
    plan = igia.plan(0.4, **words)
    small = gradpruner.apply(copy.deepcopy(model), plan, igia, **words)
    text = gradpruner.model_card(small, plan, base_model="acme/dense", scores=igia)
    assert f"Scores (`{PLANS[meaning(words)]['kind']}`)" in text
