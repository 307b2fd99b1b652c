"""What the processes of tests/distributed/test_distributed.py do. Each job is given a folder that all of them see."""

from __future__ import annotations

import os
import signal

import distributed_equality as equality
import pytest
import torch
from distributed_equality import ESTIMATORS, SCORES, WEIGHTS, WRAPPERS, make, plan_of, probed, step, values_of
from safetensors.torch import load_file
from shared_importance import all_of, assert_same_importance, stored_bytes
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel

import gradpruner
from gradpruner.checkpoint import save
from gradpruner.checks import exact_share
from gradpruner.distributed.sharding import is_sharded
from gradpruner.model.decoder import Decoder
from gradpruner.model.wrappers import root_of
from gradpruner.pruning import apply
from gradpruner.pruning.apply import removing
from gradpruner.storage import checked_tensors

SHARE = exact_share("top", 0.2)


def equal(folder):
    for wrapper in WRAPPERS:
        for estimator in ESTIMATORS:
            same_as_one_process(folder / f"{wrapper}-{estimator}", wrapper, estimator)


def same_as_one_process(folder, wrapper, estimator):
    rank, size = distributed.get_rank(), distributed.get_world_size()
    folder.mkdir(exist_ok=True)
    plain, plain_optimizer, alone = probed(estimator)
    model, optimizer, seen = probed(estimator, wrapper)
    # scores and plan, the same everywhere
    torch.testing.assert_close(seen.square_norms, alone.square_norms, rtol=SCORES, atol=0)
    torch.testing.assert_close(seen.layer_scores(), alone.layer_scores(), rtol=SCORES, atol=0)
    assert seen.model == alone.model
    assert len(set(all_of(seen.square_norms.numpy().tobytes()))) == 1
    plan = plan_of(seen)
    assert plan == plan_of(alone) and len(plan.merge) == 2
    # the importance is stored once; shards with replicas once a replica, as the weights are
    copies = 2 if wrapper == "HSDP" and estimator != "lora" else 1
    assert sum(all_of(stored_bytes(seen.importance))) == copies * stored_bytes(alone.importance)
    assert 0 < stored_bytes(seen.importance) < stored_bytes(alone.importance)
    assert_same_importance(seen.importance, alone.importance)
    # one process writes
    written = []
    with pytest.MonkeyPatch.context() as patch:
        save_file = checked_tensors.save_file
        patch.setattr(checked_tensors, "save_file", lambda *a, **o: (written.append(1), save_file(*a, **o)))
        seen.save(folder / "igia.safetensors")
    assert all_of(len(written)) == [1] + [0] * (size - 1)
    loaded = gradpruner.Igia.load(folder / "igia.safetensors")
    assert torch.equal(loaded.square_norms, seen.square_norms)
    assert_same_importance(loaded.importance, seen.importance, rel=0)
    # the merged model
    before = values_of(plain)
    expected = gradpruner.apply(plain, plan, alone, adapters="discard")
    whole = sum(v.numel() * v.element_size() for v in before.values())
    with equality.Gathered() as gathered:
        small = gradpruner.apply(model, plan, seen, adapters="discard")
    assert gathered.peak < whole / 10
    assert all(is_sharded(p) == (wrapper != "DDP") for p in small.parameters())  # nothing stays gathered
    merged, wanted = values_of(small), values_of(expected)
    assert merged.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=WEIGHTS)
    for new, old in enumerate(plan.kept):
        key = "mlp.up_proj.weight"
        changed = not torch.equal(wanted[f"model.layers.{new}.{key}"], before[base(before, f"layers.{old}.{key}")])
        assert changed == (old in plan.donors)
    # the checkpoint
    with pytest.MonkeyPatch.context() as patch:
        calls, write = [], save._write
        patch.setattr(save, "_write", lambda *a: (calls.append(1), write(*a)))
        gradpruner.save(small, folder / "shared", plan=plan)
    assert all_of(len(calls)) == [1] + [0] * (size - 1)
    if rank == 0:
        gradpruner.save(expected, folder / "alone", plan=plan, group=False)
        assert sorted(p.name for p in (folder / "shared").iterdir()) == sorted(
            p.name for p in (folder / "alone").iterdir()
        )
        files = [load_file(folder / name / "model.safetensors") for name in ("shared", "alone")]
        assert files[0].keys() == files[1].keys()
        for name, tensor in files[0].items():
            assert torch.equal(tensor, merged[name])
            torch.testing.assert_close(tensor, files[1][name], rtol=0, atol=WEIGHTS)
    with pytest.raises(gradpruner.InvalidArgument, match="shared"):  # it is in use: every process says so
        gradpruner.save(small, folder / "shared")
    # and training goes on
    if wrapper != "DDP" and estimator != "lora":
        states = root_of(small)._get_fsdp_state()._state_ctx.all_states
        assert len(states) == len(plan.kept) + (3 if wrapper == "accelerate" else 1)
        goes_on(expected, plain_optimizer, small, optimizer, wrapper)


