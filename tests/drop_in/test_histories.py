"""The norms that QuantileNorm and EmaNorm remember are optimizer state: saved, loaded, copied, resumed to the bit."""

import copy
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fastclip
from tests.support.cases import assert_same_bits, copy_params, give_grads, make_params, through_a_file

RULES = {"SGD": {}, "momentum": {"momentum": 0.9}, "AdamW": {}, "Lion": {}}
HISTORIES = ("clip_history", "skip_history")
SHAPES = [(3, 4), (5,), (2, 2)]
every_rule = pytest.mark.parametrize("rule", RULES)


def limits():
    """Which act in a few steps."""
    return {
        "max_norm": fastclip.QuantileNorm(0.5, scale=0.9, window=6, warmup=2),
        "skip_norm": fastclip.EmaNorm(z=1.5, decay=0.8, warmup=4),
    }


def make(rule, params, module=fastclip, **settings):
    cls = getattr(module, "SGD" if rule == "momentum" else rule)
    return cls(params, lr=0.01, **RULES[rule], **settings)


def step(optimizer, params, seed):
    torch.manual_seed(seed)
    give_grads(params, scale=(1.0, 3.0, 1.0, 2.0, 9.0)[seed % 5])
    optimizer.step()


def trained(rule, steps=9, dtype=torch.float32, **settings):
    params = make_params(SHAPES, dtype)
    optimizer = make(rule, params, **{**limits(), **settings})
    for seed in range(steps):
        step(optimizer, params, seed)
    return optimizer, params


def by_state_dict(optimizer, rule, params):
    other = make(rule, params, **limits())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other


def by_file(optimizer, rule, params):
    """With torch.load's own weights_only=True."""
    other = make(rule, params)  # whose settings come from the file, too
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    return other


def by_torch(optimizer, rule, params):
    """Into an optimizer of torch, which steps, and back."""
    theirs = make(rule, params, torch.optim)
    theirs.load_state_dict(optimizer.state_dict())
    for p in params:
        p.grad = torch.zeros_like(p)
    group = theirs.param_groups[0]
    assert set(HISTORIES) <= set(theirs.state[params[0]]), "carried along"
    return by_state_dict(theirs, rule, params) if group else None


