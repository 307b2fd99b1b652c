"""AttachCallback: what attach does, where only callbacks can be passed."""

from __future__ import annotations

import pytest
import torch
from training_runs import LAYERS, PROBE, STEPS, same, tensors, trainer
from transformers import TrainerCallback, TrainerControl, TrainerState

import gradpruner
from gradpruner.model.decoder import Decoder


def run(out, *, late=False, resume=None):
    callback = gradpruner.AttachCallback(steps=PROBE, ratio=0.4)
    assert callback.plan is None and callback.igia is None
    made, _ = trainer(out, attached=False, callbacks=[] if late else [callback])
    if late:
        made.add_callback(callback)
    made.train(resume_from_checkpoint=resume)
    return callback, made


@pytest.mark.slow  # the test of two Trainers shows as much, but for resuming
def test_a_callback_of_the_constructor_does_what_attach_does(finished, tmp_path):
    _, attached, made, final = finished("lora")
    callback, again = run(tmp_path)
    assert callback.plan == attached.plan and callback.igia.steps == PROBE
    assert len(Decoder(again.model).layers) == LAYERS - 3 and again.state.global_step == STEPS == made.state.global_step
    assert same(tensors(again.model), final)
    for step in (3, 6):  # within the probe, and after the cut
        resumed, last = run(tmp_path, resume=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.plan == attached.plan and same(tensors(last.model), final)


def test_a_callback_that_comes_later_cuts_and_cannot_resume(finished, tmp_path):
    _, attached, _, final = finished("lora")
    callback, made = run(tmp_path, late=True)
    assert callback.plan == attached.plan and same(tensors(made.model), final)
    with pytest.raises(
        gradpruner.InvalidArgument, match="training resumes at step 3, but AttachCallback was added to a"
    ):
        run(tmp_path, late=True, resume=str(tmp_path / "checkpoint-3"))


def test_wrong_options_are_refused_before_training(tmp_path):
    with pytest.raises(gradpruner.InvalidArgument, match="steps"):
        trainer(tmp_path, attached=False, callbacks=[gradpruner.AttachCallback(steps=0)])
    with pytest.raises(TypeError, match="ratios"):
        trainer(tmp_path, attached=False, callbacks=[gradpruner.AttachCallback(ratios=0.4)])


def test_a_second_one_is_refused(tmp_path):
    callbacks = [gradpruner.AttachCallback(steps=PROBE), gradpruner.AttachCallback(steps=PROBE)]
    with pytest.raises(gradpruner.InvalidArgument, match="gradpruner is attached already"):
        trainer(tmp_path, attached=False, callbacks=callbacks)


def test_without_a_trainer_it_says_so():
    callback = gradpruner.AttachCallback()
    with pytest.raises(gradpruner.InvalidArgument, match=r"found no transformers\.Trainer among its callers"):
        callback.on_init_end(None, TrainerState(), TrainerControl())


def test_two_trainers_that_live_at_once_each_have_their_own(finished, tmp_path):
    _, attached, _, final = finished("lora")
    callbacks = [gradpruner.AttachCallback(steps=PROBE, ratio=share) for share in (0.4, 0.2)]
    first, second = (
        trainer(tmp_path / str(i), attached=False, callbacks=[callback])[0] for i, callback in enumerate(callbacks)
    )
    first.train()
    assert callbacks[0].plan == attached.plan and same(tensors(first.model), final)
    assert callbacks[1].plan is None and len(Decoder(second.model).layers) == LAYERS


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, PROBE + 2])
def test_a_trainer_inside_of_anothers_callback(step, finished, tmp_path):
    """As in a sweep: an inner run begins and ends within the outer one's probe, or after its cut."""
    _, attached, _, final = finished("lora")
    outer, inner = gradpruner.AttachCallback(steps=PROBE, ratio=0.4), gradpruner.AttachCallback(steps=PROBE, ratio=0.2)

    class Inside(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                with torch.random.fork_rng():
                    made, _ = trainer(tmp_path / "inner", attached=False, callbacks=[inner])
                    made.train()

    made, _ = trainer(tmp_path / "outer", attached=False, callbacks=[outer, Inside()])
    made.train()
    assert len(inner.plan.removed) == 2
    assert outer.plan == attached.plan and same(tensors(made.model), final)


@pytest.mark.parametrize("late", [False, True])
def test_a_callback_of_another_trainer_is_refused(late, tmp_path):
    callback = gradpruner.AttachCallback(steps=PROBE, ratio=0.4)
    trainer(tmp_path, attached=False, callbacks=[callback])
    with pytest.raises(gradpruner.InvalidArgument, match="belongs to another Trainer already"):
        made, _ = trainer(tmp_path, attached=False, callbacks=[] if late else [callback])
        made.add_callback(callback)
        made.train()
