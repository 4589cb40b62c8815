"""fastclip.LAMB against the equations of apex's FusedLAMB in plain torch, and against pytorch-optimizer's."""

import copy
import math

import pytest
import pytorch_optimizer
import torch

import fastclip
from tests.support.cases import SHAPES, assert_close, assert_same_bits, copy_params, give_grads, make_params

VARIANTS = {
    "defaults": {},
    "without a clip": {"max_grad_norm": None},
    "without decay": {"weight_decay": 0.0},
    "nvlamb": {"weight_decay": 0.0, "use_nvlamb": True},
    "L2": {"adam_w_mode": False, "weight_decay": 0.1},
    "uncorrected": {"bias_correction": False},
    "without averaging": {"grad_averaging": False, "betas": (0.8, 0.95)},
}


class PlainLAMB(torch.optim.Optimizer):
    """The equations, by the names of apex's arguments."""

    def __init__(
        self,
        params,
        lr=1e-3,
        bias_correction=True,
        betas=(0.9, 0.999),
        eps=1e-6,
        weight_decay=0.01,
        adam_w_mode=True,
        grad_averaging=True,
        max_grad_norm=1.0,
        use_nvlamb=False,
    ):
        settings = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure=None):
        grads = [p.grad.double() for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]))
        most = self.param_groups[0]["max_grad_norm"]
        clip = 1.0 if most is None or norm <= most else (most / norm).item()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    self.update(group, p, p.grad * clip)

    def update(self, group, p, g):
        state = self.state[p]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        (beta1, beta2), decay, count = group["betas"], group["weight_decay"], group["step"]
        beta3 = 1 - beta1 if group["grad_averaging"] else 1.0
        if not group["adam_w_mode"]:
            g = g + decay * p
        m = state["exp_avg"].mul_(beta1).add_(g, alpha=beta3)
        v = state["exp_avg_sq"].mul_(beta2).add_(g * g, alpha=1 - beta2)
        if group["bias_correction"]:
            m, v = m / (1 - beta1**count), v / (1 - beta2**count)
        u = m / (v.sqrt() + group["eps"])
        if group["adam_w_mode"]:
            u = u + decay * p
        ratio = 1.0
        if group["use_nvlamb"] or decay != 0:
            size, of_update = (torch.linalg.vector_norm(t.double()).item() for t in (p, u))
            ratio = size / of_update if size and of_update else 1.0
        p.sub_(u, alpha=group["lr"] * ratio)


def relative_error(ours, theirs):
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True) if a.numel()]
    return max(errors).item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_those_of_the_equations(variant):
    ours = make_params(SHAPES, torch.float64)
    theirs = copy_params(ours)
    optimizer = fastclip.LAMB(ours, lr=0.01, **VARIANTS[variant])
    plain = PlainLAMB(theirs, lr=0.01, **VARIANTS[variant])
    for step in range(30):
        give_grads(theirs, ours, scale=10.0 ** (step % 3 - 2))
        optimizer.step()
        plain.step()
    assert relative_error(ours, theirs) < 1e-6  # fastclip adds 1e-6 to the norm, as torch does


@pytest.mark.parametrize("decay", [0.1, 0.01])
def test_pytorch_optimizers_takes_the_same_steps(decay):
    """Theirs corrects no average, adds eps to ‖u‖, and takes norms above 10 for 10."""
    ours = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64) / 10) for shape in [(40, 30), (3, 5, 2), (7,)]]
    theirs = copy_params(ours)
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": decay}
    optimizer = fastclip.LAMB(ours, **settings, bias_correction=False, max_grad_norm=None)
    other = pytorch_optimizer.Lamb(theirs, **settings, weight_decouple=False, adam_debias=True, foreach=False)
    for _ in range(20):
        give_grads(theirs, ours)
        optimizer.step()
        other.step()
    assert relative_error(ours, theirs) < 1e-7


