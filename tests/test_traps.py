"""What goes wrong in other fused optimizers and clips, each seen in torch, apex, bitsandbytes or their issues."""

import gc
import math
import os
import subprocess
import sys
import weakref

import pytest
import torch

import fastclip

from .cases import (
    CLIPS,
    RULES,
    SHAPES,
    Loop,
    assert_close,
    assert_same_bits,
    copy_params,
    give_grads,
    make_params,
    pair,
)

falls_back = pytest.mark.falls_back


def step_both(loop, theirs, optimizer, ours):
    loop.step()
    optimizer.step()


# ---- which elements are written ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_element_of_every_size_is_written(dtype, device):
    """torch's 16-bit fused SGD updates only the tail on the CPU."""
    params = [torch.zeros(n, dtype=dtype, device=device, requires_grad=True) for n in range(140)]
    for p in params:
        p.grad = torch.ones_like(p)
    fastclip.SGD(params, lr=1.0, momentum=0.9, clip_value=0.5).step()
    for p in params:
        assert torch.equal(p.detach(), torch.full_like(p, -0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_neighbours_of_unaligned_views_are_left_alone(dtype, device):
    for offset in range(5):
        for size in (1, 3, 16, 33, 4097):
            memory = torch.zeros(size + 16, dtype=dtype, device=device)
            p = memory[offset : offset + size].detach().requires_grad_()
            p.grad = torch.ones(size + 7, dtype=dtype, device=device)[3 : 3 + size]
            fastclip.SGD([p], lr=1.0, max_norm=1e9).step()
            expected = torch.zeros_like(memory)
            expected[offset : offset + size] = -1
            assert torch.equal(memory, expected)


def test_a_gradient_that_first_appears_later_and_one_that_goes_away():
    """Momentum starts per tensor, undampened, when the tensor's first gradient comes."""
    loop, theirs, optimizer, ours = pair([(5,), (7,), (3, 3)], CLIPS["value"], momentum=0.9, dampening=0.5)
    for step in range(7):
        give_grads(theirs, ours)
        for params in (theirs, ours):
            for index, p in enumerate(params):
                if (step + index) % 3 == 0:
                    p.grad = None
        step_both(loop, theirs, optimizer, ours)
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


def test_momentum_switched_on_and_off_between_steps():
    loop, theirs, optimizer, ours = pair([(5,), (7,)], CLIPS["value"])
    for momentum in (0, 0.9, 0.9, 0, 0.5):
        loop.optimizer.param_groups[0]["momentum"] = optimizer.param_groups[0]["momentum"] = momentum
        give_grads(theirs, ours)
        step_both(loop, theirs, optimizer, ours)
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


# ---- memory layouts ----------------------------------------------------------------------------


def run_layouts(params, grads, rule):
    theirs = [p.detach().clone(memory_format=torch.preserve_format).requires_grad_() for p in params]
    loop = Loop(theirs, CLIPS["value"], lr=0.1, **rule)
    optimizer = fastclip.SGD(params, lr=0.1, **CLIPS["value"], **rule)
    for _ in range(3):
        for p, q, g in zip(params, theirs, grads, strict=True):
            p.grad, q.grad = g.clone(memory_format=torch.preserve_format), g.contiguous().clone()
        step_both(loop, theirs, optimizer, params)
    assert_same_bits(theirs, params, loop.optimizer, optimizer)


@pytest.mark.parametrize("rule", [RULES[0], RULES[6]], ids=["plain", "momentum"])
def test_same_layout_runs_in_the_kernels(rule):
    """Transposed, channels last, and strides that differ only where a dimension has size 1."""
    params = [
        torch.randn(6, 9).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 1, 3),
    ]
    grads = [torch.randn(6, 9).t(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(4, 1, 3)]
    grads[2] = grads[2].as_strided((4, 1, 3), (3, 17, 1))
    run_layouts([p.requires_grad_() for p in params], grads, rule)


@falls_back
@pytest.mark.parametrize("rule", [RULES[0], RULES[6]], ids=["plain", "momentum"])
@pytest.mark.parametrize(
    ("param", "grad"),
    [
        (torch.randn(6, 9), torch.randn(9, 6).t()),
        (torch.randn(9, 6).t(), torch.randn(6, 9)),
        (torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(2, 3, 4, 5)),
        (torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)),
        (torch.randn(8, 8)[:, ::2], torch.randn(8, 4)),
        (torch.randn(8, 4), torch.randn(8, 8)[:, ::2]),
        (torch.randn(4, 4), torch.randn(()).expand(4, 4)),
        (torch.randn(4, 4), torch.randn(4).expand(4, 4)),
    ],
    ids=[
        "grad.t",
        "param.t",
        "param channels last",
        "grad channels last",
        "param strided",
        "grad strided",
        "expanded",
        "row expanded",
    ],
)
def test_other_layouts_give_the_same_answer(param, grad, rule):
    param = param.detach().clone(memory_format=torch.preserve_format)  # the table's own stays as it is
    run_layouts([param.requires_grad_(), torch.randn(3).requires_grad_()], [grad, torch.randn(3)], rule)


@falls_back
def test_a_strided_parameter_leaves_the_gaps_alone():
    memory = torch.zeros(4, 4)
    p = memory[:, ::2].requires_grad_()
    p.grad = torch.ones(4, 2)
    fastclip.SGD([p], lr=1.0).step()
    assert torch.equal(memory, torch.tensor([-1.0, 0, -1, 0]).expand(4, 4))


@falls_back
def test_lazily_negated_and_conjugated_gradients():
    """The same address can mean the opposite sign."""
    z = torch.randn(5, dtype=torch.complex64)
    p = torch.zeros(5, requires_grad=True)
    p.grad = z.conj().imag
    assert p.grad.is_neg()
    fastclip.SGD([p], lr=1.0).step()
    assert torch.equal(p.detach(), z.imag)


@falls_back
def test_the_way_out_of_the_kernels_is_said_once_and_names_the_parameter():
    p = torch.randn(6, 9, requires_grad=True)
    opt = fastclip.SGD([("weight", p)], lr=0.1)
    p.grad = torch.randn(9, 6).t()
    with pytest.warns(UserWarning, match=r"plain torch.*parameter 0 of group 0 \('weight'\)") as caught:
        opt.step()
        opt.step()
    assert len(caught) == 1


# ---- numbers -----------------------------------------------------------------------------------


def test_clamp_keeps_nan_clamps_inf_and_keeps_the_sign_of_zero(device):
    values = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0, 0.3, -0.3, 2.0, -2.0] * 5, device=device)
    for bounds in (0.5, 0.0, (-0.0, 0.0), (0.0, 0.0), (-0.3, 0.3)):
        p = torch.zeros_like(values).requires_grad_()
        p.grad = values.clone()
        fastclip.clip_grad_value_(p, bounds)
        low, high = bounds if isinstance(bounds, tuple) else (-bounds, bounds)
        expected = values.clamp(low, high)
        assert torch.equal(torch.signbit(p.grad), torch.signbit(expected))
        torch.testing.assert_close(p.grad, expected, rtol=0, atol=0, equal_nan=True)


