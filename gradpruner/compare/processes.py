"""A comparison in several processes, whose log messages appear in the first one."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator
from logging.handlers import QueueHandler
from queue import Empty
from typing import Any

import torch

from gradpruner.compare.experiment import Compare
from gradpruner.distributed.launch import launched
from gradpruner.errors import GradPrunerError, InvalidArgument

PACKAGE = "gradpruner"  # the logger above all of the package's
POLL = 0.2  # seconds between two looks whether the processes have ended
PATIENCE = 5.0  # seconds for the last messages of a process that was killed while it wrote one


def work_in_processes(comparison: Compare, processes: int) -> None:
    """Do `comparison.work()` in several processes.

    Each gets its share of the cores and, where there are any, a GPU.

    Args:
        comparison: the comparison.
        processes: how many. 1 works in this process.

    Raises:
        InvalidArgument: a ratio is wrong.
        GradPrunerError: a process failed. The others finish what they can, and it is kept.
    """
    comparison.cells(comparison.layers())  # a wrong ratio is refused here, not by every process
    if processes > 1 and launched() > 1:
        raise InvalidArgument(
            f"processes = {processes}, and a launcher started {launched()} processes, which make each model together; "
            "expected one of them: --processes without a launcher makes several models at a time"
        )
    if processes == 1:
        comparison.work()
        return
    spawn = multiprocessing.get_context("spawn")
    with _log_queue(spawn) as queue:
        level = logging.getLogger(PACKAGE).getEffectiveLevel()
        arguments = [(comparison, index, processes, queue, level) for index in range(processes)]
        children = [spawn.Process(target=_work, args=of_child) for of_child in arguments]
        for child in children:
            child.start()
        for child in children:
            child.join()
    failed = sum(child.exitcode != 0 for child in children)
    if failed:
        raise GradPrunerError(f"{failed} of {processes} processes failed; what the others finished is kept")
    comparison.work()  # waits for what processes that were started elsewhere are making


@contextlib.contextmanager
def _log_queue(spawn: Any) -> Iterator[Any]:
    """Yield a queue. What other processes log into it is handled as if it were logged here."""
    queue, ended = spawn.Queue(), threading.Event()

    def handle() -> None:
        while True:
            try:
                record = queue.get(timeout=POLL)
            except Empty:
                if ended.is_set():
                    return
                continue
            logging.getLogger(record.name).handle(record)

    # Not logging.handlers.QueueListener: to end, it writes to the queue, whose lock a killed process may still hold.
    listener = threading.Thread(target=handle, daemon=True)
    listener.start()
    try:
        yield queue
    finally:
        ended.set()
        listener.join(PATIENCE)


def _work(comparison: Compare, index: int, processes: int, queue: Any, level: int) -> None:
    """Work in a process of its own, logging into the queue."""
    logger = logging.getLogger(PACKAGE)
    logger.addHandler(QueueHandler(queue))
    logger.setLevel(level)
    logger.propagate = False
    if torch.cuda.device_count():
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index % torch.cuda.device_count())
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    comparison.work(wait=False)
