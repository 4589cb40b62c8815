"""Checkpoints that change on their way in: hooks of load_state_dict, flattened files, files that lack a setting."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fastclip
from tests.support.cases import copy_params, give_grads, make_params

RULES = {"SGD": {"momentum": 0.9}, "AdamW": {}}
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
every_rule = pytest.mark.parametrize("rule", RULES)


def trained(rule, shapes, module=fastclip, dtype=torch.bfloat16, **settings):
    params = make_params(shapes, dtype)
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    optimizer = getattr(module, rule)(named, lr=0.01, **RULES[rule], **settings)
    for _ in range(2):
        give_grads(params)
        optimizer.step()
    return optimizer, params


# ---- hooks -------------------------------------------------------------------------------------


def by_name(optimizer, state_dict):
    """torch's own example of such a hook: states go to the parameters that have their names."""
    (group,), (saved,) = optimizer.param_groups, state_dict["param_groups"]
    key_of = dict(zip(saved["param_names"], saved["params"], strict=True))
    own = {**saved, "params": list(range(len(group["params"]))), "param_names": group["param_names"]}
    state = {i: state_dict["state"][key_of[name]] for i, name in enumerate(group["param_names"]) if name in key_of}
    return {"state": state, "param_groups": [own]}


@every_rule
@pytest.mark.parametrize(
    "settings", [{"master_weights": True}, {"momentum_dtype": torch.float32}], ids=lambda s: next(iter(s))
)
def test_a_hook_that_maps_states_by_name(rule, settings):
    """Also from a file of more parameters than this optimizer has."""
    saved, params = trained(rule, [(3,), (3,), (3,)], **settings)
    names = ["p2", "p0"]
    ours = copy_params([params[2], params[0]])
    optimizer = getattr(fastclip, rule)(list(zip(names, ours, strict=True)), lr=0.01, **RULES[rule], **settings)
    optimizer.register_load_state_dict_pre_hook(by_name)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))  # torch does not copy what needs no cast
    for p, q in zip(ours, [params[2], params[0]], strict=True):
        assert optimizer.state[p].keys() == saved.state[q].keys()
        for name, value in saved.state[q].items():
            loaded = optimizer.state[p][name]
            assert loaded.dtype == value.dtype and torch.equal(loaded, value), name
    give_grads(ours, [params[2], params[0]])
    params[1].grad = None
    optimizer.step()
    saved.step()
    assert torch.equal(ours[0], params[2]) and torch.equal(ours[1], params[0])


@every_rule
def test_what_a_hook_resets_after_loading_stays_reset(rule):
    saved, params = trained(rule, [(3,), (4,)], master_weights=True)
    optimizer, ours = trained(rule, [(3,), (4,)], master_weights=True)
    seen = []

    def reset(loaded):
        seen.append(loaded.state[ours[0]]["master_param"].dtype)
        for p in ours:
            for name, value in loaded.state[p].items():
                if name not in ("step", "master_param"):
                    loaded.state[p][name] = torch.zeros_like(value)
        del loaded.state[ours[1]]

    optimizer.register_load_state_dict_post_hook(reset)
    optimizer.load_state_dict(saved.state_dict())
    assert seen == [torch.float32]  # it sees what the optimizer will work with
    assert ours[1] not in optimizer.state
    kept = optimizer.state[ours[0]]
    assert torch.equal(kept["master_param"], saved.state[params[0]]["master_param"])
    assert not any(value.any() for name, value in kept.items() if name not in ("step", "master_param"))


@pytest.mark.parametrize("when", ["pre", "post"])
def test_a_hook_that_loads_itself(when):
    """Another file instead, say. The states of both keep their dtypes."""
    saved, params = trained("AdamW", [(3,)], master_weights=True)
    optimizer, ours = trained("AdamW", [(3,)], master_weights=True)
    seen = []

    def load_another(loading, *_):
        if not seen:
            seen.append(True)
            loading.load_state_dict(copy.deepcopy(saved.state_dict()))

    getattr(optimizer, f"register_load_state_dict_{when}_hook")(load_another)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    for name, value in saved.state[params[0]].items():
        loaded = optimizer.state[ours[0]][name]
        assert loaded.dtype == value.dtype and torch.equal(loaded, value)


def test_hooks_are_as_they_were_also_after_an_error():
    optimizer, _ = trained("SGD", [(3,)])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert optimizer.__getstate__().keys() == {"defaults", "state", "param_groups"}
    optimizer.load_state_dict(optimizer.state_dict())
    assert not optimizer._optimizer_load_state_dict_pre_hooks


# ---- flattened files ---------------------------------------------------------------------------


