"""NovoGrad, whose updates take the norm of each parameter: what tests/step/test_rules.py does not ask of all rules."""

import copy
import math

import pytest
import torch

import fastclip
from fastclip.plain import step as reference
from tests.support.cases import LARGE, SHAPES, assert_close, assert_same_bits, copy_params, give_grads, make_params
from tests.support.in_backward_cases import assert_same, groups, losses, net
from tests.support.optimizers import PlainNovoGrad

CLIPS = {
    "none": {},
    "value": {"clip_value": 0.4},
    "norm": {"max_norm": 0.7},
    "norm of each": {"max_norm": 0.2, "norm_scope": "parameter"},
    "rule": {"max_norm": fastclip.EmaNorm(z=0.5, decay=0.8, warmup=2)},
    "rule of each": {"max_norm": fastclip.EmaNorm(z=0.5, decay=0.8, warmup=2), "norm_scope": "parameter"},
    "skipped": {"skip_norm": 1000.0},
    "finite": {"skip_nonfinite": True},
}
KINDS = {
    "float32": {},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "master weights": {"dtype": torch.bfloat16, "master_weights": True},
    "narrow momentum": {"momentum_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", CLIPS)
def test_plain_torch_takes_the_same_steps(clip, kind):
    """With each clip before it: what enters the average is the norm after all clips."""
    of_kind = dict(KINDS[kind])
    ours = make_params([*SHAPES, *LARGE], of_kind.pop("dtype", torch.float32))
    theirs = copy_params(ours)
    optimizer, plain = (
        fastclip.NovoGrad(p, lr=0.05, weight_decay=0.01, **CLIPS[clip], **of_kind) for p in (ours, theirs)
    )
    for step in range(5):
        give_grads(theirs, ours, scale=(1.0, 5.0, 0.1)[step % 3])
        ours[step].grad = theirs[step].grad = None
        optimizer.step()
        expected = reference.step(plain._rule, plain.param_groups, plain.state)
        assert optimizer.clip_stats().skipped == expected.skipped
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-11}.get(ours[0].dtype, 2e-2)
    assert_close(theirs, ours, tolerance)
    for a, b in zip(theirs, ours, strict=True):
        pair = plain.state[a]["exp_avg_sq"], optimizer.state[b]["exp_avg_sq"]
        torch.testing.assert_close(*pair, rtol=1e-6, atol=0)


def test_a_clip_of_each_does_what_the_loop_does():
    """PyTorch's own clip of each parameter, and the equations in plain torch."""
    ours = make_params(SHAPES)
    theirs = copy_params(ours)
    plain = PlainNovoGrad(theirs, lr=0.05)
    optimizer = fastclip.NovoGrad(ours, lr=0.05, max_norm=0.2, norm_scope="parameter")
    for _ in range(4):
        give_grads(theirs, ours)
        for p in theirs:
            if p.numel():
                torch.nn.utils.clip_grad_norm_([p], 0.2)
        plain.step()
        optimizer.step()
    assert_close(theirs, ours, 1e-5)


def test_a_first_gradient_of_zeros_begins_no_average():
    p = torch.ones(3, requires_grad=True)
    optimizer = fastclip.NovoGrad([p], lr=0.1)
    for gradient, average in ((0.0, 0.0), (2.0, 12.0), (0.0, 0.98 * 12)):
        p.grad = torch.full_like(p, gradient)
        optimizer.step()
        assert p.isfinite().all() and optimizer.state[p]["exp_avg_sq"].item() == pytest.approx(average)


def test_a_skipped_step_changes_nothing():
    params = make_params([(30,), (40,)])
    optimizer = fastclip.NovoGrad(params, lr=0.1, skip_nonfinite=True)
    for step in range(3):
        give_grads(params)
        if step == 2:
            params[0].grad[3] = math.nan
        before = [p.detach().clone() for p in params]
        states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params] if step == 2 else []
        optimizer.step()
    assert_same_bits(before, params)
    for p, state in zip(params, states, strict=True):
        assert all(torch.equal(optimizer.state[p][name], value) for name, value in state.items())
    assert optimizer.total_norm is None and optimizer.skipped_steps == 1


