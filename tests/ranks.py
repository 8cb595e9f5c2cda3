"""Runs a function on several ranks: processes with a time limit, always reaped, joined by gloo through a file."""

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


def _rank(function: Callable, rank: int, world: int, file: str, limit: float, results: Any, args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(file, world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=limit))
        result = function(*args)
        dist.barrier()
        dist.destroy_process_group()
        results.send_bytes(pickle.dumps((result, None)))
    except BaseException:
        results.send_bytes(pickle.dumps((None, traceback.format_exc())))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may wait for a rank that is gone


def run(world: int, function: Callable, *args: Any, limit: float = 90, fork: bool = True) -> list[Any]:
    """What ``function(*args)`` returns on each rank of a process group; ``KILLED`` for a rank that is gone.

    Raises AssertionError with the traceback of each rank that failed, and TimeoutError after ``limit`` seconds. No rank
    outlives the call. ``fork=False`` starts each from nothing: CUDA does not survive a fork.
    """
    context = get_context("forkserver" if fork else "spawn")
    if fork:
        context.set_forkserver_preload(PRELOADED)
    deadline = time.monotonic() + limit
    answers: list[Any] = [(KILLED, None)] * world
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        try:
            for rank in range(world):
                receiver, sender = context.Pipe(duplex=False)
                given = (function, rank, world, str(Path(folder) / "store"), limit, sender, args)
                process = context.Process(target=_rank, args=given, daemon=True)
                process.start()
                sender.close()
                pipes.append(receiver)
                processes.append(process)
            waiting = dict(zip(pipes, range(world), strict=True))
            while waiting:
                ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"ranks {sorted(waiting.values())} of {world} did not return in {limit} s")
                for pipe in ready:
                    rank = waiting.pop(pipe)
                    try:
                        answers[rank] = pickle.loads(pipe.recv_bytes())
                    except EOFError:  # killed
                        continue
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()
    failed = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(answers) if error]
    if failed:
        raise AssertionError("\n".join(failed))
    return [result for result, _ in answers]