def by_distributed_checkpoint(model, optimizer, other, loaded, folder, options=None):
    dcp.save({"optim": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=folder)
    target = {"optim": get_optimizer_state_dict(other, loaded, options=options)}
    assert not loaded.norm_history().numel(), "the step with zero gradients that makes the states"
    dcp.load(target, checkpoint_id=folder)
    set_optimizer_state_dict(other, loaded, target["optim"], options=options)


WAYS = {"state_dict": by_state_dict, "file": by_file, "torch.optim": by_torch}


@every_rule
@pytest.mark.parametrize("way", WAYS)
def test_training_goes_on_to_the_bit(rule, way):
    if rule == "Lion" and way == "torch.optim":
        pytest.skip("torch has no Lion")
    optimizer, params = trained(rule, dtype=torch.float64 if way == "torch.optim" else torch.float32)
    ours = copy_params(params)
    other = WAYS[way](optimizer, rule, ours)
    for name in HISTORIES:
        assert_same_bits([other.state[ours[0]][name]], [optimizer.state[params[0]][name]])
        assert other.state[ours[0]][name].dtype == torch.float64
    skipped = 0
    for seed in range(9, 30):
        step(optimizer, params, seed)
        step(other, ours, seed)
        assert_same_bits(params, ours, optimizer, other)
        assert other.clip_stats()[:4] == optimizer.clip_stats()[:4]
        skipped += int(other.clip_stats().skipped)
    assert 0 < skipped < 20


@every_rule
@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_copies_go_on_to_the_bit(rule, way):
    optimizer, params = trained(rule)
    other, ours = way((optimizer, params))
    for seed in range(9, 20):
        step(optimizer, params, seed)
        step(other, ours, seed)
        assert_same_bits(params, ours, optimizer, other)
    assert other.state[ours[0]]["clip_history"] is not optimizer.state[params[0]]["clip_history"]


@pytest.mark.parametrize("rule", ["SGD", "momentum", "AdamW"])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_distributed_checkpoints(rule, flat, tmp_path):
    model, other = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)) for _ in range(2))
    optimizer, options = make(rule, model.parameters(), **limits()), StateDictOptions(flatten_optimizer_state_dict=flat)
    for seed in range(9):
        step(optimizer, [*model.parameters()], seed)
    other.load_state_dict(model.state_dict())
    loaded = make(rule, other.parameters(), **limits())
    by_distributed_checkpoint(model, optimizer, other, loaded, tmp_path, options)
    assert torch.equal(loaded.norm_history(), optimizer.norm_history())
    for seed in range(9, 20):
        step(optimizer, [*model.parameters()], seed)
        step(loaded, [*other.parameters()], seed)
        assert_same_bits([*model.parameters()], [*other.parameters()], optimizer, loaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_keep_it_in_float64(dtype):
    """Also on the way through torch.optim, which rounds states to the parameter's dtype, and norms above 65,504 to
    inf."""
    optimizer, params = trained("momentum", dtype=dtype, max_norm=fastclip.QuantileNorm(window=6, warmup=2))
    ours = copy_params(params)
    other = by_file(optimizer, "momentum", ours)
    assert_same_bits(
        [other.state[ours[0]][name] for name in HISTORIES], [optimizer.state[params[0]][name] for name in HISTORIES]
    )
    step(optimizer, params, 0)
    params[1].grad = torch.full_like(params[1], 60000.0)
    optimizer.step()
    kept = optimizer.norm_history().tolist()
    assert kept[-1] > 1e5
    ours = copy_params(params)
    other = by_torch(optimizer, "momentum", ours)
    expected = torch.tensor(kept, dtype=torch.float64).to(dtype).double()
    expected = expected[expected.isfinite()]
    assert torch.equal(other.norm_history(), expected)
    step(other, ours, 0)
    assert other.clip_stats().threshold.item() == pytest.approx(2 * expected[-6:].quantile(0.5).item(), rel=1e-12)
    assert all(p.isfinite().all() for p in ours)


def test_a_file_without_history_warms_up():
    params = make_params(SHAPES)
    theirs = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    for seed in range(3):
        step(theirs, params, seed)
    ours = make("momentum", params, **limits())
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["max_norm"]["window"] == 6 and ours.param_groups[0]["skip_nonfinite"]
    step(ours, params, 0)
    assert ours.clip_stats().threshold == float("inf")
    assert ours.norm_history().numel() == 1


def test_histories_of_an_optimizer_whose_settings_changed():
    """Those of another window, or of another rule, are no reason to fail."""
    optimizer, params = trained("momentum")
    for max_norm in (fastclip.QuantileNorm(window=3, warmup=1), fastclip.EmaNorm(warmup=1), 5.0, None, "quantile"):
        ours = copy_params(params)
        other = make("momentum", ours, max_norm=max_norm)
        state = copy.deepcopy(optimizer.state_dict())
        state["param_groups"][0]["max_norm"] = other.param_groups[0]["max_norm"]
        other.load_state_dict(state)
        for seed in range(3):
            step(other, ours, seed)
        assert torch.isfinite(torch.cat([p.detach().flatten() for p in ours])).all()


def test_what_is_no_history_is_refused():
    optimizer, params = trained("momentum")
    optimizer.state[params[0]]["clip_history"] = [1.0, 2.0]
    before = copy_params(params)
    with pytest.raises(TypeError, match="the history of norms in the state must be a tensor, got list"):
        step(optimizer, params, 0)
    assert_same_bits(params, before)
    del optimizer.state[params[0]]["clip_history"]
    step(optimizer, params, 0)
    assert optimizer.norm_history().numel() == 1


@pytest.mark.parametrize("broken", [torch.zeros(3), torch.zeros(0), torch.full((20,), float("nan")), torch.ones(2, 3)])
def test_a_broken_history_is_begun_anew(broken):
    optimizer, params = trained("momentum")
    for name in HISTORIES:
        optimizer.state[params[0]][name] = broken
    for seed in range(3):
        step(optimizer, params, seed)
    assert all(p.isfinite().all() for p in params)
    assert optimizer.norm_history().numel() == 3


def test_which_parameter_holds_it():
    """The first that has a gradient: it has all other states, too, which torch's optimizers look for."""
    params = make_params(SHAPES)
    optimizer = make("AdamW", params, **limits())
    for seed in range(4):
        torch.manual_seed(seed)
        give_grads(params)
        params[0].grad = None
        optimizer.step()
    assert set(HISTORIES) < set(optimizer.state[params[1]])
    step(optimizer, params, 4)  # now the first has one, too
    assert optimizer.norm_history().numel() == 5
    assert not set(HISTORIES) & set(optimizer.state[params[0]])
    torch.optim.AdamW(params).load_state_dict(optimizer.state_dict())


def test_it_is_found_where_the_groups_were_made_anew():
    """By its name: trainers freeze, drop and reorder parameters."""
    optimizer, params = trained("momentum")
    before = optimizer.norm_history()
    optimizer.param_groups[0]["params"] = params[:0:-1]
    assert torch.equal(optimizer.norm_history(), before)
    step(optimizer, params, 1)
    assert torch.equal(optimizer.norm_history()[:-1], before[1:])


def test_versions_show_that_it_was_written():
    optimizer, params = trained("momentum")
    history = optimizer.state[params[0]]["clip_history"]
    before = history._version
    step(optimizer, params, 1)
    assert history._version > before and optimizer.state[params[0]]["clip_history"] is history


@pytest.mark.cuda
def test_from_device_to_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that this torch can use")
    optimizer, params = trained("momentum")
    ours = [p.detach().to("cuda").requires_grad_() for p in params]
    other = by_file(optimizer, "momentum", ours)
    assert other.state[ours[0]]["clip_history"].device.type == "cuda"
    assert torch.equal(other.norm_history().cpu(), optimizer.norm_history())


def test_a_changed_window_does_not_leave_out_steps_for_ever():
    """A history that is made anew is kept, also where the step that made it is left out."""
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    skip = fastclip.QuantileNorm(window=8, warmup=2)
    optimizer = fastclip.SGD([p], lr=0.1, skip_norm=skip)
    p.grad = torch.ones_like(p)
    for _ in range(10):
        optimizer.step()
    optimizer.param_groups[0]["skip_norm"]["window"] = 16
    p.grad = torch.full_like(p, 100.0)
    for _ in range(12):
        optimizer.step()
    assert optimizer.skipped_steps < 10 and not optimizer.clip_stats().skipped


@pytest.mark.parametrize("value", [float("nan"), -5e7, float("inf"), -float("inf"), 1e300, 0.5])
@pytest.mark.parametrize("place", [0, 1, 2, 3, 8, 15, slice(None)], ids=str)
@pytest.mark.parametrize(
    "rule", [fastclip.QuantileNorm(window=6, warmup=2), fastclip.EmaNorm(warmup=2)], ids=["q", "ema"]
)
def test_no_value_in_a_history_harms_the_model(rule, place, value):
    """Of the right size and dtype, as a broken file may have it."""
    p = torch.zeros(3, requires_grad=True)
    optimizer = fastclip.SGD([p], lr=0.1, max_norm=rule, skip_norm=rule)
    p.grad = torch.ones_like(p)
    for _ in range(9):
        optimizer.step()
    for name in HISTORIES:
        history = optimizer.state[p][name]
        if isinstance(place, slice) or place < len(history):
            history[place] = value
    for _ in range(40):
        optimizer.step()
    assert p.isfinite().all() and not optimizer.clip_stats().threshold.isnan()


def test_a_file_with_numbers_into_an_optimizer_with_rules():
    """The file's settings win; a rule that it does not know stays, and with it skip_nonfinite."""
    params = make_params(SHAPES)
    file = fastclip.SGD(params, lr=0.1, max_norm=1.0).state_dict()
    for group in file["param_groups"]:
        del group["skip_norm"]
    optimizer = fastclip.SGD(params, lr=0.1, max_norm="quantile", skip_norm="ema")
    optimizer.load_state_dict(file)
    (group,) = optimizer.param_groups
    assert (group["max_norm"], group["skip_norm"]["rule"], group["skip_nonfinite"]) == (1.0, "ema", True)
    step(optimizer, params, 0)


@pytest.mark.parametrize("rule", ["SGD", "momentum", "AdamW"])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_distributed_checkpoints_where_the_first_parameter_had_no_gradient_at_first(rule, flat, tmp_path):
    model, other = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)) for _ in range(2))
    optimizer, options = make(rule, model.parameters(), **limits()), StateDictOptions(flatten_optimizer_state_dict=flat)
    for seed in range(9):
        torch.manual_seed(seed)
        give_grads(list(model.parameters()))
        if seed < 4:
            model[0].weight.grad = None
        optimizer.step()
    before = optimizer.norm_history()
    loaded = make(rule, other.parameters(), **limits())
    by_distributed_checkpoint(model, optimizer, other, loaded, tmp_path, options)
    assert torch.equal(loaded.norm_history(), before)
    assert torch.equal(optimizer.norm_history(), before)


