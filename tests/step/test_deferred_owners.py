"""A clip is deferred to the optimizer that owns all of the gradients; where there is none, it is done at once."""

import gc
import warnings

import pytest
import torch

import fastclip
from fastclip.deferred import Living, owner_of
from tests.support.cases import (
    TINY,
    assert_same_bits,
    copy_params,
    give_grads,
    make_params,
)
from tests.support.deferral import clip, two


@pytest.mark.parametrize("kind", ["tight", "value"])
def test_clips_at_once_where_the_gradients_are_not_those_of_one_optimizer(kind):
    """A part of the model, two optimizers, one of torch's, a parameter given twice, tied gradients."""

    def of_two(params):
        return [fastclip.SGD(params[:5], lr=0.1), fastclip.AdamW(params[5:], lr=0.01)]

    def tie(params):
        params[1].grad = params[2].grad = torch.ones_like(params[1])

    same = [(3,), (4,), (4,), (5, 2), (6,), (1,), (2,)]
    cases = {
        "a part": (lambda params: [fastclip.SGD(params, lr=0.1)], lambda params: params[2:]),
        "more": (lambda params: [fastclip.SGD(params[2:], lr=0.1)], lambda params: params),
        "two optimizers": (of_two, lambda params: params),
        "torch's": (lambda params: [torch.optim.SGD(params, lr=0.1)], lambda params: params),
        "twice": (lambda params: [fastclip.SGD(params, lr=0.1)], lambda params: [*params, params[0]]),
        "tied": (lambda params: [fastclip.SGD(params, lr=0.1)], lambda params: (tie(params), params)[1]),
        "nobody": (lambda params: [], lambda params: params),
    }
    for name, (make, chosen) in cases.items():
        ours = make_params(same)
        theirs = copy_params(ours)
        optimizers = [make(params) for params in (ours, theirs)]
        give_grads(ours, theirs)
        clip(chosen(ours), kind, defer=True)
        clip(chosen(theirs), kind)
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p.grad, q.grad), name
        for optimizer in sum(optimizers, []):
            optimizer.step()
        assert_same_bits(theirs, ours)


def test_each_optimizer_has_its_own_clip():
    """Two networks that take turns: each clips its own parameters, and one is not stepped each time."""
    pairs = [two(shapes=[(7,), (3, 5)]) for _ in range(2)]
    for turn in range(4):
        for number, (opt, ours, plain, theirs) in enumerate(pairs):
            opt.zero_grad()
            give_grads(ours, theirs)
            clip(ours, "tight", defer=True)
            clip(theirs, "tight")
            if turn % 2 == number:
                opt.step()
                plain.step()
            assert_same_bits(theirs, ours, plain, opt)


def test_two_losses_that_are_clipped_in_turn():
    """One optimizer, and a clip of each part before the other has gradients: each is of its own part."""
    results = []
    for defer in (True, False):
        torch.manual_seed(3)
        parts = [make_params([(7,), (3, 5)]), make_params([(4,)])]
        optimizer = fastclip.SGD([*parts[0], *parts[1]], lr=0.1)
        for part in parts:
            for p in part:
                (100 * p).sum().backward()
            clip(part, "tight", defer=defer)
        optimizer.step()
        results.append([*parts[0], *parts[1]])
    assert_same_bits(*results)


def test_a_clip_in_a_hook_of_each_gradient():
    """As a gradient has been added up, in the backward pass."""
    results = []
    for defer in (True, False):
        torch.manual_seed(3)
        params = make_params([(7,), (3, 5), (2,)])
        optimizer = fastclip.SGD(params, lr=0.1)
        for p in params:
            p.register_post_accumulate_grad_hook(lambda p, defer=defer: clip([p], "tight", defer=defer) and None)
        sum((100 * p).sum() for p in params).backward()
        optimizer.step()
        results.append(params)
    assert_same_bits(*results)


def test_a_group_that_joins_between_clip_and_step():
    results = []
    for defer in (True, False):
        torch.manual_seed(3)
        params, later = make_params([(7,), (3, 5)]), make_params([(4,)])
        optimizer = fastclip.SGD(params, lr=0.1)
        give_grads(params, scale=100.0)
        give_grads(later)
        clip(params, "tight", defer=defer)
        optimizer.add_param_group({"params": later})
        optimizer.step()
        results.append([*params, *later])
    assert_same_bits(*results)


