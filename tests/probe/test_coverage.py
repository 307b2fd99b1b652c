"""Layers that are not measured alike: no plan is made of their scores, and that is said before time is spent."""

from __future__ import annotations

import dataclasses
import json
import logging

import model_families
import pytest
import torch
from auto_runs import make_source
from auto_runs import run as auto_run
from peft import LoraConfig, get_peft_model
from small_comparisons import TEST, TRAIN, job, make_home
from tiny_llama import batch, llama, lora, trainable
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import gradpruner
from gradpruner.cli.main import main
from gradpruner.compare.experiment import Compare
from gradpruner.methods import METHODS, Clues
from gradpruner.model.decoder import Decoder
from gradpruner.model.parameter_counts import count_parameters
from gradpruner.plan import Plan
from gradpruner.probe.igia import Igia
from gradpruner.run.probe_folder import load_probed_model, save_probe
from gradpruner.training.finetune import add_adapters, check_comparable
from gradpruner.training.recipe import Recipe


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("auto"))


MLP = [f"model.layers.{j}.mlp.{name}_proj" for j in range(3) for name in ("gate", "up", "down")]
ATTENTION = [f"model.layers.{j}.self_attn.{name}_proj" for j in range(8) for name in "qkvo"]


def adapted(**options):
    return get_peft_model(llama(), LoraConfig(**{"r": 4, "target_modules": "all-linear", **options}))


def frozen_below():
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[:3].requires_grad_(False)
    return model


UNLIKE = {
    "layers_to_transform": (
        lambda: adapted(target_modules=["q_proj", "up_proj"], layers_to_transform=[3, 4, 5]),
        r"layers \[1, 2, 6, 7\].*watches none of their weights.*estimator='exact'.*protect=\[0, 1, 2, 6, 7\]",
    ),
    "frozen lower layers": (frozen_below, r"layers \[1, 2\].*watches none of their weights"),
    "MLP of some": (
        lambda: adapted(target_modules=[*ATTENTION, *MLP]),
        r"layers \[1, 2\].*layer 1 has besides mlp.down_proj.weight and 2 more",
    ),
    "rank of one": (
        lambda: adapted(rank_pattern={r"layers\.4\.mlp\.up_proj": 2}),
        r"layers \[4\].*differ in rank or scale.*up_proj.weight: r = 2, scale = 4 in layer 4, else r = 4, scale = 2",
    ),
}


def watched(model, steps=3, options=None, before=None):
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    probe = gradpruner.Probe(model, importance=False, **(options or {}))
    with probe.watching(optimizer, steps):
        for i in range(steps):
            if before is not None:
                before(i)
            ids = batch(i)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return probe.igia


def attached(model, folder, **options):
    rows = [{"input_ids": ids, "labels": ids} for ids in batch(0)]
    arguments = TrainingArguments(str(folder), max_steps=6, report_to=[], disable_tqdm=True, use_cpu=True)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    return trainer, gradpruner.attach(trainer, steps=3, **options)


@pytest.mark.parametrize("case", UNLIKE)
def test_no_plan_where_layers_are_not_measured_alike(case, tmp_path):
    make, message = UNLIKE[case]
    model = make()
    igia = watched(model)
    clear = Plan(8, [1, 2])
    for refused in (lambda: igia.plan(count=2), lambda: igia.margin(clear), lambda: igia.stability(clear)):
        with pytest.raises(gradpruner.ProbeError, match=message):
            refused()
    igia.save(tmp_path / "igia.safetensors")  # what is read back knows as much
    with pytest.raises(gradpruner.ProbeError, match=message):
        Igia.load(tmp_path / "igia.safetensors").plan(count=2)
    with pytest.raises(gradpruner.ProbeError, match=message):
        attached(make(), tmp_path / "out")


def test_protected_layers_need_no_measurement(tmp_path):
    model = frozen_below()
    igia = watched(model)
    plan = igia.plan(count=2, protect=(0, 1, 2))
    assert set(plan.removed) <= set(range(3, 8)) and igia.margin(plan, protect=(0, 1, 2)) > 0
    assert igia.stability(plan, protect=(0, 1, 2))[-1] == 1.0 and igia.watched[:3] == (0.0, 0.0, 0.0)
    trainer, callback = attached(frozen_below(), tmp_path, protect=(0, 1, 2), count=2)
    trainer.train()
    assert set(callback.plan.removed) <= set(range(3, 8))
    (figures,) = [entry for entry in trainer.state.log_history if "gradpruner/watched/03" in entry]
    assert figures["gradpruner/watched/02"] == 0 and figures["gradpruner/watched/03"] > 0.9


