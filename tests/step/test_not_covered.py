"""What the kernels do not cover: plain torch with the same answer, or an error before anything is changed."""

import math

import pytest
import torch

import fastclip
from tests.support.cases import CLIPS, assert_close, give_grads, pair, param, step_both

falls_back = pytest.mark.falls_back


@falls_back
def test_the_way_out_of_the_kernels_is_said_once_and_names_the_parameter():
    p = torch.randn(6, 9, requires_grad=True)
    opt = fastclip.SGD([("weight", p)], lr=0.1)
    p.grad = torch.randn(9, 6).t()
    with pytest.warns(UserWarning, match=r"plain torch.*parameter 0 of group 0 \('weight'\)") as caught:
        opt.step()
        opt.step()
    assert len(caught) == 1


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


def nested_gradient():
    p = torch.nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged))
    return p, torch.ones_like(p)


@falls_back
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: (param(4), torch.ones(4).to_sparse()), r"gradient of parameter 0 of group 0 is sparse"),
        (
            lambda: (param(4), torch.ones(4).to(torch.complex64).conj().imag),
            "gradient of parameter 0 of group 0 is a lazily negated",
        ),
        (nested_gradient, "parameter 0 of group 0 is nested"),
    ],
    ids=["sparse", "negated", "nested"],
)
def test_the_warning_says_which_tensor_is_of_which_kind(make, words):
    p, grad = make()
    p.grad = grad
    with pytest.warns(UserWarning, match=words):
        fastclip.SGD([p], lr=1.0).step()


@falls_back
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "weight_decay": 0.1}])
def test_nested_parameters_step_as_in_torch(settings):
    trained = []
    for module in (torch.optim, fastclip):
        p, p.grad = nested_gradient()
        optimizer = module.SGD([p], lr=0.1, **settings)
        optimizer.step()
        optimizer.step()
        trained.append(p.detach().values())
    assert torch.equal(*trained)


@falls_back
def test_clips_of_nested_parameters_and_adam():
    """torch's Adam finds out in the middle of a step."""
    p, p.grad = nested_gradient()
    norm = 5**0.5
    optimizer = fastclip.SGD([p], lr=1.0, clip_value=0.5, max_norm=norm / 4)
    optimizer.step()
    torch.testing.assert_close(p.detach().values(), torch.full((5,), 0.75), rtol=1e-5, atol=0)
    p, p.grad = nested_gradient()
    with pytest.raises(RuntimeError, match="does not support nested gradients, as that of parameter 0 of group 0"):
        fastclip.AdamW([p], lr=1.0).step()
    assert torch.equal(p.detach().values(), torch.ones(5))


@falls_back
@pytest.mark.parametrize("value", [1.0, math.inf, math.nan])
def test_skip_nonfinite_looks_at_the_values_of_sparse_gradients(value):
    embedding, p = torch.nn.Embedding(6, 2, sparse=True), param(3)
    optimizer = fastclip.SGD([embedding.weight, p], lr=0.1, skip_nonfinite=True)
    before = embedding.weight.detach().clone()
    (embedding(torch.tensor([1, 4, 4])) * torch.tensor([1.0, value])).sum().backward()
    expected = before - 0.1 * embedding.weight.grad.to_dense()
    optimizer.step()
    skipped = not math.isfinite(value)
    assert optimizer.skipped_steps == skipped and optimizer.clip_stats().skipped == skipped
    torch.testing.assert_close(embedding.weight.detach(), before if skipped else expected, rtol=1e-6, atol=0)
    assert torch.equal(p.detach(), torch.full((3,), 0.0 if skipped else -0.1))


@falls_back
def test_sparse_gradients_with_weight_decay_are_refused_before_anything_changes():
    a, embedding = param(2), torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="weight_decay.*sparse gradient of parameter 1"):
        fastclip.SGD([a, embedding.weight], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(a.detach(), torch.zeros(2))


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


class Labelled(torch.Tensor):
    """A subclass that changes nothing of what operations do."""


@pytest.mark.parametrize("clip", ["value", "norm"])
def test_a_subclass_without_a_dispatch_of_its_own_runs_in_the_kernels(clip):
    loop, theirs, _, _ = pair([(3, 4)], CLIPS[clip], momentum=0.9)
    ours = [torch.nn.Parameter(p.detach().clone().as_subclass(Labelled)) for p in theirs]
    optimizer = fastclip.SGD(ours, lr=0.1, momentum=0.9, **CLIPS[clip])
    for _ in range(3):
        give_grads(theirs, ours)
        step_both(loop, theirs, optimizer, ours)
    assert type(ours[0]) is Labelled
    assert_close(theirs, [p.detach().as_subclass(torch.Tensor) for p in ours], 2e-6)


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


@falls_back
def test_a_parameter_that_takes_gradients_of_another_dtype():
    p = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch has no grad_dtype")
    p.grad_dtype = torch.float32
    p.grad = torch.full((3,), 2.0)
    fastclip.SGD([p], lr=0.1, clip_value=1.0).step()
    assert torch.equal(p.detach(), torch.full((3,), -0.1, dtype=torch.bfloat16))


@falls_back
@pytest.mark.parametrize("settings", [{"max_norm": 1.0}, {"clip_value": 0.5}, {"clip_value": 0.5, "max_norm": 1.0}])
def test_meta_parameters(settings):
    p = torch.zeros(3, device="meta", requires_grad=True)
    p.grad = torch.ones(3, device="meta")
    optimizer = fastclip.SGD([p], lr=0.1, **settings)
    optimizer.step()
    assert p.is_meta
