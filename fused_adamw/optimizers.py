"""Defines the classes: torch.optim's arguments, the formula, and which rule steps a group."""

from typing import Any

from torch import Tensor

from fused_adamw import options
from fused_adamw.base import FusedOptimizer
from fused_adamw.options import (
    Backend,
    Cautious,
    EmaDtype,
    Master,
    Measured,
    Params,
    ProcessGroups,
    Rounding,
    StateDtype,
    documented,
)


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

    family = "adam"

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
        cautious: Cautious | None = None,
        first_moment: bool = True,
        state_dtype: StateDtype | None = None,
        rounding: Rounding = "nearest",
        master: Master | None = None,
        seed: int = 0,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        ema_dtype: EmaDtype | None = None,
        statistics: Measured = False,
        backend: Backend | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        amp_scaling: bool = False,
        process_group: ProcessGroups = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": options.floats(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "decouple_lr": decouple_lr,
            "cautious": cautious,
            "first_moment": first_moment,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "master": master,
            "seed": seed,
            "ema_decay": ema_decay,
            "ema_warmup": ema_warmup,
            "ema_dtype": ema_dtype,
            "statistics": statistics,
        }
        super().__init__(
            params,
            defaults,
            backend=backend,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            amp_scaling=amp_scaling,
            process_group=process_group,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    def rule_of(self, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        if group["amsgrad"]:
            return "adam_amsgrad", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        if not group.get("first_moment", True):
            return "adam_no_first_moment", ("exp_avg_sq",)
        return _adam_rule(group), ("exp_avg", "exp_avg_sq")


def _adam_rule(group: dict[str, Any]) -> str:
    cautious = group.get("cautious")
    return f"adam_cautious_{cautious}" if cautious else "adam"


@documented
class AdamW(Adam):
    r"""Adam with decoupled weight decay (Algorithm 2 of arXiv 1711.05101), a drop-in for :class:`torch.optim.AdamW`.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2 \\
        \theta_t &= \theta_{t-1} - d \, \theta_{t-1}
            - \gamma \, \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}

    with :math:`d = \gamma \lambda` as in torch or, with ``decouple_lr``, :math:`d = (\gamma / \gamma_0) \lambda` as in
    the paper, where :math:`\gamma_0` is the learning rate that the group was made with (its ``base_lr``). With
    ``cautious="decay"`` elements in which :math:`m_t` and :math:`\theta_{t-1}` have opposite signs are not decayed;
    with ``cautious="update"`` those in which :math:`m_t` and :math:`g_t` differ in sign are decayed but not updated.

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
        cautious: Cautious | None = None,
        first_moment: bool = True,
        state_dtype: StateDtype | None = None,
        rounding: Rounding = "nearest",
        master: Master | None = None,
        seed: int = 0,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        ema_dtype: EmaDtype | None = None,
        statistics: Measured = False,
        backend: Backend | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        amp_scaling: bool = False,
        process_group: ProcessGroups = None,
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
            cautious=cautious,
            first_moment=first_moment,
            state_dtype=state_dtype,
            rounding=rounding,
            master=master,
            seed=seed,
            ema_decay=ema_decay,
            ema_warmup=ema_warmup,
            ema_dtype=ema_dtype,
            statistics=statistics,
            backend=backend,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            amp_scaling=amp_scaling,
            process_group=process_group,
        )


@documented
class RAdam(FusedOptimizer):
    r"""Adam with a rectified variance (arXiv 1908.03265), a drop-in for :class:`torch.optim.RAdam`.

    .. math::
        \rho_\infty &= \tfrac{2}{1-\beta_2} - 1, \qquad
            \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1-\beta_2^t}, \qquad
            r_t = \sqrt{\frac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}} \\
        \theta_t &= \theta_{t-1} - \gamma \, \frac{m_t}{1-\beta_1^t} \begin{cases}
            r_t \sqrt{1-\beta_2^t} \, / (\sqrt{v_t} + \epsilon) & \text{if } \rho_t > 5 \\
            1 & \text{otherwise, or 0 without degenerated_to_sgd} \end{cases}

    with the moments of :class:`Adam`, and a weight decay as in :class:`Adam` or, decoupled, as in :class:`AdamW`.

    Args:
    """

    family = "radam"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        degenerated_to_sgd: bool = True,
        decouple_lr: bool = False,
        cautious: Cautious | None = None,
        state_dtype: StateDtype | None = None,
        rounding: Rounding = "nearest",
        master: Master | None = None,
        seed: int = 0,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        ema_dtype: EmaDtype | None = None,
        statistics: Measured = False,
        backend: Backend | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        amp_scaling: bool = False,
        process_group: ProcessGroups = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": options.floats(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "degenerated_to_sgd": degenerated_to_sgd,
            "decouple_lr": decouple_lr,
            "cautious": cautious,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "master": master,
            "seed": seed,
            "ema_decay": ema_decay,
            "ema_warmup": ema_warmup,
            "ema_dtype": ema_dtype,
            "statistics": statistics,
        }
        super().__init__(
            params,
            defaults,
            backend=backend,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            amp_scaling=amp_scaling,
            process_group=process_group,
            foreach=foreach,
            differentiable=differentiable,
        )

    def rule_of(self, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        return _adam_rule(group), ("exp_avg", "exp_avg_sq")


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

    family = "sgd"
    _decoupled = False

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
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        ema_dtype: EmaDtype | None = None,
        statistics: Measured = False,
        backend: Backend | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        amp_scaling: bool = False,
        process_group: ProcessGroups = None,
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
            "ema_decay": ema_decay,
            "ema_warmup": ema_warmup,
            "ema_dtype": ema_dtype,
            "statistics": statistics,
        }
        super().__init__(
            params,
            defaults,
            backend=backend,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            amp_scaling=amp_scaling,
            process_group=process_group,
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
