"""Memory that clip and update allocate beside parameters and gradients."""

import copy
import os

import torch

# Otherwise torch's profiler writes a line to stderr when it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def allocated(update, device="cpu"):
    """Calls `update`, and returns the most bytes of tensors that it held on the device at one time: those that torch's
    profiler has seen, or on a GPU its allocator, in blocks of 512 bytes.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        update()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True) as profiler:
        update()
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def bytes_of_update(arm, loss_of):
    """Returns (bytes of the optimizer's state, most other bytes in the first two steps of a new optimizer)."""
    arm = copy.copy(arm)
    arm.model = copy.deepcopy(arm.model)
    arm.params = list(arm.model.parameters())
    loss_of(arm.model).backward()
    arm.optimizer = arm.make_optimizer(arm.params)

    def two_updates():
        arm.update()
        arm.update()

    peak = allocated(two_updates, arm.device)
    tensors = [value for state in arm.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    state = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return state, peak - state
