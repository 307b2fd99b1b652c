"""What a checkpoint says of how it was made goes with it from command to command, and into the card."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import model_families
import pytest
from huggingface_hub import HfApi, ModelCard
from model_families import igia_of

import gradpruner
from gradpruner.checkpoint.card import is_ours
from gradpruner.checkpoint.companions import plan_of
from gradpruner.cli.main import main
from gradpruner.plan import Plan
from gradpruner.probe.igia import Igia


@pytest.fixture
def pruned():
    model = model_families.build(model_families.CONFIGS["llama"]())
    igia = igia_of(model)
    plan = igia.plan(count=3, merge=1, kind="norm")
    return gradpruner.apply(model, plan, igia), plan, igia


def printed_json(capsys):
    text = capsys.readouterr().out
    return json.loads(text[text.index("{\n") :])


def test_the_plan_goes_from_apply_through_every_command_to_the_hub(home, hub, tmp_path, capsys, monkeypatch):
    model, small, tuned, sparse = (str(path) for path in (home / "model", *(tmp_path / n for n in ("s", "t", "z"))))
    data = ["--data", str(home / "data.jsonl")]
    plan = Plan.load(home / "plan.json")
    assert (
        main(
            [
                "apply",
                "--model",
                model,
                "--plan",
                str(home / "plan.json"),
                "--igia",
                str(home / "igia.safetensors"),
                "--out",
                small,
            ]
        )
        == 0
    )
    assert main(["finetune", "--model", small, *data, "--steps", "2", "--batch-size", "4", "--out", tuned]) == 0
    assert (
        main(
            [
                "sparsify",
                "--model",
                tuned,
                *data,
                "--method",
                "magnitude",
                "--max-length",
                "8",
                "--samples",
                "2",
                "--out",
                sparse,
            ]
        )
        == 0
    )
    for folder in (small, tuned, sparse):
        found = Plan.load(f"{folder}/gradpruner.json")
        assert found == plan and found.kind == "norm", folder
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(hub.url))
    assert main(["push", tuned, "me/small"]) == 0
    assert json.loads(hub.files["gradpruner.json"])["kept"] == list(plan.kept)
    assert f"kept: {list(plan.kept)}" in hub.files["README.md"].decode()


@pytest.mark.parametrize("ours", [False, True])
def test_licence_and_base_model_go_along_and_results_of_another_state_do_not(home, tmp_path, ours):
    model = shutil.copytree(home / "model", tmp_path / "model")
    plan = Plan(7, drop=[6])
    plan.save(model / "gradpruner.json")
    (model / "LICENSE").write_text("terms")
    text = "---\nlicense: mit\nbase_model: acme/dense\n---\n"
    if ours:
        text = gradpruner.model_card(model, base_model="acme/dense", license="mit", results=[{"": "score", "a": "0.9"}])
    (model / "README.md").write_text(text)
    cut, whole, tuned = (tmp_path / name for name in ("cut", "whole", "tuned"))
    data = ["--data", str(home / "data.jsonl"), "--steps", "2", "--batch-size", "4"]
    assert main(["finetune", "--model", str(model), *data, "--out", str(tuned)]) == 0
    Plan(6, drop=[1]).save(tmp_path / "plan.json")
    apply = ["apply", "--model", str(model), "--plan", str(tmp_path / "plan.json")]
    assert main([*apply, "--out", str(cut)]) == 0 and main([*apply, "--dtype", "float32", "--out", str(whole)]) == 0
    for folder in (tuned, cut, whole):
        assert (folder / "LICENSE").read_text() == "terms"
        assert "0.9" not in (folder / "README.md").read_text() and not is_ours(folder)
        metadata = ModelCard(gradpruner.model_card(folder)).data
        assert (metadata.license, metadata.base_model) == ("mit", "acme/dense"), folder


def test_a_model_that_was_pruned_before_says_so(home, tmp_path):
    once, again, whole = (str(tmp_path / name) for name in ("once", "again", "whole"))
    first, second = Plan(6, drop=[1, 4]), Plan(4, drop=[2])
    for name, plan in (("first", first), ("second", second)):
        plan.save(tmp_path / f"{name}.json")
    assert main(["apply", "--model", str(home / "model"), "--plan", str(tmp_path / "first.json"), "--out", once]) == 0
    apply = ["apply", "--model", once, "--plan", str(tmp_path / "second.json")]
    assert main([*apply, "--out", again]) == 0 and main([*apply, "--dtype", "float32", "--out", whole]) == 0
    for folder in (again, whole):
        plan = Plan.load(f"{folder}/gradpruner.json")
        assert plan == second and plan.before == first
        text = gradpruner.model_card(folder)
        assert "with 3 of its 6 decoder layers removed" in text and "The last time it went from 4 to 3" in text
    with pytest.raises(gradpruner.InvalidArgument, match="before keeps 4 layers"):
        Plan(5, drop=[1], before=first)

    out = tmp_path / "run"
    assert (
        main(
            [
                "run",
                "--model",
                once,
                "--data",
                str(home / "data.jsonl"),
                "--steps",
                "4",
                "--probe-steps",
                "2",
                "--batch-size",
                "4",
                "--count",
                "1",
                "--no-dense",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    for folder in ("cut", "model"):
        assert Plan.load(out / folder / "gradpruner.json").before == first
    assert "with 3 of its 6 decoder layers removed" in (out / "model" / "README.md").read_text()


def test_a_plan_of_another_model_stops_before_training(home, tmp_path, capsys):
    folder = shutil.copytree(home / "model", tmp_path / "model")
    Plan(6, drop=[1]).save(folder / "gradpruner.json")
    command = ["finetune", "--model", str(folder), "--data", str(home / "data.jsonl"), "--steps", "2"]
    assert main([*command, "--out", str(tmp_path / "tuned")]) == 1
    assert "keeps 5 decoder layers; the model beside it has 6" in capsys.readouterr().err
    assert not (tmp_path / "tuned").exists()


def test_a_model_of_the_hub_has_its_plan_there(tmp_path, monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    plan = Plan(6, drop=[1, 2, 3])
    plan.save(tmp_path / "gradpruner.json")
    config = model_families.CONFIGS["llama"]()
    config.num_hidden_layers = 3
    model = model_families.build(config)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda source, name, revision: str(tmp_path / name))
    assert plan_of("me/small", model) == plan

    def missing(source, name, revision):
        raise EntryNotFoundError("no such file")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", missing)
    assert plan_of("me/small", model) is None

    def broken(source, name, revision):
        raise HfHubHTTPError("503", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)
    with pytest.raises(gradpruner.CheckpointError, match="could not be looked up"):
        plan_of("me/small", model)


def test_a_plan_knows_the_score_that_chose_it(pruned, tmp_path):
    _, plan, igia = pruned
    plan.save(tmp_path / "plan.json")
    assert plan.kind == Plan.load(tmp_path / "plan.json").kind == "norm"
    assert Plan(6, drop=[1]).kind is None
    with pytest.raises(gradpruner.InvalidArgument, match="kind = 3"):
        Plan(6, drop=[1], kind=3)
    assert igia.margin(plan) == igia.margin(plan, "norm") != igia.margin(plan, "squared")
    assert igia.stability(plan) == igia.stability(plan, "norm")


def test_the_card_shows_the_scores_that_chose_and_no_others(pruned, hub):
    model, plan, igia = pruned
    gradpruner.push_to_hub(model, "me/small", plan=plan, scores=igia, api=HfApi(hub.url))
    text = hub.files["README.md"].decode()
    assert "Scores (`norm`)" in text and f"| 1 | {igia.layer_scores('norm')[1]:.4g} |" in text
    with pytest.raises(gradpruner.InvalidArgument, match="kind = 'squared'; the plan was chosen by 'norm'"):
        gradpruner.model_card(model, plan, scores=igia, kind="squared")
    by_hand = Plan(plan.layers, plan.drop, plan.merge)
    with pytest.raises(gradpruner.InvalidArgument, match="does not say which score chose it"):
        gradpruner.model_card(model, by_hand, scores=igia)
    assert "Scores (`norm`)" in gradpruner.model_card(model, by_hand, scores=igia, kind="norm")
    assert "Scores. The layers with the lowest scores" in gradpruner.model_card(model, by_hand, scores=[1.0] * 6)


def test_the_card_shows_no_scores_of_another_model(pruned):
    import dataclasses

    model, plan, igia = pruned
    with pytest.raises(gradpruner.ModelMismatch, match="another model"):
        gradpruner.model_card(model, plan, scores=dataclasses.replace(igia, model="another"))


def test_the_probe_orders_layers_by_the_score_that_plan_takes(home, tmp_path, capsys):
    out = str(tmp_path / "igia.safetensors")
    command = ["probe", "--model", str(home / "model"), "--data", str(home / "data.jsonl"), "--steps", "2"]
    assert main([*command, "--batch-size", "4", "--out", out, "--json"]) == 0
    found = printed_json(capsys)
    assert found["kind"] == "norm" and found["layer_scores"] == Igia.load(out).layer_scores("norm").tolist()
    assert main(["plan", out, "--count", "2", "--out", str(tmp_path / "plan.json"), "--json"]) == 0
    assert printed_json(capsys)["kind"] == found["kind"]
