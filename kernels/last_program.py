"""The last program of a launch goes on with what all of them counted: a launch less, and nothing waits."""

from __future__ import annotations

import triton
import triton.language as tl

from gradpruner.kernels.selection_state import ENDED


@triton.jit
def is_last(state):
    """Whether every other program of this launch has come this far; what they wrote before is then to be seen.

    The barrier holds the atomic addition back until all threads have written: it releases for the whole program.
    """
    tl.debug_barrier()
    last = tl.atomic_add(state + ENDED, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(state + ENDED, 0)
    return last
