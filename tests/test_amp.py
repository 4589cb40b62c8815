"""GradScaler and autocast."""

import pytest
import torch

import fastclip

from .cases import CLIPS, clip_in_place, give_grads, pair, param


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("clip", ["none", "value", "norm", "value and norm"])
def test_grad_scaler(clip, unscale):
    """Equal to unscale_ -> clip -> step in plain code; overflow at the first step and at a later one skips."""
    loop, theirs, optimizer, ours = pair([(5, 3), (4,)], CLIPS[clip], momentum=0.9, dampening=0.1)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    for step in range(6):
        scales = [scaler.scale(torch.tensor(1.0)).item() for scaler in scalers]
        assert scales[0] == scales[1]
        give_grads(theirs, ours, scale=scales[0])
        if step in (0, 3):
            for params in (theirs, ours):
                params[1].grad[2] = float("inf")
        scalers[0].unscale_(loop.optimizer)
        if step not in (0, 3):
            clip_in_place(theirs, **CLIPS[clip])
        scalers[0].step(loop.optimizer)
        if unscale:
            scalers[1].unscale_(optimizer)
        scalers[1].step(optimizer)
        for scaler in scalers:
            scaler.update()
        if step == 0:
            assert not optimizer.state, "a skipped first step must not leave a momentum buffer"
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(
            loop.optimizer.state[a]["momentum_buffer"], optimizer.state[b]["momentum_buffer"], rtol=2e-6, atol=1e-6
        )


def test_found_inf_summed_over_devices_still_skips():
    p = torch.ones(2, requires_grad=True)
    opt = fastclip.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(2)
    opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(2.0)
    opt.step()
    assert torch.equal(p.detach(), torch.ones(2)) and not opt.state


def test_a_skipped_step_has_an_infinite_norm():
    p = param(2)
    optimizer = fastclip.SGD([p], lr=0.1, max_norm=1.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert optimizer.total_norm.item() == float("inf") and torch.equal(p.detach(), torch.zeros(2))
