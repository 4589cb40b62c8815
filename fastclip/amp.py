"""Decides which gradient scalers leave unscaling, and the verdict to skip, to the optimizer's step."""

import sys

import torch

from .settings import LIMITS

# torch's methods that unscale, or decide whether a step is taken. `update` does neither: it reads the same findings
# either way.
_TORCHS_METHODS = {
    name: getattr(torch.amp.GradScaler, name) for name in ("step", "unscale_", "_unscale_grads_", "_maybe_opt_step")
}

IN_BACKWARD = (
    "step_in_backward has stepped on gradients that GradScaler had scaled, and the parameters are wrong: load them "
    "again, and train without one of the two (bfloat16 needs no GradScaler)"
)


class SupportsAmpScaling:
    """`_step_supports_amp_scaling`, which `GradScaler.step` asks for. If it is true, the scaler leaves all to the step,
    in `optimizer.grad_scale` and `optimizer.found_inf`, and does not call its own methods.

    It is false for a scaler that has methods of its own, such as FSDP's `ShardedGradScaler`, which makes one verdict
    for all ranks. Nothing in the arguments reveals which scaler asks, so its frame is looked for on the stack.
    """

    def __get__(self, optimizer, owner=None):
        if optimizer is None:
            return True
        if not vars(optimizer).get("_step_supports_amp_scaling", True):
            return False
        scaler = _scaler_that_asks(sys._getframe(1))
        if scaler is not None and optimizer._in_backward is not None:
            raise RuntimeError(IN_BACKWARD)
        return _is_torchs(scaler) if scaler is not None else _leaves_clipping_to(optimizer, sys._getframe(1))

    def __set__(self, optimizer, value):
        vars(optimizer)["_step_supports_amp_scaling"] = value  # torch's __init__ sets it if fused=True


def _scaler_that_asks(frame):
    """Returns the scaler that asks, or None: Lightning asks, too, see `_leaves_clipping_to`."""
    while frame is not None:
        if frame.f_code.co_name == "step":
            caller = frame.f_locals.get("self")
            if hasattr(type(caller), "unscale_"):
                return caller
        frame = frame.f_back
    return None


def _leaves_clipping_to(optimizer, frame):
    """Returns what to answer Lightning's plugin for mixed precision. It asks whether the step unscales: then the
    plugin does not unscale, and refuses to clip. So the answer is no where nothing is scaled (bfloat16), or where the
    optimizer has no clip of its own, and the plugin's may be wanted. Anybody else gets a yes."""
    for _ in range(3):
        if frame is None:
            break
        plugin = frame.f_locals.get("self")
        if hasattr(type(plugin), "clip_gradients") and hasattr(plugin, "scaler"):
            own = any(
                group.get(name) is not None for group in optimizer.param_groups for name in ("clip_value", *LIMITS)
            )
            return plugin.scaler is not None and own
        frame = frame.f_back
    return True


def _is_torchs(scaler):
    """Returns whether all methods that decide are torch's: not the scaler's, its class's, or put into torch's class."""
    return all(
        getattr(getattr(scaler, name, None), "__func__", None) is torchs for name, torchs in _TORCHS_METHODS.items()
    )
