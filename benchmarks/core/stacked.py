"""ScaledAdam as icefall batches it, in plain torch: all parameters of a shape in one stack, anew at each step.

A writing of our own by the equations of the paper (https://arxiv.org/abs/2310.11230) and the behaviour of icefall's
zipformer/optim.py; none of its code. The tests compare fastclip with it, and a benchmark times it.
"""

import torch

from fastclip import icefall_states


class StackedScaledAdam:
    """Arguments and defaults are those of `fastclip.ScaledAdam`; one group, and every parameter has a gradient."""

    def __init__(
        self, params, lr=0.03, clipping_scale=None, betas=(0.9, 0.98), scalar_lr_scale=0.1, eps=1e-8,
        param_min_rms=1e-5, param_max_rms=3.0, scalar_max=10.0, size_update_period=4, clipping_update_period=100,
    ):  # fmt: skip
        vars(self).update({name: value for name, value in locals().items() if name != "self"})
        self.batches = [([params[i] for i in places], {}) for places in icefall_states.batches(params)]
        self.count, self.norms, self.threshold, self.clipped = 0, torch.zeros(clipping_update_period), None, 0

    @torch.no_grad()
    def step(self):
        factor = self.clip_factor()
        for params, state in self.batches:
            self.update(params, state, torch.stack([p.grad for p in params]) * factor)
        self.count += 1

    def clip_factor(self):
        if self.clipping_scale is None or self.count == 0:
            return 1.0
        square = 0.0
        for params, state in self.batches:
            grads = torch.stack([p.grad for p in params])
            square += ((grads * (state.get("rms", self.scalar_lr_scale))) ** 2).sum()
        norm, period = square.sqrt(), self.clipping_update_period
        self.norms[self.count % period] = norm
        early = self.count in (10, 20, 40) and self.count < period
        if self.count % period == 0 or early:
            count = self.count if early else period
            median = self.norms.sort()[0][-count:][min(count - 1, count // 4 * 2)]
            self.threshold, self.clipped = self.clipping_scale * median * (2 if early else 1), 0
        if self.threshold is None:
            return 1.0
        factor = min(1.0, (self.threshold / (norm + 1e-20)).item())
        self.clipped += factor < 1
        return factor

    def update(self, params, state, grad):
        stacked = torch.stack(list(params))
        dims, scalars = [*range(1, stacked.dim())], stacked[0].numel() == 1
        lr = self.lr * (self.scalar_lr_scale if scalars else 1)
        beta1, beta2 = self.betas
        v = state.setdefault("v", torch.zeros_like(stacked))
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction = 1 - beta2 ** (self.count + 1)
        change = -lr * grad / ((v / correction if correction < 0.99 else v).sqrt() + self.eps)
        if not scalars:
            change = self.sized(stacked, state, grad, change, dims)
        delta = state.setdefault("delta", torch.zeros_like(stacked))
        delta.mul_(beta1).add_(change, alpha=1 - beta1)
        stacked += delta
        if scalars:
            stacked.clamp_(-self.scalar_max, self.scalar_max)
        for p, new in zip(params, stacked, strict=True):
            p.copy_(new)

    def sized(self, stacked, state, grad, change, dims):
        period, beta2 = self.size_update_period, self.betas[1]
        due = self.count % period == period - 1
        if due or self.count == 0:
            state["rms"] = stacked.square().mean(dim=dims, keepdim=True).sqrt()
        rms = state["rms"]
        derivatives = state.setdefault("derivatives", torch.zeros(period, *rms.shape))
        derivatives[self.count % period] = (stacked * grad).sum(dim=dims, keepdim=True)
        change = change * rms.clamp(min=self.param_min_rms)
        if due and self.count > 0:
            average = state.setdefault("average", torch.zeros_like(rms))
            average.mul_(beta2**period).add_(derivatives.square().mean(dim=0), alpha=1 - beta2**period)
            correction = (1 - beta2 ** (self.count + 1)) ** 0.5
            size = -self.lr * self.scalar_lr_scale * correction * derivatives.sum(dim=0) / (average.sqrt() + self.eps)
            size = size.masked_fill(rms < self.param_min_rms, 0.0).clamp(-0.1, 0.1)
            change = change + stacked * torch.minimum(size, (self.param_max_rms - rms) / rms)
        return change
