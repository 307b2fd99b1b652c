"""Processes that are forked from a server which has imported the heavy libraries once."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).resolve().parent
PRELOADED = ["torch", "transformers", "peft", "accelerate", "gradpruner", "training_runs", "distributed_equality"]


def forking() -> Any:
    """The context of a process's one fork server.

    The first who asks decides what it preloads, so all ask here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    paths = [str(SUPPORT), str(SUPPORT.parents[1])]
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *(path for path in known if path and path not in paths)])
    return context
