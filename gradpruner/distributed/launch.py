"""Join the processes that a launcher started, such as torchrun or accelerate launch.

Nothing heavy is imported before it is known that there are several processes.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from gradpruner.errors import InvalidArgument, UnsupportedModel

TIMEOUT = datetime.timedelta(hours=6)  # the longest that one process works alone, e.g. to write a checkpoint
PATIENCE = datetime.timedelta(seconds=3)  # until the first process has said what went wrong
FAILED = "gradpruner/failed"  # the key under which the first process says so
# by which torchrun and accelerate launch say what a process is one of
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")  # what accelerate looks at
QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def launched() -> int:
    """Return how many processes a launcher started, 1 without a launcher."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdigit() and "RANK" in os.environ else 1


def launched_rank() -> int:
    """Return the number of this process among those that a launcher started, from 0."""
    return int(os.environ["RANK"]) if launched() > 1 else 0


def uses_cpu() -> bool:
    """Whether the launcher asks for the CPU where there are GPUs: `accelerate launch --cpu`."""
    return _is_set("ACCELERATE_USE_CPU")


def work_apart() -> None:
    """Make this process no part of the launch of its parent, whose variables it has inherited."""
    for name in (*PLACE, "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_FSDP"):
        os.environ.pop(name, None)


def wants_shards() -> bool:
    """Whether the launcher asks for FSDP2: `accelerate launch --use_fsdp --fsdp_version 2`."""
    return launched() > 1 and _is_set("ACCELERATE_USE_FSDP")


def refuse_unknown_engines() -> None:
    """Refuse an engine that the launcher asks for and that cannot be used.

    Raises:
        UnsupportedModel: it is DeepSpeed, FSDP1, Megatron-LM, or parallelism within a layer.
    """
    ways = (
        "accepted are one process, torchrun, and accelerate launch with DDP or FSDP2 (--use_fsdp --fsdp_version 2); "
        "docs/launchers.md has the commands"
    )
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise UnsupportedModel(
            "the launcher asks for DeepSpeed, whose optimizer holds copies of the weights, so that layers cannot be "
            f"removed under it; {ways}. A DeepSpeed training of your own can be probed: docs/training.md, section "
            "'Several processes'"
        )
    if _is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise UnsupportedModel(f"the launcher asks for Megatron-LM; {ways}")
    if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise UnsupportedModel(f"the launcher asks for tensor, context or sequence parallelism; {ways}")
    if _is_set("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UnsupportedModel(f"the launcher asks for FSDP1, whose flat parameters hold several layers; {ways}")


def refuse_mpi() -> None:
    """Refuse processes of mpirun, or of srun with MPI.

    On CPUs, accelerate would take them for one training.

    Raises:
        InvalidArgument: this process is one of several, and torchrun or accelerate launch did not start it.
    """
    found = [name for name in MPI if os.environ.get(name, "1") not in ("", "0", "1")]
    if launched() == 1 and found:
        raise InvalidArgument(
            f"{found[0]} = {os.environ[found[0]]}: this process is one of several that MPI started; expected torchrun "
            "or accelerate launch for one training in several processes, or, for compare, independent processes "
            "without the variables of MPI (srun --mpi=none)"
        )


def join() -> None:
    """Connect to the other processes of this launch.

    Without a launcher, or a second time, nothing happens.

    Raises:
        UnsupportedModel: the launcher asks for an engine that cannot be used.
        InvalidArgument: torch cannot connect the processes.
    """
    if launched() < 2:
        return
    refuse_unknown_engines()
    from torch import distributed

    if distributed.is_initialized():
        return
    import torch

    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.accelerator.is_available() and not uses_cpu():
        count = torch.accelerator.device_count()
        if local >= count:
            raise InvalidArgument(
                f"process {local} of this machine has no GPU: {count} are visible; expected at most as many processes "
                "per machine as GPUs (--nproc-per-node, --num_processes)"
            )
        torch.accelerator.set_device_index(local)
        backend = None  # the accelerator's own, and gloo for the host's tensors
    else:
        backend = "gloo"
    # every process loads the whole model: it is cut and checked before it is sharded
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        distributed.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise InvalidArgument(f"the launched processes cannot be connected: {' '.join(str(error).split())}") from error


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Disconnect from the other processes after a success.

    After an error, this process leaves at once, so that the others notice.
    """
    yield
    distributed: Any = sys.modules.get("torch.distributed")  # not imported: not joined
    if launched() > 1 and distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def silence_others() -> None:
    """Let the first process alone log and show progress. Errors of the others are still shown."""
    if launched_rank() == 0:
        return
    os.environ.update(QUIET)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def said_by_first(message: str) -> bool:
    """Whether the first process reports this error, so that this one need not.

    Args:
        message: the error. The first process makes it known to the others, which wait a few seconds for it.
    """
    distributed: Any = sys.modules.get("torch.distributed")
    if launched() < 2 or distributed is None or not distributed.is_initialized():
        return launched_rank() > 0 and distributed is None  # before the processes joined, all fail alike
    store = distributed.distributed_c10d._get_default_store()
    with contextlib.suppress(RuntimeError, distributed.DistError):  # the first process is gone, or says nothing
        if launched_rank() == 0:
            store.set(FAILED, message)
            return False
        store.wait([FAILED], PATIENCE)
        return bool(store.get(FAILED).decode() == message)
    return False


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "on")
