"""What batches must be to calibrate on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from gradpruner.errors import InvalidArgument

Batch = Mapping[str, Tensor]


def need_full(batches: Sequence[Batch], who: str) -> None:
    """Raises InvalidArgument, with the name of `who` needs them, without batches or with padding in them."""
    if not batches:
        raise InvalidArgument(f"batches is empty; {who} expected at least one, with input_ids")
    if any("attention_mask" in batch and not bool(batch["attention_mask"].all()) for batch in batches):
        raise InvalidArgument("batches: some tokens are padding, which would count as text; expected full rows")
