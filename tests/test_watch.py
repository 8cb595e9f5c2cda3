"""What a living plan follows and keeps: tensors that move, gradients that come and go, nothing kept alive."""

import gc
import os
import signal
import weakref
from pathlib import Path

import pytest
import torch

from fused_adamw import backends, plan, scalars
from tests import cases


@pytest.fixture
def builds(monkeypatch):
    """The optimizer of every plan that is built."""
    built, true = [], plan.build
    monkeypatch.setattr(plan, "build", lambda o, *args, **kwargs: built.append(o) or true(o, *args, **kwargs))
    return built


@pytest.fixture(params=["native", "python"])
def watch(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(backends, "native", lambda: None)
    return request.param


def of_watch(watch, target):
    """The target, or the reference backend where the native one cannot take the watch in Python."""
    return target._replace(backend="reference") if (watch, target.backend) == ("python", "cpu") else target


def made(target, shapes=((5,), (4, 3), (7,)), name="AdamW", dtype=torch.float32, **options):
    """An optimizer of ours, its parameters, and both of a twin that is made anew before each step."""
    pairs = [cases.parameters(list(shapes), dtype, target.device) for _ in range(2)]
    return *(cases.make(name, ps, options, backend=target.backend) for ps in pairs), *pairs


def remade(optimizer):
    """A new optimizer with the groups and the state of this one."""
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    ours = {name: getattr(optimizer, name) for name in ("max_grad_norm", "skip_nonfinite")}
    new = type(optimizer)(groups, backend=optimizer.requested, **ours)
    new.defaults = optimizer.defaults  # of groups that are added later
    new.load_state_dict(optimizer.state_dict())
    return new


def step_both(a, b, ps, qs, t, live=None):
    """Step both with the same gradients, the second remade; returns that."""
    cases.set_gradients(ps, t)
    for k, (p, q) in enumerate(zip(ps, qs, strict=True)):
        if live is not None and k not in live:
            p.grad = None
        q.grad = None if p.grad is None else p.grad.clone()
    b = remade(b)
    a.step()
    b.step()
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))
    return b


# ---- gradients that come and go


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"rounding": "stochastic"}], ids=str)
def test_a_missing_gradient_needs_no_new_plan(options, target, builds):
    dtype = torch.bfloat16 if "rounding" in options else torch.float32
    a, b, ps, qs = made(target, dtype=dtype, **options)
    b = step_both(a, b, ps, qs, 0)
    builds.clear()
    for t, live in enumerate([{0}, {1, 2}, set(), {0, 2}, {1}, {0, 1, 2}], 1):
        b = step_both(a, b, ps, qs, t, live)
    assert a not in builds
    assert [own["step"].item() for own in a.state.values()] == [4, 4, 4]


def test_alternating_halves_are_planned_twice(target, builds):
    """The gradients of one half have another dtype, which is remembered while they are missing."""
    ps = cases.parameters([(5,), (6,), (7,), (8,)], torch.bfloat16, target.device)
    optimizer = cases.make("AdamW", ps, {"master": "fp32"}, backend=target.backend)
    for t in range(6):
        for p in ps:
            p.grad = None
        for p in ps[2 * (t % 2) :][:2]:
            cases.set_gradient(p, torch.ones_like(p, dtype=torch.bfloat16 if t % 2 else torch.float32))
        optimizer.step()
    assert len(builds) == 2
    assert [own["step"].item() for own in optimizer.state.values()] == [3] * 4


