"""What the processes of tests/distributed/test_deepspeed.py do."""

from __future__ import annotations

import os

import torch
from distributed_equality import make, plan_of
from shared_importance import all_of, assert_same_importance, stored_bytes
from torch import distributed

import gradpruner


def deepspeed_stages(folder):
    import deepspeed

    os.environ |= {"LOCAL_RANK": str(distributed.get_rank()), "DS_ACCELERATOR": "cpu"}
    deepspeed.init_distributed("gloo")
    for stage in (1, 2, 3):
        for estimator in ("lora", "gradient"):
            runs = [deepspeed_probe(estimator, stage) for stage in (None, stage)]
            assert runs[0].model == runs[1].model and plan_of(runs[0]) == plan_of(runs[1])
            torch.testing.assert_close(runs[1].square_norms, runs[0].square_norms, rtol=1e-4, atol=1e-12)
            assert_same_importance(runs[1].importance, runs[0].importance, rel=1e-2)
            assert sum(all_of(stored_bytes(runs[1].importance))) == stored_bytes(runs[0].importance)


def deepspeed_probe(estimator, stage):
    """float32, clipped at 0.3; in one process with plain torch, or by an engine in all of them."""
    import deepspeed

    model = make(estimator)[0].float()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    if stage is not None:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": zero,
            "gradient_clipping": 0.3,
            "zero_allow_untested_optimizer": True,
        }
        model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    probe = gradpruner.Probe(model, estimator=estimator, group=False if stage is None else None)
    for i in range(3):
        ids = torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(i))
        if stage is not None:
            ids = ids.chunk(distributed.get_world_size())[distributed.get_rank()]
        loss = model(input_ids=ids, labels=ids).loss
        if stage is None:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.3)
            probe.record(optimizer)
            optimizer.step()
            optimizer.zero_grad()
        else:
            model.backward(loss)
            probe.record(model.optimizer)
            model.step()
    return probe.igia
