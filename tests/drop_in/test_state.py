"""State dicts from and into torch's optimizers, as torch's own optimizer tests have them."""

import copy
import itertools
import pickle

import pytest
import torch

import fastclip
from fastclip.settings import OWN_SETTINGS
from tests.support.cases import (
    assert_close,
    assert_equal_trees,
    copy_params,
    exact_square_roots,
    give_grads,
    through_a_file,
)
from tests.support.torch_optim_db import (
    ADAM,
    SGD,
    Twins,
    as_torch_tests,
    every_clip,
    every_input,
    every_optimizer,
    without_clips,
)

# ---- state dicts ---------------------------------------------------------------------------------


@as_torch_tests("test_state_dict_deterministic")
@every_clip
@every_input
def test_the_state_dict_is_torchs_and_our_settings(optim, kwargs, clip):
    twins = Twins(optim, kwargs, clip, impl={"foreach": False})
    for steps in range(3):
        theirs, ours = (copy.deepcopy(optimizer.state_dict()) for optimizer in twins.optimizers)
        added = {k: v for k, v in ours["param_groups"][0].items() if k not in theirs["param_groups"][0]}
        assert added == {**OWN_SETTINGS, **clip}
        assert_equal_trees(theirs, without_clips(ours))
        assert len(ours["state"]) == (
            len(twins.ours) if optim.keeps_state(kwargs) and (steps or optim.has_state_at_once) else 0
        )
        twins.step()


ROUTES = {
    "state_dict": lambda optimizer: copy.deepcopy(optimizer.state_dict()),
    "file": lambda optimizer: through_a_file(optimizer.state_dict()),
    "deepcopy": lambda optimizer: copy.deepcopy(optimizer).state_dict(),
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)).state_dict(),
}


@as_torch_tests("test_save_load_equality_with_weights_only")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("source", "target"), list(itertools.product(("torch", "fastclip"), repeat=2))[1:])
@every_clip
@every_input
def test_training_goes_on_from_a_state_dict(optim, kwargs, clip, source, target, route):
    """Into another optimizer, of other settings; compared with torch, which was never interrupted."""
    twins = Twins(optim, kwargs, clip)
    twins.step(3)
    saved = ROUTES[route](getattr(twins, source))
    kept = copy.deepcopy(saved)
    params = copy_params(twins.ours)
    others = optim.another
    fresh = getattr(optim, target)(params, lr=5.0, maximize=True, **others)
    fresh.load_state_dict(saved)
    if source == "fastclip":
        assert {k: fresh.param_groups[0][k] for k in clip} == clip
    twins.fastclip, twins.ours = fresh, params
    assert_equal_trees(without_clips(kept)["param_groups"], without_clips(fresh.state_dict())["param_groups"])
    twins.step(3)
    twins.check()
    assert_equal_trees(kept["param_groups"], saved["param_groups"])


@as_torch_tests("test_can_load_older_state_dict")
@every_clip
@every_input
def test_state_dicts_of_older_torch(optim, kwargs, clip):
    """They lack what came later, hold a momentum_buffer of None where there was no momentum, and numbers of steps."""
    twins = Twins(optim, kwargs, clip)
    twins.step(2)
    for optimizer in twins.optimizers:
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            for flag in {*optim.info.not_og_supported_flags, *OWN_SETTINGS} & group.keys():
                if flag != "maximize" or not kwargs.get("maximize"):
                    del group[flag]
        if not optim.keeps_state(kwargs):
            saved["state"] = {i: {"momentum_buffer": None} for i in range(len(twins.ours))}
        for state in saved["state"].values():
            if "step" in state:
                state["step"] = int(state["step"])
        optimizer.load_state_dict(saved)
        group = optimizer.param_groups[0]
        assert (group["foreach"], group["differentiable"]) == (None, False) and not group.get("fused")
    group = twins.fastclip.param_groups[0]
    assert {k: group[k] for k in clip} == clip, "the clip is this optimizer's own where the state dict has none"
    twins.step(2)
    if optim.keeps_state(kwargs):
        twins.check()
    for optimizer in twins.optimizers:
        optimizer.param_groups[0].update({**optim.another, "lr": 0.5})
    twins.step(2)
    twins.check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", ["torch", "fastclip"])
@pytest.mark.parametrize("optim", [SGD, ADAM], ids=repr)
def test_a_state_dict_is_cast_to_the_parameters(optim, target, dtype):
    twins = Twins(optim, optim.stateful)
    twins.step(2)
    params = [p.detach().to(dtype).requires_grad_() for p in twins.ours]
    fresh = getattr(optim, target)(params, lr=5.0)
    fresh.load_state_dict(copy.deepcopy(twins.fastclip.state_dict()))
    for p, q in zip(params, twins.ours, strict=True):
        for name, value in twins.fastclip.state[q].items():
            expected = value if name == "step" else value.to(dtype)
            assert fresh.state[p][name].dtype == expected.dtype
            assert torch.equal(fresh.state[p][name], expected)
    give_grads(params)
    fresh.step()
    assert all(p.isfinite().all() for p in params)


