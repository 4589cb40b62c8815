"""States in 8 bits, in plain torch: csrc/rules/quantized.h says what codes mean."""

import math
from typing import NamedTuple

import torch

from ..distributed import is_dtensor, local_of, placed_as
from .rounding import SIXTEEN_BIT, state_dtype

BLOCK = 256  # elements with a scale of their own
LEAST = 4096  # elements of a parameter whose states are quantized
LEVELS = 8
CODES, SCALES = "_codes", "_scales"  # what their names end with


class Quantized(NamedTuple):
    """A state.

    Attributes:
        codes (Tensor): uint8, of the parameter's shape and strides.
        scales (Tensor): float32, for each block the largest magnitude; blocks follow each other in memory.
        signed (bool): whether there are negative numbers.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    signed: bool

    def values(self):
        """Returns the numbers that the codes stand for, float32."""
        flat = in_order_of_memory(self.codes)
        table = code_values(self.signed).to(flat.device)
        scales = self.scales.reshape(-1).repeat_interleave(BLOCK)[: flat.numel()]
        values = torch.empty_like(self.codes, dtype=torch.float32)
        in_order_of_memory(values).copy_(table[flat.long()] * scales)
        return values

    def store(self, values):
        """Writes float32 numbers."""
        flat = in_order_of_memory(torch.empty_like(self.codes, dtype=torch.float32).copy_(values))
        blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        largest = blocks.abs().amax(1)
        scales = torch.where(largest <= 2.0**126, largest, largest * math.inf)
        scales = torch.where(largest < 2.0**-126, 0.0, scales)
        inverse = torch.where((largest >= 2.0**-126) & (largest <= 2.0**126), 1 / largest, 0.0)
        codes = encoded((blocks * inverse[:, None]).nan_to_num(0, 0, 0), self.signed)
        in_order_of_memory(self.codes).copy_(codes.view(-1)[: flat.numel()])
        self.scales.copy_(scales.view(self.scales.shape))


def in_order_of_memory(tensor):
    """Returns the elements of a tensor as a view of one dimension: as they lie in memory, where there are no gaps."""
    if torch.ops.aten.is_non_overlapping_and_dense(tensor):
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor.view(-1)


def bottom(level):
    """Returns the lower end of a level's decade: level 0 is 0, and the others are the decades from 10^-7 to 1."""
    return 10.0 ** (level - LEVELS)


def width(level):
    """Returns the width of a place: of a cell with a sign, or of two without."""
    return 9 * bottom(level) / 2 ** (level - 1)


def float32(numbers):
    return torch.tensor(numbers, dtype=torch.float64).float()


def fma(a, b, c):
    """Computes a * b + c of float32 in one rounding: products of float32 are exact in float64."""
    return (a.double() * b.double() + c.double()).float()


def code_values(signed):
    """Returns what each code stands for, float32 [256]."""
    cells = torch.arange(256) - 127 if signed else torch.arange(256) + 1
    middles = (cells.abs() + 0.5) * (1 if signed else 0.5)
    levels = range(1, LEVELS)
    steps = float32([width(i) for i in levels])
    origins = float32([bottom(i) - 2 ** (i - 1) * width(i) for i in levels])
    values = fma(steps[:, None], middles, origins[:, None]).amax(0).clamp(0, 1)
    return torch.where(cells < 0, -values, values)


def lines(signed):
    """Returns for each level the smallest number, and slope, begin and end of the line from numbers to places."""
    first = bottom(1) + width(1) / 2  # the middle of the first place
    smallest = [-1.0, first / 2 if signed else 2.0**-126]
    smallest += [bottom(i) + width(i - 1) / (1 if signed else 2) for i in range(2, LEVELS)]
    slopes = [0.0, 1 / width(1) if signed else 0.5 / first, *(1 / width(i) for i in range(2, LEVELS))]
    begins = [2 ** (i - 1) - bottom(i) / width(i) for i in range(1, LEVELS)]
    begins = [0.5, begins[0] if signed else 1.0, *begins[1:]]
    ends = [2.0**i * (1 - 2.0**-24) for i in range(LEVELS)]
    return map(float32, (smallest, slopes, begins, ends))


