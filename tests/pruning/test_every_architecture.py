"""Every decoder that transformers registers is cut rightly or refused, and docs/decoders.md says which."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import architecture_matrix as architectures
import pytest
import transformers as hf
from architecture_matrix import LAST, REFUSED, UNBUILT, WORKS, WRONG, examine
from packaging.version import Version
from thinned import every, thinned
from tiny_configs import REGISTERED

import gradpruner
from gradpruner.model import layer_config, logits
from gradpruner.pruning import apply, surgery

PAGE = Path(__file__).parents[2] / "docs" / "decoders.md"
# of each kind one: dense, MoE, hybrid, state space, shared weights, shared keys, per-layer embeddings, towers, encoders
USUAL = {
    "afmoe": WORKS,
    "bart": WORKS,
    "bamba": WORKS,
    "deepseek_v3": WORKS,
    "diffllama": LAST,
    "falcon_h1": WORKS,
    "gemma4_text": WORKS,
    "gpt_neo": WORKS,
    "hy_v4": WORKS,
    "jamba": WORKS,
    "lfm2": WORKS,
    "mamba2": WORKS,
    "minicpm3": WORKS,
    "nemotron_h": WORKS,
    "qwen3_next": WORKS,
    "recurrent_gemma": WORKS,
    "reformer": REFUSED,
    "rwkv": REFUSED,
    "xlnet": WORKS,
    "zamba2": WORKS,
}
SINCE = {"nemotron_h": "5.13"}  # an older transformers names its kinds of layers otherwise
OTHERS = {("image-text", "llava"): WORKS, ("image-text", "qwen3_vl"): WORKS, ("seq2seq", "t5"): WORKS}


@pytest.fixture(autouse=True)
def quiet():
    hf.logging.disable_progress_bar()
    yield
    hf.logging.enable_progress_bar()


@pytest.mark.parametrize(
    ("group", "name", "status"),
    thinned([*(("causal", n, s) for n, s in USUAL.items()), *((*k, s) for k, s in OTHERS.items())], every(3)),
)
@pytest.mark.filterwarnings("ignore")
def test_a_decoder_of_each_kind(group, name, status):
    if name not in REGISTERED[group][1] or Version(hf.__version__) < Version(SINCE.get(name, "0")):
        pytest.skip(f"transformers {hf.__version__} is older than {name}")
    outcome = examine(group, name)
    assert outcome.status == status, outcome.note


# Its router adds up what the routers of earlier layers gave. Whether a cut changes the chosen experts of the few tokens
# that are compared depends on how the processor rounds.
DECIDED_BY_ROUNDING = {"zaya"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_decoder_and_the_page_says_the_same():
    outcomes = [examine(group, name) for group, name in architectures.architectures()]
    assert [outcome for outcome in outcomes if outcome.status == WRONG] == []
    built = [outcome for outcome in outcomes if outcome.status != UNBUILT]
    assert sum(outcome.status == WORKS for outcome in built) >= 0.9 * len(built)
    assert all(outcome.note for outcome in outcomes if outcome.status in (REFUSED, UNBUILT, LAST))
    page = PAGE.read_text()
    if f" {hf.__version__} registers" not in page:
        pytest.skip(f"docs/decoders.md is of another transformers than {hf.__version__}")
    works = 0
    for outcome in outcomes:  # what the page could not build, for want of a package say, may build elsewhere
        head = f"| {outcome.model_type} | {outcome.kind} |"
        line = next(line for line in page.splitlines() if line.startswith(head))
        agrees = line == outcome.row() or outcome.model_type in DECIDED_BY_ROUNDING
        assert agrees or line.startswith(f"{head} {UNBUILT} |")
        works += agrees and line.startswith(f"{head} {WORKS} |")
    stated = next(line for line in page.splitlines() if line.startswith(f"| {WORKS} | "))
    assert int(stated.split(" | ")[1]) == works


def test_the_page_counts_its_own_rows():
    lines = PAGE.read_text().splitlines()
    for status in (WORKS, LAST, REFUSED, WRONG, UNBUILT):
        stated = next(line for line in lines if line.startswith(f"| {status} | ")).split(" | ")[1]
        assert int(stated) == sum(line.startswith("| ") and line.split(" | ")[2:3] == [status] for line in lines)


def test_the_page_lists_every_registered_architecture():
    page = PAGE.read_text()
    if f" {hf.__version__} registers" not in page:
        pytest.skip(f"docs/decoders.md is of another transformers than {hf.__version__}")
    for group, name in architectures.architectures():
        assert f"| {name} | {architectures.REGISTERED[group][1][name]} |" in page
    assert f"| {WRONG} | 0 |" in page


def broken(step, monkeypatch):
    prepare, changes = apply.prepare, layer_config._changes

    def unnumbered(decoder, kept):  # layers keep the index they had
        return dataclasses.replace(prepare(decoder, kept), attributes=())

    def flipped(old, kept, layers):  # a list of every layer that says the opposite
        found = changes(old, kept, layers)
        return {**found, "no_rope_layers": [1 - rope for rope in found["no_rope_layers"]]}

    if step == "numbers":
        monkeypatch.setattr(apply, "prepare", unnumbered)
    elif step == "rope":
        monkeypatch.setattr(layer_config, "_changes", flipped)
    elif step == "layers":  # the kept layers are not those of the plan
        monkeypatch.setattr(apply, "prepare", lambda decoder, kept: prepare(decoder, tuple(k or 1 for k in kept)))
    elif step == "merge":
        monkeypatch.setattr(apply, "merge_into", lambda *_: None)


@pytest.mark.parametrize(
    ("name", "step", "seen"),
    [
        ("llama", "numbers", "cut generation, cache=True"),
        ("smollm3", "rope", "reloaded logits"),
        ("llama", "layers", "layer 0 has other weights"),
        ("llama", "merge", "nothing was merged"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_walk_sees_a_broken_step(name, step, seen, monkeypatch):
    """With the package's own comparisons left out: those of the walk are enough."""
    assert examine("causal", name).status == WORKS
    for module in ("gradpruner.pruning.apply", "gradpruner.checkpoint.save"):
        monkeypatch.setattr(f"{module}.differ", lambda *_: None)
    broken(step, monkeypatch)
    if step == "rope":
        monkeypatch.setattr(surgery, "_equal", lambda a, b: True)
    outcome = examine("causal", name)
    assert outcome.status == WRONG and seen in outcome.note, outcome


