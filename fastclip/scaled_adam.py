"""icefall's ScaledAdam with clipping, in two passes."""

from collections.abc import Iterable
from typing import Any

from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from . import icefall_states
from .arguments import check_not_negative, groups_among
from .optimizer import ClippedOptimizer
from .plain import rules
from .plain.weighted_clip import MODEL_NORMS, NUMBERS, quartiles
from .settings import ClipSettings, lists_clip_settings


class ScaledAdam(ClippedOptimizer):
    r"""Adam whose steps are as large as their parameter, and which learns that size. icefall's, for Zipformer.

    For each parameter of more than one element, with g its gradient after all clips and rms the root mean square of the
    parameter, taken every `size_update_period` steps::

        v = beta2 * v + (1 - beta2) * g²
        change = -lr * max(rms, param_min_rms) * g / (√(v / (1 - beta2^t)) + eps)
        change = change + s * param, every `size_update_period` steps
        delta = beta1 * delta + (1 - beta1) * change
        param = param + delta

    s is a step of Adam on the logarithm of the size: -lr * scalar_lr_scale times the sum of the derivatives Σ param * g
    of the period, divided by the root of their average square; from -0.1 to 0.1, and so that the rms stays below
    param_max_rms. A parameter of one element has lr * scalar_lr_scale, no s, and magnitudes up to scalar_max.

    With `clipping_scale`, the norm of a group's gradients, each parameter's times its rms (that of one element times
    scalar_lr_scale), is limited to `clipping_scale` times the median of the last `clipping_update_period` norms. The
    limit follows the median once in that many steps, and after 10, 20 and 40 steps, then twice as high. The first step
    is not clipped.

    A step reads parameters and gradients for its sums, then takes Adam's 28 bytes for each float32 element: 36 in all.
    It differs from icefall's in four points. A parameter without a gradient stays as it is; there its gradient is
    zeros. With a clip, a step with an inf or NaN in a gradient is left out; there the gradients become zeros. Gradients
    are left as they were. Sums are taken in double.

    Its state is `delta`, `exp_avg_sq`, `step` and a row of numbers, `sizes`; `model_norms` beside one parameter of each
    group. `load_state_dict` takes icefall's checkpoints as well, and `icefall_state_dict` writes them. DTensors
    are refused, and parameters on several devices are stepped in plain torch.

    Args:
        params: as in `torch.optim.AdamW`, or icefall's groups, with `named_params`.
        lr (float): learning rate, relative to the size of a parameter.
        clipping_scale (float, optional): the limit, in medians. None: no clip.
        betas ((float, float)): the weights of the old change, and of the old average of squares.
        scalar_lr_scale (float): of lr, for sizes and for parameters of one element.
        eps (float): is added to roots of averages.
        param_min_rms, param_max_rms (float): bounds of the rms that is learnt.
        scalar_max (float): the largest magnitude of a parameter of one element.
        size_update_period (int): steps after which sizes change.
        clipping_update_period (int): steps after which the limit follows the median.
        maximize (bool): moves up the gradients.
        clip_value, max_norm, skip_norm, skip_nonfinite: as in `fastclip.SGD`, before `clipping_scale`.
            skip_nonfinite is True where a group has a clipping_scale.
        norm_type (float): 2.
        norm_scope (str): "global" or "parameter".
        master_weights, stochastic_rounding, rounding_seed: as in `fastclip.SGD`.
        momentum_dtype (torch.dtype, optional): of `delta`.
        state_bits (int): 32; 8 is refused.

    Raises:
        ValueError: a negative number, a period below 1, betas outside of [0, 1), a clipping_scale with
            skip_nonfinite=False; and as `fastclip.Adam`.
        TypeError: a DTensor, at the first step.

    Source: Yao et al. (2023), https://arxiv.org/abs/2310.11230; icefall's `zipformer/optim.py`.

    Example:
        >>> model = torch.nn.Linear(80, 64)
        >>> opt = fastclip.ScaledAdam(model.named_parameters(), lr=0.045, clipping_scale=2.0)
        >>> model(torch.randn(8, 80)).square().sum().backward()
        >>> opt.step()
    """

    _rule = rules.SCALED_ADAM
    _optional = ClippedOptimizer._optional | {"weight_decay", "maximize", "differentiable"}

    @lists_clip_settings
    def __init__(
        self,
        params: ParamsT | Iterable[dict[str, Any]],
        lr: float = 3e-2,
        clipping_scale: float | None = None,
        betas: tuple[float, float] = (0.9, 0.98),
        scalar_lr_scale: float = 0.1,
        eps: float = 1e-8,
        param_min_rms: float = 1e-5,
        param_max_rms: float = 3.0,
        scalar_max: float = 10.0,
        size_update_period: int = 4,
        clipping_update_period: int = 100,
        *,
        maximize: bool = False,
        **clip: Unpack[ClipSettings],
    ) -> None:
        numbers = {
            "lr": lr,
            "scalar_lr_scale": scalar_lr_scale,
            "eps": eps,
            "param_min_rms": param_min_rms,
            "param_max_rms": param_max_rms,
            "scalar_max": scalar_max,
            "size_update_period": size_update_period,
            "clipping_update_period": clipping_update_period,
        }
        check_not_negative(**numbers)
        for scale in [clipping_scale, *(group.get("clipping_scale") for group in groups_among(params))]:
            if scale is not None:
                check_not_negative(clipping_scale=scale)
                clip.setdefault("skip_nonfinite", True)
        settings = {**numbers, "clipping_scale": clipping_scale, "betas": betas, "weight_decay": 0.0}
        super().__init__(params, {**settings, "maximize": maximize, "differentiable": False}, **clip)

    def _check_group(self, group):
        if group["weight_decay"] != 0:
            raise ValueError(f"weight_decay in param_groups[{len(self.param_groups)}] must be 0: ScaledAdam has none")
        super()._check_group(group)

    def __setstate__(self, state):
        for group in state.get("param_groups", []):  # icefall's know none of them
            group.setdefault("weight_decay", 0.0)
            group.setdefault("maximize", False)
            group.setdefault("differentiable", False)
            if group.get("clipping_scale") is not None:
                group.setdefault("skip_nonfinite", True)
        super().__setstate__(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this optimizer or of icefall's, which keeps the states of all parameters of a shape in
        one tensor.

        Example:
            >>> opt = fastclip.ScaledAdam(model.parameters(), clipping_scale=2.0)
            >>> checkpoint = {"optimizer": opt.icefall_state_dict()}
            >>> opt.load_state_dict(checkpoint["optimizer"])
        """
        super().load_state_dict(icefall_states.taken_apart(state_dict, self.param_groups))

    def icefall_state_dict(self) -> dict[str, Any]:
        """Returns the state as icefall's ScaledAdam loads it.

        Raises:
            ValueError: parameters of a shape have taken different numbers of steps, which icefall counts together.

        Example:
            >>> opt = fastclip.ScaledAdam(model.parameters(), clipping_scale=2.0)
            >>> model(x).sum().backward(); opt.step()
            >>> torch.save({"optimizer": opt.icefall_state_dict()}, "epoch-30.pt")
        """
        return icefall_states.put_together(self.state_dict(), self.param_groups)

    def clipping_report(self, group: int = 0) -> str:
        """Returns the line that icefall logs of its clip: quartiles of norms, threshold, share of steps clipped.

        Waits for the device.

        Args:
            group (int): the place among `param_groups`.

        Raises:
            RuntimeError: the group has no `clipping_scale`.

        Example:
            >>> opt = fastclip.ScaledAdam(model.parameters(), clipping_scale=2.0)
            >>> for _ in range(11):
            ...     model(x).sum().backward(); opt.step()
            >>> log({"clip": opt.clipping_report()})
        """
        settings = self.param_groups[group]
        scale = settings["clipping_scale"]
        if scale is None:
            raise RuntimeError(f"param_groups[{group}] has no clipping_scale, and so no norms to tell of")
        entries = [self.state.get(param, {}) for param in settings["params"]]
        memory = next((entry[MODEL_NORMS].tolist() for entry in entries if MODEL_NORMS in entry), [0.0] * NUMBERS)
        step = max((int(entry["step"]) for entry in entries if "step" in entry), default=0)
        norms = " ".join(f"{norm:.3e}" for norm in quartiles(memory, step))
        threshold, _, clipped, steps, *_ = memory
        share = 100 * clipped / steps if steps else 0.0
        return (
            f"Clipping_scale={scale}, grad-norm quartiles {norms}, threshold={threshold:.3e}, "
            f"percent-clipped={share:.1f}"
        )

    def dominating_parameter(self, group: int = 0) -> tuple[str, float]:
        """Returns the name of the parameter with the largest share of the norm that `clipping_scale` limits, in the
        last step, and its share of the square of that norm, from 0 to 1. Waits for the device.

        Args:
            group (int): the place among `param_groups`.

        Raises:
            RuntimeError: there was no step, or the group has no parameter.

        Example:
            >>> opt = fastclip.ScaledAdam(model.named_parameters(), clipping_scale=2.0)
            >>> model(x).sum().backward(); opt.step()
            >>> name, share = opt.dominating_parameter()
        """
        names, norms = self.norms_by_parameter()
        first = sum(len(other["params"]) for other in self.param_groups[:group])
        settings = self.param_groups[group]
        squares = {}
        for place, param in enumerate(settings["params"], start=first):
            sizes = self.state.get(param, {}).get("sizes")
            size = 0.0 if sizes is None else float(sizes[0])
            squares[names[place]] = float(norms[place] * rules.weight_in_scaled_adam(settings, param, size)) ** 2
        if not squares:
            raise RuntimeError(f"param_groups[{group}] has no parameters")
        name = max(squares, key=squares.__getitem__)
        total = sum(squares.values())
        return name, squares[name] / total if total else 0.0
