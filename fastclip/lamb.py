"""LAMB with clipping: Adam whose steps are as large as the norm of their tensor."""

from typing import Any

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .arguments import check_not_negative
from .optimizer import ClippedOptimizer
from .plain import rules
from .settings import ClipSettings, lists_clip_settings


class LAMB(ClippedOptimizer):
    r"""LAMB: Adam whose steps are as large as the norm of their tensor, for large batches. apex's FusedLAMB.

    For each parameter, with g its gradient after all clips, and m̂ and v̂ Adam's averages, corrected::

        u = m̂ / (√v̂ + eps) + weight_decay * param
        param = param - lr * ‖param‖ / ‖u‖ * u

    Where ‖param‖ or ‖u‖ is 0, and in groups without a weight decay, the step is lr * u. What is added is measured
    before anything is written, so a step reads the gradient twice, or three times with `max_norm`: 48 bytes for each
    float32 parameter, where AdamW with `max_norm` takes 32. DTensors have no kernel, nor have parameters
    on several devices: these are stepped in plain torch.

    Args:
        params: as in `torch.optim.AdamW`.
        lr (float or Tensor): learning rate, relative to the norm of each tensor.
        bias_correction (bool): whether the averages are corrected.
        betas ((float, float)): the weights of the old averages, of gradients and of their squares.
        eps (float): is added to the root of the average of squares.
        weight_decay (float): of the parameter.
        amsgrad (bool): refused, if it is True, as by apex.
        adam_w_mode (bool): True: the decay is added to u. False: to the gradient.
        grad_averaging (bool): weighs a gradient by 1 - betas[0] in its average; else by 1.
        set_grad_none (bool): accepted and not needed; `zero_grad` does as in torch.
        max_grad_norm (float, optional): apex's name of `max_norm`, which counts where both are given. None: no clip.
        use_nvlamb (bool): takes ‖param‖ / ‖u‖ into account also in groups without a weight decay.
        maximize (bool): moves up the gradients.
        clip_value, skip_norm, norm_type, norm_scope, skip_nonfinite: as in `fastclip.SGD`.
        max_change, max_relative_change, max_update_rms: as in `fastclip.Adam`.
        master_weights, stochastic_rounding, rounding_seed: as in `fastclip.SGD`.
        momentum_dtype (torch.dtype, optional): of the average of gradients.
        state_bits (int): 32; 8 is refused.

    Raises:
        ValueError: a negative lr, eps or weight_decay, betas outside of [0, 1), amsgrad; and as `fastclip.Adam`.

    Sources: You et al. (2019), https://arxiv.org/abs/1904.00962; apex's `apex/optimizers/fused_lamb.py`, which divides
    the gradients by norm / max_grad_norm, where this one adds 1e-6 to the norm, as torch does.

    Example:
        >>> model = torch.nn.Linear(80, 64)
        >>> opt = fastclip.LAMB(model.parameters(), lr=2e-3, weight_decay=0.01)
        >>> model(torch.randn(8, 80)).square().sum().backward()
        >>> opt.step()
    """

    _rule = rules.LAMB
    _optional = ClippedOptimizer._optional | {"maximize", "differentiable"}

    @lists_clip_settings
    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        grad_averaging: bool = True,
        set_grad_none: bool = True,
        max_grad_norm: float | None = 1.0,
        use_nvlamb: bool = False,
        *,
        maximize: bool = False,
        **clip: Unpack[ClipSettings],
    ) -> None:
        check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        _refuse_amsgrad(amsgrad)
        clip.setdefault("max_norm", max_grad_norm)
        settings = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "adam_w_mode": adam_w_mode,
            "grad_averaging": grad_averaging,
            "use_nvlamb": use_nvlamb,
            "maximize": maximize,
        }
        super().__init__(params, {**settings, "differentiable": False}, **clip)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of all optimizers here. A group may have apex's `max_grad_norm` in the place of `max_norm`.

        Example:
            >>> opt = fastclip.LAMB([torch.zeros(3)], max_grad_norm=None)
            >>> opt.add_param_group({"params": [torch.zeros(2)], "lr": 0.1})
        """
        if isinstance(param_group, dict):
            param_group = _in_our_words(param_group)
        super().add_param_group(param_group)

    def __setstate__(self, state):
        given = state.get("param_groups", [])
        groups = [_in_our_words(group) for group in given]
        for group in groups:
            group.setdefault("adam_w_mode", self.__dict__.get("defaults", {}).get("adam_w_mode", True))
            group.setdefault("use_nvlamb", self.__dict__.get("defaults", {}).get("use_nvlamb", False))
            group.setdefault("maximize", False)
            group.setdefault("differentiable", False)
        super().__setstate__({**state, "param_groups": groups} if groups else state)
        for group in given:  # apex counts the steps of a group
            if "step" in group:
                for param in group["params"]:
                    if self.state.get(param):
                        self.state[param].setdefault("step", torch.tensor(float(group["step"]), dtype=torch.float32))


def _in_our_words(group):
    """Returns a group of apex's as one of ours."""
    _refuse_amsgrad(group.get("amsgrad", False))
    own = {name: value for name, value in group.items() if name not in ("max_grad_norm", "amsgrad", "step")}
    if "max_grad_norm" in group:
        own.setdefault("max_norm", group["max_grad_norm"])
    return own


def _refuse_amsgrad(amsgrad):
    if amsgrad:
        raise ValueError("fastclip.LAMB has no amsgrad, and neither has apex's")
