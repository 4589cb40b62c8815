"""Each optimizer of the table: bits and bounds, states, dtypes, clips, checkpoints. A new rule meets it first."""

import copy

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from fastclip import _C
from fastclip.plain import rules
from tests.support.cases import (
    CLIPS,
    LARGE,
    SHAPES,
    TINY,
    Loop,
    assert_close,
    assert_equal_trees,
    assert_same_bits,
    copy_params,
    exact_square_roots,
    give_grads,
    make_params,
    reference_step,
)
from tests.support.optimizers import CASES, OPTIMIZERS, described

BITWISE = ["none", "value", "pair"]
ROUNDINGS = {
    "to nearest": {},
    "master weights": {"master_weights": True},
    "stochastic": {"stochastic_rounding": True, "rounding_seed": 5},
}
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
every_case = pytest.mark.parametrize("case", CASES, ids=repr)
every_variant = pytest.mark.parametrize(
    ("case", "variant"),
    [pytest.param(case, variant, id=f"{case} {described(variant)}") for case in CASES for variant in case.variants],
)


def twins(case, shapes, clip, dtype=torch.float32, **settings):
    """The plain loop and fastclip, over equal parameters: (loop, its parameters, optimizer, its parameters)."""
    ours = make_params(shapes, dtype)
    theirs = copy_params(ours)
    settings = {**case.stateful, "lr": 0.01, **settings}
    loop = Loop(theirs, clip, optimizer=case.torch, **settings)
    return loop, theirs, case.fastclip(ours, **settings, **clip), ours


def test_the_table_of_tests_has_all_optimizers():
    import fastclip

    public = {name for name in fastclip.__all__ if hasattr(getattr(fastclip, name), "_rule")}
    of_their_own = {"ScaledAdam", "LAMB"}  # sums over whole parameters decide: see their files
    assert public == set(OPTIMIZERS) | of_their_own
    of_table = {case.rule.name for case in CASES} | {getattr(fastclip, name)._rule.name for name in of_their_own}
    assert of_table == {rule.name for rule in rules.RULES}


def test_the_table_of_rules_says_what_csrc_says():
    """A rule that one of them lacks, or whose states have other names, orders or counts."""
    in_python = [
        (rule.name, rule.arrays, rule.scalar and rule.scalar[0], rule.counts_steps, rule.momentum)
        + (rule.filled_by_first_step, rule.change is not None)
        for rule in rules.RULES
    ]
    in_csrc = [rule for rule in _C.rules() if rule[0] != "clip_grad"]
    assert in_python == in_csrc


@pytest.mark.parametrize("clip", BITWISE)
@both_precisions
@every_variant
def test_same_bits_as_the_loop(case, variant, dtype, clip):
    loop, theirs, optimizer, ours = twins(case, SHAPES, CLIPS[clip], dtype, **variant)
    for step in range(7):
        give_grads(theirs, ours, scale=10 ** (step % 4 - 2))
        loop.step()
        optimizer.step()
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shapes", [TINY, LARGE], ids=["tiny", "large"])
@every_case
def test_same_bits_over_many_and_large_tensors(case, shapes, threads):
    torch.set_num_threads(threads)
    loop, theirs, optimizer, ours = twins(case, shapes, CLIPS["value"])
    for _ in range(3):
        give_grads(theirs, ours)
        loop.step()
        optimizer.step()
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


@pytest.mark.parametrize("clip", ["norm", "inf norm", "loose norm", "value and norm"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 5e-6), (torch.float64, 1e-12)], ids=str)
@every_case
def test_norm_clip_agrees_with_the_loop(case, dtype, rtol, clip):
    if case.rule.needs_norm and clip == "inf norm":
        with pytest.raises(ValueError, match="norm_type in param_groups.0. must be 2 in this optimizer"):
            case.fastclip(make_params(SHAPES), **CLIPS[clip])
        return
    loop, theirs, optimizer, ours = twins(case, SHAPES, CLIPS[clip], dtype, weight_decay=0.1, **case.moderate)
    for _ in range(4):
        give_grads(theirs, ours)
        norm = loop.step()
        optimizer.step()
        torch.testing.assert_close(optimizer.total_norm, norm, rtol=1e-12, atol=0)
    assert_close(theirs, ours, rtol)