def test_the_norms_are_there_to_look_at():
    params = make_params([(30,), (40,)])
    optimizer = fastclip.NovoGrad(params, lr=0.1)
    give_grads(params)
    optimizer.step()
    expected = [p.grad.double().norm().item() for p in params]
    assert optimizer.norms_by_parameter()[1].tolist() == pytest.approx(expected)
    assert optimizer.clip_stats().clip_coefficient is None


@pytest.mark.parametrize("bucket_cap_mb", [0, 1e-3, 4])
def test_steps_in_the_backward_pass_have_the_same_bits(bucket_cap_mb):
    ordinary, stepped = [(m, fastclip.NovoGrad(groups(m), lr=0.1, weight_decay=0.01)) for m in (net(), net())]
    fastclip.step_in_backward(*stepped, bucket_cap_mb=bucket_cap_mb)
    for loss in losses(4):
        for model in (ordinary[0], stepped[0]):
            loss(model).backward()
        ordinary[1].step()
        ordinary[1].zero_grad()
        assert_same(ordinary, stepped)


def test_a_checkpoint_of_nemos_is_loaded():
    """There, the count of steps is an int, and groups know no clip."""
    ours = make_params([(5, 3), (7,)])
    theirs = copy_params(ours)
    plain = PlainNovoGrad(theirs, lr=0.05, weight_decay=0.01)
    give_grads(theirs)
    plain.step()
    saved = copy.deepcopy(plain.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    for group in saved["param_groups"]:
        del group["maximize"]
    optimizer = fastclip.NovoGrad(ours)
    optimizer.load_state_dict(saved)
    for a, b in zip(theirs, ours, strict=True):
        b.data.copy_(a)
    for _ in range(2):
        give_grads(theirs, ours)
        plain.step()
        optimizer.step()
    assert_same_bits(theirs, ours)
    assert [state["step"].item() for state in optimizer.state.values()] == [3, 3]


def test_a_checkpoint_with_amsgrad_is_refused():
    params = make_params([(5, 3)])
    saved = PlainNovoGrad(params).state_dict()
    saved["param_groups"][0]["amsgrad"] = True
    optimizer = fastclip.NovoGrad(params, lr=0.5)
    with pytest.raises(ValueError, match=r"fastclip.NovoGrad has no amsgrad: NeMo's own"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5, "nothing has changed"
    give_grads(params)
    optimizer.step()
    for switch in ("amsgrad", "luc"):
        with pytest.raises(ValueError, match=f"fastclip.NovoGrad has no {switch}"):
            fastclip.NovoGrad([{"params": params, switch: True}])
    optimizer = fastclip.NovoGrad([{"params": params, "amsgrad": False, "luc": False, "luc_eps": 1e-8}])
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("kind", [torch.bfloat16, float, "one element"])
def test_an_average_of_norms_in_another_form(kind):
    """Of 16 bits it would stand still."""
    p = torch.ones((), requires_grad=True)
    optimizer = fastclip.NovoGrad([p])
    give_grads([p])
    optimizer.step()
    saved = optimizer.state_dict()
    average = saved["state"][0]["exp_avg_sq"]
    forms = {float: average.item(), "one element": average.reshape(1)}
    saved["state"][0]["exp_avg_sq"] = forms[kind] if kind in forms else average.to(kind)
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
    give_grads([p])
    reference.step(optimizer._rule, optimizer.param_groups, optimizer.state)
    optimizer.step()
    assert p.isfinite()


BAD = {
    "amsgrad": ({"amsgrad": True}, "fastclip.NovoGrad has no amsgrad"),
    "luc": ({"luc": True}, "fastclip.NovoGrad has no luc"),
    "scope": (
        {"max_norm": 1.0, "norm_scope": "group"},
        "norm_scope in param_groups[0] must be 'global' or 'parameter'",
    ),
    "norm": ({"norm_type": math.inf}, "norm_type in param_groups[0] must be 2 in this optimizer"),
    "change": ({"max_change": 1.0}, "fastclip.SGD, Adam, AdamW and LAMB alone have it"),
    "eps": ({"eps": -1.0}, "eps must not be negative or NaN, got -1.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused(case):
    settings, message = BAD[case]
    with pytest.raises(ValueError) as error:
        fastclip.NovoGrad(make_params([(3,)]), **settings)
    assert message in str(error.value)