def base(values, ending):
    """The name of a base weight in a model that may have adapters."""
    stem = ending.removesuffix(".weight")
    return next(n for n in values if n.endswith((ending, f"{stem}.base_layer.weight")))


def goes_on(plain, plain_optimizer, model, optimizer, wrapper):
    plain_optimizer = gradpruner.rebuild_optimizer(plain_optimizer, plain)
    optimizer = gradpruner.rebuild_optimizer(optimizer, model)
    losses = [[step(plain, plain_optimizer, 50 + i), step(model, optimizer, 50 + i, wrapper)] for i in range(3)]
    assert len({round(alone, 6) for alone, _ in losses}) == 3
    for alone, shared in losses:
        assert shared == pytest.approx(alone, rel=1e-8)


def other_shards(folder):
    """Shards with replicas, and as accelerate cuts a model: the embedding apart, the norm and the head as one."""
    for wrapper in ("HSDP", "accelerate"):
        for estimator in ESTIMATORS:
            same_as_one_process(folder / f"{wrapper}-{estimator}", wrapper, estimator)


def details(folder):
    (folder / "lora").mkdir(exist_ok=True)
    same_fingerprint()
    adapters_go_on(folder)
    all_or_nothing()
    gathered_before()
    for wrapper in WRAPPERS:
        for estimator in ("lora", "gradient"):
            interrupted(folder / f"{wrapper}-{estimator}.safetensors", wrapper, estimator)
    skips_alike()
    refusals()
    failed_saves(folder)


def same_fingerprint():
    plain, _ = make("gradient")
    plain.model.layers[0].mlp.up_proj.weight.data[0, 0] = -0.0
    sharded = make("gradient")[0]
    sharded.model.layers[0].mlp.up_proj.weight.data[0, 0] = -0.0
    expected = Decoder(plain).fingerprint(content=True)
    assert Decoder(equality.wrap(sharded, "FSDP2")).fingerprint(content=True) == expected
    sharded.model.layers[5].mlp.down_proj.weight.data.mul_(1.5)
    assert Decoder(sharded).fingerprint(content=True) != expected


def adapters_go_on(folder):
    """Cut as the first thing that a sharded model does, with a stored igia; then its adapters still learn."""
    _, _, alone = probed("lora")
    path = folder / f"igia{distributed.get_rank()}.safetensors"
    alone.save(path)
    runs = []
    for wrapper in (None, "FSDP2"):
        model, optimizer = make("lora", wrapper)
        loaded = gradpruner.Igia.load(path, lazy=True)
        with removing(Decoder(model), plan_of(loaded), loaded, SHARE, 1.0):
            pass
        optimizer = gradpruner.rebuild_optimizer(optimizer, model)
        runs.append([step(model, optimizer, i, wrapper) for i in range(4)])
    assert len(set(runs[0])) == 4
    assert runs[1] == pytest.approx(runs[0], rel=1e-8)


def all_or_nothing():
    """The check of the logits fails on one process: every one has the dense model back."""
    model, optimizer, seen = probed("gradient", "FSDP2")
    before = values_of(model)
    with pytest.MonkeyPatch.context() as patch:
        if distributed.get_rank() == 1:
            patch.setattr(apply, "differ", lambda *a: 1.0)
        with pytest.raises(gradpruner.UnsupportedModel, match="logits"):
            gradpruner.apply(model, plan_of(seen), seen)
    after = values_of(model)
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    step(model, optimizer, 9, "FSDP2")


def gathered_before():
    """A forward without a backward has left the weights gathered: what is merged goes into the shards all the same."""
    plain, _, alone = probed("gradient")
    model, _, seen = probed("gradient", "FSDP2")
    for layer in Decoder(model).layers:
        layer.set_reshard_after_forward(False)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert not any(is_sharded(p) for p in model.parameters())
    merged = values_of(gradpruner.apply(model, plan_of(seen), seen, adapters="discard"))
    for name, value in values_of(gradpruner.apply(plain, plan_of(alone), alone)).items():
        torch.testing.assert_close(merged[name], value, rtol=0, atol=WEIGHTS)


def interrupted(path, wrapper, estimator):
    _, _, whole = probed(estimator, wrapper)
    model, optimizer = make(estimator, wrapper)
    probe = gradpruner.Probe(model, estimator=estimator)
    probe.start(optimizer, equality.STEPS)
    for i in range(2):
        step(model, optimizer, i, wrapper)
    probe.snapshot().save(path)
    probe.abandon()  # as if the processes had ended here
    probe = gradpruner.Probe(model, estimator=estimator)
    probe.start(optimizer, equality.STEPS, resume=gradpruner.Igia.load(path))
    for i in range(2, 4):
        step(model, optimizer, i, wrapper)
    again = probe.igia
    assert torch.equal(again.square_norms, whole.square_norms)
    assert stored_bytes(again.importance) == stored_bytes(whole.importance)
    assert_same_importance(again.importance, whole.importance, rel=0)


