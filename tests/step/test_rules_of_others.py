"""Rules in the parameters of others, beside their own packages: PyPI's zclip and autoclip."""

import numpy as np
import pytest
import torch
from autoclip.torch import QuantileClip
from zclip import ZClip

import fastclip

NORMS = np.exp(np.random.default_rng(0).normal(1.6, 0.6, 300)).tolist()
SPIKES = [norm * (30 if step % 40 == 39 else 1) for step, norm in enumerate(NORMS)]


def one():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    return model


def stats_of_ours(norms, **limits):
    model = one()
    optimizer = fastclip.SGD(model.parameters(), lr=1.0, **limits)
    for norm in norms:
        model.weight.grad = torch.full_like(model.weight, norm)
        optimizer.step()
        yield optimizer.clip_stats(), optimizer.state[model.weight]["clip_history"]


@pytest.mark.parametrize("ceiling", [7.0, None])
@pytest.mark.parametrize("mode, above", [("zscore", "reciprocal"), ("percentile", "threshold")])
def test_zclip(mode, above, ceiling):
    theirs, model = ZClip(mode=mode, max_grad_norm=ceiling), one()
    rule = fastclip.EmaNorm(above=above, **({} if ceiling is None else {"ceiling": ceiling}))
    clipped = 0
    for step, (norm, (stats, history)) in enumerate(zip(SPIKES, stats_of_ours(SPIKES, max_norm=rule), strict=True)):
        model.weight.grad = torch.full_like(model.weight, norm)
        theirs.step(model)
        taken = norm * stats.clip_coefficient.item()
        assert taken == pytest.approx(model.weight.grad.item(), rel=1e-6)
        clipped += stats.clip_coefficient.item() < 1
        if step >= 24:
            assert history[2:4].tolist() == pytest.approx([theirs.mean, theirs.var], rel=1e-6)
    assert 10 < clipped < 200


@pytest.mark.parametrize("q, length", [(0.9, 1000), (0.5, 20), (0.1, 200)])
def test_autoclip(q, length):
    model = one()
    theirs = QuantileClip(model.parameters(), quantile=q, history_length=length, global_threshold=True)
    rule = fastclip.QuantileNorm(q, scale=1.0, window=length, warmup=1)
    for norm, (stats, _) in zip(SPIKES, stats_of_ours(SPIKES, max_norm=rule), strict=True):
        model.weight.grad = torch.full_like(model.weight, norm)
        theirs.step()
        assert norm * stats.clip_coefficient.item() == pytest.approx(model.weight.grad.item(), rel=1e-6)


@pytest.mark.parametrize("q", [0.1, 0.9])
def test_autoclips_paper(q):
    """Seetharaman et al.: a percentile of all norms so far. Here, of all before the step, up to the window."""
    rule = fastclip.QuantileNorm(q, scale=1.0, window=1024, warmup=1)
    for step, (stats, _) in enumerate(stats_of_ours(NORMS, max_norm=rule)):
        before = np.array(NORMS[:step], dtype=np.float32).astype(np.float64)
        assert stats.threshold.item() == (np.percentile(before, 100 * q) if step else float("inf"))


def test_after_an_inf_only_ours_goes_on():
    """zclip lets every later spike pass, autoclip makes every later gradient NaN."""
    norms = [*NORMS[:40], float("nan"), 1e9, 5.0]
    model = one()
    zclip, ends = ZClip(max_grad_norm=None), {}
    for norm in norms:
        model.weight.grad = torch.full_like(model.weight, norm)
        zclip.step(model)
        ends["zclip"], before = model.weight.grad.item(), ends.get("zclip")
    assert before == pytest.approx(1e9)
    autoclip = QuantileClip(model.parameters(), quantile=0.5, history_length=100, global_threshold=True)
    for norm in norms:
        model.weight.grad = torch.full_like(model.weight, norm)
        autoclip.step()
    assert model.weight.grad.isnan()
    for limit in ("quantile", "ema"):
        *_, (spike, _), (last, _) = stats_of_ours(norms, max_norm=limit)
        assert spike.clip_coefficient < 1e-7 and last.clip_coefficient == 1
