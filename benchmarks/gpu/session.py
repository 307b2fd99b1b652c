"""What every part of the evidence is given: the device, whether this is a dry run, and where its rows go."""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Session:
    """One part of one run.

    Args:
        part: its name, the first column of every row.
        device: where it computes.
        tiny: a dry run, on shapes that a CPU computes in seconds.
        rows: the JSON lines of all parts; a row is there as soon as it is known.
        model: a GGUF file or a folder of its pieces, for the part that trains a real model.
        data: training rows and, where there are any, test rows of that part, CSV files.
        seeds: of that part.
    """

    part: str
    device: torch.device
    tiny: bool
    rows: Path
    model: Path | None = None
    data: tuple[Path, ...] = ()
    seeds: tuple[int, ...] = (0,)

    @property
    def on_cuda(self) -> bool:
        """Whether there is a card."""
        return self.device.type == "cuda"

    def put(self, **row: Any) -> None:
        """Write a row. A part that is killed keeps the rows that it has written."""
        shortened = {name: float(f"{v:.6g}") if isinstance(v, float) else v for name, v in row.items()}
        line = json.dumps({"part": self.part, **shortened})
        print(line, flush=True)
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normals on the device."""
        return torch.randn(*shape, device=self.device).to(dtype)

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def begin_peak(self) -> int:
        """Begin to watch the device's memory. Returns the bytes that are in use now, 0 without a card."""
        gc.collect()
        if not self.on_cuda:
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        """Bytes at the highest point since `begin_peak`, 0 without a card."""
        return torch.cuda.max_memory_allocated(self.device) if self.on_cuda else 0
