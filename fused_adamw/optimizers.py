"""The optimizer classes: one base, four thin classes with torch.optim's arguments."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fused_adamw import backends, clipping, formats, options, plan, scalars, state
from fused_adamw.options import Backend, Master, Params, Rounding, StateDtype, documented

_KEPT = ("state_dtype", "capturable", "rounding", "master")  # of a group, whatever a checkpoint says

_REFUSED = {
    ("foreach", True): "the step is one fused launch on every backend; drop the argument",
    ("fused", False): 'the step is fused on every backend; for plain operators use backend="reference"',
    ("differentiable", True): "a fused step has no derivative; use torch.optim's class of this name",
}

# What the other modules ask an optimizer, and its user need not: left out of what dir() and tab completion show.
_INTERNAL = {"check", "counts_on_device", "init_state_of", "kind_of", "requested", "rule", "rule_of", "scales"}


class FusedOptimizer(Optimizer):
    """What the four classes share: a step of all tensors in one launch per device, on the best backend there."""

    rule: str  # a key of scalars.ROWS
    _decoupled: bool | None = None  # None: a matter of the group
    # Options that torch's class has not, and their defaults. A group holds them where they are set, so that at the
    # defaults its keys are torch's: torch.distributed.checkpoint asks a checkpoint for each key of the group that it is
    # loaded into.
    _ours: dict[str, Any] = {  # noqa: RUF012
        "decouple_lr": False,
        "state_dtype": None,
        "rounding": "nearest",
        "master": None,
        "seed": 0,
    }

    # What unpickling, which knows nothing of us, leaves unset.
    requested: Backend | None = None
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    amp_scaling: bool = False
    #: Norm of all gradients at the last step, float32, 0-dim, on the device of the first; with max_grad_norm or
    #: skip_nonfinite. A new tensor at each step, but for the replays of a graph.
    grad_norm: Tensor | None = None
    _watch: Any = None
    _plans: Sequence[plan.Plan] = ()
    _alone: dict[Tensor, tuple]  # what step_parameter has prepared
    _scaling: tuple[bool, bool] = (False, False)
    _captured: Sequence[plan.Plan] = ()
    _loading: dict[str, Any] | None = None

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        backend: Backend | None,
        max_grad_norm: float | None,
        skip_nonfinite: bool,
        amp_scaling: bool,
        **asked: bool | None,
    ) -> None:
        for (name, value), remedy in _REFUSED.items():
            if asked.get(name) is value:
                raise RuntimeError(f"{type(self).__name__}({name}={value}) is not supported: {remedy}")
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise ValueError(f"Invalid max_grad_norm value: {max_grad_norm}")
        self.requested, self._alone = backend, {}
        self.max_grad_norm, self.skip_nonfinite, self.amp_scaling = max_grad_norm, skip_nonfinite, amp_scaling
        if backend is not None:
            backends.named(backend)
        # torch's keys, for code that reads them and for checkpoints that torch.optim loads.
        defaults |= {"foreach": None, "differentiable": False, "fused": asked.get("fused")}
        self.check(defaults)
        super().__init__(params, {k: v for k, v in defaults.items() if k not in self._ours or v != self._ours[k]})

    @property
    def backend(self) -> dict[torch.device, str]:
        """Name of the backend that steps the tensors of each device of the parameters."""
        devices = dict.fromkeys(p.device for group in self.param_groups for p in group["params"])
        return {device: backends.pick(device, requested=self.requested).name for device in devices}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's; raises ValueError for a hyperparameter out of range, naming the group."""
        if isinstance(param_group, dict):
            options.name_dtype(param_group)
            full = {**self.defaults, **param_group}
            self.check(full, len(self.param_groups))
            if full.get("decouple_lr"):
                param_group.setdefault("base_lr", float(full["lr"]))
            if full.get("rounding") == "stochastic":
                param_group.setdefault("seed", full.get("seed", 0))  # which a checkpoint is to bring
        super().add_param_group(param_group)

    @staticmethod
    def check(group: dict[str, Any], index: int | None = None) -> None:
        """Raise ValueError or TypeError for an option that no step could use; name a dtype by the dtype."""
        options.name_dtype(group)
        try:
            scalars.check(group)
            formats.check(group)
            declared = group.get("state_dtype")
            if declared not in (None, *options.DTYPES, *formats.INT8):
                names = ", ".join(map(str, options.DTYPES))
                raise ValueError(f"state_dtype={declared!r}: must be one of {names}, their names, or 'int8'")
        except (ValueError, TypeError) as error:
            raise error if index is None else type(error)(f"{error} (group {index})") from None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model anew and returns the loss, which step returns.

        Raises TypeError, ValueError or RuntimeError, before anything is written, for a tensor that cannot be stepped.
        """
        args = () if closure is None else (closure,)
        if torch.compiler.is_compiling():
            return self._untraced_step(*args)
        if type(self).step is not FusedOptimizer.step:  # a subclass's own, around which torch has put its wrapper
            return self._step(*args)
        if any(self._observers()):
            return self._observed_step(*args)
        with torch._C._profiler._RecordFunctionFast(f"Optimizer.step#{type(self).__name__}.step"):
            return self._step(*args)

    # No wrapper of torch's around it: it costs 8 us a step, and is called where it has work to do.
    step.hooked = True  # type: ignore[attr-defined]

    def _observers(self) -> tuple[Any, ...]:
        return (
            torch.autograd._profiler_enabled(),
            self._optimizer_step_pre_hooks,
            self._optimizer_step_post_hooks,
            _global_optimizer_pre_hooks,
            _global_optimizer_post_hooks,
        )

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        scaling = self._skips(), self.scales()
        if self._watch is None or scaling != self._scaling or not self._watch.poll(groups, self.state, self.kind_of):
            self._drop_plans()
            with torch.no_grad():
                self._watch, self._plans, _ = plan.build(self)
            self._scaling = scaling
        self._move(self._watch, self._plans)
        return loss

    _observed_step = Optimizer.profile_hook_step(_step)
    # A graph break under torch.compile, as for torch's own classes; the decorator costs 15 us, so only there.
    _untraced_step = torch._disable_dynamo(_observed_step)

    def kind_of(self, group: dict[str, Any]) -> tuple:
        """What of a group, changed, makes plans stale; asked where an option of the group has changed."""
        return self.rule_of(group), *map(group.get, ("state_dtype", "capturable", "rounding", "master", "seed"))

    def _skips(self) -> bool:
        return self.skip_nonfinite or self.amp_scaling

    def scales(self) -> bool:
        """Whether gradients are multiplied by a factor, which takes their norm or a GradScaler to know."""
        return self.max_grad_norm is not None or self._skips()

    @property
    def _step_supports_amp_scaling(self) -> bool:  # torch.amp.GradScaler asks
        return self.amp_scaling

    def counts_on_device(self, group: dict[str, Any], p: Tensor) -> bool:
        """Whether p's steps are counted on its device: where only that knows whether a step is skipped, or replayed."""
        return bool(group.get("capturable")) or (self._skips() and p.is_cuda)

    def _move(self, watch: Any, plans: Sequence[plan.Plan]) -> None:
        try:
            rows = watch.rows()
        except (TypeError, ValueError, ArithmeticError):
            for i, group in enumerate(self.param_groups):
                self.check(group, i)
            raise
        for part in plans:
            part.bring(rows)
        factor: float | Tensor = 1.0
        skipped = False
        if plans and self.scales():
            scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
            if not self.amp_scaling:
                scale = found = None
            factor, self.grad_norm = clipping.factor_of(plans, self.max_grad_norm, self.skip_nonfinite, scale, found)
            # Steps that are counted on the host are those of tensors that lie there.
            skipped = self._skips() and any(part.device.type == "cpu" for part in plans) and factor.item() < 0
        for part in plans:
            part.run(factor.to(part.device, non_blocking=True) if isinstance(factor, Tensor) else factor)
        if not skipped:
            watch.advance()

    def step_parameter(self, p: Tensor) -> None:
        """Update one parameter, to the same bits as :meth:`step` would, and nothing else.

        For gradient release, where no two gradients need be alive at once (arXiv 2306.09782, "LOMO")::

            def release(p):
                optimizer.step_parameter(p)
                p.grad = None

            for p in model.parameters():
                p.register_post_accumulate_grad_hook(release)

        Nothing happens to a parameter without a gradient. The hooks of :meth:`step` are not called. Raises ValueError
        for a tensor that is not among the parameters, and as :meth:`step` does.
        """
        # Not traced, as step().
        return self._untraced_step_parameter(p) if torch.compiler.is_compiling() else self._step_parameter(p)

    def _step_parameter(self, p: Tensor) -> None:
        if p.grad is None:
            return
        if self.scales():
            raise RuntimeError(
                f"{type(self).__name__}.step_parameter: one gradient does not tell the norm of all, nor whether a step "
                "is to be skipped: leave out max_grad_norm, skip_nonfinite and amp_scaling"
            )
        prepared = self._alone.get(p)
        if prepared is None or not self._still_holds(p, *prepared):
            if prepared is not None:
                self._retire(prepared[3])
            self._alone.pop(p, None)
            i, j = self._place_of(p)
            with torch.no_grad():
                self._alone[p] = prepared = i, j, *plan.build(self, p)
        _, _, watch, plans, _ = prepared
        self._move(watch, plans)
        self._opt_called = True  # for schedulers, which warn where they are stepped before the optimizer

    _untraced_step_parameter = torch._disable_dynamo(_step_parameter)

    def _place_of(self, p: Tensor) -> tuple[int, int]:
        for i, group in enumerate(self.param_groups):
            for j, q in enumerate(group["params"]):
                if q is p:
                    return i, j
        raise ValueError(
            f"{type(self).__name__}.step_parameter: a tensor of shape {list(p.shape)} is not among the parameters of "
            "this optimizer: use add_param_group"
        )

    def _still_holds(self, p: Tensor, i: int, j: int, watch: Any, _: Any, watched: tuple) -> bool:
        group = self.param_groups[i] if i < len(self.param_groups) else {"params": ()}
        if j >= len(group["params"]) or group["params"][j] is not p or self.state.get(p) is not watched[1][p]:
            return False
        ((own,), _) = watched
        alone = own["params"]
        own.clear()
        own.update(group, params=alone)
        return watch.poll(*watched, self.kind_of)

    def init_state(self) -> None:
        """Make what a first step would make, zero moments and no step counted, for all that requires a gradient.

        So that memory is claimed before training, and that torch.distributed.checkpoint, which loads into state that is
        there, need not take a step to have it. State that is there already stays. Raises as :meth:`step` does.
        """
        with torch.no_grad():
            for *_, group, p in plan.checked(self, lambda p: p.requires_grad).values():
                self.init_state_of(group, p)

    def warmup(self) -> None:
        """Compile what a step will launch, without stepping; gradients are taken to have their parameters' dtype.

        Nothing to do, and nothing done, for backends that are compiled already. Raises as :meth:`step` does where the
        backend that was asked for cannot run.
        """
        for group in self.param_groups:
            for p in filter(lambda p: p.requires_grad, group["params"]):
                (rule, names), state_dtype = self.rule_of(group), plan.state_dtype_of(p, group.get("state_dtype"))
                backend = backends.pick(p.device, {p.dtype, state_dtype}, bool(group.get("capturable")), self.requested)
                form = formats.kept(p, group, names)
                backend.warmup(rule, p, torch.int8 if form.int8 else state_dtype, form.master, form.stochastic)

    def _drop_plans(self) -> None:
        self._retire(self._plans)
        self._watch, self._plans = None, ()

    def _retire(self, plans: Sequence[plan.Plan]) -> None:
        # A captured graph goes on using the tables of the plan that it was captured from.
        self._captured = [*self._captured, *(p for p in plans if getattr(p.launch, "captured", None))]

    def refresh_captured(self) -> None:
        """Bring hyperparameters that changed (lr, betas, weight decay, ...) to the device, for graphs to replay with.

        To be called before ``graph.replay()``, after the schedulers and after :meth:`load_state_dict`, which puts what
        it loads where the graph reads it; needs ``capturable=True``. A learning rate that is a tensor on the device is
        read by the graph itself. State that was replaced by hand needs a new capture.
        """
        alone = chain.from_iterable(plans for *_, plans, _ in self._alone.values())
        for part in (*self._captured, *self._plans, *alone):
            if refresh := getattr(part.launch, "refresh", None):
                refresh(self.param_groups)

    def rule_of(self, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        """The rule that steps a group, and the names of the states it moves, in its order."""
        raise NotImplementedError

    def init_state_of(self, group: dict[str, Any], p: Tensor) -> None:
        """Make the state of p that is missing; bring the rest to the dtype, device and layout that a step needs."""
        names = self.rule_of(group)[1]
        there = p.device if self.counts_on_device(group, p) else torch.device("cpu")
        state.init(self.state[p], p, names, formats.kept(p, group, names), group.get("state_dtype"), there)

    def refresh_masters(self) -> None:
        """Make the value of every parameter that has a master what the parameter itself says.

        For ``master="kahan"`` and ``"split16"``, after parameters were overwritten by something else than a step: what
        their masters add, less than an ulp, is that of the old values otherwise. A float32 master notices by itself.
        """
        with torch.no_grad():
            for group in self.param_groups:
                for p in filter(self.state.__contains__, group["params"]):
                    form = formats.kept(p, group, self.rule_of(group)[1])
                    if form.extra in self.state[p]:
                        state.refresh_master(self.state[p], p, form)

    def export(self) -> dict[str, Any]:
        """:meth:`state_dict` for torch.optim's class of the same name: moments in a floating dtype, no masters.

        Parameters keep what their own dtype holds; the groups have torch's keys alone.
        """
        exported = self.state_dict()
        exported["state"] = {key: state.plain(own) for key, own in exported["state"].items()}
        for group in exported["param_groups"]:
            for key in (*self._ours, "base_lr"):
                group.pop(key, None)
        return exported

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, but the state keeps the dtype that was declared here, and no tensor is shared with ``state_dict``.

        Checkpoints of torch.optim's class of the same name (for-loop, foreach or fused) load too.
        """

        def before(_: Optimizer, loaded: dict[str, Any]) -> None:
            self._before_loading(loaded)

        # Registered last, so that it sees what the user's own hooks made of the dict.
        hook = self.register_load_state_dict_pre_hook(before)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self._loading = None

    def _before_loading(self, loaded: dict[str, Any]) -> None:
        self._loading = loaded
        # What the groups will be: how the state is kept is a matter of ours.
        merged = [
            {**mine, **{key: value for key, value in theirs.items() if key not in _KEPT and key != "params"}}
            for mine, theirs in zip(self.param_groups, loaded["param_groups"], strict=False)
        ]
        for i, group in enumerate(merged):
            self.check(group, i)
        group_of = {p: group for group in merged for p in group["params"]}
        for key, _, p in self._loaded_params(loaded):
            own, names = loaded["state"].get(key, {}), self.rule_of(group_of[p])[1]
            at = f"{type(self).__name__}: loading parameter {key} (shape {list(p.shape)})"
            plan.check_formats(at, p, group_of[p], names, own)
            for name, value in state.shaped(own, names):
                plan.check_sharding(at, p, {f"its state {name!r}": value})
                if value.shape != p.shape:
                    raise ValueError(
                        f"{type(self).__name__}: the state {name!r} to be loaded for parameter {key} has shape "
                        f"{list(value.shape)}, the parameter {list(p.shape)}: it is another model's"
                    )

    def _loaded_params(self, loaded: dict[str, Any]) -> list[tuple[Any, dict[str, Any], Tensor]]:
        """(key in the state that is being loaded, group, parameter) of every parameter."""
        keys = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        params = ((group, p) for group in self.param_groups for p in group["params"])
        return [(key, group, p) for key, (group, p) in zip(keys, params, strict=False)]

    def __setstate__(self, kept: dict[str, Any]) -> None:
        own, old = getattr(self, "param_groups", []), getattr(self, "state", {})
        super().__setstate__(kept)
        self._drop_plans()  # they hold the old tensors
        self._retire([part for *_, plans, _ in getattr(self, "_alone", {}).values() for part in plans])
        self._alone = {}
        for i, group in enumerate(self.param_groups):
            for key, value in (own[i] if i < len(own) else self.defaults).items():
                if key != "base_lr":
                    group.setdefault(key, value)
            if group.get("decouple_lr"):
                group.setdefault("base_lr", float(group.get("initial_lr", group["lr"])))
            if self._decoupled is not None:
                self._set(group, "decoupled_weight_decay", self._decoupled)
            if i < len(own):  # how the state is kept is this optimizer's matter, not the checkpoint's
                for key in _KEPT:
                    self._set(group, key, own[i].get(key))
            options.name_dtype(group)
        if self._loading is not None:
            # torch has cast every state to its parameter's dtype (bf16 parameters: a loss); take the saved ones again.
            for key, group, p in self._loaded_params(self._loading):
                if key in self._loading["state"]:
                    loaded = self._loading["state"][key]
                    self.state[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in loaded.items()}
                    self.init_state_of(group, p)
            self._load_into_captured(old)

    def _set(self, group: dict[str, Any], key: str, value: Any) -> None:
        group[key] = value
        if key in self._ours and key not in self.defaults and value in (None, self._ours[key]):
            del group[key]

    def _load_into_captured(self, old: dict[Tensor, dict[str, Any]]) -> None:
        """Put what was loaded where captured graphs find it: into the tensors that they were captured with."""
        for row in chain.from_iterable(part.rows for part in self._captured):
            group = self.param_groups[row.group]
            self.init_state_of(group, row.param)  # the checkpoint may have been made before the first step
            own, was = self.state[row.param], old.get(row.param, {})
            for name, value in own.items():
                if isinstance(was.get(name), Tensor) and was[name].dtype is value.dtype:
                    own[name] = was[name].copy_(value)

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in _INTERNAL]

    def __repr__(self) -> str:
        """torch's, and what is an option of the optimizer and of no group."""
        devices = dict.fromkeys(p.device for group in self.param_groups for p in group["params"])
        # Not by the property, which warns of, or raises, what the step is to.
        chosen = {
            str(device): next(b.name for b in backends.BACKENDS if not b.refuses(device, set(), False))
            for device in devices
        }
        names = self.requested or ", ".join(
            name if len(set(chosen.values())) == 1 else f"{name} on {device}" for device, name in chosen.items()
        )
        ours = {"amp_scaling": self.amp_scaling, "backend": names}
        ours |= {"max_grad_norm": self.max_grad_norm, "skip_nonfinite": self.skip_nonfinite}
        lines = "".join(f"    {name}: {value}\n" for name, value in ours.items())
        return f"{super().__repr__().removesuffix(')')}\nAll groups\n{lines})"

    def __getstate__(self) -> dict[str, Any]:
        kept = ("requested", "max_grad_norm", "skip_nonfinite", "amp_scaling")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}