def test_two_optimizers_with_the_same_parameters():
    """A warm-up by one, then the other: nobody knows which of them will step, so the clip is at once."""
    params = make_params([(7,)])
    optimizers = [fastclip.AdamW(params, lr=0.1), fastclip.SGD(params, lr=1.0)]
    before = params[0].detach().clone()
    give_grads(params, scale=100.0)
    clip(params, "tight", defer=True)
    assert params[0].grad.norm() == pytest.approx(0.5) and all(o._deferred is None for o in optimizers)
    optimizers[1].step()
    assert (params[0] - before).norm().item() == pytest.approx(0.5, rel=1e-5)


def test_an_optimizer_made_between_clip_and_step():
    params = make_params([(7,)])
    old = fastclip.AdamW(params, lr=0.1)
    before = params[0].detach().clone()
    give_grads(params, scale=100.0)
    clip(params, "tight", defer=True)
    assert old._deferred is not None
    fastclip.SGD(params, lr=1.0).step()
    assert (params[0] - before).norm().item() == pytest.approx(0.5, rel=1e-5)


def test_a_step_of_a_subclass_is_not_deferred_to():
    class Own(fastclip.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad, alpha=group["lr"])

    params = make_params([(7,)])
    optimizer = Own(params, lr=1.0)
    before = params[0].detach().clone()
    give_grads(params, scale=100.0)
    clip(params, "tight", defer=True)
    optimizer.step()
    assert (params[0] - before).norm().item() == pytest.approx(0.5, rel=1e-5)


def test_clips_that_no_step_carries_out_are_said_once():
    """As in a loop that clips per sample, and adds the gradients up elsewhere. Single skipped steps are no reason."""
    opt, params, *_ = two(shapes=[(7,)])
    for k in range(8):
        give_grads(params)
        clip(params, "tight", defer=True)
        if k % 2:
            opt.step()
        opt.zero_grad()
    said = []
    for _ in range(6):
        give_grads(params)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            clip(params, "tight", defer=True)
            opt.zero_grad()
        said += [str(warning.message) for warning in found]
    assert len(said) == 1 and "met no step" in said[0] and "--clip fused" in said[0]


def test_a_group_added_by_hand_with_torchs_keys_only():
    opt, ours, plain, theirs = two()
    for optimizer, params in ((opt, ours), (plain, theirs)):
        group = optimizer.param_groups[0]
        optimizer.param_groups.append({**torch.optim.SGD([params[-1]], lr=0.1).param_groups[0]})
        group["params"] = params[:-1]
    give_grads(ours, theirs)
    clip(ours, "value", defer=True)
    clip(theirs, "value")
    opt.step()
    plain.step()
    assert_same_bits(theirs, ours)


def test_groups_and_parameters_in_another_order():
    ours = make_params(TINY)
    theirs = copy_params(ours)
    groups = [[{"params": p[::2], "weight_decay": 0.1}, {"params": p[1::2]}] for p in (ours, theirs)]
    opt, plain = (fastclip.SGD(g, lr=0.1) for g in groups)
    give_grads(ours, theirs)
    assert owner_of(ours)[0] is opt and owner_of(ours[::-1])[0] is opt
    clip(ours, "tight", defer=True)
    clip(theirs, "tight")
    opt.step()
    plain.step()
    assert_same_bits(theirs, ours)


def test_the_list_of_optimizers_forgets_those_that_are_gone_and_takes_new_ones_meanwhile():
    living = Living()
    optimizers = [fastclip.SGD(make_params([(2,)]), lr=0.1) for _ in range(3)]
    for optimizer in optimizers:
        living.add(optimizer)
    seen = 0
    for one in living:
        living.add(fastclip.SGD(make_params([(2,)]), lr=0.1))
        seen += one in optimizers
    assert seen == 3 and optimizers[0] in living
    del one, optimizer, optimizers
    gc.collect()
    assert [*living] == []
