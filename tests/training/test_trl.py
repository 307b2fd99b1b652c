"""TRL's own trainers: probed, cut, trained on, and their checkpoints reloaded by stock classes; or refused by name."""

from __future__ import annotations

import pytest
import tiny_trl
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from tiny_trl import LAYERS, PROBE, STEPS, trainer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import gradpruner
from gradpruner.model.decoder import Decoder

pytest.importorskip("trl", minversion="1.16", reason="its trainers had other arguments before")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

FLAT = {"padding_free": True, "max_length": None}
WORKING = {
    "supervised": ("SFT", {}),
    "supervised, all weights": ("SFT", {"lora": False}),
    "packed (bfd)": ("SFT", {"packing": True, "per_device_train_batch_size": 1}),
    "packed (bfd), all weights": ("SFT", {"packing": True, "per_device_train_batch_size": 1, "lora": False}),
    "packed (wrapped)": ("SFT", {"packing": True, "packing_strategy": "wrapped", "max_length": 32}),
    "padding-free": ("SFT", FLAT),
    "loss on assistant turns": ("SFT", {"data": "messages", "assistant_only_loss": True}),
    "loss on completions": ("SFT", {"data": "completion", "completion_only_loss": True}),
    "dft loss": ("SFT", {"loss_type": "dft"}),
    "streamed": ("SFT", {"data": tiny_trl.rows("text").to_iterable_dataset()}),
    "preferences, reference computed before": ("DPO", {"precompute_ref_log_probs": True}),
    "preferences, reference of its own": ("DPO", {"extra": {"ref_model": tiny_trl.model()}}),
    "preferences, all weights": ("DPO", {"lora": False, "extra": {"ref_model": tiny_trl.model()}}),
    "judged, reference computed before": ("KTO", {"precompute_ref_log_probs": True}),
    "judged, all weights": ("KTO", {"lora": False, "extra": {"ref_model": tiny_trl.model()}}),
    "odds ratio": ("ORPO", {}),
    "contrastive": ("CPO", {}),
    "rewards": ("Reward", {}),
    "rewards, all weights": ("Reward", {"lora": False}),
    "group relative, no reference": ("GRPO", {"beta": 0.0}),
    "group relative, all weights": ("GRPO", {"beta": 0.0, "lora": False}),
    "leave one out, no reference": ("RLOO", {"beta": 0.0}),
    "distilled": ("GKD", {}),
}
REFUSED = {
    "preferences": ("DPO", {}, r"DPOTrainer whose reference.*switched off.*precompute_ref_log_probs=True"),
    "preferences, adapters of before": ("DPO", {"extra": {"wrapped": True}}, "with the adapter 'ref'"),
    "preferences, a reference that follows": (
        "DPO",
        {"lora": False, "sync_ref_model": True, "extra": {"ref_model": tiny_trl.model()}},
        "SyncRefModelCallback: it copies",
    ),
    "judged": ("KTO", {}, "KTOTrainer whose reference"),
    "group relative": ("GRPO", {"beta": 0.1}, r"GRPOTrainer whose reference.*beta=0\.0"),
    "leave one out": ("RLOO", {"beta": 0.1}, r"RLOOTrainer whose reference.*beta=0\.0"),
    "online": ("OnlineDPO", {}, "OnlineDPOTrainer whose reference"),
}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 40)[None], use_cache=False).logits


@pytest.mark.parametrize("what", WORKING)
def test_a_run_is_cut_and_its_checkpoint_loads(what, tmp_path):
    name, options = WORKING[what]
    made = trainer(name, tmp_path, **options)
    callback = gradpruner.attach(made, steps=PROBE, count=2)
    made.train()
    assert made.state.global_step == STEPS and len(Decoder(made.model).layers) == LAYERS - 2
    assert callback.igia.steps == PROBE and callback._cut.patched
    folder = tmp_path / f"checkpoint-{STEPS}"
    stock = {
        (True, False): AutoPeftModelForCausalLM,
        (True, True): AutoPeftModelForSequenceClassification,
        (False, False): AutoModelForCausalLM,
        (False, True): AutoModelForSequenceClassification,
    }[options.get("lora", True), name == "Reward"]
    more = {"num_labels": 1} if name == "Reward" and options.get("lora", True) else {}
    assert torch.equal(logits(stock.from_pretrained(folder, **more)), logits(made.model))


@pytest.mark.parametrize("what", REFUSED)
def test_a_trainer_that_would_go_wrong_is_refused(what, tmp_path):
    name, options, reason = REFUSED[what]
    made = trainer(name, tmp_path, **options)
    with pytest.raises(gradpruner.UnsupportedModel, match=reason):
        gradpruner.attach(made, steps=PROBE, count=2)
    callback = gradpruner.AttachCallback(steps=PROBE, count=2)  # it comes before TRL's constructor has ended
    with pytest.raises(gradpruner.UnsupportedModel, match=reason):
        trainer(name, tmp_path, callbacks=[callback], **options).train()


@pytest.mark.parametrize("step", [3, 6])
@pytest.mark.parametrize("what", ["packed (bfd)", "padding-free", "streamed", "rewards"])
def test_a_run_resumes_as_if_it_had_never_stopped(what, step, tmp_path):
    name, options = WORKING[what]

    def run(resume=None):
        made = trainer(name, tmp_path, **options)
        callback = gradpruner.attach(made, steps=PROBE, count=2)
        made.train(resume_from_checkpoint=resume)
        return callback.plan, {n: p.detach().clone() for n, p in made.model.named_parameters()}

    plan, expected = run()
    again, actual = run(str(tmp_path / f"checkpoint-{step}"))
    assert again == plan and all(torch.equal(actual[n], expected[n]) for n in expected)


def test_padding_free_batches_give_the_plan_and_patches_of_padded_ones(tmp_path):
    shares = []
    for options in ({}, FLAT):
        made = trainer("SFT", tmp_path, **options)
        callback = gradpruner.attach(made, steps=PROBE, count=2)
        made.train()
        (figures,) = [entry for entry in made.state.log_history if "gradpruner/gaps" in entry]
        shares.append({n: v for n, v in figures.items() if "unexplained" in n or "score" in n})
        plan = callback.plan
    assert shares[0] == pytest.approx(shares[1], rel=1e-2) and plan.removed


def test_a_callback_in_the_constructor_of_a_supervised_trainer(tmp_path):
    callback = gradpruner.AttachCallback(steps=PROBE, count=2)
    made = trainer("SFT", tmp_path, callbacks=[callback])
    made.train()
    assert len(callback.plan.removed) == 2 and len(Decoder(made.model).layers) == LAYERS - 2
