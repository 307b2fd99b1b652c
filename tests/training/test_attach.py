"""One Trainer run that starts dense and ends pruned: schedule, logs, checkpoints, and resuming."""

from __future__ import annotations

import functools
import json
import multiprocessing
import shutil
import signal
from fractions import Fraction

import pytest
import torch
import training_runs
from peft import AutoPeftModelForCausalLM
from training_runs import LAYERS, PROBE, SETTINGS, STEPS, lora, same, tensors
from training_runs import trainer as plain_trainer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, T5Config, Trainer, TrainerCallback

import gradpruner
from gradpruner.model.decoder import Decoder
from gradpruner.plan import gaps
from gradpruner.pruning.patch import Patch, fit_patches
from gradpruner.storage.checked_tensors import read_described, write_described
from gradpruner.training import probe_batches as inputs
from gradpruner.training.probe_batches import load_inputs
from gradpruner.training.resume import mark_of

RUNS = [*((kind, "default") for kind in training_runs.KINDS), ("full", "merging"), ("lora", "paper"), ("full", "paper")]


def trainer(out, kind="lora", *, attached=True, chosen="default", **options):
    made, _ = plain_trainer(out, kind, attached=False, **options)
    return made, gradpruner.attach(made, steps=PROBE, ratio=0.4, **SETTINGS[chosen]) if attached else None


def run_and_die(out, chosen, moment):
    """As training_runs does, with other settings; target of a process of its own."""
    training_runs.trainer = functools.partial(trainer, chosen=chosen)
    training_runs.run_and_die(out, "lora", moment)


class Stop(TrainerCallback):
    """Ends training after some steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.steps


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Of each kind and settings, one run that nothing interrupted: its folder, callback, Trainer and final tensors."""
    runs = {}

    def get(kind, chosen="default"):
        key = kind, chosen
        if key not in runs:
            out = tmp_path_factory.mktemp(kind)
            made, callback = trainer(out, kind, chosen=chosen)
            made.train()
            runs[key] = out, callback, made, tensors(made.model)
        return runs[key]

    return get


