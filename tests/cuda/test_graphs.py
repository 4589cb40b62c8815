"""A step captured by a CUDA graph and replayed does what eager steps do. Needs a GPU."""

import math

import pytest
import torch

import fastclip
from tests.conftest import NO_GPU
from tests.support.cases import CLIPS, SHAPES, TINY, assert_same_bits, copy_params, give_grads, make_params

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU),
]
# The second is more than the arguments of a kernel have room for: its table lies in device memory.
MODELS = {"mixed": SHAPES, "1,000 tensors": [(5,)] * 1000}


RULES = {"plain": {}, "momentum": {"momentum": 0.9}, "adam": {"cls": fastclip.AdamW, "amsgrad": True}}


class Captured:
    """An optimizer whose step is a graph, and one that steps eagerly, over equal parameters."""

    def __init__(self, shapes=SHAPES, cls=fastclip.SGD, **settings):
        self.ours = make_params(shapes, device="cuda")
        self.theirs = copy_params(self.ours)
        self.lr = torch.tensor(0.1, device="cuda")
        self.optimizer = cls(self.ours, lr=self.lr, **settings)
        self.eager = cls(self.theirs, lr=self.lr.clone(), **settings)
        give_grads(self.ours, self.theirs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # as torch asks for: first on a side stream, uncaptured
            self.optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        self.eager.step()
        self.graph = torch.cuda.CUDAGraph()

    def capture(self):
        with torch.cuda.graph(self.graph):
            self.optimizer.step()

    def step(self, change=lambda grads: None):
        """New gradients, in the memory that was captured; then a replay, and an eager step."""
        for p, q in zip(self.ours, self.theirs, strict=True):
            q.grad = torch.randn_like(q)
            change(q.grad)
            p.grad.copy_(q.grad)
        self.graph.replay()
        self.eager.step()

    def check(self):
        assert_same_bits(self.theirs, self.ours, self.eager, self.optimizer)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("clip", CLIPS)
def test_replays_equal_eager_steps(clip, rule, model):
    """Adam too, also where it does not know that it will be captured: it counts steps on the device in any case."""
    pair = Captured(MODELS[model], weight_decay=0.01, **RULES[rule], **CLIPS[clip])
    pair.capture()
    for lr in (0.1, 0.05, 0.2):
        pair.lr.fill_(lr)  # as a scheduler does in place
        pair.eager.param_groups[0]["lr"].fill_(lr)
        pair.step()
        pair.check()
    if rule == "adam":
        steps = [float(pair.optimizer.state[p]["step"]) for p in pair.ours]
        assert steps == [1 + 3] * len(steps), "a capture counts nothing, a replay does"
    for replayed, eager in zip(pair.optimizer.clip_stats(), pair.eager.clip_stats(), strict=True):
        assert replayed is eager is None or torch.equal(replayed, eager)


@pytest.mark.parametrize("rule", RULES)
def test_replays_remember_norms(rule):
    """A replayed step pushes its norm by itself, and leaves out what is absurd."""
    limits = {"max_norm": fastclip.QuantileNorm(window=9, warmup=2), "skip_norm": fastclip.EmaNorm(z=4, warmup=5)}
    pair = Captured(**limits, **RULES[rule])
    pair.capture()
    for step in range(200):
        pair.step(lambda grad, size=100.0 if step % 50 == 49 else 1.0 + step % 3: grad.mul_(size))
        for replayed, eager in zip(pair.optimizer.clip_stats(), pair.eager.clip_stats(), strict=True):
            assert replayed is eager is None or torch.equal(replayed, eager)
    pair.check()
    assert pair.optimizer.skipped_steps >= 4 and pair.optimizer.norm_history().numel() == 9


def test_a_graph_stays_right_when_the_optimizer_steps_larger_models_meanwhile():
    """Its scratch memory is its own."""
    pair = Captured(SHAPES, max_norm=1.0)
    pair.capture()
    group = make_params([(300, 300)] * 50 + TINY * 2, device="cuda")
    pair.optimizer.add_param_group({"params": group})
    give_grads(group)
    pair.optimizer.param_groups[0]["params"], kept = [], pair.optimizer.param_groups[0]["params"]
    pair.optimizer.step()
    pair.optimizer.param_groups[0]["params"] = kept
    del group
    torch.cuda.empty_cache()
    for _ in range(3):
        pair.step()
        pair.check()


def test_a_graph_stays_right_when_a_checkpoint_is_loaded():
    pair = Captured(SHAPES, max_norm=1.0)
    pair.capture()
    pair.optimizer.load_state_dict(pair.optimizer.state_dict())
    pair.optimizer.param_groups[0]["lr"] = pair.lr  # which loading has copied
    junk = [torch.full((64,), 1e9, dtype=torch.float64, device="cuda") for _ in range(100)]
    for _ in range(3):
        pair.step()
        pair.check()
    assert all((j == 1e9).all() for j in junk)


def test_clip_grad_norm_can_be_captured():
    params = make_params(SHAPES, device="cuda")
    theirs = copy_params(params)
    give_grads(params, theirs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fastclip.clip_grad_norm_(params, 1.0)
    for _ in range(2):
        for p, q in zip(params, theirs, strict=True):
            q.grad = torch.randn_like(q)
            p.grad.copy_(q.grad)
        graph.replay()
        fastclip.clip_grad_norm_(theirs, 1.0)
        assert_same_bits([q.grad for q in theirs], [p.grad for p in params])


def test_skipped_steps_are_counted_over_replays():
    pair = Captured(SHAPES, momentum=0.9, clip_value=0.5, skip_nonfinite=True)
    pair.capture()
    for bad in (1.0, math.nan, math.inf, 1.0):
        pair.step(lambda grad, bad=bad: grad.view(-1)[:1].mul_(bad))
        pair.check()
    assert pair.optimizer.skipped_steps.item() == pair.eager.skipped_steps.item() == 2


def test_amp_in_a_graph():
    pair = Captured(SHAPES, momentum=0.9, max_norm=1.0)
    scale = torch.tensor(1024.0, device="cuda")
    found_inf = torch.tensor(0.0, device="cuda")
    for optimizer in (pair.optimizer, pair.eager):
        optimizer.grad_scale, optimizer.found_inf = scale, found_inf
    pair.optimizer.step()  # what is counted is there before the capture
    pair.eager.step()
    pair.capture()
    for inf in (0.0, 1.0, 0.0):
        found_inf.fill_(inf)
        pair.step(lambda grad: grad.mul_(1024))
        pair.check()


def test_what_can_not_be_captured_says_so():
    params = make_params(SHAPES, device="cuda")
    give_grads(params)
    for settings in ({"max_norm": 1.0}, {"momentum": 0.9}):
        before = copy_params(params)
        optimizer = fastclip.SGD(params, lr=0.1, **settings)
        with pytest.raises(RuntimeError, match="take a step before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
        assert_same_bits(before, params)
