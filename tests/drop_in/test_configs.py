"""Arguments as configurations give them: text, lists, names of dtypes, icefall's groups; what reads constructors."""

import inspect
import typing

import pytest
import torch

import fastclip
from tests.support.cases import assert_same_bits, copy_params, give_grads, make_params

NAMES = ("SGD", "Adam", "AdamW", "Adadelta", "Adagrad", "NAdam", "RAdam", "RMSprop", "Lion", "NovoGrad")


def param():
    return torch.nn.Parameter(torch.ones(3))


TEXTS = [
    ({"lr": "1e-3"}, "lr is the text '1e-3': write 1.0e-3, without quotes"),
    ({"lr": "0.1"}, "lr is the text '0.1': write 0.1"),
    ({"max_norm": "1e0"}, r"max_norm in param_groups\[0\] is the text '1e0': write 1.0e\+0"),
    ({"max_norm": "5.0"}, r"max_norm in param_groups\[0\] is the text '5.0': write 5.0"),
    ({"skip_norm": "1E2"}, r"skip_norm in param_groups\[0\] is the text '1E2': write 1.0e\+2"),
    ({"clip_value": "0.5"}, r"clip_value in param_groups\[0\] is the text '0.5'"),
    ({"clip_value": ["-1e-1", 0.1]}, r"clip_value in param_groups\[0\] is the text '-1e-1': write -1.0e-1"),
    ({"weight_decay": "1.5e-2"}, "weight_decay is the text '1.5e-2': write 1.5e-2"),
    ({"max_relative_change": "3e-2"}, r"max_relative_change in param_groups\[0\] is the text '3e-2'"),
]


@pytest.mark.parametrize("settings, words", TEXTS, ids=lambda value: str(value)[:40])
def test_a_number_that_is_text_says_what_to_write(settings, words):
    with pytest.raises(TypeError, match=words):
        fastclip.SGD([param()], **settings)


def test_text_in_other_places():
    with pytest.raises(TypeError, match="momentum is the text '9e-1'"):
        fastclip.SGD([param()], 0.1, "9e-1")
    with pytest.raises(TypeError, match="betas is the text '0.9'"):
        fastclip.AdamW([param()], betas=(0.5, "0.9"))
    with pytest.raises(TypeError, match="betas is the text '0.9'"):
        fastclip.AdamW([param()], 0.1, ["0.9", 0.99])
    optimizer = fastclip.SGD([param()], lr=0.1)
    with pytest.raises(TypeError, match=r"lr in param_groups\[1\] is the text '1e-2'"):
        optimizer.add_param_group({"params": [param()], "lr": "1e-2"})
    assert len(optimizer.param_groups) == 1
    for name in NAMES:
        with pytest.raises(TypeError, match="lr is the text '1e-2': write 1.0e-2"):
            getattr(fastclip, name)([param()], lr="1e-2")


@pytest.mark.parametrize("name", ["bfloat16", "torch.bfloat16"])
def test_a_dtype_by_its_name(name):
    optimizer = fastclip.SGD([p := param()], lr=0.1, momentum=0.9, momentum_dtype=name)
    optimizer.add_param_group({"params": [param()], "momentum_dtype": name})
    assert {group["momentum_dtype"] for group in optimizer.param_groups} == {torch.bfloat16}
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["bfloat", "float", "nn", "torch.nn.Linear", "", "bfloat16 "])
def test_no_dtype_of_that_name(name):
    if name == "float":  # torch.float is float32
        assert fastclip.SGD([param()], momentum_dtype=name).param_groups[0]["momentum_dtype"] == torch.float32
        return
    with pytest.raises(ValueError, match=rf"momentum_dtype in param_groups\[0\] must be a dtype.*got '{name}'"):
        fastclip.SGD([param()], momentum_dtype=name)


def test_omegaconfs_lists_and_dicts(tmp_path):
    """As Hydra and NeMo hand them over; a checkpoint holds none of them."""
    omegaconf = pytest.importorskip("omegaconf", reason="needs omegaconf")
    conf = omegaconf.OmegaConf.create(
        {"clip_value": [-0.1, 0.2], "betas": [0.8, 0.9], "max_norm": {"rule": "quantile", "q": 0.75}, "lr": 0.1}
    )
    for settings in ({**conf}, omegaconf.OmegaConf.to_container(conf)):
        optimizer = fastclip.AdamW([p := param()], **settings)
        (group,) = optimizer.param_groups
        assert tuple(group["clip_value"]) == (-0.1, 0.2) and tuple(group["betas"]) == (0.8, 0.9)
        assert type(group["clip_value"]) in (list, tuple) and type(group["betas"]) in (list, tuple)
        assert group["max_norm"]["q"] == 0.75 and type(group["max_norm"]) is dict
        p.grad = torch.ones(3)
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        torch.load(tmp_path / "state.pt", weights_only=True)


