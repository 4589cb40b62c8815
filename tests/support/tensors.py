"""Tensors for the property tests: values placed in memory in any layout, their bits, and their exact norm."""

import dataclasses
import math

import torch


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a tensor's elements lie: the order of its dimensions in memory, the gap between them, the first one."""

    order: tuple = ()  # outermost first; () is the contiguous one
    gap: int = 1
    offset: int = 0
    expanded: bool = False  # of gradients: the first dimension has stride 0


def placed(values, layout):
    """(tensor, the memory it is a view of): `values` in a layout of memory that is full of sevens."""
    sizes = list(values.shape)
    if layout.expanded:
        values = values[:1].expand(sizes)
    strides, stride = [0] * len(sizes), layout.gap
    for dim in reversed(layout.order or range(len(sizes))):
        if not (layout.expanded and dim == 0):
            strides[dim] = stride
            stride *= max(sizes[dim], 1)
    memory = torch.full((layout.offset + stride + 9,), 7.0, dtype=values.dtype)
    view = memory.as_strided(sizes, strides, layout.offset)
    (view[:1] if layout.expanded else view).copy_(values[:1] if layout.expanded else values)
    return view, memory


def placed_all(list_of_values, layouts, together):
    """`placed`, of each; or `together`, where nothing speaks against it: one behind the other in the same memory, as in
    a bucket of DistributedDataParallel."""
    if not together or any(layout != Layout() for layout in layouts) or not list_of_values:
        return [placed(values, layout) for values, layout in zip(list_of_values, layouts, strict=True)]
    sizes = [values.numel() for values in list_of_values]
    memory = torch.full((sum(sizes) + 9,), 7.0, dtype=list_of_values[0].dtype)
    views = memory.split([*sizes, 9])
    return [(view.view(v.shape).copy_(v), memory) for view, v in zip(views, list_of_values, strict=False)]


def writable(grad):
    """An expanded gradient can't be clipped in place, of which torch complains."""
    return grad.clone() if 0 in grad.stride() and grad.numel() > 1 else grad


def bits(tensor):
    """Its elements as integers: 0.0 and -0.0 differ. All NaN are one: which one an operation makes is not said."""
    if not tensor.is_floating_point():
        return tensor
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().masked_fill(tensor.isnan(), math.nan).contiguous().view(size)


def flushed(tensor):
    """Zeros for subnormal numbers; no float16 is one in the float32 that it is computed in."""
    return (
        tensor
        if tensor.dtype == torch.float16
        else tensor.masked_fill(tensor.abs() < torch.finfo(tensor.dtype).tiny, 0)
    )


def exact_norm(grads, norm_type):
    """By Python's math.hypot, which is right to the last bit and neither overflows nor vanishes."""
    values = [value for g in grads for value in g.double().flatten().tolist()]
    if any(map(math.isnan, values)):
        return math.nan
    if float(norm_type) == math.inf:
        return max(map(abs, values), default=0.0)
    return math.hypot(*values)
