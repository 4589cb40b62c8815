"""Which memory a step reads and writes: every size, unaligned and strided views, shared memory, other layouts."""

import pytest
import torch

import fastclip
from fastclip.plain import rules
from tests.support.cases import (
    CLIPS,
    RULES,
    Loop,
    assert_close,
    assert_same_bits,
    exact_square_roots,
    give_grads,
    pair,
    param,
    step_both,
)

falls_back = pytest.mark.falls_back
ADAM = {"optimizer": "AdamW", "amsgrad": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_element_of_every_size_is_written(dtype, device):
    """torch's 16-bit fused SGD updates only the tail on the CPU."""
    params = [torch.zeros(n, dtype=dtype, device=device, requires_grad=True) for n in range(140)]
    for p in params:
        p.grad = torch.ones_like(p)
    fastclip.SGD(params, lr=1.0, momentum=0.9, clip_value=0.5).step()
    for p in params:
        assert torch.equal(p.detach(), torch.full_like(p, -0.5))
    optimizer = fastclip.Adam(params, lr=1.0, betas=(0.5, 0.75), eps=0.0, amsgrad=True, clip_value=0.5)
    optimizer.step()
    for p in params:
        assert torch.equal(p.detach(), torch.full_like(p, -1.5))
        for name, value in zip(rules.ADAM.arrays, (0.25, 0.0625, 0.0625), strict=True):
            assert torch.equal(optimizer.state[p][name], torch.full_like(p, value))


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
            optimizer = fastclip.Adam([p], lr=1.0, betas=(0.5, 0.75), eps=0.0)
            memories = {name: torch.zeros_like(memory) for name in rules.ADAM.arrays[:2]}
            of_p = {name: of[offset : offset + size] for name, of in memories.items()}
            optimizer.state[p] = {"step": torch.zeros((), device=device), **of_p}
            optimizer.step()
            expected[offset : offset + size] = -2
            assert torch.equal(memory, expected)
            for of in memories.values():
                assert torch.equal(of != 0, memory != 0)


def run_layouts(params, grads, rule):
    theirs = [p.detach().clone(memory_format=torch.preserve_format).requires_grad_() for p in params]
    loop = Loop(theirs, CLIPS["value"], lr=0.1, **rule)
    settings = {k: v for k, v in rule.items() if k != "optimizer"}
    optimizer = getattr(fastclip, rule.get("optimizer", "SGD"))(params, lr=0.1, **CLIPS["value"], **settings)
    for _ in range(3):
        for p, q, g in zip(params, theirs, grads, strict=True):
            p.grad, q.grad = g.clone(memory_format=torch.preserve_format), g.contiguous().clone()
        with exact_square_roots():  # of plain torch
            step_both(loop, theirs, optimizer, params)
    assert_same_bits(theirs, params, loop.optimizer, optimizer)


@pytest.mark.parametrize("rule", [RULES[0], RULES[6], ADAM], ids=["plain", "momentum", "adam"])
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
@pytest.mark.parametrize("rule", [RULES[0], RULES[6], ADAM], ids=["plain", "momentum", "adam"])
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
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"clip_value": 2.0}, {"max_norm": 9.0}], ids=str)
def test_a_strided_parameter_leaves_the_gaps_alone(settings):
    memory = torch.zeros(4, 4)
    p = memory[:, ::2].requires_grad_()
    p.grad = torch.ones(4, 2)
    fastclip.SGD([p], lr=1.0, **settings).step()
    assert torch.equal(memory, torch.tensor([-1.0, 0, -1, 0]).expand(4, 4))