def test_a_gradient_that_comes_back_in_another_layout(target, watch):
    target = of_watch(watch, target)
    a, b, ps, qs = made(target)
    b = step_both(a, b, ps, qs, 0)
    for t in range(1, 5):
        cases.set_gradients(ps, t)
        ps[1].grad = None if t % 2 else torch.empty(3, 4, device=target.device).t().copy_(ps[1].grad)
        for p, q in zip(ps, qs, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        b = remade(b)
        a.step()
        b.step()
        cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


def test_a_broken_state_without_a_gradient_is_no_error(target):
    """Nothing is done to it until it has a gradient."""
    a, _, ps, _ = made(target)
    cases.set_gradients(ps, 0)
    a.step()
    a.state[ps[0]]["exp_avg"] = torch.ones(2, device=target.device)
    ps[0].grad = None
    a.step()
    ps[0].grad = torch.ones_like(ps[0])
    with pytest.raises(ValueError, match=r"group 0, parameter 0 .*'exp_avg' has shape \[2\]"):
        a.step()
    assert a.state[ps[1]]["step"].item() == 2


# ---- tensors that move


def swap_states(optimizer, ps):
    for own in optimizer.state.values():
        own.update({key: t.clone() for key, t in own.items()})


def swap_state_dicts(optimizer, ps):
    for p in ps:
        optimizer.state[p] = {key: t.clone() for key, t in optimizer.state[p].items()}


def move_parameters(optimizer, ps):
    for p in ps:
        p.data = p.data.clone()


def replace_groups(optimizer, ps):
    optimizer.param_groups = list(optimizer.param_groups)


def load_itself(optimizer, ps):
    optimizer.load_state_dict(optimizer.state_dict())


MOVES = [swap_states, swap_state_dicts, move_parameters, replace_groups, load_itself]


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8", "rounding": "stochastic"}], ids=str)
def test_what_moved_is_followed(options, move, target, builds):
    a, b, ps, qs = made(target, ((5,), (64, 64), (40, 3)), **options)
    b = step_both(a, b, ps, qs, 0)
    builds.clear()
    for t in range(1, 4):
        move(a, ps)
        b = step_both(a, b, ps, qs, t)
    assert a not in builds


def test_parameters_that_come_to_share_memory_are_stepped_one_after_the_other(target):
    a, _, ps, _ = made(target, ((5,), (5,)), "SGD", lr=1.0)
    for p in ps:
        p.grad = torch.ones_like(p)
    a.step()
    ps[1].data = ps[0].data
    before = ps[0].detach().clone()
    a.step()
    assert torch.equal(ps[0], before - 2)


def test_lists_of_groups_that_come_round_keep_their_plans(target, builds):
    """DeepSpeed's ZeRO steps one group after the other, through a list of its own."""
    ps = cases.parameters([(4,), (5,), (6,)], device=target.device)
    optimizer = cases.make("AdamW", [{"params": [p]} for p in ps], {}, backend=target.backend)
    groups = optimizer.param_groups
    for t in range(4):
        cases.set_gradients(ps, t)
        for group in groups:
            optimizer.param_groups = [group]
            optimizer.step()
        optimizer.param_groups = groups
    assert len(builds) == 3
    assert [own["step"].item() for own in optimizer.state.values()] == [4] * 3


def test_a_plan_of_other_options_stays_stale_until_they_come_back(watch):
    """Plans are kept, and polled again."""
    (p,) = cases.parameters([(5,)], torch.bfloat16)
    optimizer = cases.make("AdamW", [p], {"rounding": "stochastic"}, backend="reference")
    cases.set_gradients([p], 0)
    watching, (group,) = plan.build(optimizer).watch, optimizer.param_groups
    held = []
    for seed in (0, 1, 1, 0):
        group["seed"] = seed
        held.append(watching.poll(optimizer.param_groups, optimizer.state, optimizer.plan_key))
    assert held == [True, False, False, True]


def test_step_parameter_draws_by_the_place_of_the_parameter(target):
    """As a resumed run does, after an earlier parameter was taken out by hand."""
    options = {"rounding": "stochastic", "lr": 0.1}
    a, b, ps, qs = made(target, ((50,), (60,)), dtype=torch.bfloat16, **options)
    for t in range(4):
        cases.set_gradients(ps, t)
        for p, q in zip(ps, qs, strict=True):
            q.grad = p.grad.clone()
        if t == 2:
            for optimizer in (a, b):
                del optimizer.state[optimizer.param_groups[0]["params"].pop(0)]
            ps, qs = ps[1:], qs[1:]
        for p in ps:
            a.step_parameter(p)
        b = remade(b)
        b.step()
    cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))


