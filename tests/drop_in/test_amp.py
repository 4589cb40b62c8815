"""GradScaler and autocast: equal to unscale_, then the clip, then torch.optim.SGD's step."""

import copy
import math

import pytest
import torch

import fastclip
from tests.support.cases import (
    CLIPS,
    assert_close,
    assert_same_bits,
    clip_in_place,
    copy_params,
    exact_square_roots,
    make_params,
    pair,
    param,
)

falls_back = pytest.mark.falls_back
SHAPES = [(5, 3), (4,), (33,)]
STEPS = 5
OVERFLOWS = {"never": set(), "at the first step": {0}, "later": {3}}
SETTINGS = {name: CLIPS[name] for name in ("none", "value", "norm", "value and norm")}
SETTINGS["skip_nonfinite"] = {"skip_nonfinite": True}


def scaler_on(device):
    return torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=2)


def backward(scaler, params, gradients):
    """Backward passes of losses with the given gradients, one per micro-batch: they accumulate."""
    for batch in gradients:
        loss = sum((p * g).sum() for p, g in zip(params, batch, strict=True)) / len(gradients)
        scaler.scale(loss).backward()


def random_gradients(shapes, device, micro_batches, overflows):
    batches = [[torch.randn(shape, device=device) for shape in shapes] for _ in range(micro_batches)]
    if overflows:
        batches[-1][1].view(-1)[2] = 1e38  # finite, and infinite when scaled
    return batches


def buffers(optimizer, params):
    return [value for p in params if p in optimizer.state for value in optimizer.state[p].values()]


SGD, MOMENTUM, ADAM = {}, {"momentum": 0.9, "dampening": 0.1}, {"optimizer": "AdamW", "eps": 1e-3}