@pytest.mark.cuda
@as_torch_tests("test_state_dict_with_cuda_params")
@every_optimizer
def test_a_state_dict_goes_to_another_device(optim):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that this torch can use")
    twins = Twins(optim, optim.stateful)
    twins.step(2)
    params = [p.detach().cuda().requires_grad_() for p in twins.ours]
    fresh = optim.fastclip(params, lr=5.0)
    fresh.load_state_dict(copy.deepcopy(twins.torch.state_dict()))
    give_grads(twins.theirs, params)
    for optimizer in (twins.torch, fresh):
        optimizer.step()
    arrays = [value for p in params for name, value in fresh.state[p].items() if name != "step"]
    assert arrays and all(value.is_cuda for value in arrays)
    assert_close(twins.theirs, [p.cpu() for p in params], 2e-6)


# ---- names ---------------------------------------------------------------------------------------


def named(model):
    return {"names": model.named_parameters(), "no names": model.parameters()}


@pytest.mark.parametrize("target", ["names", "no names"])
@pytest.mark.parametrize("source", ["names", "no names"])
@pytest.mark.parametrize("optim", [SGD, ADAM], ids=repr)
def test_names_travel_as_in_torch(optim, source, target):
    """Names of the state dict replace those there are; without any, those there are stay."""
    results = []
    for cls in optim.classes:
        torch.manual_seed(0)
        model, other = torch.nn.Linear(3, 2), torch.nn.Sequential(torch.nn.Linear(3, 2))
        optimizer, loading = cls(named(model)[source], **optim.stateful), cls(named(other)[target])
        model(torch.ones(3)).sum().backward()
        with exact_square_roots():
            optimizer.step()
        state_dict = through_a_file(optimizer.state_dict())
        loading.load_state_dict(state_dict)
        results.append((without_clips(state_dict), without_clips(loading.state_dict())))
    for theirs, ours in zip(*results, strict=True):
        assert_equal_trees(theirs, ours)
    expected = {"names": ["weight", "bias"], "no names": None}[source]
    if source == "no names" and target == "names":
        expected = ["0.weight", "0.bias"]
    assert results[1][1]["param_groups"][0].get("param_names") == expected


def test_a_hook_that_maps_names_loads_into_another_order():
    """torch's documentation says to do so where the loaded parameters have another order."""
    model = torch.nn.Linear(3, 2)
    optimizer = fastclip.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    other = fastclip.SGD(reversed(list(model.named_parameters())), lr=0.1)

    def by_name(loading, state_dict):
        (saved,), (own,) = state_dict["param_groups"], loading.param_groups
        places = {name: place for name, place in zip(saved["param_names"], saved["params"], strict=True)}
        group = {**saved, "params": [places[name] for name in own["param_names"]], "param_names": own["param_names"]}
        return {**state_dict, "param_groups": [group]}

    other.register_load_state_dict_pre_hook(by_name)
    other.load_state_dict(optimizer.state_dict())
    for p in model.parameters():
        assert torch.equal(other.state[p]["momentum_buffer"], optimizer.state[p]["momentum_buffer"])


@pytest.mark.parametrize("first", ["names", "no names"])
def test_groups_with_and_without_names_do_not_mix(first):
    second = "no names" if first == "names" else "names"
    words = []
    for cls in (torch.optim.SGD, fastclip.SGD):
        optimizer = cls(named(torch.nn.Linear(3, 2))[first])
        with pytest.raises(ValueError, match="with/without names") as error:
            optimizer.add_param_group({"params": named(torch.nn.Linear(3, 2))[second]})
        words.append(str(error.value))
        assert len(optimizer.param_groups) == 1
    assert words[0] == words[1]


@pytest.mark.parametrize("master_weights", [False, True])
def test_each_group_of_adagrad_begins_at_its_own_value(master_weights):
    """torch ignores the one of a group that is given to the constructor, and cannot step a group that is added."""
    params = [torch.zeros(20, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    optimizer = fastclip.Adagrad(
        [{"params": params[:1]}, {"params": params[1:2], "initial_accumulator_value": 3.0}],
        initial_accumulator_value=2.0,
        master_weights=master_weights,
    )
    optimizer.add_param_group({"params": params[2:], "initial_accumulator_value": 4.0})
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, begun in zip(params, (2.0, 3.0, 4.0), strict=True):
        assert optimizer.state[p]["sum"].unique().tolist() == [begun + 1]