def model_and_optimizer(rule, module, tied=False, **settings):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    if tied:
        model[1].weight = model[0].weight
    groups = [{"params": [model[0].weight], "weight_decay": 0.1}, {"params": [model[0].bias, model[1].bias]}]
    if not tied:
        groups[1]["params"].append(model[1].weight)
    optimizer = getattr(module, rule)(groups, lr=0.1, **RULES[rule], **settings)
    return model, optimizer


def train(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()


@every_rule
@pytest.mark.parametrize("tied", [False, True])
def test_a_flattened_file_of_torch_loads_and_leaves_our_settings(rule, tied):
    model, theirs = model_and_optimizer(rule, torch.optim, tied)
    train(model, theirs)
    ours_model, ours = model_and_optimizer(rule, fastclip, tied, clip_value=1e6, max_norm=1e9)
    ours.param_groups[1]["clip_value"] = 1e7
    ours_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(ours_model, ours, get_optimizer_state_dict(model, theirs, options=FLAT), options=FLAT)
    assert [(g["clip_value"], g["max_norm"], g["weight_decay"]) for g in ours.param_groups] == [
        (g["clip_value"], 1e9, h["weight_decay"])
        for g, h in zip([{"clip_value": 1e6}, {"clip_value": 1e7}], theirs.param_groups, strict=True)
    ]
    for p, q in zip(ours_model.parameters(), model.parameters(), strict=True):
        assert ours.state[p].keys() == theirs.state[q].keys()
        assert all(torch.equal(ours.state[p][name], value) for name, value in theirs.state[q].items())


@every_rule
def test_flattened_files_of_ours_hold_the_clip_and_load_into_torch(rule):
    model, saved = model_and_optimizer(rule, fastclip, clip_value=0.1, max_norm=2.0)
    train(model, saved)
    flat = get_optimizer_state_dict(model, saved, options=FLAT)
    again_model, again = model_and_optimizer(rule, fastclip, clip_value=7.0)
    set_optimizer_state_dict(again_model, again, flat, options=FLAT)
    assert [(g["clip_value"], g["max_norm"]) for g in again.param_groups] == [(0.1, 2.0)] * 2
    torch_model, theirs = model_and_optimizer(rule, torch.optim)
    set_optimizer_state_dict(torch_model, theirs, flat, options=FLAT)
    for optimizer, of in ((again, again_model), (theirs, torch_model)):
        for p, q in zip(of.parameters(), model.parameters(), strict=True):
            assert all(torch.equal(optimizer.state[p][name], value) for name, value in saved.state[q].items())


@every_rule
def test_a_flattened_file_that_was_saved_before_there_was_some_setting(rule):
    model, saved = model_and_optimizer(rule, fastclip, clip_value=0.1, max_norm=2.0)
    train(model, saved)
    flat = get_optimizer_state_dict(model, saved, options=FLAT)
    older = {key: value for key, value in flat.items() if not key.endswith(("max_norm", "rounding_seed"))}
    assert len(older) < len(flat)
    model, optimizer = model_and_optimizer(rule, fastclip, clip_value=7.0, max_norm=5.0, rounding_seed=3)
    set_optimizer_state_dict(model, optimizer, older, options=FLAT)
    for group in optimizer.param_groups:
        assert (group["clip_value"], group["max_norm"], group["rounding_seed"]) == (0.1, 5.0, 3)


def test_a_flattened_file_of_two_optimizers_of_which_one_is_torchs():
    model, ours = model_and_optimizer("SGD", fastclip, clip_value=0.1)
    other, theirs = model_and_optimizer("SGD", torch.optim)
    both = torch.nn.ModuleDict({"a": model, "b": other})
    flat = get_optimizer_state_dict(both, [ours, theirs], options=FLAT)
    model, first = model_and_optimizer("SGD", fastclip, clip_value=7.0)
    other, second = model_and_optimizer("SGD", fastclip, clip_value=8.0)
    set_optimizer_state_dict(torch.nn.ModuleDict({"a": model, "b": other}), [first, second], flat, options=FLAT)
    assert [group["clip_value"] for o in (first, second) for group in o.param_groups] == [0.1, 0.1, 8.0, 8.0]


@pytest.mark.parametrize("options", [None, FLAT], ids=["nested", "flat"])
def test_checkpoints_of_torch_by_distributed_checkpoint(options, tmp_path):
    """It is told to load what there is: our settings are asked for, and not in the file."""
    model, saved = model_and_optimizer("AdamW", torch.optim)
    train(model, saved)
    file = {"optimizer": get_optimizer_state_dict(model, saved, options=options)}
    dcp.save(file, checkpoint_id=tmp_path, no_dist=True)
    model, optimizer = model_and_optimizer("AdamW", fastclip, clip_value=0.5)
    template = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    with pytest.raises(dcp.api.CheckpointException, match="clip_value"):
        dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(model, optimizer, template["optimizer"], options=options)
    assert [group["clip_value"] for group in optimizer.param_groups] == [0.5, 0.5]
    for group, theirs in zip(optimizer.param_groups, saved.param_groups, strict=True):
        for p, q in zip(group["params"], theirs["params"], strict=True):
            assert all(torch.equal(optimizer.state[p][name], value) for name, value in saved.state[q].items())


def test_a_setting_of_torch_that_the_file_lacks_is_torchs_error():
    model, saved = model_and_optimizer("SGD", fastclip)
    flat = get_optimizer_state_dict(model, saved, options=FLAT)
    lacking = {key: value for key, value in flat.items() if not key.endswith("momentum")}
    with pytest.raises(KeyError, match="momentum"):
        set_optimizer_state_dict(model, saved, lacking, options=FLAT)


# ---- groups that were made by hand -------------------------------------------------------------


@every_rule
def test_a_group_of_torchs_settings_only_that_was_appended_by_hand(rule):
    """It gets what add_param_group would give it: the optimizer's defaults, and what holds for all groups."""
    p, q, r = make_params([(3,)] * 3, torch.float32)
    optimizer = getattr(fastclip, rule)([p], lr=0.01, clip_value=0.5, max_norm=1e9, **RULES[rule])
    optimizer.param_groups[0]["max_norm"] = 1e8
    plain = getattr(torch.optim, rule)([q], lr=0.01, **RULES[rule]).param_groups[0]
    optimizer.param_groups.append(plain)
    twin = getattr(fastclip, rule)([r], lr=0.01, clip_value=0.5, **RULES[rule])
    r.data.copy_(q.data)
    give_grads([q], [r], scale=3)
    optimizer.step()
    twin.step()
    assert torch.equal(q, r)
    assert (plain["clip_value"], plain["max_norm"]) == (0.5, 1e8)
    del plain["lr"]
    with pytest.raises(KeyError, match=r"lr in param_groups\[1\] is missing"):
        optimizer.step()


def test_a_group_of_torchs_settings_only_that_was_put_first():
    p, q = make_params([(3,)] * 2, torch.float32)
    optimizer = fastclip.SGD([p], lr=0.01, max_norm=1e9)
    optimizer.param_groups[0]["max_norm"] = 1e8
    optimizer.param_groups.insert(0, torch.optim.SGD([q], lr=0.01).param_groups[0])
    give_grads([p, q])
    optimizer.step()
    assert [group["max_norm"] for group in optimizer.param_groups] == [1e8, 1e8]
    optimizer.add_param_group({"params": make_params([(2,)])})
    assert optimizer.param_groups[2]["max_norm"] == 1e8


def test_groups_that_were_cleared_and_added_again():
    p, q = make_params([(3,), (4,)])
    optimizer = fastclip.SGD([p], lr=1.0, clip_value=0.5, max_norm=1e9)
    optimizer.param_groups.clear()
    optimizer.step()
    optimizer.add_param_group({"params": [q]})
    assert {name: optimizer.param_groups[0][name] for name in ("clip_value", "max_norm")} == {
        "clip_value": 0.5,
        "max_norm": 1e9,
    }
    before = q.detach().clone()
    q.grad = torch.full((4,), 2.0)
    optimizer.step()
    assert torch.equal(q.detach(), before - 0.5)


@pytest.mark.falls_back
@pytest.mark.parametrize("transposed", [False, True])
def test_states_of_others_beside_ours(transposed):
    """An average that somebody keeps of the parameters, say, before the first step. torch's AdamW raises."""
    p, q = make_params([(3, 3), (3, 3)])
    q.data.copy_(p.data)
    ours, twin = fastclip.AdamW([p], lr=0.01), fastclip.AdamW([q], lr=0.01)
    ours.state[p]["ema"] = torch.zeros(2)
    for _ in range(2):
        give_grads([p], [q])
        if transposed:
            p.grad = p.grad.t().contiguous().t()
        ours.step()
        twin.step()
    torch.testing.assert_close(p, q)
    assert ours.state[p].keys() == {"ema", *twin.state[q].keys()} and not ours.state[p]["ema"].any()


@every_rule
@pytest.mark.parametrize("way", ["load", "deepcopy"])
def test_states_of_others_are_loaded_and_copied_where_there_are_none_of_ours(rule, way):
    """torch's AdamW looks for a step in each entry."""
    optimizer, (p, q) = trained(rule, [(3,), (4,)])
    optimizer.state[p] = {"ema": torch.tensor([0.5, 2.0])}
    if way == "load":
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.state.clear()
        optimizer.load_state_dict(saved)
    else:
        optimizer = copy.deepcopy(optimizer)
        p, q = optimizer.param_groups[0]["params"]
    assert optimizer.state[p].keys() == {"ema"} and optimizer.state[p]["ema"].tolist() == [0.5, 2.0]
    names = set(optimizer.state[q])
    give_grads([p, q])
    optimizer.step()
    assert optimizer.state[p].keys() == {"ema", *names}