def test_icefalls_groups():
    """`get_parameter_groups_with_lrs(include_names=True)` makes such: `named_params` in place of `params`."""
    theirs = make_params([(3,), (4, 2), (5,)])
    ours = copy_params(theirs)
    named = [("encoder.weight", ours[0]), ("encoder.bias", ours[1])]
    groups = [{"named_params": named, "lr": 0.2}, {"named_params": [("joiner", ours[2])]}]
    optimizer = fastclip.SGD(groups, lr=0.1)
    plain = torch.optim.SGD([{"params": theirs[:2], "lr": 0.2}, {"params": theirs[2:]}], lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["encoder.weight", "encoder.bias"]
    assert all("named_params" not in group for group in optimizer.param_groups) and "named_params" in groups[0]
    for _ in range(2):
        give_grads(theirs, ours)
        plain.step()
        optimizer.step()
    assert_same_bits(theirs, ours)
    optimizer.add_param_group({"named_params": [("later", param())]})
    assert optimizer.param_groups[2]["param_names"] == ["later"]


def test_subclasses_with_constructors_of_their_own_keep_what_they_hand_on():
    """Whatever their own arguments are called, and however many."""

    class OfConfig(fastclip.AdamW):
        def __init__(self, params, config):
            super().__init__(params, lr=config["lr"], betas=config["betas"], weight_decay=config["decay"])

    class OfAnything(fastclip.SGD):
        def __init__(self, *positional, **named):
            super().__init__(*positional, **named)

    class OfModel(fastclip.AdamW):
        def __init__(self, model):
            super().__init__(model.parameters(), 0.5, (0.5, 0.6), weight_decay=0.3)

    model = torch.nn.Linear(2, 2)
    (group,) = OfConfig([param()], {"lr": 0.1, "betas": (0.5, 0.6), "decay": 0.7}).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.1, (0.5, 0.6), 0.7)
    (group,) = OfAnything([param()], 0.2, momentum=0.9, weight_decay=0.01, nesterov=True).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.2, 0.9, 0.01, True)
    (group,) = OfModel(model).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.5, 0.6), 0.3)
    with pytest.raises(TypeError, match="momentum is the text '9e-1'"):
        OfAnything([param()], 0.1, "9e-1")


def test_a_subclass_that_calls_torchs_optimizer_itself():
    class Own(fastclip.SGD):
        def __init__(self, params):
            defaults = torch.optim.SGD([param()], lr=0.5).defaults
            torch.optim.Optimizer.__init__(self, params, defaults)

    optimizer = Own([p := param()])
    p.grad = torch.ones(3)
    optimizer.step()
    assert p.tolist() == [0.5] * 3 and optimizer.param_groups[0]["max_norm"] is None


def test_keys_of_others_in_a_group_are_left_alone():
    history = [1, 2]
    groups = [{"params": [param()], "name": "0", "layer_id": "12", "history": history, "lr": 0.2}]
    optimizer = fastclip.SGD(groups, lr=0.1)
    optimizer.add_param_group({"params": [param()], "name": "1"})
    first, second = optimizer.param_groups
    assert (first["name"], first["layer_id"], second["name"]) == ("0", "12", "1") and first["history"] is history


@pytest.mark.parametrize("name", ["skip_nonfinite", "master_weights", "stochastic_rounding"])
def test_a_switch_that_is_text(name):
    with pytest.raises(TypeError, match=rf"{name} in param_groups\[0\] must be True or False, got the text 'false'"):
        fastclip.SGD([param()], **{name: "false"})


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_has_a_type_hint(name):
    cls = getattr(fastclip, name)
    hints = typing.get_type_hints(cls.__init__)
    parameters = [*inspect.signature(cls).parameters]
    assert hints.keys() - {"return"} == set(parameters) >= fastclip.settings.OWN_SETTINGS.keys()
    assert float in typing.get_args(hints["max_norm"]) and hints["skip_nonfinite"] is bool


def test_the_constructors_own_names_are_listed_once():
    """Not with torch's classes of the same names: LightningCLI's `--optimizer AdamW` would be ambiguous."""

    def all_subclasses(cls):
        if "<locals>" in cls.__qualname__:  # jsonargparse does not look there
            return []
        return [cls, *(each for subclass in cls.__subclasses__() for each in all_subclasses(subclass))]

    listed = all_subclasses(torch.optim.Optimizer)
    assert not [cls for cls in listed if cls.__module__.startswith("fastclip")]
    for name in (name for name in NAMES if hasattr(torch.optim, name)):
        assert issubclass(getattr(fastclip, name), getattr(torch.optim, name))
        known = [cls.__name__ for cls in listed if cls.__module__.partition(".")[0] in ("torch", "fastclip")]
        assert known.count(name) == 1  # other libraries, which other tests import, have their own


@pytest.mark.parametrize("given, found", [("AdamW", torch.optim.AdamW), ("fastclip.AdamW", fastclip.AdamW)])
def test_jsonargparse_finds_an_optimizer_by_its_name_or_path(given, found):
    jsonargparse = pytest.importorskip("jsonargparse", reason="needs jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(torch.optim.Optimizer, "optimizer", skip={"params"}, instantiate=False)
    arguments = ["--optimizer", given, "--optimizer.lr", "1e-2"]
    if found is fastclip.AdamW:
        arguments += ["--optimizer.max_norm", "1e0", "--optimizer.clip_value", "[-0.1, 0.2]"]
        arguments += ["--optimizer.momentum_dtype", "bfloat16"]
    made = parser.parse_args(arguments).optimizer
    module, _, name = made.class_path.rpartition(".")
    cls = getattr(__import__(module, fromlist=[name]), name)
    assert cls is found
    settings = {key: value for key, value in vars(made.init_args).items() if value is not None}
    (group,) = cls([param()], **settings).param_groups
    assert group["lr"] == 0.01
    if found is fastclip.AdamW:
        assert (group["max_norm"], group["momentum_dtype"]) == (1.0, torch.bfloat16)
        assert tuple(group["clip_value"]) == (-0.1, 0.2)