def test_negative_zero_parameters_and_gradients():
    """fma(0, p, g) would turn -0.0 into 0.0, and 0 * inf into NaN: with weight decay 0 the term is left out."""
    for rule in RULES:
        loop, theirs, optimizer, ours = pair([(40,)], CLIPS["value"], **rule)
        with torch.no_grad():
            for p in (*theirs, *ours):
                p[::3], p[1::3] = -0.0, 0.0
        for _ in range(2):
            for p in (*theirs, *ours):
                p.grad = torch.full_like(p, -0.0)
                p.grad[::2] = 0.0
            step_both(loop, theirs, optimizer, ours)
        for a, b in zip(theirs, ours, strict=True):
            assert torch.equal(torch.signbit(a), torch.signbit(b))


@pytest.mark.parametrize("clip", ["none", "value", "norm", "inf norm"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_non_finite_gradients_do_what_they_do_in_plain_code(bad, clip, device):
    loop, theirs, optimizer, ours = pair([(3,), (40,)], CLIPS[clip], device=device, momentum=0.9)
    for _ in range(2):
        give_grads(theirs, ours)
        for params in (theirs, ours):
            params[1].grad[7] = bad
        step_both(loop, theirs, optimizer, ours)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-6, atol=1e-6, equal_nan=True)


def test_infinite_parameters_without_weight_decay():
    p = torch.tensor([math.inf, 1.0], requires_grad=True)
    p.grad = torch.ones(2)
    fastclip.SGD([p], lr=0.1, momentum=0.9, nesterov=True).step()
    assert p[0].item() == math.inf


def test_finite_gradients_of_1e20_do_not_vanish(device):
    """torch's float32 sum of squares overflows: the norm is inf and every gradient becomes 0."""
    p = torch.zeros(2, device=device, requires_grad=True)
    p.grad = torch.tensor([3e20, 4e20], device=device)
    fastclip.SGD([p], lr=1.0, max_norm=1.0).step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.6, -0.8], device=device))


