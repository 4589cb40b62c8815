"""Gradient scalers whose verdict is their own, with an overflow on rank 1: it holds, as for torch.optim.SGD."""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import fastclip

from .compare import assert_same_on_all_ranks, on_ranks, place

STEPS, OVERFLOWS, SCALE = 5, (0, 3), 8.0
RULE = {"lr": 0.1, "momentum": 0.9}


def any_rank(found_inf):
    found_inf = found_inf.clone()
    dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
    return found_inf


class NeMo(torch.amp.GradScaler):
    """In the shape of NeMo's and of Megatron's in apex: the ranks agree where the step is taken, and on the scale."""

    def _maybe_opt_step(self, optimizer, optimizer_state, *args, **kwargs):
        found_inf = torch.stack(tuple(optimizer_state["found_inf_per_device"].values())).sum()
        return None if any_rank(found_inf).item() else optimizer.step(*args, **kwargs)

    def update(self, new_scale=None):
        for state in self._per_optimizer_states.values():
            found = state["found_inf_per_device"]
            found.update({device: any_rank(found_inf) for device, found_inf in found.items()})
        super().update(new_scale)


class Unscales(torch.amp.GradScaler):
    """Asks the other ranks in `unscale_`, as FSDP's does."""

    def unscale_(self, optimizer):
        super().unscale_(optimizer)
        found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        found.update({device: any_rank(found_inf) for device, found_inf in found.items()})


class UnscalesGradients(torch.amp.GradScaler):
    """And in the method below that; divides by twice the scale, to see whose gradients are stepped on."""

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        found = super()._unscale_grads_(optimizer, inv_scale / 2, found_inf, allow_fp16)
        return {device: any_rank(found_inf) for device, found_inf in found.items()}


class Steps(NeMo):
    """A `step` of its own that never asks the optimizer."""

    def step(self, optimizer, *args, **kwargs):
        self.unscale_(optimizer)
        return self._maybe_opt_step(optimizer, self._per_optimizer_states[id(optimizer)], *args, **kwargs)


class Duck:
    """No GradScaler, but one that asks the optimizer as torch's does."""

    def __init__(self, *_, init_scale, **__):
        self._scale, self._found = init_scale, None

    def scale(self, loss):
        return loss * self._scale

    def unscale_(self, optimizer):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self._found = any_rank(torch.stack([(~g.isfinite()).any() for g in grads]).any().float())
        torch._foreach_div_(grads, self._scale)

    def step(self, optimizer):
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            raise AssertionError("this scaler has nothing to hand over")
        if self._found is None:
            self.unscale_(optimizer)
        if not self._found:
            optimizer.step()

    def update(self):
        self._scale, self._found = self._scale * (0.5 if self._found else 1), None

    def get_scale(self):
        return self._scale


def train(make_scaler, make_optimizer, unscale, make_model):
    """The scales after each step, and the parameters; each rank has its own batches."""
    torch.manual_seed(5)
    model = make_model(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(place.device_type))
    optimizer = make_optimizer(model.parameters())
    scaler, scales = make_scaler(place.device_type, init_scale=SCALE, growth_interval=2), []
    for step in range(STEPS):
        torch.manual_seed(10 * step + dist.get_rank())
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 6, device=place.device_type)).square().sum()).backward()
        if step in OVERFLOWS and dist.get_rank() == 1:
            grads = [p.grad for p in model.parameters() if p.grad is not None and p.grad.numel()]
            grads[-1].view(-1)[-1] = math.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, [p.detach().clone() for p in model.parameters()], optimizer


def assert_verdicts_hold(make_scaler, make_model):
    for unscale in (False, True):
        expected, plain, _ = train(
            make_scaler, lambda ps: torch.optim.SGD(ps, foreach=False, **RULE), unscale, make_model
        )
        assert len(set(expected)) > 1 and expected[0] == SCALE / 2, expected
        for settings in ({}, {"fused": True}):
            scales, params, optimizer = train(
                make_scaler, lambda ps, own=settings: fastclip.SGD(ps, **RULE, **own), unscale, make_model
            )
            assert scales == expected, (unscale, scales, expected)
            assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True)), unscale
            assert_same_on_all_ranks(torch.tensor(scales[-1]))
            assert optimizer.skipped_steps.item() == 0  # as no step was called


@on_ranks(2)
def the_scaler_of_fully_sharded_data_parallel():
    def shard(model):
        return FullyShardedDataParallel(model, device_id=torch.device(place.device_type))

    assert_verdicts_hold(ShardedGradScaler, shard)


@on_ranks(2)
def scalers_with_methods_of_their_own():
    for scaler in (NeMo, Unscales, UnscalesGradients, Steps, Duck):
        if scaler is Steps:
            expected, plain, _ = train(scaler, lambda ps: torch.optim.SGD(ps, **RULE), False, averaged)
            scales, params, _ = train(scaler, lambda ps: fastclip.SGD(ps, **RULE), False, averaged)
            assert scales == expected and all(map(torch.equal, params, plain))
        else:
            assert_verdicts_hold(scaler, averaged)


def averaged(model):
    return model
