"""List what is compared, by name: the algorithms, our backends, and the peers."""

import contextlib
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.optim import swa_utils

import fused_adamw
from fused_adamw import backends, gpu

ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
NO_BETA1 = ADAM | {"betas": (0.0, 0.999)}
SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-2}


class Algorithm(NamedTuple):
    """Name a class of fused_adamw, its options, and the class of torch.optim that moves the same bytes."""

    ours: str
    options: dict[str, Any]
    torchs: str
    max_grad_norm: float | None = None  # torch's arms call clip_grad_norm_ before the step
    lacking: dict[str, Any] = {}  # noqa: RUF012 (options that torch's class lacks)

    @property
    def same_rule(self) -> bool:
        """Whether torch's class computes the same."""
        return self.ours == self.torchs and not self.lacking

    @property
    def ema_decay(self) -> float | None:
        """The decay of averages of the parameters, where there are any."""
        return self.lacking.get("ema_decay")


ALGORITHMS = {
    "adamw": Algorithm("AdamW", ADAM, "AdamW"),
    "amsgrad": Algorithm("AdamW", {**ADAM, "amsgrad": True}, "AdamW"),
    "adam": Algorithm("Adam", ADAM, "Adam"),
    "adamw-clip": Algorithm("AdamW", ADAM, "AdamW", max_grad_norm=1.0),
    "radam": Algorithm("RAdam", {**ADAM, "decoupled_weight_decay": True}, "RAdam"),
    "adamw-beta1-0": Algorithm("AdamW", NO_BETA1, "AdamW"),
    "adamw-no-first-moment": Algorithm("AdamW", NO_BETA1, "AdamW", lacking={"first_moment": False}),
    "adabound": Algorithm("AdaBound", ADAM, "Adam"),  # torch has no AdaBound
    "amsbound": Algorithm("AdaBound", ADAM, "Adam", lacking={"amsbound": True}),
    "adamw-cautious-decay": Algorithm("AdamW", ADAM, "AdamW", lacking={"cautious": "decay"}),
    "adamw-cautious-update": Algorithm("AdamW", ADAM, "AdamW", lacking={"cautious": "update"}),
    # Others average after the step: torch's arms an AveragedModel, one more of ours by torch._foreach_lerp_.
    "adamw-ema": Algorithm("AdamW", ADAM, "AdamW", lacking={"ema_decay": 0.999}),
    # Beside ours without them.
    "adamw-statistics": Algorithm("AdamW", ADAM, "AdamW", lacking={"statistics": True}),
    "sgdw": Algorithm("SGDW", SGD, "SGD"),  # torch has no SGDW
    "sgd": Algorithm("SGD", SGD, "SGD"),
}


class Storage(NamedTuple):
    """Hold the dtypes of parameters (and gradients) and of the state; torch keeps the state in the former."""

    dtype: torch.dtype
    state_dtype: torch.dtype
    options: dict[str, Any] = {}  # noqa: RUF012 (of our arms; the tests alone compare such arms with an oracle)


F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {
    "fp32": Storage(F32, F32),
    "bf16": Storage(BF16, BF16),
    "bf16+fp32": Storage(BF16, F32),
    "fp16+fp32": Storage(torch.float16, F32),
    "bf16-stochastic": Storage(BF16, BF16, {"rounding": "stochastic"}),
    "bf16+fp32-stochastic": Storage(BF16, F32, {"rounding": "stochastic"}),
    **{f"bf16+fp32-{master}": Storage(BF16, F32, {"master": master}) for master in ("kahan", "split16", "fp32")},
    "fp32+int8": Storage(F32, torch.int8),
    "bf16+int8": Storage(BF16, torch.int8),
    "bf16+int8-stochastic": Storage(BF16, torch.int8, {"rounding": "stochastic"}),
    "bf16+int8-split16": Storage(BF16, torch.int8, {"master": "split16"}),
}
SHORT = {F32: "fp32", torch.float64: "fp64", BF16: "bf16", torch.float16: "fp16"}
SHORT |= {torch.int8: "int8", torch.uint8: "int8", torch.int16: "int16"}
FUSED, FOREACH = "torch fused", "torch foreach"
MOST_GRAPHS = 8  # groups that torch.compile is given: the compilation of 465 takes longer than all the rest

Groups = list[dict[str, Any]]


class Arm(NamedTuple):
    """Describe a way to step groups of parameters: ``make`` gives the optimizer, or raises what it lacks."""

    name: str
    make: Callable[[Groups], torch.optim.Optimizer]
    graph: bool = False  # captured once as a CUDA graph, then replayed
    compiled: bool = False  # step() goes through torch.compile
    same_rule: bool = True  # else what it computes is not compared with the oracle
    foreign: bool = False  # another project's: its state may mean something else, and it may fail as it likes
    steady: bool = False  # of a list that changes between steps: on one that does not
    chunk: int | None = None  # elements of a program of a GPU, where not those of the product


class Missing(Exception):
    """Say why an arm cannot run here."""


