"""Ways in which the step was broken once, on purpose: each stays closed."""

import pytest
import torch

import fastclip

from .cases import CLIPS, Loop, assert_same_bits, give_grads, pair

falls_back = pytest.mark.falls_back


def param(size=4, value=0.0):
    p = torch.full((size,), value, requires_grad=True)
    p.grad = torch.ones(size)
    return p


def test_an_interrupted_first_step_leaves_no_momentum_buffers(monkeypatch):
    """Making state entries runs Tensor.__hash__, in Python, where Ctrl-C can arrive."""
    loop, theirs, optimizer, ours = pair([(5,)] * 20, momentum=0.9)
    calls = iter(range(1000))

    def interrupted(self):
        if next(calls) == 30:
            raise KeyboardInterrupt
        return id(self)

    give_grads(theirs, ours)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__hash__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert not any(optimizer.state.values())
    for _ in range(2):
        loop.step()
        optimizer.step()
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


def test_a_state_that_makes_no_entries():
    a, b = param(5), param(2)
    optimizer = fastclip.SGD([a, b], lr=0.1, momentum=0.9)
    optimizer.state = {a: {}}
    with pytest.raises(KeyError):
        optimizer.step()
    assert optimizer.state == {a: {}} and torch.equal(a.detach(), torch.zeros(5))


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


@falls_back
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"max_norm": 1.0}])
def test_modes_and_transforms_see_plain_torch(settings):
    """Scratch memory made under them would be fake, and the kernels would write to nowhere."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    p = param()
    optimizer = fastclip.SGD([p], lr=0.1, **settings)
    with FlopCounterMode(display=False):
        optimizer.step()
    assert (p < 0).all()
    with FakeTensorMode(allow_non_fake_inputs=True):
        optimizer.step()
    try:
        torch.func.functionalize(lambda x: (optimizer.step(), x.sum())[1])(torch.ones(2))
        torch.func.grad(lambda x: (optimizer.step(), (x**2).sum())[1])(torch.ones(2))
    except RuntimeError as error:  # torch's own
        assert "fastclip" not in str(error)


def test_a_momentum_buffer_of_another_shape_is_refused_before_anything_changes():
    a, b = param(2), param(3)
    optimizer = fastclip.SGD([a, b], lr=0.1, momentum=0.9)
    optimizer.step()
    b.data, b.grad = torch.zeros(5), None
    b.grad = torch.ones(5)
    before = a.detach().clone()
    with pytest.raises(ValueError, match="momentum_buffer of parameter 1 of group 0 has another shape"):
        optimizer.step()
    assert torch.equal(a, before)


@falls_back
def test_sparse_gradients_with_weight_decay_are_refused_before_anything_changes():
    a, embedding = param(2), torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="weight_decay.*sparse gradient of parameter 1"):
        fastclip.SGD([a, embedding.weight], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(a.detach(), torch.zeros(2))


def test_clip_functions_change_nothing_when_they_raise():
    a, c = param(2), torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    c.grad = torch.ones_like(c)
    a.grad *= 5
    with pytest.raises(TypeError, match="complex64"):
        fastclip.clip_grad_value_([a, c], 0.1)
    with torch.inference_mode():
        inference = torch.full((2,), 5.0)
    b = torch.zeros(2, requires_grad=True)
    b.grad = inference
    for clip in (fastclip.clip_grad_value_, fastclip.clip_grad_norm_):
        with pytest.raises(RuntimeError, match="inference tensor"):
            clip([a, b], 0.1)
    assert a.grad.tolist() == [5, 5] and inference.tolist() == [5, 5]


@falls_back
def test_a_parameter_that_takes_gradients_of_another_dtype():
    p = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    p.grad_dtype = torch.float32
    p.grad = torch.full((3,), 2.0)
    fastclip.SGD([p], lr=0.1, clip_value=1.0).step()
    assert torch.equal(p.detach(), torch.full((3,), -0.1, dtype=torch.bfloat16))


def test_the_norm_of_clip_grad_norm_holds_no_graph():
    z, w = torch.randn(4, 8, requires_grad=True), torch.zeros(4, 4, requires_grad=True)
    w.grad = (z * 2)[:, ::2]
    assert not fastclip.clip_grad_norm_([w], 1.0).requires_grad


@falls_back
@pytest.mark.parametrize("settings", [{"max_norm": 1.0}, {"clip_value": 0.5}, {"clip_value": 0.5, "max_norm": 1.0}])
def test_meta_parameters(settings):
    p = torch.zeros(3, device="meta", requires_grad=True)
    p.grad = torch.ones(3, device="meta")
    optimizer = fastclip.SGD([p], lr=0.1, **settings)
    optimizer.step()
    assert p.is_meta


def test_numbers_that_change_their_list_or_their_parameter():
    class Number:
        def __float__(self):
            values.clear()
            a.grad = None
            a.data = torch.zeros(2)
            return -1.0

    a = param(4)
    values = [Number(), float("0.12345")]
    optimizer = fastclip.SGD([{"params": [a]}, {"params": [param(3)]}], lr=0.1)
    optimizer.param_groups[1]["clip_value"] = values
    optimizer.step()
    assert torch.equal(a.detach(), torch.zeros(2))


def test_containers_that_torch_takes():
    a, b = param(3), param(2)
    optimizer = fastclip.SGD([a], lr=1.0)
    optimizer.param_groups[0]["params"] = (a,)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [b]})
    del optimizer.param_groups[1]["differentiable"]
    optimizer.param_groups = tuple(optimizer.param_groups)
    optimizer.step()
    assert torch.equal(a.detach(), -torch.ones(3)) and torch.equal(b.detach(), -torch.ones(2))


def test_a_skipped_step_has_an_infinite_norm():
    p = param(2)
    optimizer = fastclip.SGD([p], lr=0.1, max_norm=1.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert optimizer.total_norm.item() == float("inf") and torch.equal(p.detach(), torch.zeros(2))
