"""torch.optim.SGD with clipping, in one pass."""

import torch
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from .optimizer import ClippedOptimizer
from .plain import rules
from .settings import ClipSettings, lists_clip_settings


class SGD(ClippedOptimizer, torch.optim.SGD):
    r"""`torch.optim.SGD` that clips the gradients in the same pass over memory.

    Equivalent to::

        torch.nn.utils.clip_grad_value_(params, clip_value)  # if clip_value is given
        torch.nn.utils.clip_grad_norm_(params, max_norm)     # if max_norm is given
        torch.optim.SGD(params, ...).step()

    except that the gradients stay as they were. With a value clip, or without a clip, the bits are torch's on the CPU
    in float32 and float64. The norm is more exact than torch's (1e-6 for any finite input). 16-bit parameters are
    computed in float32 and rounded once; their gradients may be float32 (`p.grad_dtype = torch.float32`).

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, differentiable: as in `torch.optim.SGD`.
        foreach, fused: accepted and not needed; the step is fused in any case.
        clip_value (float or (float, float), optional): gradients are clamped to [-clip_value, clip_value], or to
            [low, high]. Can be set per group. Units: those of the gradient.
        max_norm (float or rule, optional): gradients are scaled down so that their norm over all groups is at most
            this. 0 is allowed; inf only measures, see `total_norm`. A rule derives it from the norms of past steps:
            `fastclip.QuantileNorm`, `fastclip.EmaNorm`, either as a dict, or "quantile" or "ema" for its defaults.
        skip_norm (float or rule, optional): a step with a larger norm, or one that is not finite, is left out: it
            changes nothing, and counts in `skipped_steps`. inf leaves out none.
        norm_type (float): 2 or inf; of all norms here.
        norm_scope (str): "global": `max_norm` limits the norm over all groups. "group", "parameter": it limits that of
            each group, or of each parameter's gradient, by itself; groups may then have different ones. A rule then
            looks at the past norms of each. `max_change` and `max_relative_change` are limits on each, too.
            `skip_norm` is over all groups in any case.
        max_change (float, optional): the largest change of the parameters, as a norm over all groups, that the
            gradients of a step make in the end: lr * (1 - dampening) / (1 - momentum) * norm of the gradients after
            their clips, each group with its own settings. Gradients are scaled down to it. Units: those of the
            parameters. Kaldi's `max-param-change`, with momentum counted.
        max_relative_change (float, optional): the same limit, as a fraction of the norm of all parameters: 0.03 is 3 %.
            Frozen parameters do not count. Parameters whose root mean square is below 1e-3 are taken for that large, so
            that a model of zeros moves. With several of these limits, the smallest factor holds. inf only measures, see
            `clip_stats`.
        norm_process_group (ProcessGroup or list of them, optional): its ranks hold other parameters, as the stages of a
            pipeline do, whose gradients count in the norm; all of them have to step together.
        norm_replicated (bool): all ranks of the `norm_process_group` have the parameters of this group, with the same
            gradients, as those of layers beside experts. They count once.
        skip_nonfinite (bool): leaves parameters and momentum as they are if any gradient holds an inf or NaN, even one
            that a value clip would bound; see `skipped_steps`. Reads the gradients once more, unless `max_norm` does
            already. By default, as in torch, such values take their course, except that a rule implies True.
        master_weights (bool): 16-bit parameters have a float32 copy in the state, `master_param`. Each step updates the
            copy and rounds it to the parameter. All states of the parameter are float32. The first step makes the copy;
            later steps undo other changes of the parameter.
        stochastic_rounding (bool): values stored in 16 bits are rounded up or down at random, so that they are right on
            average. Parameters learn the small updates that rounding to nearest loses, with no more memory. Each
            parameter then counts its steps in the state, as `step`. The bits depend on this count, on `rounding_seed`
            and on the parameter's place among the groups: they are the same in every run, on any number of threads and
            on a GPU.
        rounding_seed (int): from 0 to 2**32 - 1.
        momentum_dtype (torch.dtype, optional): dtype of `momentum_buffer`; by default the gradient's, or float32 with
            `master_weights`. bfloat16 halves the memory for a float32 parameter's momentum.
        state_bits (int): 8 keeps the momentum of parameters with 4096 elements or more in 8 bits: `uint8` codes of the
            parameter's shape, and a float32 scale for each 256 of them. 32, the default, leaves states in float32, or
            in the parameter's dtype. See `fastclip.dequantized`, which writes such states for torch.

    Raises:
        ValueError: a negative or NaN threshold, low > high, another norm type, a limit on the change with a momentum of
            1 or more, `max_update_rms`, or one of `max_norm`, `skip_norm`, `max_change`, `max_relative_change`,
            `norm_type`, `norm_scope` and `skip_nonfinite` different between groups; with a `norm_scope` other than
            "global", the first and the limits on the change may differ.
        TypeError: a value that is not a number.

    Sources: value clip, Mikolov (2012), and the article this project started from; norm clip, Pascanu et al. (2013),
    https://arxiv.org/abs/1211.5063; limit on the change, Kaldi's nnet3, https://kaldi-asr.org/doc/dnn3.html.

    Example:
        >>> model = torch.nn.Linear(80, 64)
        >>> opt = fastclip.SGD(model.parameters(), lr=0.01, momentum=0.9, clip_value=0.01)
        >>> model(torch.randn(8, 80)).square().sum().backward()
        >>> opt.step()
    """

    _rule = rules.SGD

    @lists_clip_settings
    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **clip: Unpack[ClipSettings],
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            **clip,
        )