def ours(algorithm: Algorithm, storage: Storage, device: torch.device, everything: bool) -> list[Arm]:
    """List our backends that step this device; PyTorch operators ("reference") only where everything is asked for."""
    arms = []
    for backend in backends.BACKENDS:
        if (backend.devices and device.type not in backend.devices) or (backend.name == "reference" and not everything):
            continue

        def make(
            groups: Groups,
            capturable: bool,
            backend: str = backend.name,
            lacking: dict[str, Any] = algorithm.lacking,
        ) -> torch.optim.Optimizer:
            dtypes = {p.dtype for group in groups for p in group["params"]}
            if why := backends.named(backend).refuses(device, dtypes, capturable):
                raise Missing(why)
            more = {"capturable": True} if capturable else {}
            more["max_grad_norm"] = algorithm.max_grad_norm
            cls = getattr(fused_adamw, algorithm.ours)
            kept = {"state_dtype": storage.state_dtype, **storage.options}
            return cls(groups, **algorithm.options, **lacking, **kept, backend=backend, **more)

        def make_lerp(groups: Groups, make: Callable = make) -> torch.optim.Optimizer:
            return with_lerp(make(groups, False, lacking={}), algorithm.ema_decay)

        def make_narrow(groups: Groups, make: Callable = make) -> torch.optim.Optimizer:
            return make(groups, False, lacking={**algorithm.lacking, "ema_dtype": BF16})

        # The oracle steps pieces of the tensors, which have another norm: tests/test_clipping.py compares.
        same = algorithm.max_grad_norm is None and not storage.options and storage.state_dtype is not torch.int8
        more = {"same_rule": same}
        arms += _with_graph(f"fused_adamw {backend.name}", make, device, backend.capturable, **more)
        if algorithm.ema_decay is not None:
            arms.append(Arm(f"fused_adamw {backend.name} + foreach_lerp", make_lerp, **more))
            arms.append(Arm(f"fused_adamw {backend.name}, bfloat16 averages", make_narrow, same_rule=False))
        if "statistics" in algorithm.lacking:
            plain = functools.partial(make, capturable=False, lacking={})
            arms.append(Arm(f"fused_adamw {backend.name} without", plain, **more))
    return arms


def with_lerp(optimizer: torch.optim.Optimizer, decay: float) -> torch.optim.Optimizer:
    """Let a step be followed by one call that moves averages of all parameters."""
    params = params_of(optimizer)
    averages = [p.detach().clone() for p in params]
    return _followed(optimizer, torch.no_grad()(lambda: torch._foreach_lerp_(averages, params, 1 - decay)))


def with_averaged_model(optimizer: torch.optim.Optimizer, decay: float) -> torch.optim.Optimizer:
    """Let a step be followed by the update of an AveragedModel."""
    model = torch.nn.ParameterList(params_of(optimizer))
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
    return _followed(optimizer, lambda: averaged.update_parameters(model))


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """List the parameters of all groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _followed(optimizer: Any, update: Callable[[], object]) -> torch.optim.Optimizer:
    step = optimizer.step

    def both() -> None:
        step()
        update()

    optimizer.step = both
    optimizer.bytes_after_step = 3 * sum(p.nbytes for p in params_of(optimizer))  # which timing.bytes_of_step adds
    return optimizer


def _with_graph(name: str, make: Callable, device: torch.device, capturable: bool, **more: Any) -> list[Arm]:
    arms = [Arm(name, lambda groups: make(groups, False), **more)]
    if capturable and device.type == "cuda":
        arms.append(Arm(f"{name}, graph", lambda groups: make(groups, True), graph=True, **more))
    return arms


TORCH = {
    "fused": {"fused": True},
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "compiled": {"foreach": True},
}


def torchs(name: str, algorithm: Algorithm, device: torch.device) -> list[Arm]:
    """Make the arms of one of torch.optim's implementations."""
    cls = getattr(torch.optim, algorithm.torchs)
    takes_capturable = algorithm.torchs != "SGD"

    def make(groups: Groups, capturable: bool) -> torch.optim.Optimizer:
        if name == "compiled" and len(groups) > MOST_GRAPHS:
            raise Missing(f"it compiles every group apart, and here are {len(groups)}")
        if name == "fused" and "fused" not in inspect.signature(cls).parameters:
            raise Missing(f"torch.optim.{algorithm.torchs} has no fused step: compare with --against foreach")
        more = {"capturable": True} if capturable and takes_capturable else {}
        optimizer = cls(groups, **algorithm.options, **TORCH[name], **more)
        if algorithm.max_grad_norm is not None:
            params = [p for group in groups for p in group["params"]]
            clip = torch.nn.utils.clip_grad_norm_
            optimizer.register_step_pre_hook(lambda *_: (clip(params, algorithm.max_grad_norm), None)[1])
        if algorithm.ema_decay is not None:
            optimizer = with_averaged_model(optimizer, algorithm.ema_decay)
        return optimizer

    same = algorithm.same_rule and algorithm.max_grad_norm is None
    more = {"compiled": name == "compiled", "same_rule": same}
    return _with_graph(f"torch {name}", make, device, name == "fused", **more)