@pytest.mark.parametrize("size", [0, 60], ids=["freed", "cut"])
@pytest.mark.parametrize("which", ["grad", "exp_avg"])
def test_a_storage_that_is_too_small_is_refused(which, size, target, watch):
    target = of_watch(watch, target)
    (p,) = cases.parameters([(50,)], device=target.device)
    whole = torch.ones(100, device=target.device)
    optimizer = cases.make("AdamW", [p], {}, backend=target.backend)
    p.grad = whole[50:] if which == "grad" else torch.ones_like(p)
    optimizer.step()
    if which == "exp_avg":
        optimizer.state[p]["exp_avg"] = whole[50:]
        optimizer.step()
    whole.untyped_storage().resize_(4 * size)
    before = p.detach().clone()
    with pytest.raises((TypeError, ValueError), match=r"group 0, parameter 0 .*(memory|null data)"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("other", ["dicts", "tensors"])
def test_states_that_are_exchanged_and_come_back(other, target, watch):
    """A poll that fails at the second parameter has already read the first one's."""
    target = of_watch(watch, target)
    a, _, ps, _ = made(target)

    def step(t):
        cases.set_gradients(ps, t)
        a.step()

    step(0)
    step(1)
    before = {p: dict(own) for p, own in a.state.items()}
    exchanged = {p: {key: t.clone() for key, t in own.items()} for p, own in before.items()}
    data, ps[1].data = ps[1].data, torch.ones(2, device=target.device)
    if other == "dicts":
        kept, a.state = a.state, type(a.state)(dict, exchanged)
    else:
        for p in ps:
            a.state[p].clear()
            a.state[p].update(exchanged[p])
    with pytest.raises(ValueError, match="group 0, parameter 1 .*'exp_avg' has shape"):
        step(2)
    ps[1].grad, ps[1].data = None, data
    if other == "dicts":
        a.state = kept
    else:
        for p in ps:
            a.state[p].clear()
            a.state[p].update(before[p])
    step(3)
    assert [own["step"].item() for own in before.values()] == [3] * 3
    assert exchanged[ps[0]]["step"].item() == 2


# ---- nothing is kept alive


def dead(*refs):
    gc.collect()
    return [ref() is None for ref in refs] == [True] * len(refs)


@pytest.mark.usefixtures("young")
@pytest.mark.parametrize("single", [False, True], ids=["step", "step_parameter"])
def test_what_is_replaced_is_freed_at_once(single, target, watch):
    target = of_watch(watch, target)
    a, _, ps, _ = made(target)

    def step(optimizer, params, t):
        cases.set_gradients(params, t)
        if single:
            for p in params:
                optimizer.step_parameter(p)
        else:
            optimizer.step()

    step(a, ps, 0)
    own = a.state[ps[0]]
    moment = weakref.ref(own["exp_avg"])
    own["exp_avg"] = own["exp_avg"].clone()
    assert dead(moment)
    step(a, ps, 1)
    gradient = weakref.ref(ps[1].grad)
    for p in ps:
        p.grad = None
    assert dead(gradient)
    states = [weakref.ref(t) for t in a.state[ps[2]].values()]
    del own
    a.state.clear()
    assert dead(*states)
    step(a, ps, 2)
    param = weakref.ref(ps[1])
    a.state.pop(ps[1])
    a.param_groups[0]["params"].pop(1)
    del ps[1], p
    assert dead(param)
    step(a, ps, 3)
    optimizer, last = weakref.ref(a), weakref.ref(ps[0])
    del a, ps
    assert dead(optimizer)
    assert dead(last)


STATM = Path("/proc/self/statm")


@pytest.mark.skipif(
    not STATM.exists() or "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="only Linux tells how much memory a process has, and AddressSanitizer keeps what is freed",
)
def test_cleared_states_give_their_memory_back():
    def resident():
        gc.collect()
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    (p,) = cases.parameters([(8_000_000,)])
    p.grad = torch.ones_like(p)
    optimizer = cases.make("AdamW", [p], {})
    optimizer.step()
    before = resident()
    optimizer.state.clear()
    assert before - resident() > 0.9 * 2 * p.nbytes


@pytest.mark.gpu
def test_states_moved_to_the_host_give_the_memory_of_the_gpu_back(backend):
    ps = cases.parameters([(100_000,), (300_000,)], device="cuda")
    optimizer = cases.make("AdamW", ps, {}, backend=backend)
    cases.set_gradients(ps, 0)
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    moments = [(own, key) for own in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    for own, key in moments:
        own[key] = own[key].cpu()
    assert before - torch.cuda.memory_allocated() >= 2 * sum(p.nbytes for p in ps)
    for own, key in moments:
        own[key] = own[key].cuda()
    cases.set_gradients(ps, 1)
    optimizer.step()
    assert {own["step"].item() for own in optimizer.state.values()} == {2}


@pytest.mark.usefixtures("young")
def test_a_group_that_is_dropped_is_freed(target):
    ps = cases.parameters([(4,), (5,)], device=target.device)
    optimizer = cases.make("AdamW", [{"params": [p]} for p in ps], {}, backend=target.backend)
    cases.set_gradients(ps, 0)
    optimizer.step()
    param = weakref.ref(ps[1])
    del optimizer.state[ps[1]]
    optimizer.param_groups.pop()
    del ps[1]
    assert dead(param)


def test_swapped_tensors(target):
    """torch.utils.swap_tensors refuses tensors that anything else refers to."""
    model = torch.nn.Linear(4, 3).to(target.device)
    optimizer = cases.make("AdamW", list(model.parameters()), {}, backend=target.backend)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for t, change in enumerate(
            [lambda: model.bfloat16(), lambda: model.float(), lambda: model.load_state_dict(model.state_dict())]
        ):
            cases.set_gradients(list(model.parameters()), t)
            optimizer.step()
            model.zero_grad()
            change()
        cases.set_gradients(list(model.parameters()), 4)
        optimizer.step()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert {own["step"].item() for own in optimizer.state.values()} == {4}


def test_entries_of_removed_parameters_do_not_pile_up():
    optimizer = cases.make("AdamW", cases.parameters([(3,)]), {})
    for t in range(20):
        (p,) = optimizer.param_groups[0]["params"] = cases.parameters([(3,)])
        optimizer.state.clear()
        cases.set_gradients([p], t)
        optimizer.step_parameter(p)
        del p
    assert len(optimizer._built_some) <= 4


# ---- interrupts


def test_an_interrupted_step_is_taken_and_counted_or_neither():
    (p,) = cases.parameters([(2_000_000,)])
    p.data.zero_()
    p.grad = torch.ones_like(p)
    optimizer = cases.make("SGD", [p], {"lr": 1.0, "momentum": 0.0})
    optimizer.step()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupted = 0
    try:
        for _ in range(40):
            signal.setitimer(signal.ITIMER_REAL, 0.0005)
            try:
                for _ in range(100):
                    optimizer.step()
            except KeyboardInterrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert p[0].item() == p[-1].item() == -optimizer.state[p]["step"].item()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted


# ---- what a plan was not built for


def test_tied_parameters_need_no_new_plan(target, watch, builds):
    target = of_watch(watch, target)
    a, _, ps, _ = made(target, ((5,), (5,)), "SGD", lr=1.0)
    ps[1].data = ps[0].data
    before = ps[0].detach().clone()
    for _ in range(3):
        for p in ps:
            p.grad = torch.ones_like(p)
        a.step()
    assert len(builds) == 1
    assert torch.equal(ps[0], before - 6)


def test_a_strided_parameter_that_comes_to_share_memory(target, watch):
    """A launch steps a copy of it."""
    target = of_watch(watch, target)
    a, _, ps, _ = made(target, ((5,), (5,)), "SGD", lr=1.0)
    for whole in (None, torch.zeros(10, device=target.device)):
        ps[0].data = torch.zeros(10, device=target.device)[::2] if whole is None else whole[::2]
        if whole is not None:
            ps[1].data = whole[:5]
        for p in ps:
            p.grad = torch.ones_like(p)
        a.step()
    assert whole.tolist() == [-2, -1, -2, -1, -2, 0, -1, 0, -1, 0]


def test_a_gradient_that_comes_to_lie_across_its_parameter_is_refused(target, watch):
    target = of_watch(watch, target)
    a, _, ps, _ = made(target, ((100,),))
    whole = torch.zeros(101, device=target.device)
    ps[0].data = whole[1:]
    ps[0].grad = torch.ones_like(ps[0])
    a.step()
    before = whole.clone()
    ps[0].grad = whole[:100]
    with pytest.raises(ValueError, match=r"group 0, parameter 0 .*its gradient overlaps it, shifted"):
        a.step()
    assert torch.equal(whole, before)


def test_a_gradient_is_not_remembered_for_a_parameter_of_another_shape(target, watch):
    """It would be read beyond its end."""
    target = of_watch(watch, target)
    a, _, ps, _ = made(target, ((4,), (3,)))
    cases.set_gradients(ps, 0)
    a.step()
    p, own = ps[0], a.state[ps[0]]
    p.grad = None
    p.data = torch.zeros(4000, device=target.device)
    own.update({key: torch.zeros_like(p.data) for key in ("exp_avg", "exp_avg_sq")})
    a.step()
    p.data = torch.zeros(4, device=target.device)
    p.grad = torch.ones_like(p)
    p.data = torch.zeros(4000, device=target.device)
    with pytest.raises(ValueError, match=r"group 0, parameter 0 .*its gradient has shape \[4\]"):
        a.step()
    assert not p.any()


def test_memory_that_is_copied_on_write_is_copied(target):
    a, _, ps, _ = made(target, ((4,),))
    cases.set_gradients(ps, 0)
    a.step()
    own, t = a.state[ps[0]], ps[0].data
    lazy = torch._lazy_clone(t), torch._lazy_clone(own["exp_avg"])
    before = [x.clone() for x in lazy]
    own["exp_avg_sq"] = torch._lazy_clone(own["exp_avg_sq"])
    a.step()
    assert all(map(torch.equal, lazy, before))


def test_scales_without_memory_are_refused(target, watch):
    target = of_watch(watch, target)
    a, _, ps, _ = made(target, ((64, 64),), state_dtype="int8")
    cases.set_gradients(ps, 0)
    a.step()
    a.state[ps[0]]["exp_avg_scales"].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"group 0, parameter 0 .*memory of its state 'exp_avg_scales' is gone"):
        a.step()


@pytest.mark.usefixtures("young")
def test_keys_of_a_state_that_are_no_strings(target, watch, builds):
    target = of_watch(watch, target)
    a, _, ps, _ = made(target)
    cases.set_gradients(ps, 0)
    a.step()
    key = torch.ones(1)
    a.state[ps[0]] |= {key: 5, (1, 2): 3}
    a.step()
    builds.clear()
    a.step()
    assert not builds
    last = weakref.ref(key)
    del a.state[ps[0]][key], key
    assert dead(last)


def test_a_list_that_is_replaced_while_the_options_are_compared(target, builds, monkeypatch):
    """They are compared by Python code, after which another object may lie where the list was."""
    a, _, ps, _ = made(target, lr=torch.tensor(0.1))  # a tensor, of which each poll asks anew
    cases.set_gradients(ps, 0)
    a.step()
    plan_key, others = a.plan_key, []

    def replaces(group):
        group["params"] = list(ps)
        others.append([None] * 3)
        return plan_key(group)

    monkeypatch.setattr(a, "plan_key", replaces)
    builds.clear()
    for _ in range(3):
        a.step()
    assert not builds
    assert {own["step"].item() for own in a.state.values()} == {4}


def test_a_gradient_that_is_dropped_after_the_poll(monkeypatch):
    """By what runs while Python code computes hyperparameters: a finalizer, a signal handler, another thread."""
    ps = cases.parameters([(5,), (6,)])
    drops, true = [], scalars.HYPER["adam"]
    monkeypatch.setitem(scalars.HYPER, "adam", lambda group: [setattr(p, "grad", None) for p in drops] and true(group))
    drops.append(torch.nn.Parameter(torch.ones(1)))
    optimizer = cases.make("AdamW", ps, {})
    cases.set_gradients(ps, 0)
    optimizer.step()
    before = ps[0].detach().clone()
    drops.append(ps[0])
    optimizer.param_groups[0]["weight_decay"] = 0.5
    optimizer.step()
    assert torch.equal(ps[0], before)
    assert [own["step"].item() for own in optimizer.state.values()] == [1, 2]


def test_step_parameters_sees_parameters_that_move_between_groups(target, watch):
    """The random bits of a parameter follow its place among all parameters."""
    target = of_watch(watch, target)
    ours, twins = (cases.parameters([(40,)] * 4, torch.bfloat16, target.device) for _ in range(2))
    options = {"rounding": "stochastic"}
    a, b = (
        cases.make("AdamW", [{"params": ps[:2]}, {"params": ps[2:]}], options, backend=target.backend)
        for ps in (ours, twins)
    )
    for t in range(4):
        for o in (a, b):
            first, second = (group["params"] for group in o.param_groups)
            if t == 1:  # the same groups and positions in the second, and other numbers
                first.append(cases.parameters([(3,)], torch.bfloat16, target.device)[0])
            elif t == 2:
                second.reverse()
            elif t == 3:
                second.append(first.pop(0))
        for ps in (ours, twins):
            cases.set_gradients(ps, t)
        a.step_parameters(ours[2:])
        a.step_parameters(ours[:2])
        b.step()
        cases.assert_same_bits(cases.tensors_of(a), cases.tensors_of(b))
