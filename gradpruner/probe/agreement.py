"""Agreement of several processes on what they read, so that all of them make the same plan."""

from __future__ import annotations

import torch
from torch import Tensor

from gradpruner.distributed.processes import Peers
from gradpruner.errors import ProbeError
from gradpruner.model.decoder import Weight

ALIKE = 1e-3  # largest relative difference between processes that read the same reduced gradient


def agreed_norms(peers: Peers, model: str, weights: tuple[Weight, ...], skipped: int, norms: Tensor) -> Tensor:
    """Return the square norms of the first process, after a check that all have read the same.

    This is a collective.

    Args:
        peers: the processes.
        model: fingerprint of the model of this process.
        weights: the weights that it watched.
        skipped: how many steps it left out.
        norms: its square norms, float64 of shape (t, n).

    Returns:
        The square norms of the first process.

    Raises:
        ProbeError: another process has read something else.
    """
    answers = peers.gather((model, weights, skipped, norms))
    model, weights, skipped, first = answers[0]
    for rank, (other_model, other_weights, other_skipped, other) in enumerate(answers):
        if (other_model, other_weights) != (model, weights):
            difference = "watched another model than process 0"
        elif (len(other), other_skipped) != (len(first), skipped):
            difference = f"saw {len(other)} steps and skipped {other_skipped}, process 0 {len(first)} and {skipped}"
        elif not torch.allclose(other, first, rtol=ALIKE, atol=0):
            difference = "saw other gradients than process 0"
        else:
            continue
        raise ProbeError(
            f"process {rank} {difference}: the gradients are not reduced over the processes (no_sync in every "
            "step, or no DistributedDataParallel), or each trains a model of its own: then pass group=False"
        )
    return first
