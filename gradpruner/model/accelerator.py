"""Move a model to the accelerator of this process, such as a GPU."""

from __future__ import annotations

import logging

import torch
from torch import nn

from gradpruner.distributed.launch import uses_cpu, wants_shards

logger = logging.getLogger(__name__)


def accelerator() -> torch.device | None:
    """Return the accelerator that this process works on, or None if it works on the CPU."""
    if uses_cpu() or not torch.accelerator.is_available():
        return None
    return torch.accelerator.current_accelerator()


def to_accelerator(model: nn.Module, *, trains: bool = False, room: int = 0) -> None:
    """Move a model from host memory to the accelerator, if there is one and the model fits.

    A model that is not in host memory, or that is divided over devices or quantised, stays where its loader put it.

    Args:
        model: a model. Its parameters are moved in place.
        trains: whether it is trained afterwards. For FSDP2 it then stays in host memory, since the devices get shards.
        room: bytes that must be left there beside the model. Default: none.
    """
    device = accelerator()
    if device is None or (trains and wants_shards()) or not _is_in_host_memory(model):
        return
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    needed, free = size + room, _free(device)
    if free is not None and needed >= free:
        logger.warning(
            f"the model needs {needed / 1e9:.3g} GB, and the {device.type} device has {free / 1e9:.3g} GB left: it "
            "stays on the CPU, which is slow"
        )
        return
    model.to(device)


def _is_in_host_memory(model: nn.Module) -> bool:
    """Whether all of a model is on the CPU, in weights that `to` can move."""
    if getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False):
        return False
    return all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))


def _free(device: torch.device) -> int | None:
    """Return the free bytes of a device, or None where torch cannot tell."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # torch holds them for new tensors
    return torch.cuda.mem_get_info()[0] + unused
