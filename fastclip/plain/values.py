"""Reads the values of tensors: those that a gradient stores, and numbers that plain torch decides by."""

import torch
from torch._subclasses.fake_tensor import FakeTensor

KNOWN_DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)

SPARSE_LAYOUTS = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
KNOWN_LAYOUTS = (torch.strided, torch.jagged, *SPARSE_LAYOUTS)


def is_sparse(tensor):
    return tensor.layout in SPARSE_LAYOUTS


def values_of(grad):
    """Returns the values of a gradient; of a sparse or nested one, the values that it stores."""
    if grad.layout == torch.strided:
        return grad
    return grad.coalesce().values() if grad.layout == torch.sparse_coo else grad.values()


def item_of(tensor, unknown):
    """Returns `tensor.item()`, or `unknown` if nobody knows it: on meta, in fake tensors, while torch traces."""
    if tensor.is_meta or (isinstance(tensor, FakeTensor) and tensor.constant is None):
        return unknown
    try:
        return tensor.item()
    except RuntimeError:
        if torch._C._len_torch_dispatch_stack() == 0:
            raise
        return unknown


def number_of(value):
    """Returns a setting as a plain number, which torch takes everywhere; a Fraction or an array would fail in some
    steps. A tensor that the step is differentiated by stays a tensor."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    return value if value.requires_grad else item_of(value, unknown=value)


def span_of(tensor):
    """Returns (begin, end) of a tensor's memory; (0, 0) if it has none of its own."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        return 0, 0
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def overlap_in_part(a, b):
    """Returns whether two tensors share memory, but not element by element."""
    (begin_a, end_a), (begin_b, end_b) = span_of(a), span_of(b)
    alike = (begin_a, a.shape, a.stride(), a.dtype) == (begin_b, b.shape, b.stride(), b.dtype)
    return max(begin_a, begin_b) < min(end_a, end_b) and not alike
