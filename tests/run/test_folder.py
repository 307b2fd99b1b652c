"""A stage is reused only if it is finished and was made from what the run has now."""

from __future__ import annotations

import json
import shutil

import pytest
from small_runs import LAYERS, PROBE, TEST, TRAIN, interrupting, job_of, run, write_model

from gradpruner.compare.experiment import Compare
from gradpruner.errors import CheckpointError, InvalidArgument, ModelMismatch
from gradpruner.plan import Plan
from gradpruner.probe.igia import Igia
from gradpruner.run.auto_ratio import choose
from gradpruner.storage.provenance import digest
from gradpruner.training.evaluate import Evaluation


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    run(source, out).everything()
    return out


@pytest.fixture
def out(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def steps(monkeypatch):
    """Numbers of the optimizer steps that are taken."""
    return interrupting(monkeypatch)


def edit(file, **changed):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def other_layers(plan_file):
    """Edit a plan, so that it removes the two layers that it kept."""
    kept = json.loads(plan_file.read_text())["kept"]
    removed = [layer for layer in range(LAYERS) if layer not in kept]
    edit(plan_file, kept=removed, drop=kept, merge={})
    return tuple(kept)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_plan_that_was_edited_after_the_cut_is_refused(source, out, steps):
    other_layers(out / "plan.json")
    before = contents(out)
    with pytest.raises(InvalidArgument, match=r"cut' was made from another plan;") as caught:
        run(source, out).everything()
    assert all(repr(str(out / name)) in str(caught.value) for name in ("cut", "model", "pruned.json"))
    assert contents(out) == before and steps == []  # the card too names the layers that were removed
    shutil.rmtree(out / "cut")  # the last stage alone is refused too
    with pytest.raises(InvalidArgument, match=r"pruned.json' was made from another plan;"):
        run(source, out).everything()
    shutil.rmtree(out / "model")
    (out / "pruned.json").unlink()
    results = run(source, out).everything()
    assert results["plan"]["kept"] == Plan.load(out / "model" / "gradpruner.json").to_dict()["kept"] != [0, 1]
    assert len(steps) == 12 and results["plan"]["kept"] == json.loads((out / "plan.json").read_text())["kept"]


def test_a_plan_may_be_edited_before_the_cut(source, finished, tmp_path, steps, caplog):
    caplog.set_level("INFO", "gradpruner")
    out = tmp_path / "out"
    shutil.copytree(finished / "probe", out / "probe")
    for name in ("plan.json", "run.json"):
        shutil.copy(finished / name, out / name)
    edit(out / "plan.json", kept=[0, 2, 3], drop=[1], merge={}, parameter_ratio=0.9)
    made = run(source, out)
    plan = made.make_plan()
    igia = Igia.load(out / "probe" / "igia.safetensors")
    assert plan.removed == (1,) and plan.parameter_ratio == igia.layer_parameters[1] / igia.total_parameters
    assert "edited by hand" in caplog.text
    made.cut(plan)
    assert Plan.load(out / "cut" / "gradpruner.json") == plan and steps == []
    (out / "plan.json").write_text(json.dumps(Plan(LAYERS + 1, [1]).to_dict()))
    with pytest.raises(ModelMismatch, match=r"plan.json is for 5 decoder layers; the model has 4"):
        run(source, out).everything()


def test_checks_of_another_probe_are_refused(tmp_path):
    scores, asked = [3.0, 1.0, 2.0, 4.0], []

    def check(count):
        asked.append(count)
        return Evaluation(0.5, 2.0, None, 8)

    def chosen(**made_from):
        return choose(scores, check, tmp_path / "auto.json", bound=0.5, steps=1, made_from=made_from)

    first = chosen(settings="0", probe="0")
    made = len(asked)
    assert chosen(settings="0", probe="0") == first and len(asked) == made
    with pytest.raises(InvalidArgument, match=r"auto.json' was made from another probe;.*delete"):
        chosen(settings="0", probe="1")
    assert len(asked) == made


@pytest.mark.slow
def test_an_edited_plan_is_not_reported_as_the_choice_of_auto(source, tmp_path):
    def made():
        return run(source, tmp_path / "out", ratio="auto", max_lost=1.0, check_rows=2, check_steps=1)

    chosen = made().make_plan()
    edit(tmp_path / "out" / "plan.json", kept=[0, 1, 2], drop=[3], merge={})
    results = made().everything(dense=False)
    assert results["plan"]["drop"] == [3] != list(chosen.removed) and "auto" not in results


@pytest.mark.parametrize("stage", ["probe", "cut"])
def test_an_empty_folder_is_no_finished_stage(stage, source, out, steps):
    shutil.rmtree(out / stage)
    (out / stage).mkdir()
    made = run(source, out)
    found = made.run_probe() if stage == "probe" else made.cut(made.make_plan())
    assert found and (out / stage / "made_from.json").is_file() and len(steps) == (4 if stage == "probe" else 0)


@pytest.mark.parametrize("stage", ["probe", "cut"])
def test_a_folder_of_unknown_origin_is_refused_before_anything_is_trained(stage, source, out, steps):
    (out / stage / "made_from.json").unlink()
    (out / "dense.json").unlink()
    with pytest.raises(InvalidArgument, match=rf"{stage}' does not record what it was made from.*delete '.*{stage}'"):
        run(source, out).everything()
    assert steps == []


def test_a_probe_that_was_exchanged_is_refused_before_anything_is_trained(source, out, tmp_path, steps):
    other = run(source, tmp_path / "other", recipe={"seed": 1})
    other.run_probe()
    (out / "dense.json").unlink()
    shutil.copy(tmp_path / "other" / "probe" / "igia.safetensors", out / "probe" / "igia.safetensors")
    steps.clear()
    with pytest.raises(InvalidArgument, match=r"plan.json' was made from another probe;"):
        run(source, out).everything()
    shutil.rmtree(out / "probe")
    shutil.copytree(tmp_path / "other" / "probe", out / "probe")
    with pytest.raises(InvalidArgument, match=r"probe' was made from another settings;"):
        run(source, out).everything()
    assert steps == []


def test_a_model_that_is_gone_or_another_is_not_described(source, out):
    edit(out / "model" / "gradpruner.json", kept=[0, 1, 2], drop=[3], merge={})
    with pytest.raises(InvalidArgument, match=r"model' is not the model that pruned.json belongs to.*delete '.*pruned"):
        run(source, out).everything()
    shutil.rmtree(out / "model")
    with pytest.raises(InvalidArgument, match=r"model' is not the model that pruned.json belongs to"):
        run(source, out).everything()


def test_stages_without_their_settings_are_refused(source, out):
    (out / "run.json").unlink()
    before = contents(out)
    with pytest.raises(InvalidArgument, match=r"holds dense.json, probe, .* of a run, but not its run.json"):
        run(source, out, recipe={"learning_rate": 1e-3})
    assert contents(out) == before


def test_a_damaged_record_is_told(source, out):
    (out / "cut" / "made_from.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not a record file"):
        run(source, out).everything()


# comparisons


@pytest.fixture(scope="module")
def compared(source, tmp_path_factory):
    home = tmp_path_factory.mktemp("compared")
    comparison(source, home).work()
    return home / "out"


def comparison(source, home):
    return Compare(
        job_of(source), TRAIN, TEST, home / "out", methods=["gradpruner"], ratios=[0.5], held_out=4, dense=False
    )


def test_a_plan_of_a_method_cannot_be_edited(source, compared, tmp_path, steps):
    shutil.copytree(compared, tmp_path / "out")
    (plan,) = (tmp_path / "out" / "plans").iterdir()
    (cell,) = (tmp_path / "out" / "cells").iterdir()
    cell.unlink()
    other_layers(plan)
    with pytest.raises(InvalidArgument, match=r"\.json' was made from another plan;.*delete '[^']*plans"):
        comparison(source, tmp_path).work()
    assert steps == []


def test_models_without_their_terms_are_refused(source, compared, tmp_path):
    shutil.copytree(compared, tmp_path / "out")
    (tmp_path / "out" / "comparison.json").unlink()
    with pytest.raises(InvalidArgument, match=r"holds model.json, cells, .* but not its comparison.json"):
        comparison(source, tmp_path)
    assert not (tmp_path / "out" / "comparison.json").exists()


def test_an_empty_folder_is_no_probe(source, compared, tmp_path, steps):
    shutil.copytree(compared, tmp_path / "out")
    for name in ("plans", "cells", "trained"):
        shutil.rmtree(tmp_path / "out" / name)
    (probe,) = (tmp_path / "out" / "probes").iterdir()
    shutil.rmtree(probe)
    probe.mkdir()
    comparison(source, tmp_path).work()
    assert (probe / "igia.safetensors").is_file() and len(steps) == 4 + 12


def test_a_plan_by_hand_for_another_model_is_refused_before_the_dense_run(source, tmp_path, steps):
    plan = Plan(LAYERS, [1], model="another")
    (tmp_path / "out").mkdir()
    plan.save(tmp_path / "out" / "plan.json")
    with pytest.raises(ModelMismatch, match=r"plan.json was made for another model than the run's"):
        run(source, tmp_path / "out").everything()
    assert len(steps) == PROBE
    for record in ({"settings": "of another run"}, "no record"):
        edit(tmp_path / "out" / "plan.json", made_from=record)
        with pytest.raises(InvalidArgument, match=r"plan.json' was made by another run, .* remove its 'made_from'"):
            run(source, tmp_path / "out").everything()
    assert len(steps) == PROBE


def test_a_plan_of_another_run_is_refused_before_the_probe(source, tmp_path, steps):
    (tmp_path / "out").mkdir()
    Plan(LAYERS, [1]).save(tmp_path / "out" / "plan.json")
    edit(tmp_path / "out" / "plan.json", made_from={"settings": "of another run"})
    with pytest.raises(InvalidArgument, match=r"plan.json' was made by another run"):
        run(source, tmp_path / "out").everything()
    assert steps == [] and not (tmp_path / "out" / "probe").exists()


def test_the_card_shows_no_scores_for_a_plan_by_hand(source, out, finished):
    assert "Scores (`norm`)" in (finished / "model" / "README.md").read_text()
    for name in ("cut", "model"):
        shutil.rmtree(out / name)
    (out / "pruned.json").unlink()
    other_layers(out / "plan.json")
    edit(out / "plan.json", kind="by guess")
    run(source, out).everything()
    assert "Scores" not in (out / "model" / "README.md").read_text()


def test_results_do_not_outlive_the_stages_that_they_are_made_from(source, out):
    for name in ("cut", "model"):
        shutil.rmtree(out / name)
    (out / "pruned.json").unlink()
    made = run(source, out)
    made.cut(made.make_plan())
    assert not any((out / name).exists() for name in ("results.json", "speeds.json", "report.html"))


def test_folders_of_somebody_else_are_left_alone(source, tmp_path, steps):
    for name in ("dense", "checkpoints", "results.json"):
        mine = tmp_path / name.partition(".")[0] / name
        mine.mkdir(parents=True)
        with pytest.raises(InvalidArgument, match=rf"holds {name} of a run, but not its run.json"):
            run(source, mine.parent)
        assert mine.exists() and steps == []


def test_a_model_that_is_gone_is_told_before_the_dense_run(source, out, steps):
    (out / "dense.json").unlink()
    shutil.move(out / "model", out.parent / "elsewhere")
    with pytest.raises(InvalidArgument, match=r"model' is not the model that pruned.json belongs to"):
        run(source, out).everything()
    assert steps == []


def test_the_checks_behind_a_plan_must_be_there(source, tmp_path, steps):
    (tmp_path / "out").mkdir()
    made = run(source, tmp_path / "out", ratio="auto")
    planned = made.run_probe().plan(count=2, kind="norm", merge=0).to_dict()
    record = {**made._made_from_probe(), "plan": digest(planned)}
    (tmp_path / "out" / "plan.json").write_text(json.dumps({**planned, "made_from": record}))
    del steps[:]
    with pytest.raises(InvalidArgument, match=r"auto.json, by which .*plan.json' was chosen, is gone"):
        run(source, tmp_path / "out", ratio="auto").everything()
    assert steps == []
