"""cut: the same objects go on in a loop of one's own, whatever wraps them."""

from __future__ import annotations

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from forkserver import forking
from own_loops import PROBE, probe_and_cut, stepper, trainable
from peft import PeftModel
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from training_runs import LAYERS, llama, lora, rows, same, tensors

import gradpruner
from gradpruner.model.decoder import Decoder
from gradpruner.pruning.patch import Patch, fit_patches

pytestmark = pytest.mark.in_ci  # the slow ones among them


@pytest.mark.parametrize("adapters", ["discard", "keep"])
@pytest.mark.parametrize(
    "make", [lambda: lora(llama()), lambda: lora(llama(), use_dora=True), llama], ids=["lora", "dora", "full"]
)
def test_the_same_objects_go_on(make, adapters):
    model = make()
    optimizer = torch.optim.AdamW([{"params": trainable(model)[:5]}, {"params": trainable(model)[5:], "lr": 2e-3}])
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
    step = stepper(model, optimizer)
    modules = set(map(id, model.modules()))
    _plan, _ = probe_and_cut(model, optimizer, step, adapters=adapters)
    fresh = isinstance(model, PeftModel) and adapters == "discard"
    assert len(Decoder(model).layers) == LAYERS - 3
    assert {id(m) for m in model.modules() if not isinstance(m, torch.nn.ModuleList)} <= modules
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in trainable(model)} and len(optimizer.param_groups) == 2
    states = [optimizer.state[p] for p in held if p in optimizer.state]
    assert len(states) == (0 if fresh else len(held)) == len(optimizer.state)  # fresh adapters have no past
    for i in range(PROBE, 8):
        step(i)
        scheduler.step()
    assert optimizer.param_groups[1]["lr"] < 2e-3
    assert all(int(optimizer.state[p]["step"]) == (4 if fresh else 8) for p in held)


def test_named_parameters_of_an_optimizer_stay_with_their_parameters():
    model = llama()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    probe_and_cut(model, optimizer, stepper(model, optimizer))
    (group,) = optimizer.param_groups
    # names are those that the user gave, of the dense model
    assert len(group["params"]) == len(group["param_names"]) == len(list(model.parameters()))
    assert group["param_names"][0] == "model.embed_tokens.weight"


def test_through_accelerate_in_a_plain_loop():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = lora(llama())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, DataLoader(rows(40), batch_size=2), scheduler
    )
    probe = gradpruner.Probe(model)
    probe.start(optimizer, PROBE)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if probe.finished and len(Decoder(model).layers) == LAYERS:
            gradpruner.cut(model, optimizer, probe.igia.plan(0.4, preset="paper"), probe.igia, preset="paper")
    assert len(Decoder(model).layers) == LAYERS - 3
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {int(optimizer.state[p]["step"]) for p in held} == {10 - PROBE}


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_gradient_scaler(fused):
    found = []
    for scale in (None, 2.0**10):
        model = lora(llama())
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None, growth_interval=3)
        batches, losses = list(DataLoader(rows(40), batch_size=4)), []

        def step(i, model=model, optimizer=optimizer, scaler=scaler, batches=batches, losses=losses):
            loss = model(**batches[i]).loss
            losses.append(float(loss.detach()))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        plan, igia = probe_and_cut(model, optimizer, step)
        for i in range(PROBE, 8):
            step(i)
        found.append((plan, igia.layer_scores(), losses))
    assert found[0][0] == found[1][0] and found[0][2] == pytest.approx(found[1][2], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=0)