def test_denormals_survive_as_they_do_in_torch():
    loop, theirs, optimizer, ours = pair([(50,)], {"clip_value": 1e-40}, lr=0.5, momentum=0.9)
    for _ in range(2):
        give_grads(theirs, ours, scale=1e-39)
        for p in (*theirs, *ours):
            p.data.mul_(1e-39)
        step_both(loop, theirs, optimizer, ours)
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


# ---- things that change between steps ----------------------------------------------------------


def test_data_grad_and_dtype_replaced_between_steps():
    loop, theirs, optimizer, ours = pair([(5,), (7,)], CLIPS["value"], momentum=0.9)
    give_grads(theirs, ours)
    step_both(loop, theirs, optimizer, ours)
    fresh = torch.randn(5)
    theirs[0].data, ours[0].data = fresh.clone(), fresh.clone()
    for params, opt in ((theirs, loop.optimizer), (ours, optimizer)):
        params[1].data = params[1].data.double()
        opt.state[params[1]]["momentum_buffer"] = opt.state[params[1]]["momentum_buffer"].double()
        params[1].grad = None
    for _ in range(3):
        gc.collect()
        give_grads(theirs, ours)
        step_both(loop, theirs, optimizer, ours)
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


def test_module_moved_with_swapped_tensors():
    """A C++ copy of a parameter would make this raise."""
    model = torch.nn.Linear(4, 3)
    opt = fastclip.SGD(model.parameters(), lr=0.1, momentum=0.9, max_norm=1.0)
    model(torch.ones(2, 4)).sum().backward()
    opt.step()
    opt.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model.weight.dtype == torch.float64


def test_the_plan_keeps_no_gradient_alive():
    p = torch.zeros(1000, requires_grad=True)
    opt = fastclip.SGD([p], lr=0.1, momentum=0.9, max_norm=1.0)
    p.grad = torch.ones(1000)
    opt.step()
    grad, buffer = weakref.ref(p.grad), weakref.ref(opt.state[p]["momentum_buffer"])
    p.grad = None
    opt.state.clear()
    gc.collect()
    assert grad() is None and buffer() is None


def test_version_counters_move():
    """autograd's check of in-place changes must see the step."""
    p = torch.ones(3, requires_grad=True)
    opt = fastclip.SGD([p], lr=0.1)
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_old_checkpoints_with_an_empty_buffer():
    p = torch.zeros(3, requires_grad=True)
    opt = fastclip.SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    opt.state[p]["momentum_buffer"] = None
    p.grad = torch.ones(3)
    opt.step()
    assert torch.equal(opt.state[p]["momentum_buffer"], torch.ones(3))


def test_state_in_another_order_than_the_parameters():
    """The walk remembers where a state was; it must not believe it."""
    loop, theirs, optimizer, ours = pair([(n + 1,) for n in range(200)], CLIPS["value"], momentum=0.9)
    for _ in range(2):
        give_grads(theirs, ours)
        step_both(loop, theirs, optimizer, ours)
        for params, opt in ((theirs, loop.optimizer), (ours, optimizer)):
            opt.state = type(opt.state)(dict, [(p, opt.state[p]) for p in reversed(params)])
    optimizer.state.pop(ours[3])
    loop.optimizer.state.pop(theirs[3])
    give_grads(theirs, ours)
    step_both(loop, theirs, optimizer, ours)
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


def test_hyperparameters_are_read_at_every_step():
    loop, theirs, optimizer, ours = pair([(5,), (7,)], {"clip_value": 0.5}, momentum=0.9)
    for step in range(4):
        for group in (loop.optimizer.param_groups[0], optimizer.param_groups[0]):
            group.update(lr=0.1 / (step + 1), weight_decay=0.01 * step, maximize=bool(step % 2))
        loop.clip = {"clip_value": 0.1 * (step + 1)}
        optimizer.param_groups[0]["clip_value"] = 0.1 * (step + 1)
        give_grads(theirs, ours)
        step_both(loop, theirs, optimizer, ours)
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


def test_one_group_per_tensor():
    ours = make_params(SHAPES)
    theirs = copy_params(ours)
    loop = torch.optim.SGD([{"params": [p], "lr": 0.01 * i} for i, p in enumerate(theirs)], foreach=False)
    optimizer = fastclip.SGD([{"params": [p], "lr": 0.01 * i} for i, p in enumerate(ours)])
    give_grads(theirs, ours)
    step_both(loop, theirs, optimizer, ours)
    assert_same_bits(theirs, ours)