def test_a_step_is_as_large_as_the_learning_rate_says():
    """Relative to the norm of the tensor, whatever the gradient."""
    for scale in (1e-3, 1.0, 1e3):
        p = torch.nn.Parameter(torch.randn(50))
        before = p.detach().clone()
        optimizer = fastclip.LAMB([p], lr=0.01, eps=1e-12, max_grad_norm=None)
        p.grad = torch.randn(50) * scale
        optimizer.step()
        assert (p.detach() - before).norm() == pytest.approx(0.01 * before.norm().item(), rel=1e-5)


def test_a_tensor_of_zeros_moves_by_the_learning_rate():
    p, q = torch.nn.Parameter(torch.zeros(50)), torch.nn.Parameter(torch.randn(50))
    optimizer = fastclip.LAMB([p, q], lr=0.01)
    p.grad, q.grad = torch.ones(50), torch.zeros(50)
    before = q.detach().clone()
    optimizer.step()
    torch.testing.assert_close(p, torch.full((50,), -0.01), rtol=1e-4, atol=0)
    torch.testing.assert_close(q, before * 0.99, rtol=1e-5, atol=1e-6)  # all of u is the decay, as large as the tensor


def test_groups_and_checkpoints_of_apex_are_taken():
    params = make_params([(5,), (6,)])
    groups = [{"params": params[:1], "max_grad_norm": 2.0, "lr": 0.1}, {"params": params[1:], "max_grad_norm": 2.0}]
    optimizer = fastclip.LAMB(groups, lr=0.01, max_grad_norm=2.0)
    assert [group["max_norm"] for group in optimizer.param_groups] == [2.0, 2.0]
    assert all("max_grad_norm" not in group for group in optimizer.param_groups)
    theirs = copy_params(params)
    plain = PlainLAMB(theirs, lr=0.01, max_grad_norm=0.5)
    for _ in range(3):
        give_grads(theirs, params)
        plain.step()
    ours = copy_params(theirs)
    loaded = fastclip.LAMB(ours, lr=1.0)
    loaded.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert loaded.param_groups[0]["max_norm"] == 0.5 and "step" not in loaded.param_groups[0]
    for _ in range(3):
        give_grads(theirs, ours)
        plain.step()
        loaded.step()
    assert_close(theirs, ours, 1e-6)


def test_max_norm_counts_where_both_are_given():
    p = torch.nn.Parameter(torch.ones(4))
    assert fastclip.LAMB([p]).param_groups[0]["max_norm"] == 1.0
    assert fastclip.LAMB([p], max_norm=3.0).param_groups[0]["max_norm"] == 3.0
    assert fastclip.LAMB([p], max_grad_norm=None).param_groups[0]["max_norm"] is None
    assert fastclip.LAMB([p], max_norm="quantile").param_groups[0]["max_norm"]["rule"] == "quantile"


def test_the_norm_is_clipped_before_the_averages():
    optimizer, params = None, make_params([(50,), (60,)])
    optimizer = fastclip.LAMB(params, lr=0.01, max_grad_norm=0.5)
    give_grads(params)
    norm = math.hypot(*(p.grad.double().norm().item() for p in params))
    optimizer.step()
    for p in params:
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], p.grad * (0.1 * 0.5 / norm), rtol=1e-5, atol=0)


def test_copies_go_on_with_the_same_bits():
    ours = make_params([(50,), (60,)])
    optimizer = fastclip.LAMB(ours, lr=0.01)
    for _ in range(2):
        give_grads(ours)
        optimizer.step()
    other, theirs = copy.deepcopy((optimizer, ours))
    for _ in range(2):
        give_grads(theirs, ours)
        optimizer.step()
        other.step()
    assert_same_bits(theirs, ours, other, optimizer)


@pytest.mark.parametrize(
    ("settings", "words"), [({"amsgrad": True}, "amsgrad"), ({"lr": -1.0}, "lr"), ({"betas": (0.9, 1.0)}, "betas")]
)
def test_bad_arguments_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        fastclip.LAMB([torch.nn.Parameter(torch.ones(3))], **settings)