@pytest.mark.slow
def test_a_compiled_model_is_compiled_again():
    plain, model = lora(llama()), lora(llama())
    compiled = torch.compile(model, backend="eager")
    losses = []
    for called in (plain, compiled):
        optimizer = torch.optim.AdamW(trainable(called), lr=1e-2)
        step = stepper(called, optimizer)
        probe_and_cut(called, optimizer, step)
        losses.append([step(i) for i in range(PROBE, 8)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("make", [lambda: lora(llama()), llama], ids=["lora", "full"])
def test_layers_in_checkpoint_wrappers(make):
    """As accelerate's fsdp_activation_checkpointing wraps them."""
    found = []
    for wrapped in (False, True):
        model = make()
        model.config.use_cache = False  # the recomputation would fill a cache a second time
        decoder = Decoder(model)
        if wrapped:
            for i, layer in enumerate(decoder.layers):
                decoder.layers[i] = checkpoint_wrapper(layer)
        optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
        step = stepper(model, optimizer)
        plan, _ = probe_and_cut(model, optimizer, step)
        losses = [step(i) for i in range(PROBE, 8)]
        numbers = [layer.self_attn.layer_idx for layer in Decoder(model).layers]
        found.append((plan.to_dict(), losses, numbers))
    assert found[0] == found[1] and found[0][2] == list(range(LAYERS - 3))


def test_a_model_compiled_by_regions_is_refused():
    """What accelerate's compile_regions returns is a copy that knows the original; the loop calls the copy."""
    original = lora(llama())
    called = copy.deepcopy(original)
    called.__dict__["_orig_mod"] = original
    with pytest.raises(gradpruner.UnsupportedModel, match="compiled by regions"):
        gradpruner.cut(called, None, gradpruner.Plan(LAYERS, drop=[3]))


def test_nothing_changes_where_something_is_refused():
    model = lora(llama())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    step = stepper(model, optimizer)
    for i in range(2):
        step(i)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for plan, error in (
        (gradpruner.Plan(LAYERS, merge=[3]), gradpruner.InvalidArgument),  # no importance
        (gradpruner.Plan(LAYERS + 1, drop=[3]), gradpruner.ModelMismatch),
        (gradpruner.Plan(LAYERS), gradpruner.InvalidArgument),
    ):
        for adapters in ("discard", "keep"):
            with pytest.raises(error):
                gradpruner.cut(model, optimizer, plan, adapters=adapters)
    foreign = Patch(Decoder(model).weights[0], 3, torch.zeros(24, 24), 0.5)
    with pytest.raises(gradpruner.InvalidArgument, match="does not belong to a gap"):
        gradpruner.cut(model, optimizer, gradpruner.Plan(LAYERS, drop=[3]), patches=[foreign], adapters="keep")
    with pytest.raises(gradpruner.InvalidArgument, match="optimizer is a list"):
        gradpruner.cut(model, [optimizer], gradpruner.Plan(LAYERS, drop=[3]))
    assert same(before, model.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert all(torch.equal(after["state"][k]["exp_avg"], state["state"][k]["exp_avg"]) for k in state["state"])


def ddp_run(rank, world, port, queue, adapters):
    """Train, cut (where adapters are kept, with patches) and train on; every rank gets its share of each batch."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    inner = lora(llama(torch.float64))
    calls = []
    model = DistributedDataParallel(inner, static_graph=False, bucket_cap_mb=1) if world > 1 else inner
    if world > 1:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        model.register_comm_hook(None, allreduce_hook)
        model.register_forward_hook(lambda *args: calls.append(1))
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    data = rows(64)

    def part(i, size=8):
        return torch.stack([row["input_ids"] for row in data[size * i : size * i + size]]).chunk(world)[rank]

    def step(i):
        model(input_ids=part(i), labels=part(i)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    probe = gradpruner.Probe(model)
    with probe.watching(optimizer, PROBE):
        for i in range(PROBE):
            step(i)
    plan, patches = probe.igia.plan(0.4, merge=1), []
    if adapters == "keep":
        more = PROBE + int(world == 2 and rank == 0)  # a batch that the other process does not have
        # every fifth row chooses the ridge, by 1 process or by 2
        patches = fit_patches(model, plan, [{"input_ids": part(i, 10)} for i in range(more)])
        assert patches and not calls[PROBE:]
    gradpruner.cut(model, optimizer, plan, probe.igia, adapters=adapters, patches=patches)
    for i in range(PROBE, 8):
        step(i)
    if world > 1:
        assert len(calls) == 8 and len(model._comm_hooks) == 1
        dist.destroy_process_group()
    queue.put((rank, plan.to_dict(), {name: t.numpy() for name, t in tensors(inner).items()}))


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize("adapters", [pytest.param("discard", marks=pytest.mark.slow), "keep"])
def test_distributed_data_parallel_goes_on_with_a_reducer_for_what_is_left(adapters):
    context = forking()
    results = {}
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        queue = context.Queue()
        processes = [
            context.Process(target=ddp_run, args=(rank, world, port, queue, adapters)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        results[world] = dict((rank, rest) for rank, *rest in (queue.get(timeout=120) for _ in processes))
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    (plan, single), (plan0, rank0), (plan1, rank1) = results[1][0], results[2][0], results[2][1]
    assert plan == plan0 == plan1
    for name, value in single.items():
        value, first, second = (torch.from_numpy(v) for v in (value, rank0[name], rank1[name]))
        assert torch.equal(first, second)
        # a patch is fitted in float32
        close = dict(rtol=1e-9, atol=1e-12) if adapters == "discard" else dict(rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(value, first, **close)
