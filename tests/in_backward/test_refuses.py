"""Steps in the backward pass: what can't be stepped so is refused, with its reason, before anything changes."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastclip
from tests.support.cases import assert_same_bits


def linear(**settings):
    """A model, its optimizer, and a loss."""
    model = torch.nn.Linear(4, 4)
    return model, fastclip.SGD(model.parameters(), lr=0.1, **settings), model(torch.randn(2, 4)).square().sum()


ALL_GRADIENTS = {
    "max_norm": (1.0, r"the max_norm of param_groups\[0\]: the norm is that of several gradients"),
    "skip_nonfinite": (True, r"the skip_nonfinite of param_groups\[0\]: the last gradient"),
}


@pytest.mark.parametrize("name", ALL_GRADIENTS)
def test_what_needs_all_gradients(name):
    """At once; when it is set later; and when it comes with a checkpoint."""
    value, reason = ALL_GRADIENTS[name]
    model, other, loss = linear(**{name: value})
    with pytest.raises(ValueError, match=reason):
        fastclip.step_in_backward(model, other)
    loss.backward()
    assert model.weight.grad is not None  # no hook was left behind
    for load in (False, True):
        model, optimizer, loss = linear(clip_value=0.1)
        in_backward = fastclip.step_in_backward(model, optimizer, bucket_cap_mb=0)
        if load:
            optimizer.load_state_dict(other.state_dict())
        else:
            optimizer.param_groups[0][name] = value
        before = copy.deepcopy(model)
        with pytest.raises(ValueError, match=reason):
            loss.backward()
        assert_same_bits(before.parameters(), model.parameters())
        in_backward.remove()
        optimizer.zero_grad()
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()  # an ordinary one can
        assert not torch.equal(before.weight, model.weight)


class OwnScaler(torch.amp.GradScaler):
    """Without gradients torch's `unscale_` finds nothing, and raises in `step`; FSDP's finds no infinity."""

    def unscale_(self, optimizer):
        super().unscale_(optimizer)
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = {torch.device("cpu"): torch.zeros(())}


@pytest.mark.parametrize("kind", [torch.amp.GradScaler, OwnScaler])
def test_grad_scaler(kind):
    model, optimizer, loss = linear()
    fastclip.step_in_backward(model, optimizer)
    scaler = kind("cpu")
    scaler.scale(loss).backward()
    with pytest.raises(RuntimeError, match="gradients that GradScaler had scaled"):
        scaler.step(optimizer)
    assert optimizer._step_supports_amp_scaling  # for a trainer that asks whether it may clip
    scaler = kind("cpu", enabled=False)
    scaler.scale(model(torch.randn(2, 4)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()


def test_arguments():
    model, optimizer, _ = linear()
    for bad, error, message in [
        ((model.parameters(), optimizer), TypeError, "model must be a torch.nn.Module, got generator"),
        ((model, torch.optim.SGD(model.parameters())), TypeError, "one of fastclip's, got torch.optim.sgd.SGD"),
        ((torch.nn.Linear(4, 4), optimizer), ValueError, "parameter 0 of group 0 is not a parameter of the model"),
    ]:
        with pytest.raises(error, match=message):
            fastclip.step_in_backward(*bad)
    negative, no_number = "bucket_cap_mb must not be negative or NaN, got", "bucket_cap_mb must be a number, got"
    for bad, error, message in [
        (-1, ValueError, negative),
        (float("nan"), ValueError, negative),
        ("4", TypeError, no_number),
    ]:
        with pytest.raises(error, match=message):
            fastclip.step_in_backward(model, optimizer, bucket_cap_mb=bad)


def test_an_optimizer_with_a_step_of_its_own():
    class Own(fastclip.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model, _, _ = linear()
    with pytest.raises(TypeError, match=r"Own has a step\(\) of its own"):
        fastclip.step_in_backward(model, Own(model.parameters()))


def test_differentiable():
    model, optimizer, _ = linear(differentiable=True)
    with pytest.raises(ValueError, match=r"the differentiable of param_groups\[0\]"):
        fastclip.step_in_backward(model, optimizer)


def test_twice():
    model, optimizer, _ = linear()
    in_backward = fastclip.step_in_backward(model, optimizer)
    with pytest.raises(ValueError, match="steps in the backward pass already"):
        fastclip.step_in_backward(model, optimizer)
    other = fastclip.SGD(model.named_parameters())
    with pytest.raises(
        ValueError, match="parameter 0 of group 0 .'weight'. is stepped in the backward pass by another"
    ):
        fastclip.step_in_backward(model, other)
    in_backward.remove()
    fastclip.step_in_backward(model, other)


def test_create_graph():
    model, optimizer, loss = linear()
    in_backward = fastclip.step_in_backward(model, optimizer, bucket_cap_mb=0)
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*within accumulate\(\)"):
        loss.backward(create_graph=True)
    assert_same_bits(before.parameters(), model.parameters())
    optimizer.zero_grad()
    with in_backward.accumulate():
        model(torch.randn(2, 4)).square().sum().backward(create_graph=True)
    optimizer.step()
    assert not torch.equal(before.weight, model.weight)


def test_a_backward_pass_within_another():
    """A reentrant checkpoint; a layer in two of them would be stepped twice, and recomputed with its new weights."""
    model, optimizer, _ = linear()
    in_backward = fastclip.step_in_backward(model, optimizer, bucket_cap_mb=0)
    before = copy.deepcopy(model)
    x = torch.randn(2, 4, requires_grad=True)

    def loss(model):
        twice = checkpoint(model, checkpoint(model, x, use_reentrant=True), use_reentrant=True)
        return twice.square().sum()

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss(model).backward()
    assert_same_bits(before.parameters(), model.parameters())
    optimizer.zero_grad()
    with in_backward.accumulate():
        loss(model).backward()
    loss(before).backward()
    assert torch.equal(before.weight.grad, model.weight.grad)


def test_parameters_that_share_memory():
    """Tied by their data: one would be updated before the pass has gone through the other. Neighbours are fine."""
    reason = "can't step '0.weight' and '1.weight', which share memory"
    for stepped in (slice(0, 2), slice(0, 1), slice(1, 2)):
        model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(2)])
        model[1].weight.data = model[0].weight.data[2:] if stepped == slice(0, 1) else model[0].weight.data
        optimizer = fastclip.SGD(model[stepped].parameters(), lr=0.1)
        with pytest.raises(ValueError, match=reason):
            fastclip.step_in_backward(model, optimizer)
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    flat = torch.randn(32)
    model[0].weight.data, model[1].weight.data = flat[:16].view(4, 4), flat[16:].view(4, 4)
    fastclip.step_in_backward(model, optimizer)
    model(torch.randn(2, 4)).sum().backward()
    assert model[1].weight.grad is None


def test_a_graph_that_needs_a_parameter_which_was_updated():
    """torch notices, also where the graph has it by way of detach(); under accumulate() there is no such thing."""
    model, optimizer, _ = linear()
    other = torch.nn.Linear(4, 4)
    optimizer.add_param_group({"params": other.parameters()})
    in_backward = fastclip.step_in_backward(torch.nn.ModuleList([model, other]), optimizer, bucket_cap_mb=0)

    def loss():  # the gradient of model.weight is there before that of `other` is computed
        return (other(torch.ones(2, 4)) @ model.weight.detach()).sum() + model.weight.square().sum()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss().backward()
    optimizer.zero_grad()
    before = copy.deepcopy(other)
    with in_backward.accumulate():
        loss().backward()
    optimizer.step()
    assert not torch.equal(before.weight, other.weight)


def test_a_parameter_that_takes_no_hook():
    """None is left behind, and training goes on without."""
    model, _, _ = linear()
    with torch.inference_mode():
        scale = torch.nn.Parameter(torch.ones(4), requires_grad=False)
    model.scale = scale
    optimizer = fastclip.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="inference tensor"):
        fastclip.step_in_backward(model, optimizer)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    other = fastclip.SGD([model.weight, model.bias], lr=0.1)
    fastclip.step_in_backward(model, other)


def test_shards_of_fully_sharded_data_parallel():
    model, optimizer, _ = linear()
    model.bias._fsdp_flattened = True
    with pytest.raises(TypeError, match="parameter 1 of group 0: it is of FullyShardedDataParallel"):
        fastclip.step_in_backward(model, optimizer)
    optimizer = fastclip.SGD([model.weight], lr=0.1)
    fastclip.step_in_backward(model, optimizer)
    with pytest.raises(TypeError, match="parameter 0 of group 1: it is of FullyShardedDataParallel"):
        optimizer.add_param_group({"params": model.bias})
    assert len(optimizer.param_groups) == 1


@pytest.fixture
def process_group(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(process_group):
    """Whether it was given the model before or after, and whichever of the two is handed over."""
    replicate = torch.nn.parallel.DistributedDataParallel
    reason = "DistributedDataParallel: it reduces gradients after the hooks"
    model, optimizer, _ = linear()
    replicated = replicate(model)
    for given in (model, replicated):
        with pytest.raises(TypeError, match=reason):
            fastclip.step_in_backward(given, optimizer)
    model, optimizer, _ = linear()
    before = copy.deepcopy(model)
    fastclip.step_in_backward(model, optimizer, bucket_cap_mb=0)
    replicated = replicate(model)
    with pytest.raises(TypeError, match=reason):
        replicated(torch.randn(2, 4)).sum().backward()
    assert_same_bits(before.parameters(), model.parameters())


def test_dtensors(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    model = distribute_module(torch.nn.Linear(4, 4), init_device_mesh("cpu", (1,)))
    optimizer = fastclip.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="parameter 0 of group 0: it is a DTensor"):
        fastclip.step_in_backward(model, optimizer)


def test_a_parameter_that_is_given_twice():
    """Ordinary steps update it twice, by one gradient, which is freed after the first update here."""
    model = torch.nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = fastclip.SGD([*model.named_parameters(), ("tied", model.weight)], lr=0.1)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 \('weight'\): it is given twice"):
        fastclip.step_in_backward(model, optimizer)
    assert optimizer._in_backward is None and not model.weight._post_accumulate_grad_hooks


def test_max_norm_in_force_for_a_group_that_was_appended_by_hand():
    model = torch.nn.Linear(2, 2)
    optimizer = fastclip.SGD([model.weight], lr=0.1, clip_value=0.5)
    fastclip.step_in_backward(model, optimizer)
    by_hand = torch.optim.SGD([model.bias], lr=0.1).param_groups[0]
    optimizer.param_groups.append(by_hand)
    for _ in range(2):  # it is hooked where a pass over others ends
        model.bias.data.zero_()
        model(torch.ones(1, 2)).sum().backward()
    assert by_hand["clip_value"] == 0.5 and model.bias.grad is None
    assert torch.equal(model.bias.detach(), torch.full((2,), -0.05))
