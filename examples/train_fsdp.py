"""Trains the demo's GPT on several processes with FSDP2, checkpoints as it goes, and resumes where it was stopped.

    torchrun --nproc-per-node 2 examples/train_fsdp.py --steps 200 --checkpoints /tmp/gpt

Run it again with more --steps, on as many processes as you like, and it goes on from its last checkpoint. On a machine
with GPUs each process takes one, over NCCL; elsewhere they are CPU processes over gloo. From the top of a checkout.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the demo's model and text

import fused_adamw
from bench.studies.gpt import BATCH, GPT, batches, corpus

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # names that do not depend on how the groups are listed


def sharded(seed: int, device: torch.device) -> GPT:
    """The model, of equal weights on every rank, each block sharded on its own."""
    torch.manual_seed(seed)
    model = GPT().to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def optimizer_of(model: nn.Module) -> fused_adamw.AdamW:
    """Decay for matrices only; the state is made now, so that a checkpoint can be loaded into it."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = fused_adamw.AdamW(groups, lr=3e-3, betas=(0.9, 0.99))
    optimizer.init_state()
    return optimizer


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint, which appears under its name only when every rank has written its part."""
    partial, final = folder / f"{step:08}.part", folder / f"{step:08}"
    weights, state = get_state_dict(model, optimizer, options=FLAT)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=partial)
    if dist.get_rank() == 0:
        partial.rename(final)
    dist.barrier()


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the last checkpoint, whatever the number of ranks that wrote it; return the number of its step."""
    steps = sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())
    if not steps:
        return 0
    weights, state = get_state_dict(model, optimizer, options=FLAT)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / f"{steps[-1]:08}")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=FLAT)
    return steps[-1]


def train(args: argparse.Namespace, device: torch.device) -> list[float]:
    """Train up to ``args.steps``; return the loss of each step that was made here, over the whole batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if BATCH % world:
        raise SystemExit(f"the batch of {BATCH} cannot be shared by {world} processes")
    model = sharded(args.seed, device)
    optimizer = optimizer_of(model)
    first = resume(args.checkpoints, model, optimizer)
    if rank == 0:
        own, whole = (sum(f(p) for p in model.parameters()) for f in (lambda p: p.to_local().numel(), DTensor.numel))
        print(f"{world} processes on {device.type}, {own:,} of {whole:,} parameters on this one, from step {first}")
    losses = []
    texts = batches(corpus()[0], args.seed)
    for step in range(args.steps):
        text = next(texts)[rank::world].to(device)
        if step < first:
            continue  # a batch that was seen before the checkpoint
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
        done = step + 1
        if rank == 0 and (done % 20 == 0 or done == args.steps):
            print(f"step {done:5}  loss {losses[-1]:.4f}")
        if done % args.every == 0 or done == args.steps:
            save(args.checkpoints, done, model, optimizer)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="of the whole run (default: %(default)s)")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default: %(default)s)")
    args = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        train(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