@pytest.mark.parametrize(("kind", "chosen"), RUNS)
def test_a_run_starts_dense_and_ends_pruned(kind, chosen, finished, tmp_path):
    out, callback, made, _ = finished(kind, chosen)
    plan = callback.plan
    assert plan.layers == LAYERS and len(plan.removed) == 3 and callback.igia.steps == PROBE
    assert made.state.global_step == STEPS and len(Decoder(made.model).layers) == LAYERS - 3
    # the schedule of a run that was never cut
    losses = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in losses] == list(range(1, STEPS + 1))
    rates = [entry["learning_rate"] for entry in losses]
    assert rates == pytest.approx([1e-2 * (STEPS - i) / STEPS for i in range(STEPS)])
    # what trackers are told
    (figures,) = [e for e in made.state.log_history if "gradpruner/removed_layers" in e]
    assert figures["step"] == PROBE and figures["gradpruner/removed_layers"] == 3
    for layer, score in enumerate(callback.igia.layer_scores("norm" if chosen == "default" else "squared").tolist()):
        assert figures[f"gradpruner/score/{layer:02d}"] == score
        fate = 1.0 if layer in plan.drop else 2.0 if layer in plan.merge else 0.0
        assert figures[f"gradpruner/fate/{layer:02d}"] == fate
    assert figures["gradpruner/gaps"] == len(gaps(plan)) > 0
    assert figures["gradpruner/patched_gaps"] == sum("/unexplained/" in name for name in figures)
    # of a DoRA whose magnitudes have moved, what is added to a weight is not what is added to the layer's output
    assert (figures["gradpruner/patched_gaps"] > 0) == (kind != "dora" and chosen != "paper")
    # nothing holds a parameter that is gone
    alive = {id(p) for p in made.model.parameters() if p.requires_grad}
    held = [p for group in made.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == alive and len(held) == len(alive)
    assert gradpruner.Plan.load(out / "gradpruner" / "plan.json") == plan
    scores = gradpruner.Igia.load(out / "gradpruner" / "igia.safetensors").layer_scores()
    assert torch.equal(scores, callback.igia.layer_scores())


@pytest.mark.parametrize("kind", training_runs.KINDS)
def test_the_probe_saw_what_a_probe_alone_sees(kind, finished, tmp_path):
    _, callback, _, _ = finished(kind)
    probe = gradpruner.ProbeCallback(steps=PROBE)
    made, _ = trainer(tmp_path, kind, attached=False, callbacks=[probe])
    made.train()
    assert torch.equal(probe.igia.square_norms, callback.igia.square_norms)
    assert probe.igia.plan(0.4, kind="norm", merge=0) == callback.plan


def test_adapters_start_anew_and_merged_weights_are_those_of_apply(finished, tmp_path):
    _out, callback, made, _ = finished("lora", "paper")
    assert callback.plan.merge  # else nothing is shown
    expected = gradpruner.apply(training_runs.llama(), callback.plan, callback.igia)
    decoder = Decoder(made.model)
    for weight in decoder.weights:
        assert torch.equal(decoder.parameter(weight), Decoder(expected).parameter(weight))
    made, _ = trainer(tmp_path, chosen="paper", callbacks=[Stop(PROBE)])
    made.train()
    for name, parameter in made.model.named_parameters():
        assert "lora_B" not in name or not parameter.any()  # a fresh adapter's B is 0
    assert not any(made.optimizer.state.values())


def seen_in_the_probe(out, kind, monkeypatch):
    """A dense Trainer after the probe's steps, and what its model was given in them."""
    made, _ = trainer(out, kind, attached=False, callbacks=[Stop(PROBE)])
    batches, step = [], made.training_step

    def recording(model, given, *args):
        batches.append({name: value.clone() for name, value in given.items() if name != "labels"})
        return step(model, given, *args)

    monkeypatch.setattr(made, "training_step", recording)
    made.train()
    return made, batches


def test_adapters_go_on_and_patched_weights_are_those_of_apply(finished, tmp_path, monkeypatch):
    _out, callback, cut, _ = finished("lora", "merging")
    dense, batches = seen_in_the_probe(tmp_path / "dense", "lora", monkeypatch)
    patches = fit_patches(dense.model, callback.plan, batches)
    assert patches and callback.plan.merge
    expected = Decoder(gradpruner.apply(training_runs.llama(), callback.plan, callback.igia, patches=patches))
    decoder = Decoder(cut.model)
    for weight in decoder.weights:
        assert torch.equal(decoder.parameter(weight), expected.parameter(weight))

    made, _ = trainer(tmp_path / "cut", chosen="merging", callbacks=[Stop(PROBE)])
    made.train()
    for new, old in enumerate(callback.plan.kept):
        learned = dict(Decoder(dense.model).layers[old].named_parameters())
        for name, parameter in Decoder(made.model).layers[new].named_parameters():
            if "lora_" in name:
                assert torch.equal(parameter, learned[name])
                assert int(made.optimizer.state[parameter]["step"]) == PROBE
    assert len(made.optimizer.state) == sum(p.requires_grad for p in made.model.parameters())


def test_a_fully_trained_model_is_patched_as_the_probe_left_it(tmp_path, monkeypatch):
    made, callback = trainer(tmp_path / "cut", "full", chosen="merging", callbacks=[Stop(PROBE)])
    made.train()
    dense, batches = seen_in_the_probe(tmp_path / "dense", "full", monkeypatch)
    patches = fit_patches(dense.model, callback.plan, batches)
    expected = gradpruner.apply(dense.model, callback.plan, callback.igia, patches=patches)
    assert patches and same(expected.state_dict(), tensors(made.model))


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 3}, {"torch_compile_backend": "eager"}], ids=str)
def test_every_micro_batch_of_the_probe_is_in_the_checkpoint(options, tmp_path, monkeypatch):
    made, _ = trainer(
        tmp_path / "cut",
        torch_compile="torch_compile_backend" in options,
        callbacks=[Stop(4)],
        eval_dataset=training_runs.rows(8),
        eval_strategy="steps",
        eval_steps=1,
        **options,
    )
    made.train()
    kept = load_inputs(tmp_path / "cut" / "checkpoint-3", None)
    count = options.get("gradient_accumulation_steps", 1)
    made, _ = trainer(tmp_path / "dense", attached=False, callbacks=[Stop(3)], **options)
    seen, step = [], made.training_step
    monkeypatch.setattr(made, "training_step", lambda model, given, *a: (seen.append(given), step(model, given, *a))[1])
    made.train()
    assert len(kept) == len(seen) == 3 * count
    for batch, given in zip(kept, seen, strict=True):
        assert torch.equal(batch["input_ids"], given["input_ids"]) and "labels" not in batch


