"""Which gradient scalers leave unscaling, and the verdict to skip, to the optimizer's step."""

import sys

import torch

# What unscales, or decides whether a step is taken. `update` does neither: it reads the same findings in both ways.
_OF_TORCH = {
    name: getattr(torch.amp.GradScaler, name) for name in ("step", "unscale_", "_unscale_grads_", "_maybe_opt_step")
}

IN_BACKWARD = (
    "step_in_backward has stepped on gradients that GradScaler had scaled, and the parameters are wrong: load them "
    "anew, and train without one of the two (bfloat16 needs no GradScaler)"
)


class SupportsAmpScaling:
    """`_step_supports_amp_scaling`, which `GradScaler.step` asks for: if it is true, the scaler leaves all to the step,
    in `optimizer.grad_scale` and `optimizer.found_inf`, and passes its own methods by.

    So it is false where a scaler asks that has methods of its own, such as FSDP's `ShardedGradScaler`, which makes one
    verdict of all ranks. Nothing that it hands over tells which one asks, so its frame has to.
    """

    def __get__(self, optimizer, owner=None):
        if optimizer is None:
            return True
        if not vars(optimizer).get("_step_supports_amp_scaling", True):
            return False
        scaler = _scaler_that_asks(sys._getframe(1))
        if scaler is not None and optimizer._in_backward is not None:
            raise RuntimeError(IN_BACKWARD)
        return scaler is None or _is_torchs(scaler)

    def __set__(self, optimizer, value):
        vars(optimizer)["_step_supports_amp_scaling"] = value  # torch's __init__ does where fused=True


def _scaler_that_asks(frame):
    """None where it is no scaler that asks: Lightning wants to know whether it may clip."""
    while frame is not None:
        if frame.f_code.co_name == "step":
            asks = frame.f_locals.get("self")
            if hasattr(type(asks), "unscale_"):
                return asks
        frame = frame.f_back
    return None


def _is_torchs(scaler):
    """Whether no method of it that decides is its own, its class's, or put into torch's class since."""
    return all(getattr(getattr(scaler, name, None), "__func__", None) is torchs for name, torchs in _OF_TORCH.items())
