"""16-bit parameters: the dtypes of their states, and rounding to 16 bits, in plain torch."""

import torch

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
MASK = 0xFFFFFFFF


def compute_dtype(param):
    """Returns the dtype that a parameter is computed in: 16 bits in float32. The store rounds once."""
    return torch.float32 if param.dtype in SIXTEEN_BIT else param.dtype


def has_master(group, param):
    return group["master_weights"] and param.dtype in SIXTEEN_BIT


def state_dtype(rule, group, param, name):
    """Returns the dtype of a floating-point state that a step makes, or that is loaded."""
    if name == rule.momentum and group["momentum_dtype"]:
        return group["momentum_dtype"]
    return torch.float32 if has_master(group, param) else param.dtype


class Rounding:
    """Rounds the arrays of one parameter to 16 bits in a step: to nearest, or at random by the group's seed.

    Args:
        group (dict): the parameter's group.
        index (int): the parameter's place among the parameters of all groups.
        step (Tensor or None): the parameter's count of steps, including this one.
    """

    def __init__(self, group, index, step):
        self.stochastic = group["stochastic_rounding"]
        if self.stochastic:
            self.key = _hash(_hash(_hash(group["rounding_seed"]) ^ int(step)) ^ index)

    def store(self, array, to, values):
        """Writes float32 `values` to the tensor `to`; `array` is 0 for the parameter, and 1, 2, ... for its states."""
        if not self.stochastic or to.dtype not in SIXTEEN_BIT:
            return to.copy_(values)
        elements = _places(to)
        noise = _hash((elements & MASK) ^ (self.key ^ _hash_of_block(array, elements)))
        round_16 = _to_bfloat16 if to.dtype == torch.bfloat16 else _to_float16
        return to.copy_(round_16(values.float(), noise))


def _hash(x):
    """Hashes an int or an int64 tensor by lowbias32; see csrc/rules/dtypes.h."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def _hash_of_block(array, elements):
    return _hash(array + 4 * (elements >> 32))


def _places(tensor):
    """Returns each element's place in memory, by which the kernels count."""
    count = torch.arange(tensor.numel(), device=tensor.device)
    dense = torch.empty_like(tensor).stride() == tensor.stride()  # with gaps, in the order of its indices
    return count.as_strided(tensor.shape, tensor.stride()) if dense else count.view(tensor.shape)


def _to_bfloat16(values, noise):
    bits = values.contiguous().view(torch.int32).long() & MASK
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return _from_bits(torch.where(nan, 0x7FC0, ((bits + (noise & 0xFFFF)) & MASK) >> 16), torch.bfloat16)


def _to_float16(values, noise):
    bits = values.contiguous().view(torch.int32).long() & MASK
    magnitude = bits & 0x7FFFFFFF
    cut = noise & 0x1FFF
    normal = (magnitude + cut - (112 << 23)) >> 13
    subnormal = (values.abs() * 2.0**24 + cut.float() * 2.0**-13).nan_to_num(0, 0, 0).clamp(max=2.0**20).long()
    half = torch.where(magnitude < 0x38800000, subnormal, normal)
    half = torch.where(magnitude >= 0x47800000, torch.where(magnitude > 0x7F800000, 0x7E00, 0x7C00), half)
    return _from_bits(((bits >> 16) & 0x8000) | half, torch.float16)


def _from_bits(bits, dtype):
    return torch.where(bits >= 2**15, bits - 2**16, bits).to(torch.int16).view(dtype)