@falls_back
@pytest.mark.parametrize("clip", ["none", "value", "loose norm"])
@pytest.mark.parametrize("decay", [0, 0.1])
@pytest.mark.parametrize("grad_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("param_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_momentum_buffers_have_the_strides_of_torchs(param_format, grad_format, decay, clip):
    """Those of the first gradient."""
    strides = []
    for cls, settings in ((torch.optim.SGD, {"foreach": False}), (fastclip.SGD, CLIPS[clip])):
        p = torch.randn(2, 3, 4, 5).to(memory_format=param_format).requires_grad_()
        p.grad = torch.randn(2, 3, 4, 5).to(memory_format=grad_format)
        optimizer = cls([p], lr=0.1, momentum=0.9, weight_decay=decay, **settings)
        optimizer.step()
        strides.append(optimizer.state[p]["momentum_buffer"].stride())
    assert strides[0] == strides[1]


@falls_back
@pytest.mark.parametrize("grad_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("param_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_states_of_adam_have_the_strides_of_torchs(param_format, grad_format):
    """Those of the parameter."""
    strides = []
    for cls in (torch.optim.Adam, fastclip.Adam):
        p = torch.randn(2, 3, 4, 5).to(memory_format=param_format).requires_grad_()
        p.grad = torch.randn(2, 3, 4, 5).to(memory_format=grad_format)
        optimizer = cls([p], amsgrad=True)
        optimizer.step()
        strides.append({name: value.stride() for name, value in optimizer.state[p].items()})
    assert strides[0] == strides[1] and len(strides[0]) == 4


@pytest.mark.parametrize("rule", [RULES[0], RULES[4], ADAM], ids=["plain", "momentum", "adam"])
def test_strides_of_dimensions_of_size_1_mean_nothing(rule):
    """The kernels take such parameters and gradients, whatever the stride says."""
    loop, theirs, optimizer, ours = pair([(4, 1, 3), (1, 6), (5, 1), (6, 1, 9)], CLIPS["value"], **rule)
    ours[1].data = ours[1].data.as_strided((1, 6), (77, 1))
    ours[3].data = ours[3].data.transpose(0, 2).contiguous().transpose(0, 2)  # not contiguous in any case
    for _ in range(3):
        give_grads(theirs, ours)
        ours[0].grad = ours[0].grad.as_strided((4, 1, 3), (3, 17, 1))
        ours[2].grad = ours[2].grad.as_strided((5, 1), (1, 99))
        ours[3].grad = ours[3].grad.transpose(0, 2).contiguous().transpose(0, 2).as_strided((6, 1, 9), (1, 17, 6))
        assert ours[0].grad.stride() == (3, 17, 1) and ours[1].stride() == (77, 1)
        assert ours[3].stride() == (1, 6, 6) and ours[3].grad.stride() == (1, 17, 6)
        step_both(loop, theirs, optimizer, ours)
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


@falls_back
def test_lazily_negated_and_conjugated_gradients():
    """The same address can mean the opposite sign."""
    z = torch.randn(5, dtype=torch.complex64)
    for grad in (z.conj().imag, torch._neg_view(z.imag.clone())):  # with gaps, and dense
        p = torch.zeros(5, requires_grad=True)
        p.grad = grad
        assert p.grad.is_neg()
        fastclip.SGD([p], lr=1.0).step()
        assert torch.equal(p.detach(), z.imag)
    q = torch.zeros(5, dtype=torch.complex64, requires_grad=True)
    q.grad = z.conj()
    assert q.grad.is_conj()
    fastclip.SGD([q], lr=1.0, max_norm=1e9).step()
    assert torch.equal(q.detach(), -z.conj().resolve_conj())
    values = []
    for grad in (z.conj(), z.conj().resolve_conj()):  # torch's Adam raises for the first
        q = torch.zeros(5, dtype=torch.complex64, requires_grad=True)
        q.grad = grad
        fastclip.AdamW([q], lr=1.0).step()
        values.append(q.detach())
    assert torch.equal(*values)


@falls_back
@pytest.mark.parametrize("clip", ["none", "loose norm"])
def test_parameters_that_share_memory_are_updated_in_order(clip):
    torch.set_num_threads(2)
    for _ in range(10):
        a, b = param(65536), param(65536)
        b.data = a.data
        b.grad *= 2
        c = param(65536)
        loop = Loop([torch.zeros(65536, requires_grad=True)], lr=1.0, weight_decay=0.5)
        for grad in (a.grad, b.grad):
            loop.params[0].grad = grad.clone()
            loop.step()
        fastclip.SGD([a, b, c], lr=1.0, weight_decay=0.5, **CLIPS[clip]).step()
        torch.testing.assert_close(a.detach(), loop.params[0].detach(), rtol=1e-6, atol=0)


@falls_back
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("shift", [-1, 1, 700])
def test_a_gradient_in_the_memory_of_its_own_parameter(shift, steps_before, optimizer):
    """It is read as it was before the step: torch's momentum copies it first, too."""
    momentum = {"momentum": 0.9} if optimizer == "SGD" else {}
    values = torch.randn(5400)
    theirs, ours = torch.zeros(4000, requires_grad=True), torch.zeros(4000, requires_grad=True)
    loop = getattr(torch.optim, optimizer)([theirs], lr=0.1, foreach=False, **momentum)
    fused = getattr(fastclip, optimizer)([ours], lr=0.1, **momentum)
    for _ in range(steps_before):
        give_grads([theirs], [ours])
        step_both(loop, None, fused, None)
    for p in (theirs, ours):
        memory = values.clone()
        p.data, p.grad = memory[700:4700], None
        p.grad = memory[700 + shift : 4700 + shift].clone() if p is theirs else memory[700 + shift : 4700 + shift]
    step_both(loop, None, fused, None)
    assert_close([theirs], [ours], 1e-6)


@falls_back
def test_a_shifted_gradient_without_momentum():
    """torch raises here."""
    memory = torch.arange(5000.0)
    p = memory[1:].requires_grad_()
    p.grad = memory.detach()[:-1]
    fastclip.SGD([p], lr=1.0).step()
    assert torch.equal(p.detach(), torch.ones(4999))


@falls_back
def test_a_gradient_in_the_memory_of_another_parameter_is_read_after_its_update():
    """As in torch's loop, which goes by the order of the parameters. With two threads the kernels would not."""
    torch.set_num_threads(2)
    trained = []
    for module in (torch.optim, fastclip):
        a, b = param(65536, 1.0), param(65536, 1.0)
        optimizer = module.SGD([a, b], lr=0.5, foreach=False)
        optimizer.step()
        b.grad = a.detach()
        optimizer.step()
        trained.append([a.detach(), b.detach()])
    assert all(map(torch.equal, *trained))


@falls_back
@pytest.mark.parametrize("moved", ["to an address that makes up for the size", "to a wider dtype"])
def test_memory_that_is_shared_from_some_step_on(moved):
    """Its addresses were looked at before, and were fine."""
    memory = torch.zeros(8192)
    memory = memory[128 if memory.data_ptr() & 512 else 0 :]
    a, b = memory[:1024].requires_grad_(), memory[1024:2048].detach().requires_grad_()
    optimizer = fastclip.SGD([a, b], lr=1.0)
    a.grad, b.grad = torch.ones(1024), torch.ones(1024)
    optimizer.step()
    a.grad = b.grad = None
    if moved == "to a wider dtype":
        a.data = torch.frombuffer(memory.numpy(), dtype=torch.float64, count=1024)  # up to where b ends
    else:  # address ^ size stays as it was
        offset = ((memory.data_ptr() ^ 1024 ^ 1536) - memory.data_ptr()) // 4
        assert offset == 128
        a.data = memory[offset : offset + 1536]
    memory.zero_()
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    with pytest.warns(UserWarning, match="share memory"):
        optimizer.step()
    assert memory.sum() != 0


@falls_back
def test_overlapping_views_and_a_parameter_appended_twice():
    memory = torch.zeros(10)
    a, b = memory[:6].requires_grad_(), memory[4:].detach().requires_grad_()
    a.grad, b.grad = torch.ones(6), torch.ones(6)
    fastclip.SGD([a, b], lr=1.0).step()
    assert memory.tolist() == [-1, -1, -1, -1, -2, -2, -1, -1, -1, -1]
    p = param(3)
    optimizer = fastclip.SGD([p], lr=1.0)
    optimizer.param_groups[0]["params"].append(p)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), -2.0))


@pytest.mark.falls_back
def test_strides_of_no_elements_mean_nothing():
    """Found by make fuzz: torch gives (2, 0, 1) a first stride of 0."""
    p, q = torch.zeros(2, 0, 1, requires_grad=True), torch.zeros(4, requires_grad=True)
    optimizer = fastclip.SGD([p, q], lr=1.0, momentum=0.9)
    for _ in range(2):
        p.grad, q.grad = torch.empty_strided((2, 0, 1), (0, 1, 1)), torch.ones(8)[::2]
        optimizer.state[p]["momentum_buffer"] = torch.empty_strided((2, 0, 1), (0, 1, 1))
        optimizer.step()
    torch.testing.assert_close(q.detach(), torch.full((4,), -2.9))
