"""Lion with clipping, in one pass."""

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .arguments import check_not_negative
from .optimizer import ClippedOptimizer
from .plain import rules
from .settings import ClipSettings, lists_clip_settings


class Lion(ClippedOptimizer):
    r"""Lion: each element moves by the learning rate, in the direction of an average of gradients.

    Equivalent to::

        torch.nn.utils.clip_grad_value_(params, clip_value)  # if clip_value is given
        torch.nn.utils.clip_grad_norm_(params, max_norm)     # if max_norm is given
        lion_pytorch.Lion(params, ...).step()                # of PyPI's lion-pytorch

    except that the gradients stay as they were, and that sparse and complex ones are refused. Same bits on the CPU for
    float32 and float64; 16-bit parameters are computed in float32 and rounded once. A GPU has one kernel of this rule
    for all dtypes. Weight decay is decoupled, and multiplied by the learning rate. The sign of a NaN is 0, as in
    `torch.sign`.

    Args:
        params: as in `torch.optim.AdamW`.
        lr (float or Tensor): by how much an element moves; about a tenth of AdamW's.
        betas ((float, float)): the weights of the old average in the direction of a step, and in the new average.
        weight_decay (float): about ten times AdamW's.
        maximize (bool): moves up the gradients.
        clip_value, max_norm, skip_norm, norm_type, skip_nonfinite: as in `fastclip.SGD`. A norm clip changes the
            direction through the average only.
        master_weights, stochastic_rounding, rounding_seed: as in `fastclip.SGD`.
        momentum_dtype (torch.dtype, optional): of `exp_avg`, all the state there is.
        state_bits (int): 8 keeps the averages of large parameters in 8 bits, as in `fastclip.SGD`.

    Raises:
        ValueError: a negative lr or weight_decay, betas outside of [0, 1); and as `fastclip.Adam`.

    Source: Chen et al. (2023), https://arxiv.org/abs/2302.06675.

    Example:
        >>> model = torch.nn.Linear(80, 64)
        >>> opt = fastclip.Lion(model.parameters(), lr=1e-4, weight_decay=0.1, max_norm=1.0)
        >>> model(torch.randn(8, 80)).square().sum().backward()
        >>> opt.step()
    """

    _rule = rules.LION
    _optional = ClippedOptimizer._optional | {"maximize", "differentiable"}

    @lists_clip_settings
    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        **clip: Unpack[ClipSettings],
    ) -> None:
        check_not_negative(lr=lr, weight_decay=weight_decay)
        settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {**settings, "differentiable": False}, **clip)

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:  # lion-pytorch's know neither
            group.setdefault("maximize", False)
            group.setdefault("differentiable", False)