def test_mixed_dtypes_share_one_norm(device):
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    params = [torch.zeros(10, dtype=d, device=device, requires_grad=True) for d in dtypes]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = fastclip.SGD(params, lr=1.0, max_norm=1.0)
    opt.step()
    assert math.isclose(opt.total_norm.item(), 40**0.5)
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full_like(p, -1 / 40**0.5))


# ---- what the kernels do not cover -------------------------------------------------------------


@falls_back
def test_sparse_gradients_step_as_in_torch_and_clips_of_them_are_refused():
    results = []
    for make in (torch.optim.SGD, fastclip.SGD):
        torch.manual_seed(0)
        model = torch.nn.Embedding(10, 3, sparse=True)
        model(torch.tensor([1, 5, 5])).sum().backward()
        make(model.parameters(), lr=0.1).step()
        results.append(model.weight.detach())
    assert torch.equal(*results)
    for clip in ({"clip_value": 0.1}, {"max_norm": 0.1}):
        before = model.weight.detach().clone()
        with pytest.raises(TypeError, match="sparse gradient of parameter 0 of group 0"):
            fastclip.SGD(model.parameters(), lr=0.1, **clip).step()
        assert torch.equal(model.weight, before)


@falls_back
def test_complex_parameters():
    results = []
    for make in (torch.optim.SGD, fastclip.SGD):
        torch.manual_seed(0)
        p, q = torch.randn(4, dtype=torch.complex64, requires_grad=True), torch.randn(3, requires_grad=True)
        p.grad, q.grad = torch.randn(4, dtype=torch.complex64), torch.randn(3)
        opt = make([p, q], lr=0.1, momentum=0.9)
        if make is torch.optim.SGD:
            torch.nn.utils.clip_grad_norm_([p, q], 1.0)
        else:
            opt.param_groups[0]["max_norm"] = 1.0
        opt.step()
        results.append([p.detach(), q.detach()])
    assert_close(*results, 1e-6)
    before = q.detach().clone()
    with pytest.raises(TypeError, match="complex gradient of parameter 0"):
        fastclip.SGD([p, q], lr=0.1, clip_value=0.1).step()
    assert torch.equal(q, before)


@falls_back
def test_differentiable_steps():
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def loss_after_a_step(make):
        p = w.clone()
        p.grad = torch.tensor([0.1, 2.0, -3.0], dtype=torch.float64)
        opt = make(p)
        opt.step()
        return (p**2).sum()

    ours = loss_after_a_step(lambda p: fastclip.SGD([p], lr=lr, differentiable=True, clip_value=1.0))
    p = w.clone() - lr * torch.tensor([0.1, 1.0, -1.0], dtype=torch.float64)
    expected = torch.autograd.grad((p**2).sum(), [w, lr])
    for a, b in zip(torch.autograd.grad(ours, [w, lr]), expected, strict=True):
        torch.testing.assert_close(a, b)


def run_script(script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_where_torch_rounds_twice_the_difference_is_one_ulp():
    """ATEN_CPU_CAPABILITY=default has no fma; fastclip's rule always has."""
    result = run_script(
        """if True:
        import torch, fastclip
        torch.manual_seed(0)
        p, g = torch.randn(10_000), torch.randn(10_000)
        ours, theirs = p.clone().requires_grad_(), p.clone().requires_grad_()
        ours.grad, theirs.grad = g.clone(), g.clone()
        fastclip.SGD([ours], lr=0.1).step()
        torch.optim.SGD([theirs], lr=0.1, foreach=False).step()
        exact = (p.double() - torch.tensor(0.1).double() * g.double()).float()
        ulps = (ours.detach().view(torch.int32) - exact.view(torch.int32)).abs().max().item()
        close = torch.allclose(ours, theirs, rtol=2.4e-7, atol=2.4e-8)
        print(torch.backends.cpu.get_cpu_capability(), ulps, close)
        """,
        ATEN_CPU_CAPABILITY="default",
    )
    assert result.stdout.split() == ["DEFAULT", "0", "True"], result.stdout + result.stderr


@falls_back
def test_a_local_norm_is_not_taken_for_the_norm_of_a_sharded_model():
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        p = torch.nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
        p.grad = distribute_tensor(torch.full((4,), 3.0), mesh, [Shard(0)])
        with pytest.raises(TypeError, match="max_norm.*parameter 0 of group 0.*DTensor"):
            fastclip.SGD([p], lr=1.0, max_norm=1.0).step()
        assert torch.equal(p.detach().full_tensor(), torch.zeros(4))
        fastclip.SGD([p], lr=1.0, clip_value=0.5).step()
        assert torch.equal(p.detach().full_tensor(), torch.full((4,), -0.5))
    finally:
        distributed.destroy_process_group()
