"""Keeps torch.compile out of functions that it cannot trace."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """Makes torch.compile break its graph at each call of `function`, and run it, and all that it calls, untraced.

    `torch.compiler.disable` does the same, but costs each call as much as a small step, and imports torch._dynamo
    at once.
    """
    # A decorator as torch.no_grad() shares one code object among all functions, and would mark them all.
    assert not hasattr(function, "__wrapped__"), function
    dynamo = torch._C._dynamo.eval_frame
    skip = dynamo._FrameAction.SKIP
    strategy = dynamo._FrameExecStrategy(skip, skip)  # for the function, and for its callees
    dynamo.set_code_exec_strategy(function.__code__, strategy)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function