def test_inputs_are_kept_up_to_a_number_of_tokens(monkeypatch):
    monkeypatch.setattr(inputs, "TOKENS", 50)
    model = training_runs.llama()
    watching = inputs.Inputs()
    watching.watch(model)
    for length, count in ((9, 1), (30, 2), (12, 2), (11, 3)):  # 12 more would be 51
        model.train()(input_ids=torch.ones(1, length, dtype=torch.long), labels=torch.ones(1, length, dtype=torch.long))
        assert len(watching.batches) == count
        model.eval()(input_ids=torch.ones(1, 1, dtype=torch.long))
        with torch.no_grad():
            model.train()(input_ids=torch.ones(1, 1, dtype=torch.long))
    assert len(inputs.Inputs(watching.batches).batches) == 3
    again = inputs.Inputs(watching.batches)  # an interrupted run counts what was there
    watching.stop()
    again.watch(model)
    model(input_ids=torch.ones(1, 1, dtype=torch.long))
    assert len(again.batches) == 3 and len(watching.batches) == 3
    again.stop()
    large = inputs.Inputs()
    large.watch(model)
    model(input_ids=torch.ones(1, 60, dtype=torch.long))
    assert len(large.batches) == 1


@pytest.mark.parametrize("damage", ["gone", "bytes", "one of two"])
def test_inputs_that_do_not_come_back_whole_are_refused(damage, finished, tmp_path):
    out, _, _, _ = finished("lora")
    shutil.copytree(out / "checkpoint-3", tmp_path / "checkpoint-3")
    (file,) = (tmp_path / "checkpoint-3").glob(inputs.FILES)
    if damage == "gone":
        file.unlink()
    elif damage == "bytes":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        stored, header = read_described(file, "inputs", inputs.FORMAT)
        tensors = {name: tensor.read() for name, tensor in stored.items()}
        write_described(file, tensors, {**header, "processes": 2})
    reasons = {"gone": "lacks the inputs", "bytes": "checksum of '2/", "one of two": "of 1 processes; 2 have"}
    made, _ = trainer(tmp_path)
    with pytest.raises(gradpruner.CheckpointError, match=reasons[damage]):
        made.train(resume_from_checkpoint=True)


def test_bases_with_other_patches_have_other_names():
    plan, weights = gradpruner.Plan(LAYERS, drop=[2, 5]), Decoder(training_runs.llama()).weights
    patches = [Patch(weights[i], 2, torch.full(weights[i].shape, v), 0.5) for i, v in ((7, 0.0), (7, 1.0), (6, 1.0))]
    marks = {mark_of(plan, {"top": 0.2}, [patch]) for patch in patches}
    assert len({*marks, mark_of(plan, {"top": 0.2}), mark_of(plan, {"top": 0.3})}) == 5


