"""One and the same training in one process and in several: what the probe sees, plans and merges, compared.

`python tests/support/distributed_equality.py` prints the table for 1, 2 and 4 processes (gloo, CPU, float64).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import tempfile
import time
import traceback
import weakref
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from forkserver import forking
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig

import gradpruner
from gradpruner.model.decoder import Decoder

LAYERS, STEPS, ROWS = 6, 4, 4
SCORES, WEIGHTS = 1e-10, 1e-12  # float64: sums over processes are taken in another order
ESTIMATORS = {"lora": torch.optim.AdamW, "gradient": torch.optim.SGD, "adam": torch.optim.AdamW}
WRAPPERS = ("DDP", "FSDP2")


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=50,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config).double()


def wrap(model, wrapper):
    if wrapper == "DDP":
        return DistributedDataParallel(model)
    if wrapper in ("FSDP2", "HSDP"):
        size = distributed.get_world_size()
        grid = {"FSDP2": {"shard": size}, "HSDP": {"replicate": 2, "shard": size // 2}}[wrapper]
        mesh = init_device_mesh("cpu", tuple(grid.values()), mesh_dim_names=tuple(grid))
        for layer in Decoder(model).layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if wrapper == "accelerate":
        return as_accelerate_shards(model)
    return model


def as_accelerate_shards(model):
    """What Accelerator.prepare does to a model under FSDP2; on a CPU the Accelerator itself takes DDP instead."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    stand_in = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=False,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(stand_in, model)


def make(estimator, wrapper=None):
    """The model and its optimizer; an estimator of None or "lora" trains adapters."""
    model = llama()
    if estimator == "lora":
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=32, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.double()
    model = wrap(model, wrapper)
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {"lr": 0.05} if ESTIMATORS[estimator] is torch.optim.SGD else {"lr": 2e-3}
    return model, ESTIMATORS[estimator](parameters, **options)


def step(model, optimizer, seed, wrapper=None):
    """One step on the global batch `seed`, of which every process takes its rows. Returns the global loss."""
    ids = torch.randint(0, 61, (ROWS, 9), generator=torch.Generator().manual_seed(seed))
    if wrapper is not None:
        ids = ids.chunk(distributed.get_world_size())[distributed.get_rank()]
    # transformers' own loss is float32
    loss = F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach()
    if wrapper is not None:
        distributed.all_reduce(total)
        total /= distributed.get_world_size()
    return float(total)


def probed(estimator, wrapper=None, steps=STEPS, group=None):
    model, optimizer = make(estimator, wrapper)
    probe = gradpruner.Probe(model, estimator=estimator, group=False if wrapper is None else group)
    with probe.watching(optimizer, steps):
        for i in range(steps):
            step(model, optimizer, i, wrapper)
    return model, optimizer, probe.igia


def plan_of(igia):
    return igia.plan(count=3, kind="squared", merge=2)


def values_of(model):
    """The base model's parameters, whole."""
    names = dict(gradpruner.model.decoder.unwrap(model).named_parameters())
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in names.items()}


def compare(estimator, wrapper):
    """One row of the table: this run against the same in one process."""
    plain, _, alone = probed(estimator)
    model, _, igia = probed(estimator, wrapper)
    scores, wanted = igia.layer_scores(), alone.layer_scores()
    plan = plan_of(alone)
    same = plan_of(igia) == plan
    expected = values_of(gradpruner.apply(plain, plan, alone, adapters="discard"))
    merged = values_of(gradpruner.apply(model, plan_of(igia), igia, adapters="discard")) if same else {}
    gaps = [float((merged[name] - value).abs().max()) for name, value in expected.items()] if same else [float("nan")]
    return {
        "processes": distributed.get_world_size(),
        "wrapper": wrapper,
        "estimator": estimator,
        "scores": float(((scores - wanted) / wanted).abs().max()),
        "plan": same,
        "weights": max(gaps),
    }


def table_job(folder):
    rows = [compare(estimator, wrapper) for wrapper in WRAPPERS for estimator in ESTIMATORS]
    if distributed.get_rank() == 0:
        (folder / "rows.json").write_text(json.dumps(rows))


class Gathered:
    """Counts the bytes of tensors that full_tensor() has made and that are alive."""

    def __enter__(self):
        self.alive = self.peak = 0
        self.original = DTensor.full_tensor

        def counting(tensor, **options):
            whole = self.original(tensor, **options)
            size = whole.numel() * whole.element_size()
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(whole, self.gone, size)
            return whole

        DTensor.full_tensor = counting
        return self

    def gone(self, size):
        self.alive -= size

    def __exit__(self, *error):
        DTensor.full_tensor = self.original


# launching


def worker(job, rank, world, folder, timeout):
    torch.set_num_threads(1)
    log = folder / f"rank{rank}.txt"
    try:
        with contextlib.redirect_stdout((folder / f"out{rank}.txt").open("w")):
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=timeout),
            )
            job(folder)
            distributed.barrier()
            distributed.destroy_process_group()
    except BaseException:
        log.write_text(traceback.format_exc())
        os._exit(1)


def launch(job, world, folder, timeout=60, limit=300):
    """Run `job(folder)` in `world` processes. Returns their exit codes and what those that failed had to say."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = [forking().Process(target=worker, args=(job, r, world, folder, timeout)) for r in range(world)]
    for process in processes:
        process.start()
    end = time.monotonic() + limit
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
    logs = [folder / f"rank{r}.txt" for r in range(world)]
    return [p.exitcode for p in processes], [log.read_text() if log.exists() else "" for log in logs]


def check(job, world, folder, **options):
    codes, errors = launch(job, world, folder, **options)
    assert codes == [0] * world, "\n".join([str(codes), *errors])


def print_table(worlds=(1, 2, 4)):
    print(
        "| processes | wrapper | estimator | scores: largest relative difference | plan equal | merged weights: "
        "largest absolute difference |\n|---|---|---|---|---|---|"
    )
    for world in worlds:
        with tempfile.TemporaryDirectory() as temporary:
            check(table_job, world, Path(temporary))
            for row in json.loads((Path(temporary) / "rows.json").read_text()):
                plan = "yes" if row["plan"] else "no"
                print(
                    f"| {row['processes']} | {row['wrapper']} | {row['estimator']} | {row['scores']:.1e} | {plan} | "
                    f"{row['weights']:.1e} |",
                    flush=True,
                )


if __name__ == "__main__":
    import distributed_equality  # under its own name: processes look their job up by it

    distributed_equality.print_table(tuple(map(int, sys.argv[1:])) or (1, 2, 4))
