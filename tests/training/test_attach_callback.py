"""AttachCallback: what attach does, where only callbacks can be passed."""

from __future__ import annotations

import pytest
from training_runs import LAYERS, PROBE, STEPS, same, tensors, trainer
from transformers import TrainerControl, TrainerState

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
