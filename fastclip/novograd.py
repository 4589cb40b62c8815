"""NovoGrad with clipping, in one pass."""

from typing import Any

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .arguments import check_not_negative
from .optimizer import ClippedOptimizer
from .plain import rules
from .settings import ClipSettings, lists_clip_settings


class NovoGrad(ClippedOptimizer):
    r"""NovoGrad: momentum of gradients that are divided by their tensor's norm. NeMo's, for Jasper and QuartzNet.

    For each parameter, with g its gradient after all clips::

        v = ‖g‖² in the first step, then beta2 * v + (1 - beta2) * ‖g‖²
        g = g / (√v + eps) + weight_decay * param
        m = beta1 * m + g, or (1 - beta1) * g with grad_averaging
        param = param - lr * m

    The norm is that of the whole parameter, also where several ranks hold its shards. Its state is `exp_avg` (m), one
    number `exp_avg_sq` (v), and `step`: half of Adam's. Checkpoints are exchanged with NeMo's in both directions.
    16-bit parameters are computed in float32 and rounded once. Gradients are left as they were: NeMo's divides them in
    place. A GPU has one kernel of this rule for all dtypes.

    Args:
        params: as in `torch.optim.AdamW`.
        lr (float or Tensor): learning rate.
        betas ((float, float)): the weights of the old averages, of gradients and of squared norms.
        eps (float): is added to the root of the average of squared norms.
        weight_decay (float): of the parameter, added to the divided gradient.
        grad_averaging (bool): weighs a gradient by 1 - beta1 in its average.
        amsgrad, luc (bool): refused, if they are True; NeMo has them.
        luc_trust, luc_eps (float): accepted and not needed.
        maximize (bool): moves up the gradients.
        clip_value, max_norm, skip_norm, skip_nonfinite: as in `fastclip.SGD`. A norm clip has little effect: what
            follows from a gradient does not depend on its scale, but for the average.
        norm_type (float): 2, as the rule takes that norm.
        norm_scope (str): "global" or "parameter".
        master_weights, stochastic_rounding, rounding_seed: as in `fastclip.SGD`.
        momentum_dtype (torch.dtype, optional): of `exp_avg`.
        state_bits (int): 32; 8 is refused.

    Raises:
        ValueError: a negative lr, eps or weight_decay, betas outside of [0, 1), amsgrad, luc, another norm_type or
            norm_scope; and as `fastclip.Adam`.

    Source: Ginsburg et al. (2019), https://arxiv.org/abs/1905.11286; NeMo's `nemo/core/optim/novograd.py`.

    Example:
        >>> model = torch.nn.Linear(80, 64)
        >>> opt = fastclip.NovoGrad(model.parameters(), lr=0.01, betas=(0.8, 0.25), weight_decay=1e-3)
        >>> model(torch.randn(8, 80)).square().sum().backward()
        >>> opt.step()
    """

    _rule = rules.NOVOGRAD
    _optional = ClippedOptimizer._optional | {"maximize", "differentiable"}

    @lists_clip_settings
    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0,
        grad_averaging: bool = False,
        amsgrad: bool = False,
        luc: bool = False,
        luc_trust: float = 1e-3,
        luc_eps: float = 1e-8,
        *,
        maximize: bool = False,
        **clip: Unpack[ClipSettings],
    ) -> None:
        check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        _refuse({"amsgrad": amsgrad, "luc": luc})
        settings = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "grad_averaging": grad_averaging,
            "maximize": maximize,
        }
        super().__init__(params, {**settings, "differentiable": False}, **clip)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of all optimizers here. A group of NeMo's may have `amsgrad` and `luc`, if they are False.

        Example:
            >>> opt = fastclip.NovoGrad([torch.zeros(3)])
            >>> opt.add_param_group({"params": [torch.zeros(2)], "lr": 0.1})
        """
        if isinstance(param_group, dict):
            param_group = _without_theirs(param_group)
        super().add_param_group(param_group)

    def __setstate__(self, state):
        groups = [_without_theirs(group) for group in state.get("param_groups", [])]
        for group in groups:  # NeMo's know neither
            group.setdefault("maximize", False)
            group.setdefault("differentiable", False)
        super().__setstate__({**state, "param_groups": groups} if groups else state)
        for entry in self.state.values():  # there, a count is an int
            for name in entry.keys() & {"step", "exp_avg_sq"}:
                if isinstance(entry[name], (int, float)):
                    entry[name] = torch.tensor(float(entry[name]), dtype=torch.float32)


def _without_theirs(group):
    """Returns a group without the switches that NeMo's has and this one has not."""
    _refuse({name: group.get(name, False) for name in ("amsgrad", "luc")})
    return {name: value for name, value in group.items() if name not in ("amsgrad", "luc", "luc_trust", "luc_eps")}


def _refuse(switches):
    for name, switch in switches.items():
        if switch:
            raise ValueError(f"fastclip.NovoGrad has no {name}: NeMo's own NovoGrad has")
