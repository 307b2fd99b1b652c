"""The command line as a launcher starts it, noting which rows each process trains on.

`torchrun --nproc-per-node 2 tests/support/launched_cli.py NOTES COMMAND ...` runs the command. Each process appends a
line to `NOTES/RANK.jsonl` for every forward pass: the optimizer step, the token ids of its rows, and whether the
weights are sharded. With DIE_AT=STEP and DIE_RANK=RANK in the environment, a process kills itself after that step,
once the checkpoint of an earlier step is complete.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from gradpruner.cli.main import main


def note(folder: Path) -> None:
    from gradpruner.distributed.sharding import is_sharded
    from gradpruner.training.row_trainer import RowTrainer, StepRecorder

    rank = os.environ.get("RANK", "0")
    folder.mkdir(exist_ok=True)
    real_step, real_end = RowTrainer.training_step, StepRecorder.on_step_end

    def training_step(self, model, inputs, *args, **kwargs):
        mask = inputs["attention_mask"].bool()
        rows = [ids[kept].tolist() for ids, kept in zip(inputs["input_ids"], mask, strict=True)]
        line = {"step": self.state.global_step, "rows": rows, "sharded": any(map(is_sharded, model.parameters()))}
        with (folder / f"{rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return real_step(self, model, inputs, *args, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        real_end(self, args, state, control, **kwargs)
        if str(state.global_step) == os.environ.get("DIE_AT") and rank == os.environ.get("DIE_RANK", "0"):
            os.kill(os.getpid(), signal.SIGKILL)

    RowTrainer.training_step, StepRecorder.on_step_end = training_step, on_step_end


if __name__ == "__main__":
    note(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
