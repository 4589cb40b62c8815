"""fastclip.ScaledAdam: icefall's equations, its clip, its checkpoints.

icefall is not on PyPI. The reference is a writing of its equations of our own, with parameters stacked by shape.
"""

import copy
import io
import math
import warnings

import pytest
import torch

import fastclip
from benchmarks.core.stacked import StackedScaledAdam
from fastclip import icefall_states
from fastclip.plain import rules
from fastclip.plain import step as plain

# As in a Zipformer, small; parameters of one element, of no dimension, of several of one shape.
SHAPES = [(24, 96), (24, 96), (48,), (48,), (24, 1, 31), (), (), (1,), (5000,), (2, 2), (8, 3, 3)]
SETTINGS = {
    "without a clip": {},
    "clipped": {"clipping_scale": 2.0},
    "clipped in most steps": {"clipping_scale": 0.5, "clipping_update_period": 30},
    "sizes at every step": {"size_update_period": 1},
    "bounds that are reached": {
        "size_update_period": 3,
        "scalar_max": 0.2,
        "param_max_rms": 0.11,
        "param_min_rms": 0.1,
    },
    "other averages": {"betas": (0.8, 0.95), "size_update_period": 7, "eps": 1e-4, "scalar_lr_scale": 0.3},
}


def make_params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype)) for shape in SHAPES]


def set_grads(*lists, step):
    """One step in 17 has gradients ten times as large. They pull parameters to 0, so that sizes have a direction."""
    generator = torch.Generator().manual_seed(step)
    for params in zip(*lists, strict=True):
        noise = torch.randn(params[0].shape, generator=generator) * (10 if step % 17 == 3 else 1)
        for p in params:
            p.grad = (noise + 0.3 * params[0].detach().float()).to(p.dtype)


def take_steps(optimizer, params, first, last):
    take_steps_together([optimizer], [params], first, last)


def take_steps_together(optimizers, lists, first, last):
    """Each optimizer has the gradients of the others."""
    for step in range(first, last):
        set_grads(*lists, step=step)
        for optimizer in optimizers:
            optimizer.step()


