"""What cannot be done with a model in 4 bits. It is refused before time is spent."""

from __future__ import annotations

from gradpruner.errors import InvalidArgument
from gradpruner.model.load import four_bits
from gradpruner.training.recipe import Recipe


def check_four_bits(source: str, recipe: Recipe, *, merge: str | int = 0) -> None:
    """Check that a model can be trained in 4 bits with this recipe.

    Args:
        source: the model.
        recipe: how it is trained.
        merge: how many of the removed layers are merged, or "auto".

    Raises:
        InvalidArgument: it cannot, or bitsandbytes is missing.
    """
    if not recipe.rank:
        raise InvalidArgument(
            "load_in_4bit with rank = 0: weights of 4 bits do not train; expected a rank of 1 or more"
        )
    if merge:
        raise InvalidArgument(
            f"load_in_4bit with merge = {merge!r}: layers are merged by the importance of their entries, which a probe "
            "of 4-bit weights sees only after rounding; expected merge = 0 (--merge 0; the preset paper merges)"
        )
    four_bits(source)


def check_one_process(processes: int) -> None:
    """Raise InvalidArgument if a training in 4 bits was started in several processes."""
    if processes > 1:
        raise InvalidArgument(
            f"load_in_4bit in {processes} processes: each would need the weights on its own device, which is not "
            "supported; expected one process"
        )