@pytest.mark.parametrize(
    ("rounding", "clip"),
    [("to nearest", "value"), ("to nearest", "norm"), ("master weights", "norm"), ("stochastic", "value and norm")],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_variant
def test_16_bits_have_the_bits_of_the_reference(case, variant, dtype, rounding, clip):
    """Also of states, and of tensors whose momentum has a dtype of its own."""
    ours = make_params(SHAPES, dtype)
    expected = copy_params(ours)
    settings = {**case.stateful, "lr": 0.01, **case.moderate, **variant, **ROUNDINGS[rounding], **CLIPS[clip]}
    if case.rule.momentum and rounding != "to nearest":
        settings["momentum_dtype"] = torch.bfloat16
    optimizer, other = case.fastclip(ours, **settings), case.fastclip(expected, **settings)
    for _ in range(3):
        give_grads(expected, ours)
        optimizer.step()
        reference_step(other)
    assert_same_bits(expected, ours, other, optimizer)


@every_case
def test_momentum_dtype_is_of_the_momentum_or_refused(case):
    params = make_params([(5,)])
    if case.rule.momentum is None:
        with pytest.raises(ValueError, match="momentum_dtype in param_groups.0. must be None: .* keeps no momentum"):
            case.fastclip(params, momentum_dtype=torch.bfloat16)
        return
    optimizer = case.fastclip(params, **case.stateful, momentum_dtype=torch.bfloat16)
    give_grads(params)
    optimizer.step()
    state = optimizer.state[params[0]]
    assert {name for name, value in state.items() if value.dtype == torch.bfloat16} == {case.rule.momentum}


@every_case
def test_states_have_torchs_names_shapes_and_order(case):
    loop, theirs, optimizer, ours = twins(case, [(3, 4), ()], {})
    give_grads(theirs, ours)
    loop.step()
    optimizer.step()
    for a, b in zip(theirs, ours, strict=True):
        in_torch, in_ours = loop.optimizer.state[a], optimizer.state[b]
        assert list(in_torch) == list(in_ours)
        assert [(v.shape, v.dtype, v.stride()) for v in in_torch.values()] == [
            (v.shape, v.dtype, v.stride()) for v in in_ours.values()
        ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@every_case
def test_training_in_16_bits_goes_on_from_a_checkpoint(case, rounding, dtype):
    settings = {**case.stateful, "lr": 0.01, **case.moderate, **ROUNDINGS[rounding]}
    expected = make_params(SHAPES, dtype)
    first = case.fastclip(expected, **settings)
    for _ in range(3):
        give_grads(expected)
        first.step()
    ours = copy_params(expected)
    second = case.fastclip(ours, **settings)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    saved, loaded = first.state[expected[3]], second.state[ours[3]]
    assert {k: v.dtype for k, v in saved.items()} == {k: v.dtype for k, v in loaded.items()}
    for _ in range(3):
        give_grads(expected, ours)
        first.step()
        second.step()
    assert_same_bits(expected, ours, first, second)


@pytest.mark.parametrize("rounding", ["from plain torch", *ROUNDINGS])
@every_case
def test_flattened_checkpoints_of_torch_distributed(case, rounding):
    """torch's loader asks for each key of a group and of a state, and raises where the file lacks one."""

    def model():
        torch.manual_seed(0)
        return torch.nn.Linear(4, 5).to(torch.float32 if rounding == "from plain torch" else torch.bfloat16)

    def train(model, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(2, 4, dtype=model.weight.dtype)).square().sum().backward()
            with exact_square_roots():
                optimizer.step()

    settings = {**case.stateful, **ROUNDINGS.get(rounding, {})}
    saved = model()
    first = (case.torch if rounding == "from plain torch" else case.fastclip)(saved.parameters(), **settings)
    train(saved, first)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    file = copy.deepcopy(get_optimizer_state_dict(saved, first, options=flat))
    loaded = model()
    loaded.load_state_dict(saved.state_dict())
    second = case.fastclip(loaded.parameters(), **settings)
    set_optimizer_state_dict(loaded, second, file, options=flat)
    for net, optimizer in ((saved, first), (loaded, second)):
        train(net, optimizer)
    assert_same_bits(saved.parameters(), loaded.parameters(), first, second)


@pytest.mark.parametrize("source", ["torch", "fastclip"])
@pytest.mark.parametrize("target", ["torch", "fastclip"])
@every_case
def test_checkpoints_go_both_ways(case, source, target):
    loop, theirs, optimizer, ours = twins(case, SHAPES, {})
    optimizers = {"torch": loop.optimizer, "fastclip": optimizer}

    def step():
        give_grads(theirs, ours)
        loop.step()
        with exact_square_roots():
            optimizer.step()

    for _ in range(2):
        step()
    saved = copy.deepcopy(optimizers[source].state_dict())
    ours = copy_params(theirs)
    optimizer = getattr(case, target)(ours, lr=5.0)
    optimizer.load_state_dict(saved)
    for _ in range(2):
        step()
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


def kept(optimizer):
    return {i: state for i, state in optimizer.state_dict()["state"].items() if state}


@pytest.mark.parametrize("settings", [{"skip_nonfinite": True}, {"skip_nonfinite": True, "max_norm": 1.0}], ids=str)
@every_case
def test_a_step_that_is_skipped_changes_nothing(case, settings):
    params = make_params(SHAPES)
    optimizer = case.fastclip(params, **case.stateful, **settings)
    for first in (True, False):
        give_grads(params)
        params[3].grad[0] = float("nan")
        before, state = copy_params(params), copy.deepcopy(kept(optimizer))
        optimizer.step()
        assert optimizer.clip_stats().skipped and optimizer.skipped_steps == (1 if first else 2)
        assert_same_bits(before, params)
        assert_equal_trees(state, kept(optimizer))
        give_grads(params)
        optimizer.step()


@pytest.mark.falls_back
@every_case
def test_what_the_kernels_do_not_cover_has_the_bits_of_torch(case):
    """Strided memory goes through plain torch, with all that is beside it."""
    theirs = [torch.randn(6, 4)[:, ::2].requires_grad_(), torch.randn(7).requires_grad_()]
    ours = [p.detach().clone(memory_format=torch.preserve_format).requires_grad_() for p in theirs]
    ours[0] = torch.empty(6, 4)[:, ::2].copy_(theirs[0].detach()).requires_grad_()
    loop = Loop(theirs, CLIPS["value"], optimizer=case.torch, **{**case.stateful, "lr": 0.01})
    optimizer = case.fastclip(ours, **{**case.stateful, "lr": 0.01}, **CLIPS["value"])
    for _ in range(3):
        give_grads(theirs, ours)
        loop.step()
        with exact_square_roots():
            optimizer.step()
    assert_same_bits(theirs, ours, loop.optimizer, optimizer)


@every_case
def test_what_belongs_together_is_not_made_in_part(case):
    if not case.rule.counts_steps:
        pytest.skip("has one state array, and no count that belongs to it")
    params = make_params([(4,)])
    optimizer = case.fastclip(params, **case.stateful)
    give_grads(params)
    optimizer.step()
    for name in list(optimizer.state[params[0]]):
        missing = optimizer.state[params[0]].pop(name)
        before = copy_params(params)
        with pytest.raises(KeyError, match=f"the state of parameter 0 of group 0 has no {name}, but has .*: keep both"):
            optimizer.step()
        assert_same_bits(before, params)
        optimizer.state[params[0]] = {name: missing, **optimizer.state[params[0]]}


@pytest.mark.falls_back
@every_case
def test_sparse_gradients_as_in_torch(case):
    theirs = torch.randn(5, 3).requires_grad_()
    ours = theirs.detach().clone().requires_grad_()
    settings = {"lr": 0.1} if case.rule.takes_sparse else case.stateful
    grad = torch.sparse_coo_tensor([[1, 3]], torch.randn(2, 3), (5, 3))
    optimizer = case.fastclip([ours], **settings)
    theirs.grad, ours.grad = grad, grad.clone()
    if not case.rule.takes_sparse:
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            optimizer.step()
        return
    other = case.torch([theirs], foreach=False, **settings)
    for _ in range(3):
        with exact_square_roots():
            optimizer.step()
            other.step()
    assert_same_bits([theirs], [ours], other, optimizer)
