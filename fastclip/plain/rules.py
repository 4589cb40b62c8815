"""The table of rules: what csrc/rules says of each, and how plain torch updates one parameter by it.

torch's own code does the update where torch has the optimizer.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.optim.adadelta import adadelta
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.nadam import nadam
from torch.optim.radam import radam
from torch.optim.rmsprop import rmsprop
from torch.optim.sgd import sgd


class Rule(NamedTuple):
    """One row.

    Attributes:
        name: as in csrc/rules.
        title: of the optimizer, in messages.
        update: update(group, param, grad, states, step) changes `param`, a tensor in the type it is computed in, and
            `states`, a dict of its state tensors in such types, by `grad`, which is clipped. It counts up `step`
            where `counts_steps`.
        arrays: the names of all state tensors of a parameter's shape.
        states: states(group) are those of them that a group has.
        scalar: the name of a number that is kept of each parameter, and its first value; or None.
        length_of_row: length_of_row(group) is how many such numbers there are, in one tensor.
        counts_steps: whether torch keeps `step`.
        momentum: the state that `momentum_dtype` is about, or None.
        filled_by_first_step: the first step makes the states of the gradient; else they begin as `new_value(group)`.
        numbers: the settings that are numbers, besides those that all rules have.
        change: change(group) is the change that a gradient of norm 1 makes in the end, in this step and in later ones;
            None if that is no multiple of it.
        needs_norm: `states["grad_norm"]` is the norm of the gradient, over all ranks, a float64 tensor.
        weight: weight(group, param, scalar) is that of a parameter's norm in the clip that the rule has of its own, see
            `weighted_clip.py`; None if it has none.
        delta: delta(group, param, grad, states, step) returns what an update adds to `param`, which it leaves alone,
            and the gradient over the root of its average square; it brings `states` and `step` on as `update` does.
            None if that can't be limited.
        quantizes_states: `state_bits` may be 8, see `quantized.py`.
        is_scaled: is_scaled(group) is whether what is added becomes as large as the parameter.
        takes_sparse, takes_nested, takes_complex: kinds of gradients.
    """

    name: str
    title: str
    update: Callable
    arrays: tuple[str, ...]
    states: Callable
    scalar: tuple[str, float] | None = None
    length_of_row: Callable = lambda group: 1
    counts_steps: bool = True
    momentum: str | None = None
    filled_by_first_step: bool = False
    new_value: Callable = lambda group: 0.0
    numbers: tuple[str, ...] = ()
    change: Callable | None = None
    needs_norm: bool = False
    weight: Callable | None = None
    delta: Callable | None = None
    is_scaled: Callable = lambda group: False
    quantizes_states: bool = False
    takes_sparse: bool = False
    takes_nested: bool = False
    takes_complex: bool = True

    def needs_whole(self, group):
        """Returns whether a piece of a parameter is updated by other numbers than the parameter is."""
        return self.needs_norm or self.is_scaled(group)

    @property
    def number_states(self):
        """The names of the states that are single numbers."""
        return ("step",) if self.scalar is None else ("step", self.scalar[0])


def picked(group, *names):
    return {name: group[name] for name in names}


def call(function, group, param, grad, states, *settings, **others):
    """Calls one of torch's functional optimizers for one parameter, by the group's `settings`. A state may be None: one
    that the group does not have."""
    lists = [[] if state is None else [state] for state in states]
    own = picked(group, "lr", "weight_decay", "eps", "maximize", "differentiable", *settings)
    function([param], [grad], *lists, foreach=False, has_complex=param.is_complex(), **own, **others)


def betas_of(group):
    return {"beta1": group["betas"][0], "beta2": group["betas"][1]}


def update_sgd(group, param, grad, states, step):
    if isinstance(group["weight_decay"], torch.Tensor) and group["weight_decay"].requires_grad:
        grad = grad.clone()  # torch then adds the decay in place
    buffers = [states.get("momentum_buffer")]
    sgd(
        [param],
        [grad],
        buffers,
        has_sparse_grad=grad.is_sparse,
        foreach=False,
        fused=False,
        **picked(group, "weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize"),
    )
    if "momentum_buffer" in states:
        states["momentum_buffer"] = buffers[0]


def update_adam(group, param, grad, states, step):
    tensors = [states["exp_avg"], states["exp_avg_sq"], states.get("max_exp_avg_sq"), step]
    settings = ("amsgrad", "decoupled_weight_decay")
    call(adam, group, param, grad, tensors, *settings, fused=False, capturable=False, **betas_of(group))


def delta_of_adam(group, param, grad, states, step):
    """Lets torch update zeros. A decay that is added to the gradient is added here, as it needs the parameter."""
    grad = -grad if group["maximize"] else grad
    if group["weight_decay"] != 0 and not group["decoupled_weight_decay"]:
        grad = grad.add(param, alpha=group["weight_decay"])
    added = torch.zeros_like(param)
    update_adam({**group, "weight_decay": 0, "maximize": False}, added, grad, states, step)
    return added, relative(group, grad, states, 1 - group["betas"][1] ** float(step))


def relative(group, grad, states, correction):
    """Returns a gradient over the root of its average square, `correction` being that of the average."""
    square = states["exp_avg_sq"]
    if grad.is_complex():
        grad, square = torch.view_as_real(grad), torch.view_as_real(square)
    return grad / (square.sqrt() / correction**0.5).clamp(min=group["eps"])


def delta_of_lamb(group, param, grad, states, step):
    (beta1, beta2), decay, lr = group["betas"], group["weight_decay"], group["lr"]
    exp_avg, exp_avg_sq = states["exp_avg"], states["exp_avg_sq"]
    grad = -grad if group["maximize"] else grad
    step += 1
    count = float(step)
    corrections = (1 - beta1**count, 1 - beta2**count) if group["bias_correction"] else (1.0, 1.0)
    if decay != 0 and not group["adam_w_mode"]:
        grad = grad.add(param, alpha=decay)
    exp_avg.mul_(beta1).add_(grad * (1 - beta1 if group["grad_averaging"] else 1.0))
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(corrections[1] ** 0.5).add_(group["eps"])
    direction = exp_avg * (1 / corrections[0]) / denominator
    if decay != 0 and group["adam_w_mode"]:
        direction = direction.add(param, alpha=decay)
    return direction * -lr, relative(group, grad, states, corrections[1])


def update_lamb(group, param, grad, states, step):
    param.add_(delta_of_lamb(group, param, grad, states, step)[0])


def update_lion(group, param, grad, states, step):
    beta1, beta2 = group["betas"]
    grad = -grad if group["maximize"] else grad
    exp_avg = states["exp_avg"]
    param.mul_(1 - group["lr"] * group["weight_decay"])
    param.add_(exp_avg.mul(beta1).add_(grad, alpha=1 - beta1).sign_(), alpha=-group["lr"])
    exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)


def update_novograd(group, param, grad, states, step):
    beta1, beta2 = group["betas"]
    grad = -grad if group["maximize"] else grad
    average, square = states["exp_avg_sq"], states["grad_norm"].square()
    if not square.is_meta:
        known = average.double()
        average.copy_(torch.where(known == 0, square, beta2 * known + (1 - beta2) * square))
    step += 1
    grad = grad / (average.double().reshape(()).sqrt() + group["eps"]).to(grad.dtype)
    if group["weight_decay"] != 0:
        grad = grad.add(param, alpha=group["weight_decay"])
    weight = 1 - beta1 if group["grad_averaging"] else 1.0
    states["exp_avg"].mul_(beta1).add_(grad * weight)
    param.add_(states["exp_avg"], alpha=-group["lr"])


def update_scaled_adam(group, param, grad, states, step):
    (beta1, beta2), eps, lr = group["betas"], group["eps"], group["lr"]
    delta, exp_avg_sq, row = states["delta"], states["exp_avg_sq"], states["sizes"]
    grad = -grad if group["maximize"] else grad
    is_scalar, size_step = param.numel() == 1, 0.0
    if is_scalar:
        lr, scale = lr * group["scalar_lr_scale"], 1.0
    elif not row.is_meta:
        size, size_step = sizes_after_step(group, param, grad, row, int(step))
        scale = max(size, group["param_min_rms"])
    step += 1
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    correction = 1 - beta2 ** float(step)
    square = exp_avg_sq * (1 / correction) if correction < 0.99 else exp_avg_sq
    change = -lr * grad / square.sqrt().add_(eps) * scale
    if size_step != 0:
        change = change.add(param, alpha=size_step)
    delta.mul_(beta1).add_(change, alpha=1 - beta1)
    param.add_(delta)
    if is_scalar:
        param.clamp_(-group["scalar_max"], group["scalar_max"])


def sizes_after_step(group, param, grad, row, step):
    """Brings the row of ScaledAdam's numbers to the end of a step, counted from 0: [size of the parameter, average of
    squared derivatives by it, derivatives of the last steps]. Returns the size, and its relative change."""
    period, numel = int(group["size_update_period"]), param.numel()
    is_due = step % period == period - 1
    if step == 0 or is_due:
        row[0] = (param.double().square().sum() / max(numel, 1)).sqrt()
    row[2 + step % period] = (param.double() * grad.double()).sum()
    size = row[0].item()
    if not is_due or step == 0:
        return size, 0.0
    derivatives = row[2:].double()
    decay = group["betas"][1] ** period
    average = row[1].item() * decay + derivatives.square().sum().item() / period * (1 - decay)
    row[1] = average
    if size < group["param_min_rms"]:
        return size, 0.0
    correction = 1 - group["betas"][1] ** (step + 1)
    size_lr = group["lr"] * group["scalar_lr_scale"]
    change = -size_lr * correction**0.5 * derivatives.sum().item() / (average**0.5 + group["eps"])
    return size, min(max(min(change, 0.1), -0.1), (group["param_max_rms"] - size) / size)


def weight_in_scaled_adam(group, param, size):
    return group["scalar_lr_scale"] if param.numel() == 1 else size


def update_adadelta(group, param, grad, states, step):
    tensors = [states["square_avg"], states["acc_delta"], step]
    call(adadelta, group, param, grad, tensors, "rho", capturable=False)


def update_adagrad(group, param, grad, states, step):
    tensors = [states["sum"], step]
    call(adagrad, group, param, grad, tensors, "lr_decay", fused=False, has_sparse_grad=grad.is_sparse)


def update_nadam(group, param, grad, states, step):
    tensors = [states["exp_avg"], states["exp_avg_sq"], states["mu_product"], step]
    settings = ("momentum_decay", "decoupled_weight_decay")
    call(nadam, group, param, grad, tensors, *settings, capturable=False, **betas_of(group))


def update_radam(group, param, grad, states, step):
    tensors = [states["exp_avg"], states["exp_avg_sq"], step]
    call(radam, group, param, grad, tensors, "decoupled_weight_decay", capturable=False, **betas_of(group))


def update_rmsprop(group, param, grad, states, step):
    tensors = [states["square_avg"], states.get("grad_avg"), states.get("momentum_buffer"), step]
    call(rmsprop, group, param, grad, tensors, "alpha", "momentum", "centered", capturable=False)


def change_by_sgd(group):
    """A buffer hands a gradient on, each time times the momentum: the parts add up to 1 / (1 - momentum)."""
    lr, momentum = group["lr"], group["momentum"]
    return abs(lr * (1 - group["dampening"]) / (1 - momentum) if momentum != 0 else lr)


SGD = Rule(
    "sgd",
    "SGD",
    update_sgd,
    arrays=("momentum_buffer",),
    states=lambda group: ("momentum_buffer",) if group["momentum"] != 0 else (),
    counts_steps=False,
    momentum="momentum_buffer",
    filled_by_first_step=True,
    numbers=("momentum", "dampening"),
    change=change_by_sgd,
    quantizes_states=True,
    takes_sparse=True,
    takes_nested=True,
)
ADAM = Rule(
    "adam",
    "Adam",
    update_adam,
    arrays=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    states=lambda group: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2],
    momentum="exp_avg",
    numbers=("betas", "eps", "max_update_rms"),
    delta=delta_of_adam,
    quantizes_states=True,
)
LAMB = Rule(
    "lamb",
    "LAMB",
    update_lamb,
    arrays=("exp_avg", "exp_avg_sq"),
    states=lambda group: ("exp_avg", "exp_avg_sq"),
    momentum="exp_avg",
    numbers=("betas", "eps", "max_update_rms"),
    delta=delta_of_lamb,
    is_scaled=lambda group: bool(group.get("use_nvlamb")) or group.get("weight_decay", 0) != 0,
    takes_complex=False,
)
LION = Rule(
    "lion",
    "Lion",
    update_lion,
    arrays=("exp_avg",),
    states=lambda group: ("exp_avg",),
    counts_steps=False,
    momentum="exp_avg",
    numbers=("betas",),
    quantizes_states=True,
    takes_complex=False,
)
NOVOGRAD = Rule(
    "novograd",
    "NovoGrad",
    update_novograd,
    arrays=("exp_avg",),
    states=lambda group: ("exp_avg",),
    scalar=("exp_avg_sq", 0.0),
    momentum="exp_avg",
    numbers=("betas", "eps"),
    needs_norm=True,
    takes_complex=False,
)
SCALED_ADAM = Rule(
    "scaled_adam",
    "ScaledAdam",
    update_scaled_adam,
    arrays=("delta", "exp_avg_sq"),
    states=lambda group: ("delta", "exp_avg_sq"),
    scalar=("sizes", 0.0),
    length_of_row=lambda group: 2 + int(group["size_update_period"]),
    momentum="delta",
    numbers=(
        "betas",
        "eps",
        "scalar_lr_scale",
        "param_min_rms",
        "param_max_rms",
        "scalar_max",
        "size_update_period",
        "clipping_scale",
        "clipping_update_period",
    ),
    needs_norm=True,
    weight=weight_in_scaled_adam,
    takes_complex=False,
)
ADADELTA = Rule(
    "adadelta",
    "Adadelta",
    update_adadelta,
    arrays=("square_avg", "acc_delta"),
    states=lambda group: ("square_avg", "acc_delta"),
    numbers=("rho", "eps"),
)
ADAGRAD = Rule(
    "adagrad",
    "Adagrad",
    update_adagrad,
    arrays=("sum",),
    states=lambda group: ("sum",),
    new_value=lambda group: group["initial_accumulator_value"],
    numbers=("lr_decay", "eps", "initial_accumulator_value"),
    takes_sparse=True,
)
NADAM = Rule(
    "nadam",
    "NAdam",
    update_nadam,
    arrays=("exp_avg", "exp_avg_sq"),
    states=lambda group: ("exp_avg", "exp_avg_sq"),
    scalar=("mu_product", 1.0),
    momentum="exp_avg",
    numbers=("betas", "eps", "momentum_decay"),
)
RADAM = Rule(
    "radam",
    "RAdam",
    update_radam,
    arrays=("exp_avg", "exp_avg_sq"),
    states=lambda group: ("exp_avg", "exp_avg_sq"),
    momentum="exp_avg",
    numbers=("betas", "eps"),
)
RMSPROP = Rule(
    "rmsprop",
    "RMSprop",
    update_rmsprop,
    arrays=("square_avg", "momentum_buffer", "grad_avg"),
    states=lambda group: (
        "square_avg",
        *(["momentum_buffer"] if group["momentum"] > 0 else []),
        *(["grad_avg"] if group["centered"] else []),
    ),
    momentum="momentum_buffer",
    numbers=("alpha", "eps", "momentum"),
)

RULES = (SGD, ADAM, LION, ADADELTA, ADAGRAD, NADAM, RADAM, RMSPROP, NOVOGRAD, SCALED_ADAM, LAMB)
