"""torch.optim.RMSprop with clipping, in one pass."""

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import ClippedOptimizer
from .plain import rules
from .settings import ClipSettings, lists_clip_settings


class RMSprop(ClippedOptimizer, torch.optim.RMSprop):
    r"""`torch.optim.RMSprop` that clips the gradients in the same pass over memory.

    Equivalent to::

        torch.nn.utils.clip_grad_value_(params, clip_value)  # if clip_value is given
        torch.nn.utils.clip_grad_norm_(params, max_norm)     # if max_norm is given
        torch.optim.RMSprop(params, ...).step()

    except that the gradients stay as they were. Bits are as in `fastclip.Adam`. A GPU has one kernel of this rule for
    all dtypes, which keeps fewer loads in flight than SGD's and Adam's kernels for float32 and bfloat16.

    Args:
        params, lr, alpha, eps, weight_decay, momentum, centered, maximize, differentiable:
            as in `torch.optim.RMSprop`.
        foreach, capturable: accepted and not needed; the step is fused, and can be captured, in any case.
        clip_value, max_norm, skip_norm, norm_type, skip_nonfinite: as in `fastclip.SGD`.
        master_weights, stochastic_rounding, rounding_seed: as in `fastclip.SGD`.
        momentum_dtype (torch.dtype, optional): of `momentum_buffer`.
        state_bits (int): 32; 8 is refused.

    Raises:
        As `fastclip.Adam`.

    Source: Hinton (2012), lecture 6 of Neural Networks for Machine Learning; centered, Graves (2013),
    https://arxiv.org/abs/1308.0850.

    Example:
        >>> model = torch.nn.Linear(80, 64)
        >>> opt = fastclip.RMSprop(model.parameters(), lr=0.01, max_norm=5.0)
        >>> model(torch.randn(8, 80)).square().sum().backward()
        >>> opt.step()
    """

    _rule = rules.RMSPROP

    @lists_clip_settings
    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **clip: Unpack[ClipSettings],
    ) -> None:
        super().__init__(
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            capturable,
            foreach,
            maximize,
            differentiable,
            **clip,
        )
