"""Parameters and gradients of a model to work on, with a copy for every contender."""

import torch

from .contenders import CONTENDERS

GRADS_STD = 0.02  # of the first gradients


class Problem:
    """The start of all contenders, and the memory of each: kept from the check to the last measurement, as the first
    touch of memory takes longer than many steps."""

    def __init__(self, model, shapes, seed=0, device="cpu", dtype=torch.float32, contenders=tuple(CONTENDERS)):
        generator = torch.Generator(device).manual_seed(seed)

        def random(shape):
            return torch.randn(shape, generator=generator, device=device, dtype=dtype)

        self.model, self.device, self.dtype = model, torch.device(device), dtype
        self.params = [0.05 * random(shape) for shape in shapes]
        # A value clip at 0.01 cuts more than half of these.
        self.grads = [GRADS_STD * random(shape) for shape in shapes]
        self.numel = sum(p.numel() for p in self.params)
        self.copies = {name: self.copy() for name in contenders}

    def copy(self, dtype=None):
        """Parameters with gradients."""
        dtype = dtype or self.dtype
        copies = [torch.nn.Parameter(p.to(dtype, copy=True)) for p in self.params]
        for p, grad in zip(copies, self.grads, strict=True):
            p.grad = grad.to(dtype, copy=True)
        return copies

    @torch.no_grad()
    def reset_params(self, copies, from_zero=False):
        """Parameters of a copy back to the start, or to 0."""
        for p, origin in zip(copies, self.params, strict=True):
            p.zero_() if from_zero else p.copy_(origin)

    def reset_grads(self, copies, factor=1.0):
        """Sets the gradients of a copy to factor times the first gradients."""
        for p, grad in zip(copies, self.grads, strict=True):
            torch.mul(grad, factor, out=p.grad)


def is_normal(tensors, elements=2**16):
    """Returns whether the first elements are 0 or normal: denormals, infinities and NaN have timings of their own."""
    tiny = torch.finfo(torch.float32).tiny
    heads = (t.detach().flatten()[:elements] for t in tensors)
    return all(((t == 0) | ((t.abs() >= tiny) & t.isfinite())).all() for t in heads)