@pytest.mark.parametrize(("name", "step"), [("llama", "numbers"), ("smollm3", "rope"), ("llama", "layers")])
@pytest.mark.filterwarnings("ignore")
def test_the_package_refuses_what_a_broken_step_has_made(name, step, monkeypatch):
    broken(step, monkeypatch)
    assert examine("causal", name).status in (REFUSED, LAST)


@pytest.mark.skipif(not hasattr(hf, "Granite4VisionConfig"), reason="of a newer transformers")
def test_layers_that_a_vision_tower_feeds_stay_and_are_renumbered():
    fed = {"deepstack_layer_map": [[-1, 0], [-2, 3]], "spatial_target_layers": [0, 2]}
    config = hf.Granite4VisionConfig(text_config={"model_type": "granite", "num_hidden_layers": 6}, **fed)
    new = layer_config.cut_config(config, (0, 2, 3, 5), 6)
    assert [layer for _, layer in new.deepstack_layer_map] == [0, 2] and new.spatial_target_layers == [0, 1]
    assert new.text_config.num_hidden_layers == 4 and config.text_config.num_hidden_layers == 6
    with pytest.raises(gradpruner.UnsupportedModel, match=r"layers \[2\] take what layers of the vision tower see"):
        layer_config.cut_config(config, (0, 1, 3, 5), 6)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ([False, True, False, True], (2, 1)),
        ([False, False, True], (3, 2)),
        ([True, False, False, True], (3, 0)),
        ([True, True], (1, 0)),
        ([True, True, False], None),
    ],
)
def test_a_period_is_found_where_there_is_one(chosen, expected):
    assert layer_config._period(chosen) == expected


def test_a_period_that_chooses_no_layer():
    period, offset = layer_config._period([False, False, False])
    assert [i % period == offset for i in range(3)] == [False, False, False]


def test_a_weight_that_layers_share_is_neither_scored_nor_merged():
    from gradpruner.model.decoder import Decoder

    decoder = Decoder(architectures.build("causal", "zamba"))
    assert decoder.shared and decoder.weights
    assert not any("shared_transf" in weight.name for weight in decoder.weights)


def test_a_model_that_no_longer_answers_is_not_the_same():
    import torch

    assert logits.differ(torch.ones(1, 2, 3), None, torch.float32) == float("inf")
    assert logits.differ(None, torch.ones(1, 2, 3), torch.float32) is None