@pytest.mark.parametrize(
    ("kind", "step", "chosen"),
    [
        ("lora", 3, "default"),
        ("lora", 6, "default"),
        ("lora", 9, "default"),
        ("dora", 6, "default"),
        ("full", 3, "default"),
        ("full", 9, "default"),
        ("lora", 3, "paper"),
        ("lora", 6, "paper"),
        ("lora", 9, "paper"),
        ("dora", 6, "paper"),
        ("full", 3, "paper"),
        ("full", 9, "paper"),
        ("lora", 3, "merging"),
        ("lora", 6, "merging"),
        ("dora", 6, "merging"),
        ("full", 3, "merging"),
    ],
)
def test_resuming_gives_the_same_plan_and_weights(kind, step, chosen, finished, tmp_path):
    out, callback, _, final = finished(kind, chosen)
    shutil.copytree(out, tmp_path / "copy")
    made, again = trainer(tmp_path / "copy", kind, chosen=chosen)
    made.train(resume_from_checkpoint=str(tmp_path / "copy" / f"checkpoint-{step}"))
    assert again.plan == callback.plan and made.state.global_step == STEPS
    assert same(final, tensors(made.model))
    assert torch.equal(again.igia.layer_scores(), callback.igia.layer_scores())


def test_a_share_may_be_a_fraction(tmp_path):
    made, _ = trainer(tmp_path, attached=False)
    callback = gradpruner.attach(made, steps=PROBE, ratio=0.4, merge="auto", top=Fraction(1, 3))
    made.train()
    assert callback.plan.merge and list((tmp_path / "gradpruner").glob("base-*"))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lora", {"gradient_accumulation_steps": 3}),
        ("lora", {"gradient_checkpointing": True}),
        ("lora", {"bf16": True, "neftune_noise_alpha": 5.0}),
        ("lora", {"optim": "adamw_8bit", "auto_find_batch_size": True}),
        ("full", {"gradient_checkpointing": True, "lr_scheduler_type": "cosine", "warmup_steps": 3}),
        ("full", {"optim": "adafactor"}),
        ("full", {"optim": "adamw_8bit"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_a_trainer_can_be_told(kind, options, tmp_path):
    """Each runs across the cut, and resumes within the probe to the same plan and weights."""
    if options.get("optim") == "adamw_8bit":
        pytest.importorskip("bitsandbytes", minversion="0.50", reason="its optimizers did not run on a CPU before")
    made, callback = trainer(tmp_path, kind, chosen="merging", **options)
    made.train()
    plan, final = callback.plan, tensors(made.model)
    assert len(Decoder(made.model).layers) == len(plan.kept) and made.state.global_step == STEPS
    made, again = trainer(tmp_path, kind, chosen="merging", **options)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.plan == plan and same(final, tensors(made.model))


@pytest.mark.parametrize("step", [6, 12])
@pytest.mark.parametrize("kind", training_runs.KINDS)
def test_stock_tools_load_a_checkpoint_made_after_the_cut(kind, step, finished):
    out, _, made, _ = finished(kind)
    loader = AutoModelForCausalLM if kind == "full" else AutoPeftModelForCausalLM
    again = loader.from_pretrained(out / f"checkpoint-{step}").eval()
    assert len(Decoder(again).layers) == LAYERS - 3
    if step == STEPS:
        ids = training_runs.rows(1)[0]["input_ids"][None]
        with torch.no_grad():
            assert torch.equal(made.model.eval()(input_ids=ids).logits, again(input_ids=ids).logits)


@pytest.mark.parametrize("moment", ["probe", "apply", "save of the base", "save of step 3", "save of step 6"])
def test_killed_and_resumed_as_if_nothing_had_happened(moment, finished, tmp_path):
    chosen = "merging" if moment in ("apply", "save of step 6") else "default"
    _, callback, _, final = finished("lora", chosen)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_runs", "test_attach"])
    process = context.Process(target=run_and_die, args=(str(tmp_path), chosen, moment))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "survived").exists()
    made, again = trainer(tmp_path, chosen=chosen)
    if moment == "save of step 3":
        with pytest.raises(gradpruner.CheckpointError, match="no complete checkpoint"):
            made.train(resume_from_checkpoint=True)
        made.train()
    else:
        made.train(resume_from_checkpoint=True)
    assert again.plan == callback.plan and same(final, tensors(made.model))


def test_a_checkpoint_that_was_not_finished_is_passed_over(finished, tmp_path):
    out, _callback, _, final = finished("lora")
    shutil.copytree(out, tmp_path / "copy")
    for step, content in ((9, None), (12, '{"cut sho')):
        state = tmp_path / "copy" / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text(content) if content else state.unlink()
    made, _again = trainer(tmp_path / "copy")
    with pytest.raises(gradpruner.CheckpointError, match="not complete"):
        made.train(resume_from_checkpoint=str(tmp_path / "copy" / "checkpoint-12"))
    made.train(resume_from_checkpoint=True)
    assert same(final, tensors(made.model))
    assert json.loads((tmp_path / "copy" / "checkpoint-12" / "trainer_state.json").read_text())["global_step"] == 12


def test_a_checkpoint_of_another_base_is_refused(finished, tmp_path):
    out, _, _, _ = finished("lora")
    made, _ = trainer(tmp_path)
    with torch.no_grad():
        for parameter in made.model.get_base_model().model.layers.parameters():
            parameter.mul_(1.5)
    with pytest.raises(gradpruner.ModelMismatch):
        made.train(resume_from_checkpoint=str(out / "checkpoint-9"))
    made, _ = trainer(tmp_path, "full")
    with pytest.raises(gradpruner.ModelMismatch, match="with adapters"):
        made.train(resume_from_checkpoint=str(out / "checkpoint-9"))


def test_a_checkpoint_of_the_dense_model_is_not_loaded_into_the_cut_one(tmp_path):
    made, _ = trainer(tmp_path, "full", save_only_model=True)
    made.train()
    with pytest.raises(gradpruner.ModelMismatch, match="is cut already"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_adams_memory_of_the_first_steps_must_come_back(tmp_path):
    made, _ = trainer(tmp_path, "full", chosen="merging", save_only_model=True)
    made.train()
    made, _ = trainer(tmp_path, "full", chosen="merging", save_only_model=True)
    with pytest.raises(gradpruner.ProbeError, match="its state is lost"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_through_a_symbolic_link(finished, tmp_path):
    _, _, _, final = finished("lora")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    made, _ = trainer(tmp_path / "link")
    made.train()
    made, _ = trainer(tmp_path / "link")
    made.train(resume_from_checkpoint=str(tmp_path / "link" / "checkpoint-9"))
    assert same(final, tensors(made.model))
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "link" / "checkpoint-12")


def test_a_compiled_trainer_run_goes_on(finished, tmp_path):
    _, callback, plain, _ = finished("lora")
    made, again = trainer(tmp_path, torch_compile=True, torch_compile_backend="eager")
    made.train()
    assert again.plan == callback.plan and made.state.global_step == STEPS
    figures, compiled = ([e for e in run.state.log_history if "gradpruner/gaps" in e] for run in (plain, made))
    assert compiled[0] == pytest.approx(figures[0], rel=1e-3)  # what the patches leave among them


def test_training_that_ends_within_the_probe_says_so(tmp_path, caplog):
    made, callback = trainer(tmp_path, callbacks=[Stop(2)])
    made.train()
    assert "ended in step 2 of 5 of the probe" in caplog.text and callback.plan is None
    assert not made.optimizer.optimizer._optimizer_step_pre_hooks and not made.model._forward_pre_hooks


def test_the_best_checkpoint_is_one_of_the_smaller_model(tmp_path):
    made, callback = trainer(
        tmp_path,
        "full",
        eval_dataset=training_runs.rows(8),
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    made.train()
    assert made.state.best_global_step > PROBE
    assert len(Decoder(made.model).layers) == len(callback.plan.kept)


def test_training_a_second_time_does_not_cut_again(finished):
    _out, callback, made, _ = finished("full")
    plan = callback.plan
    made.train()
    assert callback.plan is plan and len(Decoder(made.model).layers) == len(plan.kept)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"steps": True}, "steps = True"),
        ({"ratio": 1.5}, "ratio = 1.5"),
        ({"ratio": 0.4, "count": 99}, "99 of 8 layers"),
        ({"kind": "best"}, "kind = 'best'"),
        ({"preset": "best"}, "preset = 'best'"),
        ({"patch": 1}, "patch = 1"),
        ({"adapters": "merge"}, "adapters = 'merge'"),
        ({"merge": 7}, "merge = 7"),
        ({"top": 0}, "top = 0"),
        ({"protect": [8]}, "protect names layer 8"),
    ],
)
def test_bad_arguments_are_refused_at_once_and_leave_the_trainer_alone(change, reason, tmp_path):
    made, _ = trainer(tmp_path, attached=False)
    before, callbacks = dict(vars(made)), list(made.callback_handler.callbacks)
    with pytest.raises(gradpruner.InvalidArgument, match=reason):
        gradpruner.attach(made, **change)
    assert vars(made).keys() == before.keys() and made.callback_handler.callbacks == callbacks


