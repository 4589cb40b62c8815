"""The clip of ScaledAdam: csrc/rules/weighted_clip.h in plain Python.

What it remembers is a float64 tensor: [threshold, steps that were clipped since it was set, the same in the time
before, the number of steps of that time], and the norms of the last `period` steps.
"""

import torch

from ..reasons import no_tensor

MODEL_NORMS = "model_norms"  # in the state, beside one parameter of a group
NUMBERS = 4  # before the norms
EARLY = (10, 20, 40)


def adopted(memory, period, device):
    """Returns a memory that fits of one that may not: it is on another device, of another period, or of another dtype.
    Norms of another period are left behind; the threshold stays.

    Raises:
        TypeError: it is no tensor.
    """
    if not isinstance(memory, torch.Tensor):
        raise no_tensor(f"the {MODEL_NORMS} of a group", memory)
    numbers = memory.detach().flatten().double().tolist()
    if len(numbers) != NUMBERS + period:
        numbers = [*numbers[:NUMBERS], *[0.0] * (NUMBERS - len(numbers)), *[0.0] * period]
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def coefficient_of_step(scale, period, memory, step, norm):
    """Remembers the norm of a step, counted from 0, and returns the factor of its gradients. `memory` is a list, which
    changes."""
    if step == 0:
        return 1.0
    memory[NUMBERS + step % period] = norm
    early = step in EARLY and step < period
    if step % period == 0 or early:
        count = step if early else period
        norms = sorted(memory[NUMBERS:])[-count:]
        median = norms[min(count - 1, count // 4 * 2)]
        memory[:NUMBERS] = scale * median * (2 if early else 1), 0.0, memory[1], float(count)
    threshold = memory[0]
    if threshold == 0 or not threshold / (norm + 1e-20) < 1:
        return 1.0
    memory[1] += 1
    return threshold / (norm + 1e-20)


def quartiles(memory, step):
    """Returns the five quartiles of the norms that there are after `step` steps, as icefall logs them."""
    count = min(max(step - 1, 0), len(memory) - NUMBERS)
    norms = sorted(memory[NUMBERS:])[len(memory) - NUMBERS - count :]
    return [norms[min(count - 1, count // 4 * quarter)] for quarter in range(5)] if norms else [0.0] * 5