def largest_difference(params, others):
    return max(((p - q).abs().max() / q.abs().max()).item() for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_takes_the_steps_of_icefalls_equations(settings):
    """In float64, but for numbers that are kept in float32. In float32, a Σ param * grad near 0 is noise."""
    params, others = make_params(torch.float64), make_params(torch.float64)
    optimizer, reference = (
        fastclip.ScaledAdam(params, lr=0.045, **settings),
        StackedScaledAdam(others, lr=0.045, **settings),
    )
    take_steps_together([optimizer, reference], [params, others], 0, 120)
    assert largest_difference(params, others) < 2e-6
    if "clipping_scale" in settings:
        (memory,) = [entry["model_norms"] for entry in optimizer.state.values() if "model_norms" in entry]
        assert memory[0].item() == pytest.approx(float(reference.threshold), rel=1e-5)
        assert memory[1].item() == reference.clipped > 0


class InPlainTorch(fastclip.ScaledAdam):
    def _update(self, groups, *asked):
        plain.step(self._rule, groups, self.state, *asked)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_plain_torch_takes_the_same_steps(settings):
    params, others = make_params(), make_params()
    optimizer, reference = fastclip.ScaledAdam(params, lr=0.045, **settings), InPlainTorch(others, lr=0.045, **settings)
    take_steps_together([optimizer, reference], [params, others], 0, 60)
    assert largest_difference(params, others) < 5e-6
    for p, q in zip(params, others, strict=True):
        own, expected = optimizer.state[p], reference.state[q]
        assert own.keys() == expected.keys()
        for name in own:
            torch.testing.assert_close(own[name], expected[name], rtol=1e-4, atol=1e-6)


def test_it_steps_in_the_kernels():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_steps(fastclip.ScaledAdam(params := make_params(), clipping_scale=2.0), params, 0, 2)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_same_bits_on_any_number_of_threads(threads):
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        params = [
            torch.nn.Parameter(torch.randn(300_000, generator=torch.Generator().manual_seed(i))) for i in range(2)
        ]
        take_steps(fastclip.ScaledAdam(params, clipping_scale=2.0), params, 0, 12)
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_float64_and_bfloat16_with_master_weights():
    exact, params, narrow = make_params(torch.float64), make_params(), make_params(torch.bfloat16)
    with torch.no_grad():
        for p, q, r in zip(exact, params, narrow, strict=True):
            p.copy_(r), q.copy_(r)
    optimizers = [fastclip.ScaledAdam(exact), fastclip.ScaledAdam(params)]
    optimizers.append(fastclip.ScaledAdam(narrow, master_weights=True))
    for step in range(20):
        set_grads(narrow, step=step)
        for p, q, r in zip(exact, params, narrow, strict=True):
            p.grad, q.grad = r.grad.double(), r.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    assert largest_difference(params, exact) < 1e-5
    masters = [optimizers[2].state[p]["master_param"] for p in narrow]
    assert all(torch.equal(p, q) for p, q in zip(masters, params, strict=True))


def test_maximize_moves_up():
    params, others = make_params(), make_params()
    down, up = fastclip.ScaledAdam(params), fastclip.ScaledAdam(others, maximize=True)
    for step in range(9):
        set_grads(params, others, step=step)
        for q in others:
            q.grad.neg_()
        down.step(), up.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_that_is_not_finite_changes_nothing_where_it_is_clipped(bad):
    params = make_params()
    optimizer = fastclip.ScaledAdam(params, clipping_scale=2.0)
    take_steps(optimizer, params, 0, 12)
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    set_grads(params, step=99)
    params[3].grad[5] = bad
    optimizer.step()
    assert optimizer.clip_stats().skipped and all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    for key, entry in optimizer.state_dict()["state"].items():
        assert all(torch.equal(entry[name], state["state"][key][name]) for name in entry)


def test_each_group_has_its_clip():
    """As if each were alone."""
    params, others = make_params(), make_params()
    parts = [slice(0, 4), slice(4, None)]
    groups = [{"params": params[parts[0]]}, {"params": params[parts[1]], "clipping_scale": 0.5}, {"params": []}]
    together = fastclip.ScaledAdam(groups, clipping_scale=2.0)
    alone = [
        fastclip.ScaledAdam(others[part], clipping_scale=scale) for part, scale in zip(parts, (2.0, 0.5), strict=True)
    ]
    take_steps_together([together, *alone], [params, others], 0, 13)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    memories = [entry["model_norms"] for entry in together.state.values() if "model_norms" in entry]
    assert len(memories) == 2 and all(memory[0] > 0 for memory in memories)


def test_resumed_to_the_bit():
    params, others = make_params(), make_params()
    optimizer = fastclip.ScaledAdam(params, clipping_scale=2.0, clipping_update_period=15)
    take_steps(optimizer, params, 0, 26)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in params]], file)
    state, saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = fastclip.ScaledAdam(others, lr=1.0)
    resumed.load_state_dict(state)
    with torch.no_grad():
        for p, q in zip(others, saved, strict=True):
            p.copy_(q)
    take_steps_together([optimizer, resumed], [params, others], 26, 50)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def icefalls_entry(state, batch, params):
    """What icefall keeps of a batch, beside its first parameter."""
    return state[icefall_states.batches(params)[batch][0]]


def test_a_checkpoint_of_icefalls_form_and_back():
    params, others = make_params(), make_params()
    optimizer = fastclip.ScaledAdam(params, clipping_scale=2.0)
    take_steps(optimizer, params, 0, 13)
    theirs = optimizer.icefall_state_dict()
    assert set(theirs["state"]) == {places[0] for places in icefall_states.batches(params)}
    matrices = theirs["state"][0]
    assert matrices["step"] == 13 and matrices["delta"].shape == (2, 24, 96)
    assert matrices["param_rms"].shape == matrices["scale_exp_avg_sq"].shape == (2, 1, 1)
    assert matrices["scale_grads"].shape == (4, 2, 1, 1)
    assert set(theirs["state"][5]) == {
        "step",
        "delta",
        "exp_avg_sq",
        "model_norms",
        "model_norm_threshold",
        "num_clipped",
    }
    assert theirs["state"][5]["delta"].shape == (2,)  # of no dimension: the first in icefall's order
    resumed = fastclip.ScaledAdam(others, lr=1.0)
    resumed.load_state_dict(copy.deepcopy(theirs))
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    take_steps_together([optimizer, resumed], [params, others], 13, 35)
    assert largest_difference(others, params) < 1e-6  # icefall keeps norms in float32


