"""The norm of all gradients taken together, from sums that add up over tensors, devices and ranks: csrc/rules/clip.h
in plain torch."""

import math

import torch

# Squares of magnitudes below or above would vanish or overflow: they are summed scaled by powers of two (Blue, 1978).
SMALL, SCALE_SMALL = 2.0**-500, 2.0**600
BIG, SCALE_BIG = 2.0**480, 2.0**-600


def measure_of(grads, norm_type=2.0):
    """Sums of the squares of small, medium and big magnitudes, float64 [3] on the first gradient's device; for the inf
    norm the largest magnitude, in the middle."""
    device = next((grad.device for grad in grads), torch.device("cpu"))
    total = torch.zeros(3, dtype=torch.float64, device=device)
    for grad in grads:
        if grad.numel() > 0:
            total = combined(total, _measure(grad, norm_type).to(device), norm_type)
    return total


def combined(a, b, norm_type):
    """The measure of what two measures were taken of."""
    return torch.maximum(a, b) if norm_type == math.inf else a + b


def norm_of(measure, norm_type=2.0):
    """The norm, as a float64 scalar."""
    small, medium, big = measure.unbind()
    if norm_type == math.inf:
        return medium
    # One square root: the gradient of one that is not taken would be infinite, and 0 times that is NaN.
    are_big, are_small = big > 0, medium < 1e-200
    scale = torch.ones_like(medium).masked_fill(are_small, SCALE_SMALL).masked_fill(are_big, SCALE_BIG)
    extreme = torch.where(are_big, big, torch.where(are_small, small, 0.0))
    return (extreme + medium * scale * scale).sqrt() / scale


def total_norm(grads, norm_type=2.0):
    """The norm of all `grads` taken together, as a float64 scalar on the first one's device.

    Unlike `torch.nn.utils.get_total_norm` it is right for every finite input: gradients of 1e20 do not overflow, those
    of 1e-25 do not vanish, and a million of them do not lose the sixth digit.
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
