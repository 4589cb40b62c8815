"""A row of a GPU's results: a model in a dtype, a clip, an update rule."""

import torch

from . import rows, timing
from .contenders import CLIPS, Contender, rule_of

# Steps per block: no more than the device's queue takes without making the host wait. A step of the loop has hundreds
# of launches, the steps of the others have few.
HOST_STEPS = {"loop": 1, "foreach": 4, "fused": 4, "fastclip": 4}
GRAPH_STEPS = 20  # steps in one graph: they share the time between two replays
GRAPH_TENSORS = 200  # tensors that the loop's graph updates, in at least one step


class Copy:
    """The memory's speed, as a copy from one place of the device to another reaches it."""

    BYTES = 8  # per element: one is read, one is written

    def __init__(self, elements, device):
        self.bytes = elements * self.BYTES
        self.source, self.target = torch.ones(elements, device=device), torch.empty(elements, device=device)

    def step(self):
        self.target.copy_(self.source)


def measure(problem, clip, rule, device, rounds):
    """Returns a row. Three times of each contender:

    - step: steps in a row, as a training loop takes them, by events. The host bounds it where models are small.
    - device: steps replayed from a CUDA graph, by events: the host has no part in it.
    - host: until the call returns.
    """
    contenders = rows.at_the_start(problem, clip, rule)
    row = rows.head(problem, clip, rule) | {"dtype": str(problem.dtype).removeprefix("torch."), "no_graph": {}}
    timers = {}
    for name, contender in contenders.items():
        timers["step", name] = timing.Timer(contender.step, device.block)
        timers["device", name] = device_timer(row, device, name, contender.step)
        timers["host", name] = timing.Timer(contender.step, device.host_block, HOST_STEPS[name])
    if clip == "norm":
        # In the same rounds, as the norm's cost is a ratio of the two.
        with_value = Contender("fastclip", problem.copy(), CLIPS["value"], rule)
        with_value.step()
        timers["device", "value"] = device_timer(row, device, "fastclip", with_value.step)
    copy = Copy(device.copy_elements, device.type)
    timers["copy", ""] = timing.Timer(copy.step, device.block)
    row["in_l2"] = in_l2(row, device.describe())
    row |= evaluate(row, timing.rounds(timers, rounds), copy.bytes)
    rows.require_normal(contenders, row)
    return row


def device_timer(row, device, name, step):
    """Returns a timer of a graph of steps; of steps in a row if they can't be captured, and the row then says why."""
    steps = GRAPH_STEPS if name != "loop" else max(1, min(GRAPH_STEPS, GRAPH_TENSORS // row["tensors"]))
    try:
        return timing.Timer(device.graph(step, steps), device.block, inside=steps)
    except RuntimeError as error:
        row["no_graph"][name] = str(error).splitlines()[0]
        return timing.Timer(step, device.block)


def evaluate(row, samples, copied):
    """Times, speed-ups and the part of the floor, from samples by (kind, contender)."""

    def of(kind):
        return {name: values for (k, name), values in samples.items() if k == kind}

    steps, on_device, on_host = of("step"), of("device"), of("host")
    own = on_device["fastclip"]
    speeds = [copied / seconds for seconds in samples["copy", ""]]
    floor = rows.least_bytes(row, itemsize(row))
    found = {
        "us_per_step": rows.microseconds(steps),
        "device_us": rows.microseconds(on_device),
        "host_us": rows.microseconds(on_host),
        **rows.speed_ups(steps),
        "device_vs_fused": rows.described(timing.ratios(on_device["fused"], own)),
        "host_vs_loop": rows.described(timing.ratios(on_host["loop"], on_host["fastclip"])),
        "copy_gb_per_s": rows.described(rows.scaled(1e-9, speeds)),
        "floor_bytes_per_parameter": floor,
    }
    if "value" in on_device:
        found["norm_vs_value"] = rows.described(timing.ratios(own, on_device["value"]))
    if row["parameters"] >= rows.LARGE:
        found["of_floor"] = rows.share_of_floor(row["parameters"] * floor, speeds, own)
    return found


def in_l2(row, gpu):
    """Returns whether the arrays of a step fit the device's L2 cache; None if its size is not known."""
    if not gpu or not gpu["l2_bytes"]:
        return None
    return (2 + len(rule_of(row).states)) * itemsize(row) * row["parameters"] <= gpu["l2_bytes"]


def itemsize(row):
    return getattr(torch, row["dtype"]).itemsize
