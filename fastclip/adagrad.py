"""torch.optim.Adagrad with clipping, in one pass."""

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import ClippedOptimizer
from .plain import rules
from .plain.rounding import has_master
from .plain.step import new_state
from .settings import ClipSettings, lists_clip_settings


class Adagrad(ClippedOptimizer, torch.optim.Adagrad):
    r"""`torch.optim.Adagrad` that clips the gradients in the same pass over memory.

    Equivalent to::

        torch.nn.utils.clip_grad_value_(params, clip_value)  # if clip_value is given
        torch.nn.utils.clip_grad_norm_(params, max_norm)     # if max_norm is given
        torch.optim.Adagrad(params, ...).step()

    except that the gradients stay as they were. Bits are as in `fastclip.Adam`. A GPU has one kernel of this rule for
    all dtypes, which keeps fewer loads in flight than SGD's and Adam's kernels for float32 and bfloat16.

    Each group begins at its own `initial_accumulator_value`, where torch takes the constructor's for all.

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize, differentiable:
            as in `torch.optim.Adagrad`.
        foreach, fused: accepted and not needed; the step is fused in any case.
        clip_value, max_norm, skip_norm, norm_type, skip_nonfinite: as in `fastclip.SGD`.
        master_weights, stochastic_rounding, rounding_seed: as in `fastclip.SGD`.
        momentum_dtype (torch.dtype, optional): refused, as Adagrad keeps no momentum.
        state_bits (int): 32; 8 is refused.

    Raises:
        As `fastclip.Adam`. Sparse gradients are taken, in plain torch.

    Source: Duchi et al. (2011), https://jmlr.org/papers/v12/duchi11a.html.

    Example:
        >>> model = torch.nn.Linear(80, 64)
        >>> opt = fastclip.Adagrad(model.parameters(), lr=0.01, max_norm=5.0)
        >>> model(torch.randn(8, 80)).square().sum().backward()
        >>> opt.step()
    """

    _rule = rules.ADAGRAD

    @lists_clip_settings
    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **clip: Unpack[ClipSettings],
    ) -> None:
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
            **clip,
        )
        # torch makes the sums here, all by the constructor's settings and in the dtypes of the parameters. With master
        # weights the first step makes all states: loaders take a state that is there for a whole one.
        if any(has_master(group, p) for group in self.param_groups for p in group["params"]):
            self.state.clear()
            return
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = new_state(self._rule, group, p, "sum")