@pytest.mark.parametrize("rule", [SGD, MOMENTUM, ADAM], ids=["sgd", "momentum", "adam"])
@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("unscale", [False, True], ids=["unscaled by the step", "unscale_"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_grad_scaler_equals_the_plain_sequence(settings, unscale, micro_batches, overflow, rule, device):
    clip = {k: v for k, v in SETTINGS[settings].items() if k != "skip_nonfinite"}
    loop, theirs, optimizer, ours = pair(SHAPES, clip, device=device, **rule)
    optimizer.param_groups[0]["skip_nonfinite"] = settings == "skip_nonfinite"
    scalers = scaler_on(device), scaler_on(device)
    for step in range(STEPS):
        gradients = random_gradients(SHAPES, device, micro_batches, step in OVERFLOWS[overflow])
        for scaler, params in zip(scalers, (theirs, ours), strict=True):
            backward(scaler, params, gradients)

        scalers[0].unscale_(loop.optimizer)
        norm = clip_in_place(theirs, **clip)
        if norm is not None and step in OVERFLOWS[overflow]:
            norm.fill_(math.inf)  # as a skipped step reports it: a value clip has hidden it here
        with exact_square_roots():
            scalers[0].step(loop.optimizer)

        if unscale:
            scalers[1].unscale_(optimizer)
        before = [p.grad.clone() for p in ours]
        scalers[1].step(optimizer)
        assert_same_bits(before, [p.grad for p in ours])  # the step itself writes no gradient

        for scaler, of in zip(scalers, (loop.optimizer, optimizer), strict=True):
            scaler.update()
            of.zero_grad()
        assert scalers[0].state_dict() == scalers[1].state_dict()  # the scale, and its growth
        assert optimizer.skipped_steps.item() == len([s for s in OVERFLOWS[overflow] if s <= step])
        if norm is None:
            assert_same_bits(theirs, ours, loop.optimizer, optimizer)
        else:
            torch.testing.assert_close(optimizer.total_norm, norm, rtol=1e-12, atol=0)
            assert_close(theirs, ours, 2e-6)
            assert_close(buffers(loop.optimizer, theirs), buffers(optimizer, ours), 2e-6)


def test_one_scaler_for_several_optimizers(device):
    """Each is skipped for its own gradients only; the scale goes down for all."""
    settings = [{"clip_value": 0.5}, {"max_norm": 1.0}, {}]
    pairs = [pair(SHAPES, clip, device=device, momentum=0.9) for clip in settings]
    scalers = scaler_on(device), scaler_on(device)
    for step in range(6):
        for index, (_, theirs, _, ours) in enumerate(pairs):
            gradients = random_gradients(SHAPES, device, 1, overflows=step % 4 == index)
            for scaler, params in zip(scalers, (theirs, ours), strict=True):
                backward(scaler, params, gradients)
        for loop, theirs, optimizer, _ in pairs:
            scalers[0].unscale_(loop.optimizer)
            clip_in_place(theirs, **loop.clip)
            scalers[0].step(loop.optimizer)
            scalers[1].step(optimizer)
            loop.optimizer.zero_grad()
            optimizer.zero_grad()
        for scaler in scalers:
            scaler.update()
        assert scalers[0].state_dict() == scalers[1].state_dict()
    for loop, theirs, _, ours in pairs:
        assert_close(theirs, ours, 2e-6 if "max_norm" in loop.clip else 0)
    assert [optimizer.skipped_steps.item() for _, _, optimizer, _ in pairs] == [2, 2, 1]


@pytest.mark.parametrize("scaled", [False, True], ids=["no scaler", "scaler"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, scaled, device):
    """A small model trained with its forward pass in 16 bits: the same losses and the same bits."""
    x, y = torch.randn(16, 7, device=device), torch.randn(16, 3, device=device)
    model = torch.nn.Sequential(torch.nn.Linear(7, 20), torch.nn.ReLU(), torch.nn.Linear(20, 3)).to(device)
    trained = []
    for cls in (torch.optim.SGD, fastclip.SGD):
        net = copy.deepcopy(model)
        settings = {"foreach": False} if cls is torch.optim.SGD else {"clip_value": 0.01}
        optimizer = cls(net.parameters(), lr=0.5, momentum=0.9, **settings)
        scaler = torch.amp.GradScaler(device, enabled=scaled)
        losses = []
        for _ in range(8):
            with torch.autocast(device, dtype):
                loss = (net(x) - y).square().mean()
            scaler.scale(loss).backward()
            if cls is torch.optim.SGD:
                scaler.unscale_(optimizer)
                clip_in_place(net.parameters(), clip_value=0.01)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        trained.append((losses, list(net.parameters())))
    assert trained[0][0] == trained[1][0]
    assert_same_bits(trained[0][1], trained[1][1])


@falls_back
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("kind", ["transposed", "sparse"])
def test_grad_scaler_where_the_step_is_in_plain_torch(kind, unscale):
    clip = {} if kind == "sparse" else {"max_norm": 1.0}
    ours = make_params([(4, 3), (4, 3)])
    theirs = copy_params(ours)
    optimizer = fastclip.SGD(ours, lr=0.1, **clip)
    plain = torch.optim.SGD(theirs, lr=0.1)
    scalers = scaler_on("cpu"), scaler_on("cpu")
    for step in range(4):
        gradients = [torch.randn_like(p) for p in ours]
        if step in (0, 2):
            gradients[1][2, 1] = 1e38
        for scaler, of in zip(scalers, (theirs, ours), strict=True):
            for p, g in zip(of, gradients, strict=True):
                p.grad = scaler.scale(g)
            if kind == "transposed":
                of[1].grad = of[1].grad.t().contiguous().t()
            elif kind == "sparse":
                of[1].grad = of[1].grad.to_sparse(1)
        scalers[0].unscale_(plain)
        if clip:
            clip_in_place(theirs, **clip)
        scalers[0].step(plain)
        if unscale:
            scalers[1].unscale_(optimizer)
        scalers[1].step(optimizer)
        for scaler in scalers:
            scaler.update()
        assert scalers[0].state_dict() == scalers[1].state_dict()
    assert_close(theirs, ours, 2e-6)
    assert optimizer.skipped_steps.item() == 2


def test_a_step_that_raises_leaves_nothing_to_be_unscaled_by_twice():
    """GradScaler would multiply its scale by the `grad_scale` that it finds at the next try."""
    a, b = param(3), param(2)
    optimizer, scaler = fastclip.SGD([a, b], lr=1.0), scaler_on("cpu")
    a.grad, sound = scaler.scale(a.grad), scaler.scale(b.grad)
    b.grad = None
    b.grad = torch.ones(2)
    b.grad.data = torch.ones(7)
    with pytest.raises(ValueError, match="gradient of parameter 1"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    b.grad = sound
    scaler.step(optimizer)
    assert a.tolist() == [-1] * 3 and b.tolist() == [-1] * 2


@pytest.mark.parametrize("unscale", [False, True])
def test_no_gradients_at_all(unscale, device):
    """GradScaler then adds up nothing, and leaves the int 0."""
    p = torch.ones(3, device=device, requires_grad=True)
    optimizer, scaler = fastclip.SGD([p], lr=0.1, momentum=0.9, max_norm=1.0), scaler_on(device)
    scaler.scale(torch.zeros((), device=device))
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert p.tolist() == [1] * 3 and optimizer.total_norm.item() == 0 and optimizer.skipped_steps.item() == 0


def test_unscaling_or_stepping_twice_is_refused_as_in_torch():
    messages = []
    for cls in (torch.optim.SGD, fastclip.SGD):
        p = param(2)
        optimizer, scaler = cls([p], lr=0.1), scaler_on("cpu")
        p.grad = scaler.scale(p.grad)
        scaler.unscale_(optimizer)
        with pytest.raises(RuntimeError) as unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        with pytest.raises(RuntimeError) as stepped:
            scaler.step(optimizer)
        messages.append((str(unscaled.value), str(stepped.value), p.tolist()))
    assert messages[0] == messages[1]


def test_found_inf_summed_over_devices_still_skips(device):
    p = torch.ones(2, device=device, requires_grad=True)
    for momentum in (0, 0.9):  # decided on the device, and by the host
        opt = fastclip.SGD([p], lr=0.1, momentum=momentum)
        p.grad = torch.ones_like(p)
        opt.grad_scale, opt.found_inf = torch.tensor(1.0, device=device), torch.tensor(2.0, device=device)
        opt.step()
        assert p.tolist() == [1, 1] and not opt.state


def test_a_skipped_step_has_an_infinite_norm():
    p = param(2)
    optimizer = fastclip.SGD([p], lr=0.1, max_norm=1.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert optimizer.total_norm.item() == float("inf") and torch.equal(p.detach(), torch.zeros(2))


def with_own(*names):
    """A scaler whose methods of these names are its own, and do what torch's do."""

    def method(name):
        def call(self, *args, **kwargs):
            return getattr(super(cls, self), name)(*args, **kwargs)

        return call

    cls = type("Own", (torch.amp.GradScaler,), {name: method(name) for name in names})
    return cls


SCALERS = {
    "torch's": (torch.amp.GradScaler, True),
    "torch's for the CPU": (lambda _: torch.cpu.amp.GradScaler(), True),
    "own update, scale and state": (with_own("update", "scale", "get_scale", "state_dict"), True),
    "own step": (with_own("step"), False),
    "own unscale_": (with_own("unscale_"), False),
    "own _unscale_grads_": (with_own("_unscale_grads_"), False),
    "own _maybe_opt_step": (with_own("_maybe_opt_step"), False),
}


def is_left_to_the_step(scaler, **settings):
    """Whether the step of an optimizer gets what it has to unscale by; it is right in any case."""
    p, seen = param(3), []
    optimizer = fastclip.SGD([p], lr=1.0, max_norm=math.inf, **settings)
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append(hasattr(opt, "found_inf")))
    p.grad = scaler.scale(p.grad)
    scaler.step(optimizer)
    scaler.update()
    assert p.tolist() == [-1] * 3 and optimizer.total_norm.item() == math.sqrt(3)
    return seen[0]


@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.GradScaler:FutureWarning")
@pytest.mark.parametrize("settings", [{}, {"fused": True}], ids=["plain", "fused"])
@pytest.mark.parametrize("name", SCALERS)
def test_a_scaler_with_methods_of_its_own_unscales_itself(name, settings):
    kind, left = SCALERS[name]
    assert is_left_to_the_step(kind("cpu"), **settings) == left


@pytest.mark.parametrize("owner", [lambda scaler: scaler, type], ids=["the scaler's", "torch's class's"])
@pytest.mark.parametrize("name", ["step", "unscale_", "_unscale_grads_", "_maybe_opt_step"])
def test_a_method_that_was_exchanged_is_called(name, owner, monkeypatch):
    scaler, called = torch.amp.GradScaler("cpu"), []
    torchs = getattr(owner(scaler), name)
    monkeypatch.setattr(owner(scaler), name, lambda *args, **kwargs: called.append(name) or torchs(*args, **kwargs))
    assert not is_left_to_the_step(scaler)
    assert called == [name]


def test_a_step_that_a_scaler_does_not_take_leaves_the_last_statistics():
    """As torch's optimizers, this one is not called then, and hears of nothing."""
    p, scaler = param(3), with_own("_maybe_opt_step")("cpu")
    optimizer = fastclip.SGD([p], lr=1.0, max_norm=1.0)
    for grad in (torch.ones(3), torch.full((3,), math.inf)):
        p.grad = scaler.scale(grad)
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.total_norm.item() == math.sqrt(3) and optimizer.skipped_steps.item() == 0
    assert not optimizer.clip_stats().skipped and p.isfinite().all()


def test_whoever_else_asks_is_told_that_the_step_unscales():
    """Lightning asks, and refuses to clip. Who sets the attribute has the last word."""
    optimizer = fastclip.SGD([param(2)], lr=0.1)
    assert optimizer._step_supports_amp_scaling and fastclip.SGD._step_supports_amp_scaling
    optimizer._step_supports_amp_scaling = False
    scaler, seen = torch.amp.GradScaler("cpu"), []
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append(hasattr(opt, "found_inf")))
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert seen == [False] and not optimizer._step_supports_amp_scaling