def test_what_is_no_trainer_and_what_is_attached_twice(tmp_path):
    with pytest.raises(gradpruner.InvalidArgument, match=r"expected a transformers\.Trainer"):
        gradpruner.attach(object())
    made, _ = trainer(tmp_path)
    with pytest.raises(gradpruner.InvalidArgument, match="attached already"):
        gradpruner.attach(made)


def test_adapter_checkpoints_are_not_pushed_from_a_run(tmp_path):
    made, _ = trainer(tmp_path, attached=False)
    made.args.push_to_hub = True
    with pytest.raises(gradpruner.InvalidArgument, match="push_to_hub = True"):
        gradpruner.attach(made, steps=PROBE)


def test_a_run_too_short_for_the_probe_is_refused_before_its_first_step(tmp_path):
    made, _ = trainer(tmp_path, max_steps=PROBE)
    with pytest.raises(gradpruner.InvalidArgument, match="has 5 steps left"):
        made.train()
    assert made.state.global_step == 0 and not list(tmp_path.glob("checkpoint-*"))


def test_adapters_that_changed_the_base_cannot_start_anew(tmp_path, monkeypatch):
    monkeypatch.setitem(training_runs.KINDS, "lora", lambda: lora(training_runs.llama(), init_lora_weights="pissa"))
    with pytest.raises(gradpruner.UnsupportedModel, match="init_lora_weights='pissa'"):
        trainer(tmp_path)