def test_counts_that_differ_have_no_place_in_icefalls_checkpoint():
    params = make_params()
    optimizer = fastclip.ScaledAdam(params)
    take_steps(optimizer, params, 0, 1)
    set_grads(params, step=1)
    params[0].grad = None
    optimizer.step()
    with pytest.raises(ValueError, match=r"shape \[24, 96\] have taken \[1, 2\] steps"):
        optimizer.icefall_state_dict()


def test_icefalls_groups_and_schedules():
    """Groups with `named_params`; a scheduler that writes `base_lr` and `lr` into them."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    optimizer = fastclip.ScaledAdam(
        [{"named_params": list(module.named_parameters()), "lr": 0.1 * (i + 1)} for i, module in enumerate(model)],
        lr=0.045,
        clipping_scale=2.0,
    )
    for group in optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])
        group["lr"] = group["base_lr"] * 0.5
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]


def test_the_log_line_and_the_dominating_parameter():
    params = make_params()
    names = [f"p{i}" for i in range(len(params))]
    optimizer = fastclip.ScaledAdam(list(zip(names, params, strict=True)), clipping_scale=2.0)
    take_steps(optimizer, params, 0, 11)
    memory = next(entry["model_norms"] for entry in optimizer.state.values() if "model_norms" in entry)
    norms = memory[4:].sort()[0][-10:].tolist()
    quartiles = " ".join(f"{norms[i]:.3e}" for i in (0, 2, 4, 6, 8))
    expected = f"Clipping_scale=2.0, grad-norm quartiles {quartiles}, threshold={4 * norms[4]:.3e}, percent-clipped=0.0"
    assert optimizer.clipping_report() == expected
    set_grads(params, step=50)
    params[8].grad *= 1000
    optimizer.step()
    name, share = optimizer.dominating_parameter()
    assert name == "p8" and 0.9 < share <= 1
    assert optimizer.clip_stats().clip_coefficient < 0.1


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr"),
        ({"clipping_scale": -1.0}, ValueError, "clipping_scale"),
        ({"clipping_scale": 2.0, "skip_nonfinite": False}, ValueError, "needs skip_nonfinite=True"),
        ({"size_update_period": 0}, ValueError, "whole number of steps from 1"),
        ({"clipping_update_period": 2.5}, ValueError, "whole number of steps from 1"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas"),
        ({"norm_type": math.inf}, ValueError, "must be 2"),
        ({"norm_scope": "group"}, ValueError, "norm_scope"),
        ({"max_change": 1.0}, ValueError, "max_change"),
    ],
)
def test_bad_settings_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        fastclip.ScaledAdam(make_params(), **settings)


def test_a_weight_decay_is_refused():
    with pytest.raises(ValueError, match="ScaledAdam has none"):
        fastclip.ScaledAdam([{"params": make_params(), "weight_decay": 0.1}])


def test_a_row_of_another_length_is_refused():
    params = make_params()
    optimizer = fastclip.ScaledAdam(params)
    take_steps(optimizer, params, 0, 1)
    optimizer.param_groups[0]["size_update_period"] = 5
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"sizes of parameter 0 .*must have 7 numbers"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_report_without_a_clip_is_refused():
    with pytest.raises(RuntimeError, match="no clipping_scale"):
        fastclip.ScaledAdam(make_params()).clipping_report()


def test_the_table_of_rules_says_what_the_kernels_keep():
    group = fastclip.ScaledAdam([torch.zeros(3)], size_update_period=6).param_groups[0]
    assert rules.SCALED_ADAM.length_of_row(group) == 8
