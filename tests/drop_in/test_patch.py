"""fastclip.patch: code that knows nothing of fastclip, with torch's bits."""

import contextlib
import multiprocessing
import sys
import types
import warnings

import pytest
import torch

import fastclip
from fastclip import counts
from fastclip.patching import OPTIMIZERS
from tests.support.cases import assert_same_bits, copy_params, give_grads, make_params

CLIPS = ("own", "fused", "defer")
TORCHS = {name: getattr(torch.optim, name) for name in OPTIMIZERS}
FUNCTIONS = {
    name: getattr(torch.nn.utils, name) for name in ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_")
}


@pytest.fixture(autouse=True)
def counted_from_zero(monkeypatch):
    for name in ("clips_deferred", "clips_at_once", "clips_by_torch"):
        monkeypatch.setattr(counts, name, 0)


@contextlib.contextmanager
def patched(clip):
    """These tests have imported torch's names themselves, which the patch says."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fastclip.patch came too late")
        with fastclip.patch(clip) if clip else contextlib.nullcontext():
            yield


def are_torchs():
    return all(getattr(torch.optim, name) is torchs for name, torchs in TORCHS.items()) and all(
        getattr(torch.nn.utils, name) is torchs for name, torchs in FUNCTIONS.items()
    )


def clip_by(how, params):
    """The ways in which programs clip."""
    utils = torch.nn.utils
    if how == "norm":
        return utils.clip_grad_norm_(params, 1.0)
    if how == "generator, inf":
        return utils.clip_grad_norm_((p for p in params), max_norm=0.3, norm_type=float("inf"))
    if how == "by its module":
        return utils.clip_grad.clip_grad_norm_(params, 1.0, error_if_nonfinite=True, foreach=False)
    if how == "value":
        return utils.clip_grad_value_(params, 0.2)
    norm = utils.get_total_norm([p.grad for p in params])  # torchtitan
    utils.clip_grads_with_norm_(params, 1.0, norm)
    return norm


HOWS = ("norm", "generator, inf", "by its module", "value", "two functions")


def train(how, name="SGD", steps=12, dtype=torch.float32, device="cpu"):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(9, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5)).to(device, dtype)
    settings = {"momentum": 0.9} if name in ("SGD", "RMSprop") else {}
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, **settings)
    x, norms = torch.randn(8, 9, dtype=dtype).to(device), []
    for step in range(steps):
        (10 * model(x + step)).square().sum().backward()
        norms.append(clip_by(how, [*model.parameters()]))
        optimizer.step()
        optimizer.zero_grad()
    return [*model.parameters()], norms, optimizer


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_deferred_clips_have_torchs_bits(how, dtype, device):
    theirs, expected, _ = train(how, dtype=dtype, device=device)
    before = counts.steps()
    with patched("defer"):
        ours, norms, optimizer = train(how, dtype=dtype, device=device)
    assert type(optimizer) is fastclip.SGD
    assert all(
        norm is wanted is None or torch.equal(norm, wanted) for norm, wanted in zip(norms, expected, strict=True)
    )
    assert (counts.clips_deferred, counts.clips_by_torch, counts.steps() - before) == (12, 0, 12)
    if device == "cpu":
        assert_same_bits(theirs, ours)
    else:
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", CLIPS)
def test_every_optimizer_and_clip(name, clip):
    theirs, expected, _ = train("norm", name)
    with patched(clip):
        ours, norms, optimizer = train("norm", name)
    assert type(optimizer) is getattr(fastclip, name) and are_torchs()
    torch.testing.assert_close(torch.stack(norms), torch.stack(expected), rtol=1e-5, atol=0)
    if clip == "fused":  # its norm is more exact, and some rules divide by almost nothing
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (counts.clips_deferred, counts.clips_at_once) == {"own": (0, 0), "fused": (0, 12), "defer": (12, 0)}[clip]


@pytest.mark.parametrize("how", HOWS)
def test_what_is_not_one_optimizers_is_torchs(how):
    """A part of the model, and an optimizer of torch's."""
    for make in (lambda params: fastclip.SGD(params[1:], lr=0.1), lambda params: TORCHS["SGD"](params, lr=0.1)):
        theirs = make_params([(5,), (3, 4), (2,)])
        ours = copy_params(theirs)
        optimizer = make(ours)
        give_grads(theirs, ours)
        expected = clip_by(how, theirs)
        with patched("defer"):
            norm = clip_by(how, ours)
        assert norm is expected is None or torch.equal(norm, expected)
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p.grad, q.grad)
        optimizer.step()
    assert counts.clips_by_torch == 2 and counts.clips_deferred == 0


