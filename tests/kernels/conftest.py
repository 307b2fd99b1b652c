"""The repository's own packages that are not installed: the cases to compile live in `benchmarks`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
