"""Runs that differ in clip and update alone: the same weights at the start, the same batches, in one loop.

On the CPU two arms with the same arithmetic stay equal to the bit. On a GPU they do not: torch's CTC loss adds up its
gradients in no fixed order there.
"""

import copy
import time

import torch

import fastclip

UNCLIPPED, LOOP, FASTCLIP = "no clipping", "Python loop", "fastclip"
MEASURED = ("losses", "norms", "norm_steps", "clamped", "step_seconds", "update_seconds")


def time_on(device):
    """Returns the time after all work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def name_of(device):
    """Returns the name of a GPU; "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


class Arm:
    """One of the runs: a model, its optimizer, and its measurements."""

    def __init__(self, name, model, make_optimizer, clip=None):
        self.name = name
        self.model = copy.deepcopy(model)
        self.params = list(self.model.parameters())
        self.device = self.params[0].device
        self.make_optimizer = make_optimizer
        self.optimizer = make_optimizer(self.params)
        self.clip = clip
        self.losses, self.step_seconds, self.update_seconds = [], [], []
        self.norms, self.norm_steps = [], []
        self.clamped = []  # the share of the gradients' elements, if known

    def step(self, loss_of, measure_norm):
        """One step; its times are kept only where the norm, which warms the caches, was not taken."""
        start = time_on(self.device)
        self.optimizer.zero_grad()
        loss = loss_of(self.model)
        loss.backward()
        if measure_norm:
            self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.params]).item())
            self.norm_steps.append(len(self.losses) + 1)
        before_update = time_on(self.device)
        self.update()
        end = time_on(self.device)
        if measure_norm and hasattr(self.optimizer, "clip_stats"):
            clamped = self.optimizer.clip_stats().clamped_fraction
            if clamped is not None:
                self.clamped.append(clamped.item())
        if not measure_norm:
            self.update_seconds.append(end - before_update)
            self.step_seconds.append(end - start)
        self.losses.append(loss.item())

    def update(self):
        """Clip and optimizer step, the one thing in which arms differ."""
        if self.clip is not None:
            self.clip(self.params)
        self.optimizer.step()

    def state_dict(self):
        measured = {name: getattr(self, name) for name in MEASURED}
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "measured": measured}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in MEASURED:
            setattr(self, name, state["measured"][name])


def make_arms(model, lr, momentum, clip_value):
    """SGD without a clip, SGD after the Python loop, and fastclip's, which has to end at the very bits of the loop."""

    def clip(params):
        for p in params:
            p.grad.data.clamp_(-clip_value, clip_value)

    def sgd(params):
        return torch.optim.SGD(params, lr, momentum)

    return [
        Arm(UNCLIPPED, model, sgd),
        Arm(LOOP, model, sgd, clip),
        Arm(FASTCLIP, model, lambda params: fastclip.SGD(params, lr, momentum, clip_value=clip_value)),
    ]


def step_all(arms, loss_of, taken):
    """The step after `taken` others in all arms, in changing order: what slows the machine slows all of them."""
    first = taken // 2 % len(arms)
    for arm in arms[first:] + arms[:first]:
        arm.step(loss_of, measure_norm=taken % 2 == 1)


def why_not_equal(device):
    """Returns why arms with the same arithmetic end at different bits on this device; None on the CPU."""
    if device.type == "cpu":
        return None
    return f"Bits are compared on the CPU only: on {device} torch's CTC loss adds up in no fixed order."


def first_difference(one, other):
    """Returns the first parameter or momentum buffer whose bits differ, or None; any NaN equals any other."""
    pairs = zip(one.model.named_parameters(), other.model.parameters(), strict=True)
    for (name, p), q in pairs:
        buffers = [arm.optimizer.state.get(x, {}).get("momentum_buffer") for arm, x in ((one, p), (other, q))]
        compared = [("parameter", p, q)]
        if any(buffer is not None for buffer in buffers):
            compared.append(("momentum buffer of", *buffers))
        for what, a, b in compared:
            if a is None or b is None:
                return f"{what} {name}, which only one of them has"
            same = (a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())
            if not same.all():
                return f"{what} {name}, in {(~same).sum()} of {same.numel()} places"
    return None
