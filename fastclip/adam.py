"""torch.optim.Adam and AdamW with clipping, in one pass."""

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import ClippedOptimizer
from .plain import rules
from .settings import ClipSettings, lists_clip_settings


class Adam(ClippedOptimizer, torch.optim.Adam):
    r"""`torch.optim.Adam` that clips the gradients in the same pass over memory.

    Equivalent to::

        torch.nn.utils.clip_grad_value_(params, clip_value)  # if clip_value is given
        torch.nn.utils.clip_grad_norm_(params, max_norm)     # if max_norm is given
        torch.optim.Adam(params, ...).step()

    except that the gradients stay as they were. With a value clip, or without a clip, the bits are torch's on the CPU
    in float32 and float64, wherever torch's square roots (from MKL) are right to the last bit. 16-bit parameters are
    computed in float32 and rounded once. On a GPU the count of steps in the state, `step`, lies on the device, as
    with torch's `fused=True`.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, differentiable, decoupled_weight_decay: as in
            `torch.optim.Adam`. lr and betas given as tensors are read as numbers, in double precision.
        foreach, fused, capturable: accepted and not needed; the step is fused, and can be captured, in any case.
        clip_value, max_norm, skip_norm, norm_type, norm_scope, skip_nonfinite: as in `fastclip.SGD`.
        max_change (float, optional): the largest norm of what a step adds to the parameters, without a decoupled weight
            decay; over all of them, or as `norm_scope` says. The learning rate of the step is scaled down to it.
        max_relative_change (float, optional): the same limit, as a fraction of the norm of the parameters, as in
            `fastclip.SGD`.
        max_update_rms (float, optional): the largest root mean square of a parameter's g / max(√v̂, eps): of its
            gradient divided by the root of the averaged square. The learning rate of this parameter is scaled down to
            it. 1.0 is StableAdamW (Wortsman et al., 2023, https://arxiv.org/abs/2304.13013).
        master_weights, stochastic_rounding, rounding_seed: as in `fastclip.SGD`.
        momentum_dtype (torch.dtype, optional): of `exp_avg`; the squares stay in the parameter's dtype, or in float32.
        state_bits (int): 8 keeps the averages of large parameters in 8 bits, as in `fastclip.SGD`.

    Raises:
        ValueError: a negative or NaN threshold, low > high, another norm type, one but 2 beside a limit on what is
            added, or settings different between groups, as in `fastclip.SGD`.
        TypeError: a value that is not a number.
        RuntimeError: a sparse gradient, as in torch.

    Sources: Kingma & Ba (2014), https://arxiv.org/abs/1412.6980; amsgrad, Reddi et al. (2018),
    https://arxiv.org/abs/1904.09237.

    Example:
        >>> model = torch.nn.Linear(80, 64)
        >>> opt = fastclip.Adam(model.parameters(), lr=1e-3, max_norm=5.0)
        >>> model(torch.randn(8, 80)).square().sum().backward()
        >>> opt.step()
    """

    _rule = rules.ADAM

    @lists_clip_settings
    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
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
        **clip: Unpack[ClipSettings],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
            **clip,
        )


class AdamW(Adam, torch.optim.AdamW):
    r"""`torch.optim.AdamW` that clips the gradients in the same pass over memory.

    Equivalent to::

        torch.nn.utils.clip_grad_value_(params, clip_value)  # if clip_value is given
        torch.nn.utils.clip_grad_norm_(params, max_norm)     # if max_norm is given
        torch.optim.AdamW(params, ...).step()

    with the exceptions that `fastclip.Adam` lists.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, differentiable: as in `torch.optim.AdamW`.
        foreach, fused, capturable: accepted and not needed; the step is fused, and can be captured, in any case.
        clip_value, max_norm, skip_norm, norm_type, norm_scope, skip_nonfinite: as in `fastclip.SGD`.
        max_change, max_relative_change, max_update_rms: as in `fastclip.Adam`.
        master_weights, stochastic_rounding, rounding_seed: as in `fastclip.SGD`.
        momentum_dtype (torch.dtype, optional): of `exp_avg`; the squares stay in the parameter's dtype, or in float32.
        state_bits (int): 8 keeps the averages of large parameters in 8 bits, as in `fastclip.SGD`.

    Raises:
        As `fastclip.Adam`.

    Source: Loshchilov & Hutter (2019), https://arxiv.org/abs/1711.05101.

    Example:
        >>> model = torch.nn.Linear(80, 64)
        >>> opt = fastclip.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, max_norm=1.0)
        >>> model(torch.randn(8, 80)).square().sum().backward()
        >>> opt.step()
    """

    _rule = rules.ADAM

    @lists_clip_settings
    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **clip: Unpack[ClipSettings],
    ) -> None:
        super(Adam, self).__init__(  # type: ignore[call-arg]
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
            **clip,
        )