def test_the_exact_estimator_is_a_way_out():
    igia = watched(UNLIKE["layers_to_transform"][0](), options={"estimator": "exact"})
    assert igia.plan(count=2).watched == min(igia.watched) > 0.9


def test_a_layer_trained_in_fewer_steps_is_not_compared():
    model = llama()

    def in_turn(step):  # as LISA does
        model.model.layers[5].requires_grad_(step != 1)

    message = r"layers \[5\].*had a gradient in 2 of 3 steps, other layers in 3"
    with pytest.raises(gradpruner.ProbeError, match=message):
        watched(model, before=in_turn).plan(count=2)


def test_prune_refuses_before_its_first_step():
    def batches():
        raise AssertionError("a batch was asked for")
        yield

    model = UNLIKE["layers_to_transform"][0]()
    with pytest.raises(gradpruner.ProbeError, match="watches none of their weights"):
        gradpruner.prune(model, batches(), ratio=0.4)


@pytest.mark.parametrize("held", [slice(3, 6), slice(0, 0)], ids=["some layers", "none"])
@pytest.mark.parametrize("make", [llama, lambda: lora(llama())], ids=["full", "lora"])
def test_an_optimizer_that_does_not_hold_what_is_watched_is_refused(make, held):
    model = make()
    layers = Decoder(model).layers
    held = [p for layer in layers[held] for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(held or [torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    with pytest.raises(
        gradpruner.InvalidArgument, match=r"does not hold all the watched weights of layers \[0, 1, 2, "
    ):
        gradpruner.Probe(model).start(optimizer, 3)


def test_adapters_that_do_not_train_are_not_watched():
    model = lora(llama())
    for name, parameter in model.named_parameters():
        if ".layers.4.mlp." in name:
            parameter.requires_grad_(False)
    with pytest.raises(gradpruner.ProbeError, match=r"layers \[4\].*lacks mlp.down_proj.weight and 2 more"):
        gradpruner.Probe(model).check_comparable()


def test_a_probe_that_only_looks_is_not_refused(tmp_path):
    model = UNLIKE["layers_to_transform"][0]()
    rows = [{"input_ids": ids, "labels": ids} for ids in batch(0)]
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True)
    callback = gradpruner.ProbeCallback(steps=2)
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback]).train()
    assert callback.igia.layer_scores("norm")[[1, 2, 6, 7]].tolist() == [0.0] * 4


def moe(name="qwen3-moe-sparse-step"):
    return model_families.build(model_families.CONFIGS[name]())


def test_fused_experts_are_said_to_be_hardly_watched(tmp_path, caplog):
    model = add_adapters(moe("mixtral"), Recipe(rank=2))
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    ids = model_families.tokens()
    with caplog.at_level(logging.WARNING), gradpruner.Probe(model).watching(optimizer, 2) as probe:
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    assert "watches 11.0% of the parameters of layers [0, 1, 2, 3, 4, 5]" in caplog.text
    decoder = Decoder(model)
    linears = sum(w.shape[0] * w.shape[1] for w in decoder.weights if w.layer == 3 and len(w.shape) == 2)
    assert probe.igia.watched[3] == linears / count_parameters(decoder)["layer_parameters"][3]
    plan = probe.igia.plan(count=2)
    assert plan.watched == probe.igia.watched[3] and "scored on 11.0% of a layer's parameters" in plan.summary()
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    content = json.loads((tmp_path / "plan.json").read_text())
    del content["watched"]  # of an older version
    assert Plan.from_dict(content).watched is None
    with pytest.raises(gradpruner.InvalidArgument, match="watched = 'much'"):
        Plan.from_dict({**content, "watched": "much"})


def test_dense_and_expert_layers_are_not_compared_by_adapters():
    with pytest.raises(
        gradpruner.ProbeError, match=r"layers \[2, 4\].*99.\d% .*32.\d% of those of others.*Train all weights"
    ):
        check_comparable(moe(), Recipe(rank=2))
    check_comparable(moe(), Recipe(rank=0))


