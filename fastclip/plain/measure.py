"""The norm of all gradients taken together, from sums that add up over tensors, devices and ranks: csrc/rules/measure.h
in plain torch."""

import math

import torch

# Squares of magnitudes below SMALL may vanish, those above BIG overflow: these are summed scaled by powers of two
# (Blue, 1978).
SMALL, SCALE_SMALL = 2.0**-500, 2.0**600
BIG, SCALE_BIG = 2.0**480, 2.0**-600


def measure_of(grads, norm_type=2.0, device=None):
    """Returns the sums of squares of small, medium and big magnitudes, float64 [3] on the first gradient's device; for
    the inf norm the largest magnitude, in the middle."""
    device = device or next((grad.device for grad in grads), torch.device("cpu"))
    total = torch.zeros(3, dtype=torch.float64, device=device)
    for grad in grads:
        if grad.numel() > 0:
            total = combined(total, _measure(grad, norm_type).to(device), norm_type)
    return total


def combined(a, b, norm_type):
    """Returns the measure of two sets of gradients from the measures of each."""
    return torch.maximum(a, b) if norm_type == math.inf else a + b


def multiplied(measure, factor, norm_type):
    """Returns the measure of the same numbers, each multiplied by `factor`, a number or a scalar tensor. With 0 nothing
    is left, not even of an inf."""
    factor = torch.as_tensor(factor, dtype=measure.dtype, device=measure.device)
    product = measure * (factor if norm_type == math.inf else factor * factor)
    return torch.where(factor == 0, torch.zeros_like(measure), product)


def norm_of(measure, norm_type=2.0):
    """Returns the norm of a measure, as a float64 scalar."""
    small, medium, big = measure.unbind()
    if norm_type == math.inf:
        return medium
    # One square root only. The gradient of one that is not used would be infinite, and 0 times that is NaN.
    are_big, are_small = big != 0, medium < 1e-200  # a NaN stays
    scale = torch.ones_like(medium).masked_fill(are_small, SCALE_SMALL).masked_fill(are_big, SCALE_BIG)
    extreme = torch.where(are_big, big, torch.where(are_small, small, 0.0))
    return (extreme + medium * scale * scale).sqrt() / scale


def total_norm(grads, norm_type=2.0):
    """Returns the norm of all `grads` taken together, as a float64 scalar on the first one's device.

    Unlike `torch.nn.utils.get_total_norm` it is right for every finite input: gradients of 1e20 do not overflow,
    gradients of 1e-25 do not vanish, and the norm of a million gradients is right in the sixth digit.
    """
    return norm_of(measure_of(grads, norm_type), norm_type)


def _measure(grad, norm_type):
    if norm_type == math.inf:
        largest = grad.abs().amax().double()
        return torch.stack([torch.zeros_like(largest), largest, torch.zeros_like(largest)])
    x = (torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad).double()
    small, big = x.abs() < SMALL, x.abs() > BIG
    scaled = [
        torch.where(small, x * SCALE_SMALL, 0.0),
        torch.where(small | big, 0.0, x),  # a NaN goes here
        torch.where(big, x * SCALE_BIG, 0.0),
    ]
    return torch.stack([part.square().sum() for part in scaled])
