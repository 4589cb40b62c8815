"""Whether the compiled half reads tensors as this torch means them.

torch's memory layout is no interface: it may change with any release. What the compiled half reads is compared with
what Python tells of a few tensors that are made for it. So a layout that differs is found here, and not in somebody's
training.
"""

import threading
from collections.abc import Iterator
from typing import Any

import torch


def tensors() -> Iterator[torch.Tensor]:
    """Yields tensors that differ in all that is read: dtypes, sizes, strides, offsets, gradients, versions, kinds."""
    with torch.device("cpu"):
        param = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float32))
        param.grad = torch.ones(2, 3, dtype=torch.float32)
        yield param
        yield param.grad
        yield torch.zeros(3, 2, dtype=torch.float64).t()
        yield torch.zeros(2, 1, 1, 1, 1, 1, 2, dtype=torch.bfloat16)  # sizes that no longer fit into the tensor
        yield torch.zeros(9, dtype=torch.float16)[4:]
        yield torch.zeros((), dtype=torch.float32).add_(1)
        yield torch._neg_view(torch.zeros(2))
        yield torch.zeros(2, dtype=torch.complex64).conj()
        yield torch.zeros(2, device="meta")
        yield torch.zeros(2).to_sparse()


def misread(glue: Any, tensor: torch.Tensor) -> str | None:
    """Returns what the glue, _C, reads differently; None where it reads all alike."""
    is_dense = tensor.layout == torch.strided
    is_ordinary = is_dense and tensor.device.type == "cpu" and not tensor.is_neg() and not tensor.is_conj()
    return glue.misread(
        tensor,
        tensor._cdata,
        tensor.numel(),
        tuple(tensor.shape),
        tensor.stride() if is_dense else (),
        tensor.dtype,
        tensor.device.type == "cpu",
        is_ordinary,
        is_dense and tensor.is_contiguous(),
        tensor.data_ptr() if is_ordinary else 0,
        tensor.grad if tensor.is_leaf else None,
        tensor._version,
    )


def first_misread(glue: Any) -> str | None:
    """Returns what the glue reads differently of some tensor, as "numel"; None where it fits this torch.

    In a thread of its own: modes that somebody has on while importing (inference, fake tensors, functorch) are the
    calling thread's.
    """
    found: list[str | None] = []

    def look() -> None:
        try:
            found.append(_first_misread(glue))
        except Exception as error:
            found.append(f"value ({error})")

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0]


def _first_misread(glue: Any) -> str | None:
    for tensor in tensors():
        if found := misread(glue, tensor):
            return found
    with torch.device("cpu"):
        tensor = torch.zeros(1)
    before = tensor._version
    glue.bump_version(tensor)
    return None if tensor._version == before + 1 else "version"
