"""A long-lived optimizer against one that is made anew before every step, whatever is done to either in between."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import cases
from tests.test_watch import remade

SHAPES = [(5,), (64, 64), (7, 3), (), (130,)]
FORMATS = [
    ("AdamW", torch.float32, {}),
    ("AdamW", torch.float32, {"max_grad_norm": 0.5}),
    ("Adam", torch.float32, {"skip_nonfinite": True, "amsgrad": True}),
    ("AdamW", torch.bfloat16, {"rounding": "stochastic"}),
    ("AdamW", torch.bfloat16, {"master": "kahan"}),
    ("AdamW", torch.bfloat16, {"master": "split16", "state_dtype": torch.bfloat16}),
    ("AdamW", torch.float16, {"master": "fp32"}),
    ("AdamW", torch.float32, {"state_dtype": "int8", "rounding": "stochastic"}),
    ("AdamW", torch.bfloat16, {"rounding": "stochastic", "ema_decay": 0.9}),
    ("SGD", torch.float32, {"ema_decay": 0.9, "ema_dtype": torch.bfloat16}),
    ("SGDW", torch.float32, {"momentum": 0.9, "dampening": 0.1}),
    ("SGD", torch.bfloat16, {"momentum": 0.9, "master": "fp32"}),
]


class Twin:
    """An optimizer, its parameters, and what a script may do to them. ``k`` says to which of them."""

    def __init__(self, name, dtype, options, target):
        self.params = cases.parameters(SHAPES, dtype, target.device)
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.02}]
        self.optimizer = cases.make(name, groups, options, backend=target.backend)

    def p(self, k):
        return self.params[k % len(self.params)]

    def own(self, k):
        return self.optimizer.state.get(self.p(k), {})

    def group(self, k):
        return self.optimizer.param_groups[k % len(self.optimizer.param_groups)]

    # Gradients.

    def all_gradients(self, k):
        for p in self.params:
            p.grad = None
        cases.set_gradients(self.params, k)

    def no_gradient(self, k):
        self.p(k).grad = None

    def strided_gradient(self, k):
        if self.p(k).grad is not None and self.p(k).dim() == 2:
            self.p(k).grad = torch.empty_like(self.p(k).grad.t()).t().copy_(self.p(k).grad)

    def wide_gradient(self, k):
        grad = self.p(k).grad
        if grad is not None:
            self.p(k).grad = None
            cases.set_gradient(self.p(k), grad.float())

    def infinite_gradient(self, k):
        if self.p(k).grad is not None and k % 3 == 0:
            self.p(k).grad.fill_(torch.inf)

    # Parameters.

    def move_parameter(self, k):
        self.p(k).data = self.p(k).data.clone()

    def transpose_parameter(self, k):
        p = self.p(k)
        if p.dim() == 2:
            p.data = torch.empty_like(p.data.t()).t().copy_(p.data)
            p.grad = None

    def remove_parameter(self, k):
        if len(self.params) > 2:
            p = self.params.pop(k % len(self.params))
            for group in self.optimizer.param_groups:
                group["params"] = [q for q in group["params"] if q is not p]
            self.optimizer.state.pop(p, None)

    def add_parameter(self, k):
        (p,) = cases.parameters([(k % 9,)], self.params[0].dtype, self.params[0].device.type, seed=k)
        self.params.append(p)
        self.optimizer.add_param_group({"params": [p], "lr": 0.03})

    # States.

    def move_states(self, k):
        self.own(k).update({key: t.clone() for key, t in self.own(k).items()})

    def state_elsewhere(self, k):
        """In another dtype or layout, from which the step brings it back."""
        own = self.own(k)
        for key in ("exp_avg", "momentum_buffer", "ema"):
            if key in own:
                own[key] = (
                    own[key].double() if k % 2 else own[key].t().contiguous().t() if own[key].dim() == 2 else own[key]
                )

    def clear_state(self, k):
        self.optimizer.state.pop(self.p(k), None)

    def clear_states(self, k):
        if k % 4 == 0:
            self.optimizer.state.clear()

    def reload(self, k):
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))

    # Groups.

    def set_lr(self, k):
        self.group(k)["lr"] = 1e-3 * (k + 1)

    def set_seed(self, k):
        if "seed" in self.group(k):
            self.group(k)["seed"] = k

    def replace_groups(self, k):
        self.optimizer.param_groups = [dict(group) for group in self.optimizer.param_groups]

    def swap_lists(self, k):
        self.group(k)["params"] = list(self.group(k)["params"])


EDITS = [name for name in vars(Twin) if not name.startswith("_") and name not in ("p", "own", "group", "all_gradients")]
ACTIONS = st.lists(st.tuples(st.sampled_from(EDITS), st.integers(0, 40)), max_size=4)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form[0]}-{form[1]}-{form[2]}".replace("torch.", ""))
def test_no_history_changes_a_bit(form, target):
    name, dtype, options = form

    @settings(max_examples=25 if target.device == "cpu" else 3, deadline=None, derandomize=True, database=None)
    @given(st.lists(ACTIONS, min_size=2, max_size=8))
    def check(steps):
        old, new = Twin(name, dtype, options, target), Twin(name, dtype, options, target)
        for t, actions in enumerate(steps):
            for twin in (old, new):
                twin.all_gradients(t)
                for edit, k in actions:
                    getattr(twin, edit)(k)
            new.optimizer = remade(new.optimizer)
            for twin in (old, new):
                twin.optimizer.step()
            cases.assert_same_bits(cases.tensors_of(old.optimizer), cases.tensors_of(new.optimizer))

    check()
