"""Let the last program of a launch go on with what all programs counted.

This saves a launch, and no program waits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gradpruner.kernels.selection_state import ENDED


@triton.jit
def is_last(state):
    """Whether every other program of this launch has come this far.

    If so, all that they wrote is visible. The barrier holds the atomic addition back until all threads of the program
    have written, since the addition releases for the whole program.
    """
    tl.debug_barrier()
    last = tl.atomic_add(state + ENDED, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(state + ENDED, 0)
    return last