def test_a_rule_whose_parameters_have_no_states_and_distributed_checkpoints(tmp_path):
    model = torch.nn.Linear(4, 3)  # float32: no master weights
    optimizer = fastclip.SGD(model.parameters(), lr=0.1, master_weights=True, **limits())
    step(optimizer, list(model.parameters()), 0)
    other = torch.nn.Linear(4, 3)
    loaded = fastclip.SGD(other.parameters(), lr=0.1, master_weights=True, **limits())
    by_distributed_checkpoint(model, optimizer, other, loaded, tmp_path)
    assert torch.equal(loaded.norm_history(), optimizer.norm_history())


def test_a_dropped_parameter_takes_no_history_with_it():
    params = make_params(SHAPES)
    optimizer = make("SGD", params, **limits())
    for seed in range(5):
        step(optimizer, params, seed)
    before = optimizer.norm_history()
    optimizer.param_groups[0]["params"] = params[1:]
    other = make("SGD", copy_params(params[1:]), **limits())
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.norm_history(), before) and torch.equal(optimizer.norm_history(), before)


@pytest.mark.parametrize("broken", [None, [1.0, 2.0], "text"])
def test_a_file_whose_history_is_none(broken):
    optimizer, params = trained("momentum")
    file = optimizer.state_dict()
    file["state"][0]["clip_history"] = broken
    other = make("momentum", params, **limits())
    other.load_state_dict(file)
    if broken is None:
        step(other, params, 0)
        assert other.norm_history().numel() == 1
    else:
        with pytest.raises(TypeError, match="the history of norms in the state must be a tensor"):
            step(other, params, 0)
