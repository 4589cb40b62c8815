"""A parameter that is given twice in one group: tied weights, as `[*encoder.parameters(), *decoder.parameters()]`."""

import math
import warnings

import pytest
import torch

import fastclip
from tests.support.cases import Loop, assert_same_bits, copy_params, exact_square_roots, give_grads, make_params

RULES = {"SGD": {"momentum": 0.9, "weight_decay": 0.01}, "Adam": {"amsgrad": True}, "AdamW": {}}
every_rule = pytest.mark.parametrize("rule", RULES)
falls_back = pytest.mark.falls_back


def twice(rule, module=None, clip=None, dtype=torch.float32, shapes=((5, 3), (7,))):
    """(an optimizer whose first parameter is given twice, its parameters); without a module, the plain loop's."""
    torch.manual_seed(0)
    params = make_params(shapes, dtype)
    given = [*params, params[0]]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        if module is None:
            return Loop(given, clip, rule, lr=0.01, **RULES[rule]), params
        return getattr(module, rule)(given, lr=0.01, **(clip or {}), **RULES[rule]), params


@falls_back
@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("clip", [{}, {"clip_value": 0.5}, {"max_norm": 1e9}], ids=lambda c: next(iter(c), "no clip"))
def test_torchs_warning_and_torchs_values(rule, clip, dtype):
    """torch updates it twice, by the same gradient; the order of all three updates matters."""
    loop, theirs = twice(rule, clip=clip, dtype=dtype)
    optimizer, ours = twice(rule, fastclip, clip, dtype)
    for _ in range(3):
        give_grads(theirs, ours)
        loop.step()
        optimizer.step()
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


@falls_back
@every_rule
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_its_gradient_counts_once_in_the_norm(rule, norm_type):
    """As in `clip_grad_norm_(model.parameters())`, which names each parameter once, and in fastclip's. So the clip does
    not depend on how the weights are tied."""
    optimizer, ours = twice(rule, fastclip, {"max_norm": 0.5, "norm_type": norm_type})
    loop, theirs = twice(rule)
    give_grads(theirs, ours)
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5, norm_type)
    loop.step()
    optimizer.step()
    torch.testing.assert_close(optimizer.total_norm, norm.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


# What makes copies in a wider dtype, which must not be made before the first update of the two.
WIDER = {
    "bfloat16": (torch.bfloat16, {}),
    "float16": (torch.float16, {}),
    "narrow momentum": (torch.float32, {"momentum_dtype": torch.bfloat16}),
    "narrow momentum, float64": (torch.float64, {"momentum_dtype": torch.bfloat16}),
}


@falls_back
@every_rule
@pytest.mark.parametrize("alias", [False, True], ids=["twice", "two views"])
@pytest.mark.parametrize("kind", WIDER)
def test_it_is_stepped_twice_also_where_wider_copies_are_made(rule, alias, kind):
    """As its two updates in two optimizers, one after the other."""
    dtype, settings = WIDER[kind]
    cls, momentum = getattr(fastclip, rule), {k: v for k, v in RULES[rule].items() if k != "weight_decay"}
    p = torch.randn(20).to(dtype).requires_grad_()
    q = p.detach().requires_grad_() if alias else p
    given = [p, q]
    expected = p.detach().clone().requires_grad_()
    twin, other = (cls([expected], lr=0.25, **momentum, **settings) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = cls(given, lr=0.25, **momentum, **settings)
    for number in range(3):
        p.grad = torch.randn(20).to(dtype)
        q.grad = p.grad
        expected.grad = p.grad.clone()
        if not alias and number > 0:  # one state serves both updates
            other = twin
        if not alias and rule != "SGD":  # from the first on; of SGD's first buffers both are the gradient
            other = twin
        with exact_square_roots():
            optimizer.step()
            twin.step()
            other.step()
        assert torch.equal(p, expected), number


@falls_back
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_in_the_memory_of_another_parameter_is_read_in_its_turn(dtype):
    p, q = torch.ones(8, dtype=dtype, requires_grad=True), torch.ones(8, dtype=dtype, requires_grad=True)
    p.grad, q.grad = torch.ones(8, dtype=dtype), p.detach()
    fastclip.SGD([p, q], lr=0.5).step()
    assert p.tolist() == [0.5] * 8 and q.tolist() == [0.75] * 8


@falls_back
@pytest.mark.parametrize("rule", ["Adam", "AdamW"])
def test_one_without_elements_counts_its_steps_as_any_other(rule):
    """It shares no memory with itself."""
    (theirs, their_params), (ours, params) = (
        twice(rule, module, shapes=((0, 3), (7,))) for module in (torch.optim, fastclip)
    )
    for _ in range(2):
        give_grads(their_params, params)
        theirs.step()
        ours.step()
        assert [ours.state[p]["step"] for p in params] == [theirs.state[p]["step"] for p in their_params]


@falls_back
def test_checkpoints_and_copies_as_in_torch():
    theirs, their_params = twice("SGD", torch.optim)
    ours, params = twice("SGD", fastclip)
    for optimizer, of in ((theirs, their_params), (ours, params)):
        give_grads(of)
        optimizer.step()
    for saved, into in ((theirs, ours), (ours, theirs)):
        into.load_state_dict(saved.state_dict())
        assert into.state_dict()["param_groups"][0]["params"] == saved.state_dict()["param_groups"][0]["params"]


def test_in_two_groups_it_is_refused_as_in_torch():
    p, q = make_params([(2,), (3,)])
    for module in (torch.optim, fastclip):
        with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
            module.SGD([{"params": [p]}, {"params": [q, p]}], lr=0.1)


def test_a_model_with_tied_weights_names_them_once_and_steps_in_the_kernels():
    """Without a warning, and without plain torch: `model.parameters()` is what to hand over."""
    encoder, decoder = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    decoder.weight = encoder.weight
    model = torch.nn.ModuleList([encoder, decoder])
    optimizer = fastclip.SGD(model.parameters(), lr=0.1)
    params = copy_params(model.parameters())
    give_grads(list(model.parameters()), params)
    optimizer.step()
    torch.optim.SGD(params, lr=0.1).step()
    assert_same_bits(params, list(model.parameters()))
