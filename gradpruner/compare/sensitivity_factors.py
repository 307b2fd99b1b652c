"""What `gradpruner sensitivity` changes, one setting at a time.

Pure data, so that the command line can show it without loading torch.
"""

from __future__ import annotations

from typing import Any

# by the name that people read: the method's option, another option without which it has no effect, its values
FACTORS: dict[str, tuple[str, str, tuple[Any, ...]]] = {
    "probe steps": ("probe_steps", "", (5, 10, 20, 40, 100)),
    "layer score": ("kind", "", ("squared", "norm", "normalized")),
    "layers merged": ("merge", "", (0, 3, 6, 12)),
    "share of a merged weight": ("top", "merge=3", (0.1, 0.2, 0.3, 0.5)),
    "rank of the probe": ("rank", "", (4, 8, 16, 32)),
    "rank after the cut, times": ("rank_factor", "", (1, 2, 4, 8)),
    "share of the data probed": ("share", "", (0.01, 0.1, 1.0)),
}
