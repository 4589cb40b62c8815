"""The same step four times: backward pass, value clip and SGD with momentum, in less and less memory."""

import torch

import fastclip

from .ways import trainable

MOMENTUM, CLIP_VALUE = 0.9, 0.01


def plain_torch(model, lr):
    """All gradients, then the clip, then the update: 8 bytes per parameter beside the weights."""
    params = trainable(model)
    optimizer = torch.optim.SGD(params, lr, MOMENTUM)

    def step(loss):
        loss.backward()
        torch.nn.utils.clip_grad_value_(params, CLIP_VALUE)
        optimizer.step()
        optimizer.zero_grad()

    return step


def torch_in_hooks(model, lr):
    """torch's tutorial "How to save memory by fusing the optimizer step into the backward pass": 4 bytes."""
    params = trainable(model)
    optimizers = {p: torch.optim.SGD([p], lr, MOMENTUM) for p in params}

    def update(p):
        p.grad.clamp_(-CLIP_VALUE, CLIP_VALUE)
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in params:
        p.register_post_accumulate_grad_hook(update)
    return lambda loss: loss.backward()


def in_backward(model, lr, momentum_dtype=None):
    """fastclip's, with torch's bits: 4 bytes."""
    optimizer = fastclip.SGD(trainable(model), lr, MOMENTUM, clip_value=CLIP_VALUE, momentum_dtype=momentum_dtype)
    hooks = fastclip.step_in_backward(model, optimizer)

    def step(loss, hooks=hooks):  # keeps the optimizer
        loss.backward()

    return step


def in_backward_bfloat16(model, lr):
    """fastclip's, with momentum in bfloat16: 2 bytes."""
    return in_backward(model, lr, torch.bfloat16)


STEPS = {
    "torch": plain_torch,
    "torch, hooks": torch_in_hooks,
    "fastclip": in_backward,
    "fastclip, bfloat16": in_backward_bfloat16,
}
BYTES = {"torch": 8, "torch, hooks": 4, "fastclip": 4, "fastclip, bfloat16": 2}  # per parameter, beside its weight
