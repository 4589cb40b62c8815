"""Training under torch.compile: the graph breaks at what fastclip does, which runs as it is, and to the same bits."""

import inspect

import pytest
import torch
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

import fastclip
from fastclip.eager import eager
from tests.support.cases import assert_same_bits

CASES = {
    "no clip": {},
    "value": {"clip_value": 0.05},
    "norm": {"max_norm": 0.1},
    "norm, skips": {"max_norm": 0.1, "skip_nonfinite": True},
    "AdamW": {"name": "AdamW", "max_norm": 0.1, "norm_type": "inf"},
    "closure": {"way": "closure", "clip_value": 0.05},
    "in backward": {"way": "step_in_backward", "clip_value": 0.05},
    "clip_grad_value_": {"clip": lambda params: fastclip.clip_grad_value_(params, 0.05)},
    "clip_grad_norm_": {"clip": lambda params: fastclip.clip_grad_norm_(params, 0.1)},
    "plain torch": {"max_norm": 0.1, "strided": True},
}


def train(wrap, name="SGD", way="step", clip=None, strided=False, **settings):
    """What is left of a few steps whose whole loop body is `wrap`ped: parameters, optimizer, all that was returned."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    if strided:
        model.weight = torch.nn.Parameter(torch.randn(2, 8)[:, ::2])
    momentum = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(fastclip, name)(model.parameters(), lr=0.1, **momentum, **settings)
    if way == "step_in_backward":
        fastclip.step_in_backward(model, optimizer)

    def body(x):
        def loss():
            optimizer.zero_grad()
            value = model(x).square().sum()
            value.backward()
            return value

        if way == "closure":
            return optimizer.step(loss)
        value = loss()
        if clip:
            value = value, clip(model.parameters())
        if way == "step":
            optimizer.step()
        return value, optimizer.total_norm, optimizer.skipped_steps

    step = wrap(body)
    returned = [step(torch.ones(3, 4) * i) for i in range(1, 5)]
    return list(model.parameters()), optimizer, str(returned) + str(optimizer.clip_stats())


@pytest.mark.falls_back  # where it is asked for
@pytest.mark.parametrize("case", CASES)
def test_compiled_loop_bodies_train_as_plain_ones(case):
    torch.compiler.reset()
    plain = train(lambda body: body, **CASES[case])
    compiled = train(torch.compile(backend="eager"), **CASES[case])
    assert_same_bits(plain[0], compiled[0], plain[1], compiled[1])
    assert plain[2] == compiled[2]


@pytest.mark.parametrize("module", [torch.optim, fastclip])
def test_settings_are_read_within_a_graph(module):
    """As in torch's optimizers, which need no break: where a setting has changed, torch makes a new graph."""
    model = torch.nn.Linear(2, 2)
    optimizer = module.SGD(model.parameters(), lr=0.5)

    @torch.compile(backend="eager", fullgraph=True)
    def scaled(x):
        return model(x) * optimizer.param_groups[0]["lr"]

    first = scaled(torch.ones(1, 2))
    optimizer.param_groups[0]["lr"] = 0.25
    assert torch.equal(scaled(torch.ones(1, 2)), first / 2)


def test_no_step_is_compiled():
    """Neither it nor what it calls: guards over an optimizer's every attribute would cost more than a step."""
    torch.compiler.reset()
    functions = inspect.getmembers(
        fastclip.SGD, lambda f: inspect.isfunction(f) and f.__module__.startswith("fastclip")
    )
    assert {"step", "_step", "_update"} <= {name for name, _ in functions}
    bodies = []

    def compiled(body):
        bodies.append(body)
        return torch.compile(body, backend="eager")

    train(compiled, clip_value=0.05)
    assert _debug_get_cache_entry_list(bodies[0].__code__)
    assert not [name for name, function in functions if _debug_get_cache_entry_list(function.__code__)]


@pytest.mark.parametrize("decorator", [torch.no_grad(), torch.inference_mode()], ids=["no_grad", "inference_mode"])
def test_functions_of_others_are_compiled_as_without_fastclip(decorator):
    """torch's decorators share one code object among all functions: what is said of one is said of all."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compile(decorator(lambda x: x.cos() * 3), backend=backend)(torch.ones(3))
    assert len(graphs) == 1


def test_only_functions_of_fastclip_are_kept_from_it():
    with pytest.raises(AssertionError):
        eager(torch.no_grad()(lambda x: x))