@pytest.mark.parametrize("name", ["qwen3-moe-sparse-step", "qwen3-next", "deepseek-v3"])
def test_adapters_are_on_every_linear_of_dense_and_expert_layers(name, tmp_path):
    dense = moe(name)
    decoder = Decoder(dense)
    linears = {decoder.path_of(w) for w in decoder.weights if len(w.shape) == 2}
    model = add_adapters(dense, Recipe(rank=2))
    assert {decoder.path_of(w) for w in gradpruner.Probe(model)._make_reader(None, None).weights} == linears
    with torch.no_grad():
        for name_, parameter in model.named_parameters():
            if "lora_B" in name_:
                parameter.normal_()
    ids = model_families.tokens()
    expected = model(input_ids=ids).logits
    igia = Igia(
        "-", "lora", 6, tuple(decoder.weights), torch.ones(1, len(decoder.weights)).double(), ("",) * 6, (1,) * 6, 6
    )
    save_probe(tmp_path / "probe", igia, model)
    again = load_probed_model(moe(name), tmp_path / "probe")
    assert torch.equal(again(input_ids=ids).logits, expected)


def test_older_files_have_a_watched_share_and_no_adapters(tmp_path):
    igia = watched(lora(llama()))
    older = dataclasses.replace(igia, adapters=())
    older.save(tmp_path / "older.safetensors")
    again = Igia.load(tmp_path / "older.safetensors")
    assert again.adapters == () and again.watched == igia.watched and again.plan(count=2) == igia.plan(count=2)


def experts_in_the_place_of(folder, place):
    """A model of dense and expert layers, with the tokenizer of another."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = model_families.CONFIGS["qwen3-moe-sparse-step"]()
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def test_run_and_compare_refuse_before_anything_is_trained(home, source, tmp_path, monkeypatch):
    def called(*args, **kwargs):
        raise AssertionError("something was trained")

    monkeypatch.setattr("gradpruner.run.stages.train", called)
    refused = pytest.raises(gradpruner.ProbeError, match=r"layers \[2, 4\] cannot be compared")
    experts = experts_in_the_place_of(source, tmp_path / "experts")
    for name, options in (("auto", {}), ("fixed", {"ratio": 0.4, "check_steps": None, "check_rows": None})):
        with refused:
            auto_run(experts, tmp_path / name, **options).everything()
    settings = dataclasses.replace(job(home), source=experts_in_the_place_of(home / "model", tmp_path / "others"))
    with refused:
        Compare(settings, TRAIN, TEST, tmp_path / "compare", methods=["drop-last", "gradpruner"], held_out=6).work()
    Compare(settings, TRAIN, TEST, tmp_path / "gaps", methods=["gradpruner:kind=gap"], held_out=6).layers()  # no scores


def test_the_command_line_says_what_was_watched(tmp_path, capsys):
    igia = watched(lora(llama()))
    igia.save(tmp_path / "igia.safetensors")
    out = tmp_path / "plan.json"
    assert main(["plan", str(tmp_path / "igia.safetensors"), "--count", "2", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["watched"] == min(igia.watched[1:])
    watched(UNLIKE["MLP of some"][0]()).save(tmp_path / "unlike.safetensors")
    assert main(["plan", str(tmp_path / "unlike.safetensors"), "--count", "2", "--out", str(out)]) == 1
    assert "layers [1, 2] cannot be compared" in capsys.readouterr().err


def test_taylor_and_magnitude_refuse_layers_that_they_cannot_score():
    model = llama()
    layer = model.model.layers[3]
    layer.forward = lambda hidden_states, *args, **kwargs: hidden_states  # as a cross-attention layer without an image
    ids = batch(0)
    clues = Clues(model, [{"input_ids": ids, "labels": ids}], [], 0)
    with pytest.raises(gradpruner.UnsupportedModel, match=r"layers \[3\] got no gradient from any batch"):
        METHODS["taylor"]().plan(clues, 2)
    model.model.layers[2] = layer  # shared weights are no layer's own
    with pytest.raises(gradpruner.UnsupportedModel, match=r"layers \[2, 3\] have no linear weight of their own"):
        METHODS["magnitude"]().plan(clues, 2)
