"""Keeps torch.compile out of what it can't trace."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """Has torch.compile break its graph where `function` is called, and run it, and all that it calls, as it is.

    As `torch.compiler.disable`, which costs every call what a small step costs, and imports torch._dynamo at once.
    """
    dynamo = torch._C._dynamo.eval_frame
    skip = dynamo._FrameAction.SKIP
    dynamo.set_code_exec_strategy(function.__code__, dynamo._FrameExecStrategy(skip, skip))  # it, and what it calls
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function