class Peer(NamedTuple):
    """Describe another project's optimizer: where it is, its arguments as made from ours, its algorithms."""

    module: str
    cls: str
    devices: tuple[str, ...]
    arguments: Callable[[dict[str, Any], torch.dtype], dict[str, Any]]
    algorithms: tuple[str, ...] = ("adamw",)


PEERS = {
    "deepspeed-cpu": Peer(
        "deepspeed.ops.adam",
        "DeepSpeedCPUAdam",
        ("cpu",),
        lambda options, state: {**options, "adamw_mode": True, "fp32_optimizer_states": state is torch.float32},
    ),
    "deepspeed": Peer(
        "deepspeed.ops.adam", "FusedAdam", ("cuda",), lambda options, state: {**options, "adam_w_mode": True}
    ),
    "apex": Peer("apex.optimizers", "FusedAdam", ("cuda",), lambda options, state: {**options, "adam_w_mode": True}),
    "transformer-engine": Peer(
        "transformer_engine.pytorch.optimizers",
        "FusedAdam",
        ("cuda",),
        lambda options, state: {**options, "adam_w_mode": True, "exp_avg_dtype": state, "exp_avg_sq_dtype": state},
    ),
    "bitsandbytes": Peer("bitsandbytes.optim", "AdamW", ("cpu", "cuda"), lambda options, state: options),
    "torchao": Peer("torchao.optim", "_AdamW", ("cpu", "cuda"), lambda options, state: options),
    "optimi": Peer("optimi", "AdamW", ("cpu", "cuda"), lambda options, state: {**options, "kahan_sum": False}),
    "flashoptim": Peer(
        "flashoptim",
        "FlashAdamW",
        ("cuda",),
        # Unquantized, without the correction of bfloat16 parameters that it refuses for float32 ones: torch's bytes.
        lambda options, state: {**options, "quantize": False, "master_weight_bits": None},
    ),
}
NAMES = [*TORCH, *PEERS]  # with whom ours are compared


def peer(name: str, algorithm: str, state_dtype: torch.dtype, device: torch.device) -> list[Arm]:
    """Make the arm of another project's optimizer."""
    found = PEERS[name]

    def make(groups: Groups) -> torch.optim.Optimizer:
        if device.type not in found.devices:
            raise Missing(f"it steps tensors on {' and '.join(found.devices)}, not on {device.type}")
        if algorithm not in found.algorithms:
            raise Missing(f"it is compared for {', '.join(found.algorithms)} alone")
        cls = getattr(importlib.import_module(found.module), found.cls)
        return cls(groups, **found.arguments(ALGORITHMS[algorithm].options, state_dtype))

    return [Arm(name, make, foreign=True)]


def arms_of(algorithm: str, storage: Storage, device: torch.device, against: list[str], reference: bool) -> list[Arm]:
    """List all arms of a case, ours first."""
    found = ours(ALGORITHMS[algorithm], storage, device, reference)
    for name in against:
        if name in TORCH:
            found += torchs(name, ALGORITHMS[algorithm], device)
        else:
            found += peer(name, algorithm, storage.state_dtype, device)
    return found


def with_steady(arms: list[Arm]) -> list[Arm]:
    """List the arms of a list that changes between steps, which graphs cannot follow, and ours on a steady one."""
    arms = [arm for arm in arms if not (arm.graph or arm.compiled)]
    own = [arm for arm in arms if arm.name.startswith("fused_adamw")]
    return [*own, *(arm._replace(name=f"{arm.name}, steady", steady=True) for arm in own), *arms[len(own) :]]


def with_chunks(arms: list[Arm], chunks: list[int]) -> list[Arm]:
    """List the arms, and after each of ours one for each size of its chunks."""
    found = []
    for arm in arms:
        found.append(arm)
        if arm.name.startswith("fused_adamw"):
            found += [arm._replace(name=f"{arm.name}, chunk {chunk}", chunk=chunk) for chunk in chunks]
    return found


def chunked(chunk: int | None) -> Any:
    """Give the programs of plans that are built in this context so many elements."""
    if chunk is None:
        return contextlib.nullcontext()
    return mock.patch.object(gpu, "chunk_size", lambda variant: chunk)


def step_of(arm: Arm, optimizers: list[torch.optim.Optimizer]) -> Callable[[], object]:
    """Return the call to time: a step of the first optimizer, then of the next, and so on round."""
    calls = []
    for optimizer in optimizers:
        call = optimizer.step
        if arm.compiled:
            call = torch.compile(optimizer.step)
        if arm.graph:
            call = captured(optimizer)
        calls.append(call)
    if len(calls) == 1:
        return calls[0]
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def captured(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """Return a replay of a CUDA graph of the step, after the three steps on a side stream that PyTorch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()

    def replay(keep: torch.optim.Optimizer = optimizer) -> None:  # the graph uses the optimizer's memory
        graph.replay()

    return replay
