"""Limits that follow from the norms of past steps: the same on all ranks, to the bit, and as in one process."""

import math
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Replicate, Shard

import fastclip

from .checkpoints import load, make, state_of, train
from .compare import Sharded, assert_same_model, assert_same_on_all_ranks, line, on_ranks, place
from .models import loss_of_my_rows

HISTORIES = ("clip_history", "skip_history")
LIMITS = {
    "max_norm": fastclip.QuantileNorm(0.5, scale=0.9, window=4, warmup=2),
    "skip_norm": fastclip.EmaNorm(z=2, decay=0.8, warmup=3),
}
STEPS = 10


def make_model():
    """The last one has an element on the first rank only."""
    mesh = line()
    return Sharded(
        ((5, 3), mesh, [Shard(0)]), ((9000,), mesh, [Shard(0)]), ((7,), mesh, [Replicate()]), ((1,), mesh, [Shard(0)])
    )


def give_grads(model, step):
    """The fifth are ten times as large as the others, and in each one is missing."""
    model.give_grads(step, 10.0 if step % 5 == 4 else 1.0)
    for params in (model.params, model.plain):
        params[step % 3].grad = None


def assert_agree(sharded, alone, model):
    ours, theirs = sharded.clip_stats(), alone.clip_stats()
    assert ours.skipped == theirs.skipped and ours.skipped_steps == theirs.skipped_steps
    for name in ("total_norm", "threshold", "skip_threshold", "clip_coefficient"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-12, atol=0, equal_nan=True)
        assert_same_on_all_ranks(getattr(ours, name))
    assert_same_model(model.params, model.plain)


def history_of(optimizer, name):
    return next(entry[name] for entry in optimizer.state.values() if name in entry)


@on_ranks(1, 2, 4)
def rules_look_at_the_norms_of_all_ranks():
    for settings in ({"momentum": 0.9}, {}, {"norm_type": math.inf}):
        model = make_model()
        sharded, alone = (fastclip.SGD(p, lr=0.1, **LIMITS, **settings) for p in (model.params, model.plain))
        for step in range(STEPS):
            give_grads(model, step)
            sharded.step()
            alone.step()
            assert_agree(sharded, alone, model)
        assert 0 < sharded.skipped_steps < 4 and sharded.clip_stats().threshold < math.inf
        for name in HISTORIES:
            for number in history_of(sharded, name):
                assert_same_on_all_ranks(number)


@on_ranks(2, 4)
def a_nan_on_one_rank_enters_no_history():
    model = make_model()
    optimizer = fastclip.SGD(model.params, lr=0.1, **LIMITS)
    for step in range(4):
        model.give_grads(step)
        if step == 2 and dist.get_rank() == 1:
            model.params[0].grad._local_tensor[0] = math.nan
        before = [history_of(optimizer, name).clone() for name in HISTORIES] if step == 2 else []
        optimizer.step()
        assert optimizer.clip_stats().skipped == (step == 2)
        assert all(torch.equal(history_of(optimizer, name), b) for name, b in zip(HISTORIES, before, strict=False))
    assert optimizer.norm_history().numel() == 3


@on_ranks(2, 4)
def amp_skips_on_one_rank_enter_no_history():
    model = make_model()
    optimizer = fastclip.SGD(model.params, lr=0.1, **LIMITS)
    optimizer.grad_scale = torch.ones((), device=place.device_type)
    for step in range(4):
        model.give_grads(step)
        found = float(step == 1 and dist.get_rank() == 1)
        optimizer.found_inf = torch.tensor(found, device=place.device_type)
        optimizer.step()
        assert optimizer.clip_stats().skipped == (step == 1)
    assert optimizer.norm_history().numel() == 3


@on_ranks(2, 4)
def a_rank_without_gradients_remembers_the_norms_of_the_others():
    """Also in its first step, and where the step is left to plain torch."""
    mesh = line()
    model = Sharded(((2,), mesh, [Shard(0)]), ((1, 3), mesh, [Shard(0)]))
    optimizer = fastclip.SGD(model.params, lr=0.1, **LIMITS)
    for step in range(6):
        model.give_grads(step)
        if dist.get_rank() == 1:
            model.params[0].grad = None
        with warnings.catch_warnings():
            if step % 2:
                warnings.simplefilter("ignore")
                grad = model.params[1].grad
                if grad._local_tensor.numel():  # in another layout
                    grad._local_tensor.set_(torch.zeros(1, 6, dtype=torch.float64)[:, ::2] + grad._local_tensor)
            optimizer.step()
        for name in ("total_norm", "threshold", "skip_threshold"):
            assert_same_on_all_ranks(getattr(optimizer.clip_stats(), name))
    assert optimizer.norm_history().numel() == 4


@on_ranks(1, 2, 4)
def norms_by_parameter_are_those_of_all_ranks():
    for norm_type in (2.0, math.inf):
        model = make_model()
        for limit in ({"max_norm": 1.0}, {"max_norm": "quantile"}):
            optimizer = fastclip.SGD(model.params, lr=0.1, norm_type=norm_type, **limit)
            give_grads(model, 0)
            optimizer.step()
            names, norms = optimizer.norms_by_parameter()
            assert names == [f"parameter {i} of group 0" for i in range(4)]
            expected = [0.0 if p.grad is None else p.grad.norm(norm_type).item() for p in model.plain]
            torch.testing.assert_close(norms, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
            for norm in norms:
                assert_same_on_all_ranks(norm)


def trained(steps):
    model, optimizer = make(fastclip.AdamW, lr=0.03, **LIMITS)
    train(model, optimizer, loss_of_my_rows, range(steps))
    return model, optimizer


@on_ranks(2)
def saves_a_checkpoint_with_histories():
    model, optimizer = trained(6)
    for kind, flat in (("histories", False), ("histories_flat", True)):
        dcp.save(state_of(model, optimizer, flat), checkpoint_id=place.folder / kind)


@on_ranks(1, 2, 4)
def loads_a_checkpoint_with_histories():
    expected = trained(9)
    for kind in ("histories", "histories_flat"):
        model, optimizer = make(fastclip.AdamW, lr=0.03, **LIMITS)
        load(model, optimizer, kind, flat=kind.endswith("flat"))
        assert optimizer.norm_history().numel() == 4
        train(model, optimizer, loss_of_my_rows, range(6, 9))
        torch.testing.assert_close(optimizer.norm_history(), expected[1].norm_history(), rtol=1e-12, atol=0)
        for p, q in zip(model.parameters(), expected[0].parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), q.full_tensor(), rtol=1e-10, atol=1e-12)
        for number in history_of(optimizer, "skip_history"):
            assert_same_on_all_ranks(number)