def encoded(y, signed):
    """Returns the code of each number."""
    smallest, slopes, begins, ends = (numbers.to(y.device) for numbers in lines(signed))
    magnitude = y.abs()
    level = torch.bucketize(magnitude, smallest, right=True) - 1
    places = torch.minimum(fma(slopes[level], magnitude, begins[level]), ends[level])
    nearer_to_one = (y >= float32(1 - width(LEVELS - 1) / (4 if signed else 8)).to(y.device)).int()
    if signed:
        cells = places.int()
        return (127 + torch.where(y < 0, -cells, cells) + nearer_to_one).to(torch.uint8)
    return ((2 * places).int() - 1 + nearer_to_one).to(torch.uint8)


def has_8_bits(rule, group, param):
    """Returns whether the states of a parameter are made in 8 bits: those of a large one. Blocks of a shard have to be
    those of the whole, on any number of ranks."""
    param = whole_of(group, param)
    if not rule.quantizes_states or group["state_bits"] != 8 or param.layout != torch.strided:
        return False
    if param.numel() < LEAST or param.dtype not in (torch.float32, *SIXTEEN_BIT):
        return False
    if not is_dtensor(param):
        return True
    local, row = local_of(param), param.numel() // param.shape[0]
    return row % BLOCK == 0 and local.numel() == local.shape[0] * row


def whole_of(group, param):
    """Returns the parameter that this is a shard of; itself where it is whole."""
    return group.get("wholes", {}).get(param, param)


def new_quantized(rule, group, param, name, like):
    """Returns a state of zeros of a parameter, laid out like a tensor. Where blocks end with the parameter's rows, each
    row has scales of its own, which can be sharded alike."""
    whole = whole_of(group, param)
    row = whole.numel() // whole.shape[0]
    by_rows = whole.dim() > 1 and row % BLOCK == 0
    shape = (like.shape[0], row // BLOCK) if by_rows else (-(-like.numel() // BLOCK),)
    signed = name == rule.momentum
    codes = torch.full_like(like, 127 if signed else 0, dtype=torch.uint8)
    return Quantized(codes, torch.zeros(shape, dtype=torch.float32, device=like.device), signed)


def names_of(name):
    """Returns the names under which the codes and the scales of a state are kept."""
    return name + CODES, name + SCALES


def stored(rule, own, name):
    """Returns a state, as a tensor or Quantized; None where there is none."""
    if own.get(name) is not None:
        return own[name]
    codes, scales = map(own.get, names_of(name))
    return None if codes is None or scales is None else Quantized(codes, scales, name == rule.momentum)


def keep(own, name, state):
    """Puts a state into a parameter's dict."""
    if isinstance(state, Quantized):
        own.update(zip(names_of(name), (state.codes, state.scales), strict=True))
    else:
        own[name] = state


def adapt(rule, group, param, own):
    """Brings the states of a parameter, which were loaded, to the bits that its group asks for."""
    shard = local_of(param)
    in_8_bits = has_8_bits(rule, group, param)
    for name in rule.states(group):
        state = stored(rule, own, name)
        is_dense = isinstance(state, torch.Tensor) and state.layout == torch.strided
        if is_dense and in_8_bits and state.shape == param.shape:
            values = local_of(state)
            quantized = new_quantized(rule, {**group, "wholes": {shard: param}}, shard, name, values)
            quantized.store(values)
            del own[name]
            keep(own, name, Quantized(*(placed_as(param, tensor) for tensor in quantized[:2]), quantized.signed))
        elif isinstance(state, Quantized) and group["state_bits"] == 32:
            values = dequantized_state(state).to(state_dtype(rule, group, param, name))
            for part in names_of(name):
                del own[part]
            keep(own, name, values)


def dequantized_state(state):
    """Returns the numbers of a state, which may be sharded."""
    here = Quantized(local_of(state.codes), local_of(state.scales), state.signed)
    return placed_as(state.codes, here.values())