def skips_alike():
    """A gradient that is not finite on one process, or a scaler that says so there, is a step left out by all."""
    for wrapper in WRAPPERS:
        for estimator in ("lora", "gradient"):
            model, optimizer = make(estimator, wrapper)
            probe = gradpruner.Probe(model, estimator=estimator)
            with probe.watching(optimizer, 3):
                for i in range(3):
                    keep = {n: p.detach().clone() for n, p in model.named_parameters()}
                    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(i))
                    bad = i == 1 and distributed.get_rank() == 1
                    (model(input_ids=ids, labels=ids).loss * (float("nan") if bad else 1.0)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if i == 1:
                        with torch.no_grad():
                            for name, parameter in model.named_parameters():
                                parameter.copy_(keep[name])
            assert (probe.igia.steps, probe.igia.skipped) == (2, 1)
    model, optimizer = make("gradient")
    probe = gradpruner.Probe(model, estimator="gradient")
    for i in range(2):
        ids = torch.ones(2, 5, dtype=torch.long)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.found_inf = torch.tensor([float(i == 0 and distributed.get_rank() == 1)])
        probe.record(optimizer)
    assert (probe.igia.steps, probe.igia.skipped) == (1, 1)


def refusals():
    rank = distributed.get_rank()
    model, _ = make("gradient")
    with pytest.raises(gradpruner.InvalidArgument, match="exact"):
        gradpruner.Probe(model, estimator="exact")
    gradpruner.Probe(model, estimator="exact", group=False).stop()
    with pytest.raises(gradpruner.InvalidArgument, match="group = 'x'"):
        gradpruner.Probe(model, group="x")

    with pytest.raises(gradpruner.UnsupportedModel, match="FSDP1"):
        gradpruner.Probe(FullyShardedDataParallel(make("gradient")[0], device_id=torch.device("cpu")))

    def separate(group, data):
        model, optimizer = make("lora")
        with gradpruner.Probe(model, group=group).watching(optimizer, 3) as probe:
            for i in range(3):
                step(model, optimizer, 10 * data + i)
        return probe.igia

    with pytest.raises(gradpruner.ProbeError, match=r"process 1 saw other gradients.*group=False"):
        separate(None, rank)
    assert isinstance(separate(False, rank).importance, dict)

    model, optimizer = make("lora", "DDP")
    probe = gradpruner.Probe(model)
    with pytest.raises(gradpruner.ProbeError, match="no_sync"), probe.watching(optimizer, 3), model.no_sync():
        for i in range(3):
            step(model, optimizer, i, "DDP")


def failed_saves(folder):
    model, _, seen = probed("lora", "DDP")
    with pytest.raises(gradpruner.GradPrunerError):
        seen.save(folder / "no" / "such" / "igia.safetensors" / "\0")
    small = gradpruner.apply(model, plan_of(seen), seen, adapters="discard")
    with pytest.raises(gradpruner.InvalidArgument, match="folder differs"):
        gradpruner.save(small, folder / f"own{distributed.get_rank()}")
    with pytest.MonkeyPatch.context() as patch:

        def fails(*args):
            raise gradpruner.CheckpointError("it reloads otherwise")

        patch.setattr(save, "verify", fails)  # process 0 alone comes to it
        with pytest.raises(gradpruner.CheckpointError, match="it reloads otherwise") as caught:
            gradpruner.save(small, folder / "refused")
    assert str(caught.value).startswith("process 0") == (distributed.get_rank() != 0)
    distributed.barrier()
    assert not (folder / "refused").exists()


def killed_in_training(folder):
    killed(folder, lambda i, optimizer: i == 2 and os.kill(os.getpid(), signal.SIGKILL))


def killed_at_the_end(folder):
    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    model, optimizer = make("lora", "DDP")
    gradpruner.Probe(model).start(optimizer, 3)
    for i in range(3):
        if i == 2 and distributed.get_rank() == 1:
            optimizer.register_step_pre_hook(die)  # the gradients are reduced; the other comes to compare what was seen
        step_without_report(model, optimizer, i)


def failed_in_training(folder):
    def fail(i, optimizer):
        if i == 2:
            raise ValueError("of its own")

    killed(folder, fail)


def killed(folder, die):
    model, optimizer = make("lora", "DDP")
    probe = gradpruner.Probe(model)
    with probe.watching(optimizer, 3):
        for i in range(3):
            if distributed.get_rank() == 1:
                die(i, optimizer)
            step_without_report(model, optimizer, i)


def step_without_report(model, optimizer, seed):
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