@documented
class Adam(FusedOptimizer):
    r"""Adam with L2 regularization (Algorithm 2 of arXiv 1711.05101), a drop-in for :class:`torch.optim.Adam`.

    .. math::
        g_t &= \nabla f(\theta_{t-1}) + \lambda \theta_{t-1} \\
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1}
            - \gamma \, \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}

    Args:
    """

    rule = "adam"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        decouple_lr: bool = False,
        state_dtype: StateDtype | None = None,
        rounding: Rounding = "nearest",
        master: Master | None = None,
        seed: int = 0,
        backend: Backend | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        amp_scaling: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": _floats(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "decouple_lr": decouple_lr,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "master": master,
            "seed": seed,
        }
        super().__init__(
            params,
            defaults,
            backend,
            max_grad_norm,
            skip_nonfinite,
            amp_scaling,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    def rule_of(self, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        if group["amsgrad"]:
            return "adam_amsgrad", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        return "adam", ("exp_avg", "exp_avg_sq")


def _floats(betas: Sequence[float | Tensor]) -> tuple[float, ...]:
    if len({isinstance(beta, Tensor) for beta in betas}) > 1:
        raise ValueError("betas must be either both floats or both Tensors")
    for i, beta in enumerate(betas):
        scalars.check_number("beta", beta)
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"Tensor betas[{i}] must be 1-element")
    return tuple(float(beta) for beta in betas)


@documented
class AdamW(Adam):
    r"""Adam with decoupled weight decay (Algorithm 2 of arXiv 1711.05101), a drop-in for :class:`torch.optim.AdamW`.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1} - d \, \theta_{t-1}
            - \gamma \, \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}

    with :math:`d = \gamma \lambda` as in torch or, with ``decouple_lr``, :math:`d = (\gamma / \gamma_0) \lambda` as in
    the paper, where :math:`\gamma_0` is the learning rate that the group was made with (its ``base_lr``).

    Args:

    >>> import torch, fused_adamw
    >>> w = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = fused_adamw.AdamW([w], lr=0.1, weight_decay=0.5)
    >>> w.sum().backward()
    >>> optimizer.step()
    >>> w.detach()
    tensor([0.8500, 0.8500, 0.8500])
    """

    _decoupled = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decouple_lr: bool = False,
        state_dtype: StateDtype | None = None,
        rounding: Rounding = "nearest",
        master: Master | None = None,
        seed: int = 0,
        backend: Backend | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        amp_scaling: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            decouple_lr=decouple_lr,
            state_dtype=state_dtype,
            rounding=rounding,
            master=master,
            seed=seed,
            backend=backend,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            amp_scaling=amp_scaling,
        )


