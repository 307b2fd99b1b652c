"""attach on two processes: DistributedDataParallel, and FSDP2 as accelerate prepares it."""

from __future__ import annotations

import contextlib
import os
import runpy
import shutil
import socket
from pathlib import Path
from queue import Empty

import pytest
import torch
import torch.distributed as dist
from example_runs import checked, write_inputs
from forkserver import forking
from training_runs import LAYERS, PROBE, SETTINGS, STEPS, trainer

import gradpruner
from gradpruner.model.decoder import Decoder

pytestmark = pytest.mark.slow

# DDP first: accelerate goes on to shard in a process where it was told to once
RUNS = [("ddp", "lora", "default"), ("fsdp2", "lora", "default")]
MORE_RUNS = [
    ("ddp", "full", "merging"),
    ("ddp", "lora", "paper"),
    ("fsdp2", "full", "merging"),
    ("fsdp2", "lora", "paper"),
]


def shard(made):
    """What accelerate would choose by itself on GPUs; on the CPU it takes DDP whatever is configured."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    state = made.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="SHARDED_STATE_DICT",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=True,
    )
    made.is_fsdp_enabled = True


def one_run(wrapper, kind, chosen, folder, resume=None):
    made, _ = trainer(folder, kind, attached=False)
    if wrapper == "fsdp2":
        shard(made)
    callback = gradpruner.attach(made, steps=PROBE, ratio=0.4, **SETTINGS[chosen])
    made.train(resume_from_checkpoint=None if resume is None else f"{folder}/checkpoint-{resume}")
    assert made.state.global_step == STEPS and len(Decoder(made.model).layers) == LAYERS - 3
    assert bool(callback._cut.patched) == (chosen != "paper")
    whole = {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for n, p in made.model.named_parameters()
    }
    return callback.plan, {name: tensor.clone() for name, tensor in whole.items()}


def worker(rank, port, folder, chosen, inputs, queue):
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        ACCELERATE_USE_CPU="true",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    found = {}
    for run in chosen:
        out = Path(folder, "-".join(run))
        plan, final = one_run(*run, out)
        found[run] = plan.to_dict(), {name: tensor.numpy() for name, tensor in final.items()}
        for step in (3, 6):
            copy = Path(f"{out}-{step}")
            if rank == 0:
                shutil.copytree(out, copy)
            dist.barrier()
            again, weights = one_run(*run, copy, resume=step)
            assert again == plan, (run, step)
            for name, tensor in final.items():
                assert torch.equal(tensor, weights[name]), (run, step, name)
    # accelerate is set to shard by now
    example = Path(__file__).parents[2] / "examples" / "accelerate_fsdp2.py"
    runpy.run_path(str(example))["main"](*inputs)
    dist.barrier()
    dist.destroy_process_group()
    queue.put((rank, found))


def in_two_processes(chosen, folder):
    """The folder, and of each process the plan and the final weights of the chosen runs."""
    context = forking()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue, inputs = context.Queue(), write_inputs(folder)
    processes = [
        context.Process(target=worker, args=(rank, port, str(folder), chosen, inputs, queue)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = {}
    while len(found) < len(processes):
        died = [process.exitcode for process in processes if process.exitcode not in (None, 0)]
        assert not died, f"a process ended with {died}; its traceback is on standard error"
        with contextlib.suppress(Empty):
            found.update([queue.get(timeout=1)])
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return folder, found


@pytest.fixture(scope="module")
def finished_runs(tmp_path_factory):
    """Finished runs by name: the two of RUNS together, the slow ones together."""
    groups = {}

    def get(run):
        chosen = RUNS if run in RUNS else MORE_RUNS
        if run not in groups:
            groups.update(dict.fromkeys(chosen, in_two_processes(chosen, tmp_path_factory.mktemp("runs"))))
        return groups[run]

    return get


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize(
    "run", [*(pytest.param(run, marks=pytest.mark.in_ci) for run in RUNS), *MORE_RUNS], ids="-".join
)
def test_every_process_ends_with_the_same_smaller_model(run, finished_runs):
    """That each of them resumed to the same weights, the processes have checked themselves."""
    folder, found = finished_runs(run)
    (plan, first), (other, second) = (found[rank][run] for rank in range(2))
    assert plan == other and len(plan["kept"]) == LAYERS - 3
    assert first.keys() == second.keys() and all((first[n] == second[n]).all() for n in first)
    assert gradpruner.Plan.load(folder / "-".join(run) / "gradpruner" / "plan.json").to_dict() == plan


@pytest.mark.parametrize(
    ("kind", "chosen"),
    [
        pytest.param("lora", "default", marks=pytest.mark.in_ci),
        ("full", "merging"),
        ("lora", "paper"),
    ],
)
def test_sharded_and_replicated_runs_agree(kind, chosen, finished_runs):
    _, found = finished_runs(("ddp", kind, chosen))
    (plan, replicated), (other, sharded) = (found[0][wrapper, kind, chosen] for wrapper in ("ddp", "fsdp2"))
    assert plan["drop"] == other["drop"] and plan["merge"] == other["merge"]
    for name, value in replicated.items():
        torch.testing.assert_close(torch.from_numpy(value), torch.from_numpy(sharded[name]), rtol=1e-3, atol=1e-4)


@pytest.mark.in_ci
def test_the_example_of_accelerate_and_fsdp2(finished_runs):
    folder, _ = finished_runs(RUNS[0])
    checked(folder / "out")


@pytest.mark.in_ci
def test_the_base_of_a_sharded_run_is_an_ordinary_checkpoint(finished_runs):
    from transformers import AutoModelForCausalLM

    folder, found = finished_runs(RUNS[0])
    (base,) = (folder / "fsdp2-lora-default" / "gradpruner").glob("base-*")
    stored = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    trained = found[0]["fsdp2", "lora", "default"][1]
    for name, parameter in stored.items():
        wrapped = f"base_model.model.{name}"
        value = trained.get(wrapped, trained.get(wrapped.removesuffix("weight") + "base_layer.weight"))
        assert torch.equal(parameter.detach(), torch.from_numpy(value)), name