def test_a_context_ends_also_by_an_error_and_nests():
    with pytest.raises(ZeroDivisionError), patched("fused"):
        outer = torch.nn.utils.clip_grad_norm_
        with patched("defer"):
            assert torch.nn.utils.clip_grad_norm_ is not outer
        assert torch.nn.utils.clip_grad_norm_ is outer and torch.optim.SGD is fastclip.SGD
        raise ZeroDivisionError
    assert are_torchs()
    with patched(None):
        patch = fastclip.patch("own")
    assert torch.optim.AdamW is sys.modules["torch.optim.adamw"].AdamW is fastclip.AdamW
    patch.undo()
    assert are_torchs()
    with patch:
        assert torch.optim.AdamW is fastclip.AdamW
    assert are_torchs()
    with patched(None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patches = [fastclip.patch(), fastclip.patch("defer"), fastclip.patch("fused")]
        for patch in patches:  # in another order
            assert torch.optim.SGD is fastclip.SGD
            patch.undo()
    assert are_torchs()


def test_what_is_patched_looks_like_torchs():
    with patched("defer"):
        assert issubclass(torch.optim.AdamW, torch.optim.Adam)
        for name, torchs in FUNCTIONS.items():
            ours = getattr(torch.nn.utils, name)
            assert ours is not torchs and (ours.__name__, ours.__doc__) == (name, torchs.__doc__)
        with pytest.warns(UserWarning, match="empty generator"):
            assert torch.nn.utils.clip_grad_norm_((p for p in []), 1.0) == 0
        p = torch.nn.Parameter(torch.ones(3))
        torch.optim.SGD([p], lr=0.1)
        p.grad = torch.full((3,), 3.0)
        torch.nn.utils.clip_grad_value_([p], -1.0)  # torch takes it, whatever it means
        assert p.grad.tolist() == [-1.0] * 3


def test_bad_clip_changes_nothing():
    with pytest.raises(ValueError, match="clip must be one of own, fused, defer, got 'all'"):
        fastclip.patch(clip="all")
    assert are_torchs()


def test_says_which_modules_came_before(monkeypatch):
    late = types.ModuleType("late_toolkit")
    late.clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setitem(sys.modules, "late_toolkit", late)
    with pytest.warns(UserWarning, match=r"came too late for .*late_toolkit.*fastclip\.run"), fastclip.patch():
        assert late.clip is FUNCTIONS["clip_grad_norm_"]


def moved(optimizer_of, steps=1, before_step=lambda params: None):
    """How far a parameter of ones moves, with gradients of 100 that are clipped at norm 1, under the patch."""
    with patched("defer"):
        params = [torch.nn.Parameter(torch.ones(4))]
        optimizers = optimizer_of(params)
        for _ in range(steps):
            params[0].grad = torch.full((4,), 100.0)
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            before_step(params)
            optimizers[-1].step()
    return (params[0].detach() - 1).norm().item()


class Plain(TORCHS["SGD"].__mro__[1]):
    """An optimizer of a user: a subclass of `torch.optim.Optimizer`."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad)


def test_an_optimizer_of_others_beside_one_of_fastclips():
    for optimizers in (
        lambda params: [torch.optim.Adam(params), Plain(params)],
        lambda params: [Plain(params), torch.optim.SGD(params, lr=1.0)],
        lambda params: [torch.optim.AdamW(params), torch.optim.SGD(params, lr=1.0)],
    ):
        assert moved(optimizers) == pytest.approx(1.0)
    later = []
    late = moved(lambda params: later, before_step=lambda params: later.append(Plain(params)))
    assert late == pytest.approx(1.0)


def test_who_reads_gradients_after_the_clip_gets_an_error_or_clipped_ones():
    def replace(params):
        params[0].grad = 0.5 * params[0].grad

    with pytest.raises(RuntimeError, match="was changed after its clip"):
        moved(lambda params: [torch.optim.SGD(params, lr=1.0)], before_step=replace)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_an_all_reduce_after_the_clip_sees_clipped_gradients():
    """It changes them behind autograd's back, so nothing could tell later."""
    before = torch.distributed.all_reduce
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        reduced = []

        def reduce(params):
            torch.distributed.all_reduce(params[0].grad)
            reduced.append(params[0].grad.norm().item())

        assert moved(lambda params: [torch.optim.SGD(params, lr=1.0)], before_step=reduce) == pytest.approx(1.0)
        assert reduced == [pytest.approx(1.0)] and torch.distributed.all_reduce is before
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_models_zero_grad_forgets_a_clip(set_to_none):
    """After a norm that is not finite; also where gradients are zeroed in place."""
    with patched("defer"):
        model = torch.nn.Linear(3, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for value in (float("nan"), 1.0):
            model.zero_grad(set_to_none=set_to_none)
            before = model.weight.detach().clone()
            model(torch.full((1, 3), value)).sum().backward()
            if torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite():
                optimizer.step()
    assert (model.weight - before).norm().item() == pytest.approx(1.0, rel=1e-5)


def test_subclasses_and_lists_of_types():
    """ESPnet and FunASR subclass torch's SGD; DeepSpeed compares types."""
    with patched("defer"):

        class SGD(torch.optim.SGD):
            def __init__(self, params, lr=0.1, momentum=0.0):
                super().__init__(params, lr=lr, momentum=momentum)

        optimizer = SGD([p := torch.ones(3, requires_grad=True)])
        assert isinstance(optimizer, torch.optim.SGD) and isinstance(optimizer, TORCHS["SGD"])
        assert type(torch.optim.AdamW([p])) in [torch.optim.Adam, torch.optim.AdamW]
        p.grad = torch.ones(3)
        torch.nn.utils.clip_grad_norm_([p], 0.5)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.05 / 3**0.5))
    assert counts.clips_deferred == 1


def _who_is_it(queue):
    queue.put((torch.optim.SGD.__module__, torch.nn.utils.clip_grad_norm_.__module__))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_process_started_within_a_context(method):
    context = multiprocessing.get_context(method)
    found = []
    for clip in ("defer", None):
        with patched(clip):
            queue = context.Queue()
            process = context.Process(target=_who_is_it, args=(queue,))
            process.start()
            found.append(queue.get(timeout=60))
            process.join()
    assert found == [("fastclip.sgd", "fastclip.patching"), ("torch.optim.sgd", "torch.nn.utils.clip_grad")]


def test_the_counts_line():
    text = counts.text()
    assert text.startswith("fastclip: ") and text.endswith("no clips")
    counts.clips_deferred, counts.clips_by_torch = 2, 1
    assert counts.text().endswith(", 2 clips deferred to the step, 1 clips left to torch")