@documented
class SGD(FusedOptimizer):
    r"""Stochastic gradient descent with momentum and L2 regularization, a drop-in for :class:`torch.optim.SGD`.

    .. math::
        g_t &= \nabla f(\theta_{t-1}) + \lambda \theta_{t-1} \\
        b_t &= \mu b_{t-1} + (1-\tau) g_t \\
        \theta_t &= \theta_{t-1} - \gamma b_t

    or, with ``lr_in_momentum``, Algorithm 1 of arXiv 1711.05101: :math:`b_t = \mu b_{t-1} + \gamma (1-\tau) g_t` and
    :math:`\theta_t = \theta_{t-1} - b_t`. The two are the same as long as γ stays the same. At the first step
    :math:`b_1 = g_1` (:math:`\gamma g_1`), undampened, as in torch.

    Args:
    """

    rule = "sgd"
    _decoupled = False
    _ours = FusedOptimizer._ours | {"lr_in_momentum": False, "capturable": False, "decoupled_weight_decay": False}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        decouple_lr: bool = False,
        lr_in_momentum: bool = False,
        state_dtype: StateDtype | None = None,
        rounding: Rounding = "nearest",
        master: Master | None = None,
        seed: int = 0,
        backend: Backend | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        amp_scaling: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "capturable": capturable,
            "decoupled_weight_decay": self._decoupled,
            "decouple_lr": decouple_lr,
            "lr_in_momentum": lr_in_momentum,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "master": master,
            "seed": seed,
        }
        super().__init__(
            params,
            defaults,
            backend,
            max_grad_norm,
            skip_nonfinite,
            amp_scaling,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    def rule_of(self, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        return ("sgd_momentum", ("momentum_buffer",)) if group["momentum"] else ("sgd", ())


@documented
class SGDW(SGD):
    r"""SGD with decoupled weight decay (Algorithm 1 of arXiv 1711.05101).

    .. math::
        b_t &= \mu b_{t-1} + (1-\tau) g_t \\
        \theta_t &= \theta_{t-1} - d \, \theta_{t-1} - \gamma b_t

    with :math:`d = \gamma \lambda`, torch's convention of AdamW, or, with ``decouple_lr``, the paper's
    :math:`d = (\gamma / \gamma_0) \lambda`. ``SGDW(..., decouple_lr=True, lr_in_momentum=True)`` is Algorithm 1 to
    the letter.

    Args:
    """

    _decoupled = True
