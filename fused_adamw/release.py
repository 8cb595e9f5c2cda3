"""Steps parameters within the backward pass, bucket by bucket, so that few gradients are in memory at a time."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_adamw.base import FusedOptimizer
from fused_adamw.tensors import local


class GradientRelease:
    """Ends a gradient release, or pauses it while gradients accumulate; returned by :func:`release_gradients`."""

    def __init__(self, optimizer: FusedOptimizer, buckets: list[list[Tensor]]) -> None:
        self._optimizer, self._buckets = optimizer, buckets
        self._bucket_of = {id(p): k for k, bucket in enumerate(buckets) for p in bucket}
        self._accumulating = False
        self._begin()
        self._hooks = [p.register_post_accumulate_grad_hook(self._take) for bucket in buckets for p in bucket]
        self._hooks.append(optimizer.register_step_post_hook(self._begin))

    def remove(self) -> None:
        """Remove all hooks. Gradients that are in memory stay there, for ``optimizer.step()``."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let the backward passes within this context add to the gradients, and step nothing."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def _begin(self, *_: Any) -> None:
        self._missing = [{id(p) for p in bucket} for bucket in self._buckets]

    def _take(self, p: Tensor) -> None:
        if self._accumulating:
            return
        k = self._bucket_of[id(p)]
        missing = self._missing[k]
        if not missing:
            raise RuntimeError(
                f"release_gradients: a second gradient of a parameter of shape {list(p.shape)} came after the first "
                "was stepped: call optimizer.step() after each backward pass that ends an iteration, run the others "
                "in `with released.accumulate():`, and checkpoint activations with use_reentrant=False"
            )
        missing.discard(id(p))
        if not missing:
            self._optimizer.step_parameters(self._buckets[k])
            for q in self._buckets[k]:
                q.grad = None


def release_gradients(model: nn.Module, optimizer: FusedOptimizer, bucket_mb: float = 25) -> GradientRelease:
    """Step parameters as soon as the backward pass has their gradients, one launch for each bucket of parameters.

    The gradients of a bucket are dropped once it is stepped. So gradients take about ``bucket_mb`` megabytes of memory,
    and not as much as the model ("LOMO", arXiv 2306.09782). The bits are those of an ordinary step. The
    training loop stays as it is::

        optimizer = fused_adamw.AdamW(model.parameters(), lr=3e-4)
        released = fused_adamw.release_gradients(model, optimizer)
        for batch in loader:
            loss(model, batch).backward()  # steps
            optimizer.step()  # steps what the backward pass left
            scheduler.step()

    To accumulate gradients, run all backward passes of an iteration but the last in ``with released.accumulate():``.
    A parameter that occurs several times in the model (tied weights) is stepped once, with its whole gradient.
    ``released.remove()`` ends it.

    Args:
        model: the model. ``optimizer.step()`` steps parameters that are not in it. Models of ``fully_shard`` work;
            DistributedDataParallel is refused, because it reduces gradients after they are complete.
        optimizer: one of this package, without ``max_grad_norm``, ``skip_nonfinite`` and ``amp_scaling``, which need
            all gradients at once.
        bucket_mb: the size of a bucket, in megabytes (2**20 bytes) of gradients in the parameters' dtype; 0 steps each
            parameter by itself. Buckets are filled in the reverse order of ``model.parameters()``, which is that of
            most backward passes.

    Raises TypeError for an optimizer of another package or a DistributedDataParallel, ValueError for a ``bucket_mb``
    below 0 or a model none of whose parameters the optimizer has, and RuntimeError for an optimizer that scales
    gradients. A backward pass raises RuntimeError for a second gradient of a parameter that was stepped since the last
    ``optimizer.step()``.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"release_gradients needs an optimizer of fused_adamw, and got a {type(optimizer).__name__}")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise TypeError(
            "release_gradients: DistributedDataParallel reduces gradients after they are complete, so that each rank "
            "would step with its own: use fully_shard"
        )
    if not bucket_mb >= 0:
        raise ValueError(f"Invalid bucket_mb: {bucket_mb}, it must be a number of at least 0")
    if optimizer.scales_gradients:
        raise RuntimeError(
            f"release_gradients: {type(optimizer).__name__} needs all gradients at once to clip, or to know whether a "
            "step is to be skipped: leave out max_grad_norm, skip_nonfinite and amp_scaling"
        )
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    buckets: list[list[Tensor]] = []
    size = 0.0
    for p in reversed(list(model.parameters())):
        if id(p) not in stepped or not p.requires_grad:
            continue
        nbytes = local(p).nbytes
        if not buckets or size + nbytes > bucket_mb * 2**20:
            buckets.append([])
            size = 0.0
        buckets[-1].append(p)
        size += nbytes
    if not buckets:
        raise ValueError("release_gradients: the optimizer has no parameter of this model that requires a gradient")
    return GradientRelease(optimizer, buckets)