def test_adapters_of_any_start_go_on_and_only_some_start_anew(tmp_path, monkeypatch):
    monkeypatch.setitem(
        training_runs.KINDS, "lora", lambda: lora(training_runs.llama(), init_lora_weights="orthogonal")
    )
    trainer(tmp_path)
    with pytest.raises(gradpruner.UnsupportedModel, match="init_lora_weights='orthogonal'"):
        trainer(tmp_path, chosen="paper")


def test_an_encoder_decoder_is_not_patched(tmp_path, monkeypatch, caplog):
    config = T5Config(vocab_size=61, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=8, num_heads=2)
    from transformers import T5ForConditionalGeneration

    monkeypatch.setitem(training_runs.KINDS, "full", lambda: T5ForConditionalGeneration(config))
    made, _ = trainer(tmp_path, "full", attached=False)
    with pytest.raises(gradpruner.UnsupportedModel, match="an encoder-decoder makes"):
        gradpruner.attach(made, steps=PROBE, patch=True)
    assert "will not be patched" not in caplog.text
    gradpruner.attach(made, steps=PROBE)
    assert "gaps will not be patched: an encoder-decoder" in caplog.text
    config.decoder_start_token_id = config.pad_token_id
    made.train()
    assert len(Decoder(made.model).layers) == LAYERS - 3


