"""Defines AdaBound and AdaBoundW, which torch lacks: the arguments, the formula, and which rule steps a group."""

from typing import Any

from torch import Tensor

from fused_adamw import options
from fused_adamw.base import FusedOptimizer
from fused_adamw.options import (
    Backend,
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
class AdaBound(FusedOptimizer):
    r"""Adam whose rates are kept within bounds that come together at SGD's rate (arXiv 1902.09843), with L2.

    .. math::
        \alpha_t &= \alpha \, \gamma_t / \gamma_0, \qquad
            \eta_t = \min\Bigl(\max\Bigl(\frac{\gamma_t \sqrt{1-\beta_2^t} \, / (1-\beta_1^t)}{\sqrt{v_t} + \epsilon},
            \; \alpha_t \frac{\gamma t}{\gamma t + 1}\Bigr), \; \alpha_t \frac{\gamma t + 1}{\gamma t}\Bigr) \\
        \theta_t &= \theta_{t-1} - \eta_t \, m_t

    with the moments of :class:`Adam`, the learning rate :math:`\gamma_t`, the one that the group was made with
    :math:`\gamma_0` (its ``base_lr``), ``final_lr`` :math:`\alpha` and ``gamma`` :math:`\gamma`. A group whose ``lr``
    is multiplied by a ``lr_mult`` has bounds that are, too.

    Args:
    """

    family = "adabound"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        final_lr: float = 0.1,
        gamma: float = 1e-3,
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsbound: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        decoupled_weight_decay: bool = False,
        decouple_lr: bool = False,
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
            "final_lr": final_lr,
            "gamma": gamma,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsbound": amsbound,
            "maximize": maximize,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "decouple_lr": decouple_lr,
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
        if group["amsbound"]:
            return "amsbound", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        return "adabound", ("exp_avg", "exp_avg_sq")


@documented
class AdaBoundW(AdaBound):
    r"""AdaBound with decoupled weight decay: :math:`\theta_t = \theta_{t-1} - d \, \theta_{t-1} - \eta_t \, m_t`.

    By default :math:`d = (\gamma_t / \gamma_0) \lambda`, which at a constant learning rate is the decay of the authors'
    code, λ itself; with ``decouple_lr=False`` it is torch's convention of AdamW, :math:`d = \gamma_t \lambda`.

    Args:
    """

    _decoupled = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        final_lr: float = 0.1,
        gamma: float = 1e-3,
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsbound: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        decouple_lr: bool = True,
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
            final_lr,
            gamma,
            eps,
            weight_decay,
            amsbound,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            decoupled_weight_decay=True,
            decouple_lr=decouple_lr,
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
