"""What a step should take, from bytes, launches, messages and tensors: docs/scaling.md explains it."""

import math
from dataclasses import dataclass

from .shapes import MODELS

US, MS = 1e-6, 1e-3


@dataclass(frozen=True)
class Layout:
    """Bytes of the numbers that belong to one parameter. With a master copy, the step reads and writes that, and writes
    the parameter."""

    title: str
    param: int
    grad: int
    state: int
    master: int = 0

    def held(self, states):
        """Bytes of memory per parameter."""
        return self.param + self.master + self.grad + states * self.state

    def moved(self, states, clip):
        """Bytes that fastclip's step moves per parameter."""
        written = self.param + 2 * self.master if self.master else 2 * self.param
        return (2 if clip == "norm" else 1) * self.grad + written + 2 * states * self.state

    def moved_by_torch(self, states, clip):
        """The same of torch.nn.utils.clip_grad_*_ and a fused optimizer: two clamps, or a norm and a product."""
        return self.moved(states, "value") + {"value": 4, "norm": 3}[clip] * self.grad


FLOAT32 = Layout("float32", 4, 4, 4)
MIXED = Layout("bfloat16, master and states float32", 2, 2, 4, master=4)
LAYOUTS = [
    FLOAT32,
    Layout("bfloat16", 2, 2, 2),
    MIXED,
    Layout("bfloat16, gradients, master and states float32", 2, 4, 4, master=4),
]


@dataclass(frozen=True)
class Machine:
    """What a device and its host are assumed to do."""

    bytes_per_s: float
    s_per_launch: float
    s_per_call: float  # the host's, whatever the number of tensors
    s_per_tensor: float  # the host's
    s_per_dtensor: float = 0.0  # the host's, where tensors are sharded
    s_per_message: float = 0.0  # the host's, to enqueue one
    devices_per_node: int = 8


def has_message(clip, devices):
    """Whether shards have to be told the norm of all."""
    return clip == "norm" and devices > 1


def host_seconds(machine, tensors, clip="value", devices=1):
    message = machine.s_per_message if has_message(clip, devices) else 0.0
    return machine.s_per_call + message + tensors * (machine.s_per_dtensor if devices > 1 else machine.s_per_tensor)


def device_seconds(machine, elements, layout, states, clip, devices=1):
    """Launches, both passes, and between them the message that makes one norm of all shards."""
    passes = elements * layout.moved(states, clip) / machine.bytes_per_s
    if not has_message(clip, devices):
        return machine.s_per_launch + passes
    return 2 * machine.s_per_launch + passes + all_reduce_seconds(devices, machine.devices_per_node)


def step_seconds(machine, elements, tensors, layout, states, clip, devices=1):
    """The host hands over while the device works on what came before: whoever takes longer bounds a step."""
    on_device = device_seconds(machine, elements, layout, states, clip, devices)
    return max(host_seconds(machine, tensors, clip, devices), on_device)


def all_reduce_seconds(devices, per_node=8):
    """Of a few bytes, by the latencies that NCCL itself plans with: the tree or the ring, whichever is faster, in its
    low-latency protocol, over NVLink and a network.

    Source: https://github.com/NVIDIA/nccl/blob/01afd20a77b5804e0ecf1042509dd9d20ebf9e93/src/graph/tuning.cc
    """
    if devices == 1:
        return 0.0
    nodes = math.ceil(devices / per_node)
    ring_of_nodes = 2 * (nodes - 1)
    slower = 1.8 if nodes > 1 else 1.0  # what one hop within a node takes while there are several
    tree = 4.4 + 2 * ((devices // nodes - 1) * 0.52 * slower + int(math.log2(nodes)) * 5.0)
    ring = 3.6 + (2 * (devices - 1) - ring_of_nodes) * 0.47 * slower + ring_of_nodes * 2.7
    return min(tree, ring) * US


def shard(shapes, devices, rank=0):
    """Elements and tensors that are not empty on a rank of FSDP2, which cuts each tensor along its first dimension into
    pieces of the same number of rows, but for the last ones. Rank 0 has the most."""
    elements = tensors = 0
    for shape in shapes:
        rows, rest = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        each = math.ceil(rows / devices)
        here = max(0, min(each, rows - rank * each))
        elements += here * rest
        tensors += here > 0
    return elements, tensors


def devices_where_the_host_takes_over(machine, model, layout, states, clip):
    """So many devices share a model that reading and writing a shard takes no longer than handing it over."""
    shapes = MODELS[model]
    bytes_in_that_time = host_seconds(machine, len(shapes), clip, devices=2) * machine.bytes_per_s
    return sum(map(math.prod, shapes)) * layout.moved(states, clip) / bytes_in_that_time
