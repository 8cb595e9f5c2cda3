"""Steps all tensors together, on the best backend: holds what the classes share.

The module is long because a third of it documents methods that users call.
"""

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fused_adamw import backends, checkpoints, checks, clipping, formats, loaded, options, plan, sharing, state
from fused_adamw.averages import Averages
from fused_adamw.contract import Clipping, Variant, counts_on_device
from fused_adamw.options import Backend, Params, ProcessGroups
from fused_adamw.statistics import Outcomes, Statistics, read

# Attributes that other modules read and users need not: dir() and tab completion leave them out.
_INTERNAL = {"family", "plan_key", "requested", "rule_of", "scales_gradients", "skips_steps", "swapped"}


# How many plans of other groups are kept: DeepSpeed's ZeRO hands the step one group after the other.
_KEPT_PLANS = 8


def _is_captured(part: plan.Plan) -> bool:
    return bool(getattr(part.launch, "captured", None))


class FusedOptimizer(Averages, Optimizer):
    """Steps all tensors on the best backend of each device, in few launches; the base of the classes."""

    family: str  # a key of scalars.ROWS
    _decoupled: bool | None = None  # None: the group says

    # Unpickling leaves these unset.
    requested: Backend | None = None
    process_group: ProcessGroups = None
    skip_nonfinite: bool = False
    amp_scaling: bool = False
    grad_scale, found_inf = clipping.SetByScaler(), clipping.SetByScaler()
    _max_grad_norm: float | None = None
    _grad_scale: Tensor | None = None
    _found_inf: Tensor | None = None
    #: Norm of all gradients at the last step, divided by a GradScaler's scale, float32, 0-dim, on the device of the
    #: first; with max_grad_norm or skip_nonfinite. Each step makes a new tensor, except the replays of a graph.
    grad_norm: Tensor | None = None
    _built: Sequence[plan.Built] = ()  # the first is of the last step
    # For step_parameter and step_parameters, by the ids of the parameters. This dict is never written to: an optimizer
    # makes its own.
    _built_some: dict[Hashable, plan.Built] = {}  # noqa: RUF012
    _captured: Sequence[plan.Plan] = ()
    _handed: Mapping[int, int] = {}
    _outcomes: Outcomes | None = None

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        backend: Backend | None,
        max_grad_norm: float | None,
        skip_nonfinite: bool,
        amp_scaling: bool,
        process_group: ProcessGroups,
        **asked: bool | None,
    ) -> None:
        options.check_support(f"{type(self).__name__}({{}})", asked)
        self.requested = backend
        self.grad_scale = self.found_inf = None  # of the instance too, where Python finds them 30 ns faster
        self.max_grad_norm, self.skip_nonfinite, self.amp_scaling = max_grad_norm, skip_nonfinite, amp_scaling
        options.check_process_group(process_group)
        self.process_group = sharing.zero_group() if process_group is None else process_group
        if backend is not None:
            backends.named(backend)
        # torch's keys, for code that reads them and for checkpoints that torch.optim loads.
        defaults |= {"foreach": None, "differentiable": False}
        defaults |= {"fused": asked["fused"]} if "fused" in asked else {}
        options.check(defaults)
        ours = options.ours(self.family)
        super().__init__(params, {k: v for k, v in defaults.items() if k not in ours or v != ours[k]})

    @property
    def backend(self) -> dict[torch.device, str]:
        """The name of the backend that steps the tensors of each device of the parameters."""
        devices = dict.fromkeys(p.device for group in self.param_groups for p in group["params"])
        return {device: backends.pick(device, requested=self.requested).name for device in devices}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does; raise as the constructor does for what it refuses, naming the group."""
        index, name_of_class = len(self.param_groups), type(self).__name__
        if isinstance(param_group, dict):
            options.check_support(f"{name_of_class}: {{}} of group {index}", param_group)
            for name in filter(param_group.__contains__, options.OF_ALL_GROUPS):
                if param_group[name] == getattr(self, "requested" if name == "backend" else name):
                    continue  # ZeroRedundancyOptimizer writes all arguments into the groups
                raise ValueError(
                    f"{name_of_class}: {name!r} holds for all groups, and cannot be an option of group {index}: give "
                    f"it to the constructor, {name_of_class}(groups, {name}=...)"
                )
            options.name_dtype(param_group)
            full = {**self.defaults, **param_group}
            if not param_group.keys() <= {"params", "param_names"}:  # the defaults are checked already
                options.check(full, index)
            if options.needs_base_lr(full):
                param_group.setdefault("base_lr", options.as_float("lr", full["lr"]))
            if options.draws(full):
                param_group.setdefault("seed", full.get("seed", 0))  # a checkpoint has to have it
        try:
            super().add_param_group(param_group)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (group {index})") from None

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

    # torch puts no wrapper around a step that is hooked already: it costs 8 us a step, and is called only where needed.
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
        built = self._built[0] if self._built else None
        if built and self._step_at_once(built):
            return loss
        if built is None or built.at_once or not self._holds(built):
            built = self._choose_plans()
        self._launch_all(built)
        return loss

    def _step_at_once(self, built: plan.Built) -> bool:
        if built.at_once is None or built.scaling != plan.scaling_of(self):
            return False
        try:
            return built.at_once(self.param_groups, self.state, self.plan_key)
        except (KeyError, TypeError, ValueError, ArithmeticError):
            checks.explain(self)
            raise

    def _holds(self, built: plan.Built) -> bool:
        return built.scaling == plan.scaling_of(self) and built.watch.poll(self.param_groups, self.state, self.plan_key)

    def _choose_plans(self) -> plan.Built:
        for built in self._built[1:]:
            if self._holds(built):
                self._built = [built, *(other for other in self._built if other is not built)]
                return built
        with torch.no_grad():
            built = plan.build(self, self._built[0] if self._built else None)
        kept: list[plan.Built] = [built]
        dropped: list[plan.Built] = []
        for old in self._built:  # those with copies are dropped, whose memory may be the size of the model
            drop = len(kept) == _KEPT_PLANS or any(part.copied for part in old.plans)
            (dropped if drop else kept).append(old)
        self._retire(dropped)
        self._built = kept
        return built

    @property
    def _plans(self) -> Sequence[plan.Plan]:
        """The plans of the last step."""
        return self._built[0].plans if self._built else ()

    _observed_step = Optimizer.profile_hook_step(_step)
    # torch.compile breaks the graph here, as at torch's own classes. The decorator costs 15 us, so only it comes here.
    _untraced_step = torch._disable_dynamo(_observed_step)

    def rule_of(self, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        """Return the rule that steps a group, and the names of the states that it moves, in the rule's order."""
        raise NotImplementedError

    def plan_key(self, group: dict[str, Any]) -> tuple:
        """Return the options that force a new plan when they change; called where an option of the group changed."""
        try:
            lr = group["lr"]
            # A new plan warns of a negative rate. Of a tensor's it takes 0.6 us to know: it is left as it is.
            ascends = (type(lr) is not float or lr < 0) and not isinstance(lr, Tensor) and options.ascends(group)
            averages = group.get("ema_decay") is not None
            return self.rule_of(group), ascends, averages, *map(group.get, options.REPLANS, options.REPLAN_DEFAULTS)
        except (KeyError, TypeError, ValueError):  # where the group is stepped, the new plan's checks tell why
            return ()

    @property
    def max_grad_norm(self) -> float | None:
        """The norm that all gradients are clipped to; None where they are not. To set a bad one raises."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        options.check_max_grad_norm(value)
        self._max_grad_norm = value

    @property
    def statistics(self) -> Statistics:
        """What steps measured beside their update, where ``statistics`` asks for it; on the device, never waited for.

        ``statistics.groups[i]`` has the norms ``gradient``, ``update`` and ``parameter`` of the last step that was not
        skipped (of parameters that :meth:`step_parameter` steps, of its last call), float32: 0-dim, or with
        ``statistics="parameter"`` one of each parameter, 0 where it had no gradient; None of a group that asks for
        none. The gradient is as the step used it, divided by a GradScaler's scale and clipped; the update is the new
        parameter minus the old one; both are taken before any rounding to storage. Squares have the type of the
        arithmetic: in float32 values below 1e-19 count as 0, and above 1e19 as infinity. ``clipped`` and ``skipped``
        are shares of this object's steps. Norms are of whole parameters: where ranks share them, all ranks must ask.

        The same run gives the same bits with any number of threads; another backend or instruction set may round the
        last one otherwise. Raises RuntimeError where no group has statistics.
        """
        ran = (built for built in (*self._built[:1], *self._built_some.values()))
        return read(self, (part for built in ran for part in built.plans), self._outcomes or Outcomes())

    @property
    def skips_steps(self) -> bool:
        """Whether a step may turn out to change nothing."""
        return self.skip_nonfinite or self.amp_scaling or self._found_inf is not None

    @property
    def scales_gradients(self) -> bool:
        """Whether gradients are multiplied by a factor, which takes their norm or a GradScaler to know."""
        return self._max_grad_norm is not None or self._grad_scale is not None or self.skips_steps

    @property
    def _step_supports_amp_scaling(self) -> bool:  # torch.amp.GradScaler asks
        return self.amp_scaling

    def _launch_all(self, built: plan.Built) -> None:
        watch, plans = built.watch, built.plans
        if not self.scales_gradients and not watch.any_live():
            return
        try:
            scalar_rows = watch.scalar_rows(self.param_groups)
            for part in plans:
                part.prepare_step(self, scalar_rows)
        except (KeyError, TypeError, ValueError, ArithmeticError):
            checks.explain(self)
            raise
        factor: float | Tensor = 1.0
        skipped = False
        if self.scales_gradients:
            asked = Clipping(self.max_grad_norm, self.skip_nonfinite, self._grad_scale, self._found_inf)
            factor, self.grad_norm = clipping.factor_of(self, built, asked)
            if built.measured:
                self._outcomes = self._outcomes or Outcomes()
                self._outcomes.count(factor, self.grad_norm, self.max_grad_norm)
            # If steps may be skipped, the host counts those of CPU tensors alone, and reads only their factor.
            skipped = self.skips_steps and any(part.device.type == "cpu" for part in plans) and float(factor) < 0
        last = len(plans) - 1
        for k, part in enumerate(plans):
            on_device = factor if built.norm or not isinstance(factor, Tensor) else clipping.moved(factor, part.device)
            part.run(self, on_device, k == last and not skipped)

    def step_parameter(self, p: Tensor) -> None:
        """Update one parameter, to the same bits as :meth:`step` would, and nothing else.

        For gradient release, where only one gradient is in memory at a time (arXiv 2306.09782, "LOMO")::

            def release(p):
                optimizer.step_parameter(p)
                p.grad = None

            for p in model.parameters():
                p.register_post_accumulate_grad_hook(release)

        Nothing happens to a parameter without a gradient. The hooks of :meth:`step` are not called. Raises ValueError
        for a tensor that is not among the parameters, and as :meth:`step` does.
        """
        # torch.compile does not trace it, nor step().
        return self._untraced_step_parameter(p) if torch.compiler.is_compiling() else self._step_parameter(p)

    def _step_parameter(self, p: Tensor) -> None:
        if p.grad is not None:
            self._step_some(id(p), (p,))

    def step_parameters(self, params: Sequence[Tensor]) -> None:
        """Update some of the parameters together, to the same bits as :meth:`step` would, and nothing else.

        As :meth:`step_parameter`, for parameters that are given together at every step. Raises as it does.
        """
        if torch.compiler.is_compiling():
            self._untraced_step_parameters(params)
        elif params:
            self._step_some(tuple(map(id, params)), params)

    def _step_some(self, key: Hashable, params: Sequence[Tensor]) -> None:
        if self.scales_gradients:
            raise RuntimeError(
                f"{type(self).__name__}.step_parameter: one gradient does not tell the norm of all, nor whether a step "
                "is to be skipped: leave out max_grad_norm, skip_nonfinite and amp_scaling"
            )
        self._opt_called = True  # for schedulers, which warn where they are stepped before the optimizer
        built = self._built_some.get(key)
        if built and self._step_at_once(built):
            return
        if built is None or built.at_once or not self._holds(built):
            with torch.no_grad():
                now = plan.build(self, built, only=params)
            # An entry whose parameter was taken out would stay; few are, so all go once there are too many.
            full = len(self._built_some) > 2 * sum(len(group["params"]) for group in self.param_groups)
            self._retire(self._built_some.values() if full else [built] if built else [])
            if full or not self._built_some:
                self._built_some = {}
            self._built_some[key] = built = now
        self._launch_all(built)

    _untraced_step_parameter = torch._disable_dynamo(_step_parameter)
    _untraced_step_parameters = torch._disable_dynamo(step_parameters)

    def init_state(self) -> None:
        """Make the state that a first step would make, zero moments and a step of 0, for all that requires a gradient.

        This claims the memory before training, and lets torch.distributed.checkpoint, which loads into existing state,
        do without a step. State that exists already stays. Raises as :meth:`step` does.
        """
        with torch.no_grad():
            plan.init_states(self, checks.check_params(self, lambda p: p.requires_grad))

    def warmup(self) -> None:
        """Compile what a step will launch, without stepping; gradients are taken to have their parameters' dtype.

        Does nothing for backends that are compiled already. Raises as :meth:`step` does if the backend that was asked
        for cannot run.
        """
        for group in self.param_groups:
            rule, names = self.rule_of(group)
            for p in filter(lambda p: p.requires_grad, group["params"]):
                dtype = formats.state_dtype_of(p, group.get("state_dtype"))
                backend = backends.pick(p.device, {p.dtype, dtype}, bool(group.get("capturable")), self.requested)
                storage = formats.storage_of(p, group, names)
                dtype = p.dtype if not names else torch.int8 if storage.int8 else dtype
                form = (storage.master, storage.stochastic, storage.ema, bool(group.get("statistics")))
                variant = Variant(rule, p.dtype, p.dtype, dtype, *form)
                backend.warmup(p.device, variant, self.scales_gradients, counts_on_device(self, group, p))

    def _retire(self, built: Iterable[plan.Built]) -> None:
        # A captured graph goes on using the tables of the plan that it was captured from.
        self._captured = [*self._captured, *(p for old in built for p in old.plans if _is_captured(p))]

    def _drop_plans(self) -> None:
        self._retire([*self._built, *self._built_some.values()])
        self._built, self._built_some = (), {}

    def refresh_captured(self) -> None:
        """Bring hyperparameters that changed (lr, betas, weight decay, ...) to the device, for graphs to replay with.

        To be called before ``graph.replay()``, after the schedulers and after :meth:`load_state_dict`, which puts what
        it loads where the graph reads it; needs ``capturable=True``. A learning rate that is a tensor on the device is
        read by the graph itself. State that was replaced by hand needs a new capture.
        """
        try:
            for i in range(len(self.param_groups)):
                checks.warn_of_ascent(self, i)
            for part in self._all_plans():
                if refresh := getattr(part.launch, "refresh", None):
                    refresh(self.param_groups)
        except (KeyError, TypeError, ValueError):
            checks.explain(self)
            raise

    def _all_plans(self) -> Iterator[plan.Plan]:
        built = chain(self._built, self._built_some.values())
        return chain(self._captured, chain.from_iterable(one.plans for one in built))

    def refresh_masters(self) -> None:
        """Reset every master, so that the value of its parameter is what the parameter itself says.

        Call it with ``master="kahan"`` or ``"split16"`` after something other than a step overwrote parameters: their
        masters would go on adding the digits of the old values, less than an ulp. A float32 master notices by itself.
        """
        with torch.no_grad():
            for group in self.param_groups:
                names = self.rule_of(group)[1]
                for p in filter(self.state.__contains__, group["params"]):
                    storage = formats.storage_of(p, group, names)
                    if storage.master_key in self.state[p]:
                        state.refresh_master(self.state[p], p, storage)

    def export(self) -> dict[str, Any]:
        """Return a :meth:`state_dict` for torch.optim's class of the same name: floating moments, no masters.

        Parameters keep what their own dtype holds; the groups have only torch's keys.
        """
        return checkpoints.export(self.state_dict(), self.family)

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return what torch's does, but for the options of storage, which loading leaves as they are: empty tuples."""
        found = checkpoints.describe(super().state_dict(), self)
        self._handed = loaded.versions(self.state)
        return found

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep the dtypes that were declared here and share no tensor with ``state_dict``.

        Checkpoints of torch.optim's class of the same name (for-loop, foreach or fused) load too. Where both sides
        name the parameters, they are matched by name. Raises ValueError or TypeError, before anything is changed, for
        the checkpoint of another optimizer or another model.
        """

        checkpoint = copy.copy(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            returned = before(self, checkpoint)
            checkpoint = checkpoint if returned is None else returned
        self.__setstate__(checkpoints.read(self, checkpoint, self._handed))
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __setstate__(self, kept: dict[str, Any]) -> None:
        groups, old = getattr(self, "param_groups", []), getattr(self, "state", {})
        super().__setstate__(kept)
        checkpoints.complete_groups(self, groups, self._decoupled)
        if any(map(_is_captured, self._all_plans())):
            checkpoints.load_into_captured(self, old)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("requested", "_max_grad_norm", "skip_nonfinite", "amp_scaling", "process_group")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in _INTERNAL]

    def __repr__(self) -> str:
        """Return torch's text, and the options that belong to the optimizer and to no group."""
        devices = dict.fromkeys(p.device for group in self.param_groups for p in group["params"])
        # Not by the property `backend`, which may warn or raise: the step is to do that.
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
