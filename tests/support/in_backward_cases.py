"""A model with all that is hard about steps in the backward pass, and optimizers that step it both ways."""

from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

import fastclip

from .cases import CLIPS, assert_same_bits, exact_square_roots

SOME_KIB = 2e-3  # MiB: a few of Net's parameters


class Net(torch.nn.Module):
    """With a tied weight, a layer that is used twice, and one that not every pass uses."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 16)
        self.twice = torch.nn.Linear(16, 16)
        self.norm = torch.nn.LayerNorm(16)
        self.sometimes = torch.nn.Linear(16, 16)
        self.out = torch.nn.Linear(16, 7)
        self.out.weight = self.embed.weight

    def forward(self, x, sometimes=True, checkpointed=False):
        h = self.embed(x)
        h = checkpoint(self.body, h, use_reentrant=False) if checkpointed else self.body(h)
        return self.out(self.sometimes(h) if sometimes else h)

    def body(self, h):
        return self.norm(self.twice(torch.tanh(self.twice(h))))


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def groups(model, **second):
    return [
        {"params": [*model.embed.parameters(), *model.twice.parameters()]},
        {"params": [*model.norm.parameters(), *model.sometimes.parameters(), model.out.bias], "lr": 0.03, **second},
    ]


def losses(count):
    """Functions of a model: each a loss on data of its own."""
    return [
        partial(loss_of, *torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(i))) for i in range(count)
    ]


def loss_of(x, y, model, **how):
    return 3 * torch.nn.functional.cross_entropy(model(x, **how), y)


def three(clip, bucket_cap_mb=SOME_KIB, dtype=torch.float64, optimizer="SGD", **rule):
    """(model, optimizer) of plain torch, of ordinary steps and of steps in the backward pass; what does the last."""
    models = [net(dtype) for _ in range(3)]
    own = {"clip_value": 0.01} if clip != "none" else {}
    ours_of, theirs_of = getattr(fastclip, optimizer), getattr(torch.optim, optimizer)
    optimizers = [theirs_of(groups(models[0]), lr=0.1, foreach=False, **rule)]
    optimizers += [ours_of(groups(m, **own), lr=0.1, **CLIPS[clip], **rule) for m in models[1:]]
    in_backward = fastclip.step_in_backward(models[2], optimizers[2], bucket_cap_mb=bucket_cap_mb)
    return [*zip(models, optimizers, strict=True)], in_backward


def take_ordinary_step(model, optimizer, of=None):
    """Clips as the groups of `of` say, steps, and forgets the gradients."""
    for group, clips in zip(optimizer.param_groups, of.param_groups if of else [], strict=of is not None):
        for p in group["params"]:
            if p.grad is not None and clips["clip_value"] is not None:
                bounds = clips["clip_value"]
                p.grad.clamp_(*(bounds if isinstance(bounds, tuple) else (-bounds, bounds)))
    with exact_square_roots():
        optimizer.step()
    optimizer.zero_grad()


def assert_same(first, second):
    assert_same_bits(first[0].parameters(), second[0].parameters(), first[1], second[1])


def pair(bucket_cap_mb=SOME_KIB, **settings):
    """(model, optimizer) of ordinary steps and of steps in the backward pass; what does the latter."""
    settings = {"lr": 0.1, "momentum": 0.9, "clip_value": 0.05, **settings}
    models = [net(), net()]
    optimizers = [fastclip.SGD(groups(m), **settings) for m in models]
    in_backward = fastclip.step_in_backward(models[1], optimizers[1], bucket_cap_mb=bucket_cap_mb)
    return [*zip(models, optimizers, strict=True)], in_backward