def test_an_architecture_that_cannot_be_cut_is_refused_before_training(tmp_path, monkeypatch):
    config = GPT2Config(vocab_size=61, n_embd=16, n_layer=8, n_head=2, scale_attn_by_inverse_layer_idx=True)
    monkeypatch.setitem(training_runs.KINDS, "full", lambda: AutoModelForCausalLM.from_config(config))
    with pytest.raises(gradpruner.UnsupportedModel, match="depends on the layer's index"):
        trainer(tmp_path, "full")


def test_the_exact_estimator_is_refused_where_a_batch_is_dealt_out(tmp_path):
    made, _ = trainer(tmp_path, "full", attached=False)
    made.args._n_gpu = 2  # what transformers finds on a machine with two GPUs: DataParallel
    with pytest.raises(gradpruner.InvalidArgument, match="deals a batch out to 2 GPUs"):
        gradpruner.attach(made, steps=PROBE, estimator="exact")
    gradpruner.attach(made, steps=PROBE)


def test_a_base_that_cannot_be_written_is_found_before_training(tmp_path, monkeypatch):
    from gradpruner.run import preflight

    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    made, _ = trainer(tmp_path, "lora", attached=False)
    with pytest.raises(gradpruner.InvalidArgument, match="GB are free on its disk"):
        gradpruner.attach(made, steps=PROBE)


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """Runs of kind "lora" get a 4-bit base, loaded from tmp_path/dense."""
    pytest.importorskip("bitsandbytes")
    dense = training_runs.llama(hidden=64, intermediate=128)  # the widths that bitsandbytes' kernels take
    dense.save_pretrained(tmp_path / "dense")
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def load():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=quantised)

    monkeypatch.setitem(training_runs.KINDS, "lora", lambda: lora(load()))
    return dense


def test_a_quantised_base_is_cut_and_its_full_precision_twin_written(packed, tmp_path, caplog):
    made, _ = trainer(tmp_path / "out", attached=False)
    with pytest.raises(gradpruner.InvalidArgument, match="the base is quantised, accepted is 0"):
        gradpruner.attach(made, steps=PROBE, merge="auto")
    with pytest.raises(gradpruner.UnsupportedModel, match="nothing can be added to packed weights"):
        gradpruner.attach(made, steps=PROBE, merge=0, patch=True)
    callback = gradpruner.attach(made, steps=PROBE, ratio=0.4, merge=0)
    assert caplog.text.count("gaps will not be patched") == 1
    made.train()
    assert max(int(state["step"]) for state in made.optimizer.state.values()) == STEPS  # the adapters went on
    final = tensors(made.model)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-12")
    for new, old in enumerate(callback.plan.kept):
        layer = again.get_base_model().model.layers[new]
        twin = dict(packed.model.layers[old].named_parameters())
        for name, parameter in layer.named_parameters():
            if "lora_" not in name:
                assert torch.equal(parameter, twin[name.replace(".base_layer", "")])
    made, _ = trainer(tmp_path / "out", attached=False)
    gradpruner.attach(made, steps=PROBE, ratio=0.4, merge=0)
    made.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    assert same(final, tensors(made.model))


def test_a_subclass_of_the_trainer_keeps_its_own_methods(tmp_path):
    saved = []

    class Mine(Trainer):
        def _save_checkpoint(self, model, trial):
            saved.append(self.state.global_step)
            super()._save_checkpoint(model, trial)

    made, _ = trainer(tmp_path, attached=False)
    mine = Mine(model=made.model, args=made.args, train_dataset=made.train_dataset)
    gradpruner.attach(mine, steps=PROBE, ratio=0.4)
    mine.train()
    assert saved == [3, 6, 9, 12]
