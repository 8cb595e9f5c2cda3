"""Runs a function on several ranks: processes with a time limit, always reaped, joined by gloo through a file.

The ranks of a world stay for the next function, so that one pays for their start, until a function fails on one of
them, one is killed, or :func:`close` is called: what a function patches it has to undo.
"""

import atexit
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported once, in a server from which the ranks are forked.
PRELOADED = [
    "torch._dynamo",  # which fully_shard imports: 2 s
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
    "examples.train_fsdp",
    "tests.cases",
]
KILLED = "killed"


def _rank(rank: int, world: int, file: str, limit: float, pipe: Any) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(file, world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=limit))
        while True:
            function, args = pickle.loads(pipe.recv_bytes())
            result = function(*args)
            dist.barrier()
            pipe.send_bytes(pickle.dumps((result, None)))
    except BaseException:
        pipe.send_bytes(pickle.dumps((None, traceback.format_exc())))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may wait for a rank that is gone


class _World:
    """The processes of a world, and what connects them."""

    def __init__(self, size: int, limit: float, fork: bool) -> None:
        context = get_context("forkserver" if fork else "spawn")
        if fork:
            context.set_forkserver_preload(PRELOADED)
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Any] = []
        self.processes: list[Any] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            given = (rank, size, str(Path(self.folder.name) / "store"), limit, theirs)
            self.processes.append(context.Process(target=_rank, args=given, daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)

    def answers(self, function: Callable, args: tuple, limit: float) -> list[Any]:
        """(result, traceback) of each rank, (KILLED, None) of one that is gone."""
        deadline = time.monotonic() + limit
        found: list[Any] = [(KILLED, None)] * len(self.pipes)
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        waiting = dict(zip(self.pipes, range(len(self.pipes)), strict=True))
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(waiting.values())} of {len(found)} did not return in {limit} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    found[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):  # killed
                    continue
        return found

    def close(self) -> None:
        """Reap the ranks."""
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.folder.cleanup()


_worlds: dict[tuple[int, bool], _World] = {}


@atexit.register
def close() -> None:
    """Reap all ranks that there are."""
    while _worlds:
        _worlds.popitem()[1].close()


def run(world: int, function: Callable, *args: Any, limit: float = 90, fork: bool = True) -> list[Any]:
    """What ``function(*args)`` returns on each rank of a process group; ``KILLED`` for a rank that is gone.

    Raises AssertionError with the traceback of each rank that failed, and TimeoutError after ``limit`` seconds; no rank
    outlives either. ``fork=False`` starts each from nothing: CUDA does not survive a fork.
    """
    key = world, fork
    if key not in _worlds:
        _worlds[key] = _World(world, limit, fork)
    good = False
    try:
        answers = _worlds[key].answers(function, args, limit)
        good = all(result is not KILLED and error is None for result, error in answers)
    finally:
        if not good:
            _worlds.pop(key).close()
    failed = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(answers) if error]
    if failed:
        raise AssertionError("\n".join(failed))
    return [result for result, _ in answers]
