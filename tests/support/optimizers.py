"""The table of fastclip's optimizers: a row gives the tests all that they have to know of one."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import lion_pytorch
import torch
from hypothesis import strategies as st

import fastclip


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer of fastclip, and the one that it equals.

    Attributes:
        name: in fastclip, and in torch.optim where torch has it.
        stateful: settings with which it keeps all the state it can.
        variants: settings that together reach each of its terms; `variant` names one in test ids.
        another: other settings, which need no other state.
        changes: settings that may change between two steps, one change after the other.
        moderate: settings under which torch's 16-bit arithmetic does not divide by 0 or overflow.
        drawn: a hypothesis strategy for settings of its own; None where the fuzz has no plain loop to compare with.
        expected: a class that takes the same steps in plain torch; torch's of the same name by default.
        after: the states before a step that is to be differentiated, of a tensor.
        has_state_at_once: whether its constructor makes the states, and not the first step.
        differentiable_once: settings with which torch cannot differentiate through a second step.
    """

    name: str
    stateful: dict
    variants: list
    another: dict
    changes: list
    moderate: dict = dataclasses.field(default_factory=dict)
    drawn: Any = None
    expected: Callable | None = None
    after: Callable = lambda buffer: {}
    has_state_at_once: bool = False
    differentiable_once: tuple = ()

    @property
    def torch(self):
        return self.expected or getattr(torch.optim, self.name)

    @property
    def fastclip(self):
        return getattr(fastclip, self.name)

    @property
    def rule(self):
        return self.fastclip._rule

    @property
    def is_torchs(self):
        return self.expected is None

    @property
    def classes(self):
        return self.torch, self.fastclip

    def keeps_state(self, settings):
        return bool(self.rule.counts_steps or self.rule.states({**self.torch([torch.zeros(1)]).defaults, **settings}))

    def __repr__(self):
        return self.name


def product(**choices):
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def described(settings):
    return " ".join(f"{name}={value}" for name, value in settings.items() if value) or "defaults"


@st.composite
def drawn_sgd(draw):
    momentum = draw(st.sampled_from([0, 0.0, 0.9, 0.5]))
    nesterov = momentum > 0 and draw(st.booleans())
    dampening = 0 if nesterov else draw(st.sampled_from([0, 0.3]))
    return {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}


# Neither beta1 = 0 nor RMSprop's alpha = 0: torch's averages then have 0.0 or -0.0, in the lanes of a vector not as
# behind them.
drawn_betas = st.tuples(st.sampled_from([0.9, 0.5, 0.3, 0.001]), st.sampled_from([0.999, 0.0, 0.5]))
drawn_eps = st.sampled_from([1e-8, 0.0, 1e-3, 1.0])
drawn_adam = st.fixed_dictionaries({"betas": drawn_betas, "eps": drawn_eps, "amsgrad": st.booleans()})

ADAM_VARIANTS = product(
    betas=[(0.9, 0.999), (0.5, 0.4)], amsgrad=[False, True], weight_decay=[0, 0.1], maximize=[False, True]
)
ADAM_CHANGES = [{"betas": (0.5, 0.6)}, {"eps": 0.1}, {"decoupled_weight_decay": True}, {"amsgrad": False}]
ADAM_CHANGES += [{"betas": [0.7, 0.8]}, {"decoupled_weight_decay": False}, {"capturable": False}]


def averages(buffer):
    return {
        "step": torch.tensor(3.0),
        "exp_avg": buffer.clone(),
        "exp_avg_sq": buffer.square() + 1,
        "max_exp_avg_sq": buffer * 0 + 2,
    }


class PlainLion(lion_pytorch.Lion):
    """PyPI's, with the arguments of torch's optimizers."""

    def __init__(self, params, lr=1e-4, *, foreach=None, maximize=False, **settings):
        super().__init__(params, lr, **settings)
        self.maximize = maximize

    def step(self, closure=None):
        grads = [(p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, grad in grads:
            p.grad = -grad if self.maximize else grad
        loss = super().step(closure)
        for p, grad in grads:
            p.grad = grad
        return loss


class PlainNovoGrad(torch.optim.Optimizer):
    """NovoGrad in plain torch, by the equations of NeMo's, with norms in float64."""

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.95, 0.98),
        eps=1e-8,
        weight_decay=0,
        grad_averaging=False,
        *,
        foreach=None,
        maximize=False,
    ):
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {**settings, "grad_averaging": grad_averaging, "amsgrad": False})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(group, p, -p.grad if group["maximize"] else p.grad)

    def update(self, group, p, grad):
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg_sq"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        square = torch.linalg.vector_norm(grad.double()) ** 2
        old = state["exp_avg_sq"].double()
        state["exp_avg_sq"].copy_(square if old == 0 else beta2 * old + (1 - beta2) * square)
        grad = grad / (state["exp_avg_sq"].double().sqrt() + group["eps"]).to(grad.dtype)
        if group["weight_decay"] != 0:
            grad = grad.add(p, alpha=group["weight_decay"])
        if group["grad_averaging"]:
            grad = grad * (1 - beta1)
        state["exp_avg"].mul_(beta1).add_(grad)
        p.add_(state["exp_avg"], alpha=-group["lr"])


CASES = [
    Case(
        "SGD",
        stateful={"lr": 0.1, "momentum": 0.9},
        variants=product(
            momentum=[0, 0.9], dampening=[0, 0.3], nesterov=[False], weight_decay=[0, 0.01], maximize=[False, True]
        )
        + product(momentum=[0.9], nesterov=[True], weight_decay=[0, 0.01], maximize=[False, True]),
        another={"momentum": 0.5},
        changes=[
            {"momentum": 0.5},
            {"momentum": 0},
            {"momentum": 0.9, "dampening": 0.2},
            {"dampening": 0, "nesterov": True},
        ],
        drawn=drawn_sgd(),
        after=lambda buffer: {"momentum_buffer": buffer.clone()},
    ),
    Case(
        "Adam",
        stateful={"lr": 0.1, "amsgrad": True},
        variants=ADAM_VARIANTS,
        another={"betas": (0.5, 0.6)},
        changes=ADAM_CHANGES,
        moderate={"eps": 0.1},
        drawn=drawn_adam,
        after=averages,
        differentiable_once=("amsgrad",),
    ),
    Case(
        "AdamW",
        stateful={"lr": 0.1, "amsgrad": True},
        variants=ADAM_VARIANTS,
        another={"betas": (0.6, 0.7)},
        changes=ADAM_CHANGES,
        moderate={"eps": 0.1},
        drawn=drawn_adam,
        after=averages,
        differentiable_once=("amsgrad",),
    ),
    Case(
        "Lion",
        stateful={"lr": 0.1},
        variants=product(betas=[(0.9, 0.99), (0.5, 0.4)], weight_decay=[0, 0.1]) + [{"maximize": True}],
        another={"betas": (0.6, 0.7)},
        changes=[{"betas": (0.5, 0.6)}],
        expected=PlainLion,
    ),
    Case(
        "Adadelta",
        stateful={"lr": 1.0},
        variants=product(rho=[0.9, 0.5], weight_decay=[0, 0.1], maximize=[False, True]),
        another={"rho": 0.5},
        changes=[{"rho": 0.6}, {"eps": 0.1}, {"capturable": False}],
        moderate={"eps": 0.1},
        drawn=st.fixed_dictionaries(
            {"rho": st.sampled_from([0.9, 0.5, 0.0]), "eps": st.sampled_from([1e-6, 1e-3, 1.0])}
        ),
        after=lambda buffer: {
            "step": torch.tensor(3.0),
            "square_avg": buffer.square() + 1,
            "acc_delta": buffer.square() + 2,
        },
    ),
    Case(
        "Adagrad",
        stateful={"lr": 0.1},
        variants=product(
            lr_decay=[0, 0.1], initial_accumulator_value=[0, 0.5], weight_decay=[0, 0.1], maximize=[False, True]
        ),
        another={"lr_decay": 0.2},
        changes=[{"lr_decay": 0.3}, {"eps": 0.1}],
        moderate={"eps": 0.1},
        drawn=st.fixed_dictionaries(
            {
                "lr_decay": st.sampled_from([0, 0.1]),
                "eps": drawn_eps,
                "initial_accumulator_value": st.sampled_from([0, 0.5]),
            }
        ),
        after=lambda buffer: {"step": torch.tensor(3.0), "sum": buffer.square() + 1},
        has_state_at_once=True,
    ),
    Case(
        "NAdam",
        stateful={"lr": 0.1},
        variants=product(
            betas=[(0.9, 0.999), (0.5, 0.4)],
            weight_decay=[0, 0.1],
            decoupled_weight_decay=[False, True],
            momentum_decay=[4e-3, 0.3],
        )
        + [{"maximize": True}],
        another={"betas": (0.6, 0.7), "momentum_decay": 0.1},
        changes=[{"betas": (0.5, 0.6)}, {"momentum_decay": 0.2}, {"eps": 0.1}, {"decoupled_weight_decay": True}],
        moderate={"eps": 0.1},
        drawn=st.fixed_dictionaries(
            {
                "betas": drawn_betas,
                "eps": drawn_eps,
                "momentum_decay": st.sampled_from([4e-3, 0.1]),
                "decoupled_weight_decay": st.booleans(),
            }
        ),
        after=lambda buffer: {
            "step": torch.tensor(3.0),
            "mu_product": torch.tensor(0.5),
            "exp_avg": buffer.clone(),
            "exp_avg_sq": buffer.square() + 1,
        },
    ),
    Case(
        "RAdam",
        stateful={"lr": 0.1},
        variants=product(betas=[(0.9, 0.999), (0.5, 0.4)], weight_decay=[0, 0.1], decoupled_weight_decay=[False, True])
        + [{"maximize": True}],
        another={"betas": (0.6, 0.7)},
        changes=[{"betas": (0.5, 0.6)}, {"eps": 0.1}, {"decoupled_weight_decay": True}, {"betas": (0.9, 0.999)}],
        moderate={"eps": 0.1},
        drawn=st.fixed_dictionaries({"betas": drawn_betas, "eps": drawn_eps, "decoupled_weight_decay": st.booleans()}),
        after=lambda buffer: {
            "step": torch.tensor(7.0),
            "exp_avg": buffer.clone(),
            "exp_avg_sq": buffer.square() + 1,
        },
    ),
    Case(
        "RMSprop",
        stateful={"lr": 0.1, "momentum": 0.9, "centered": True},
        variants=product(
            alpha=[0.9], momentum=[0, 0.5], centered=[False, True], weight_decay=[0, 0.1], maximize=[False, True]
        ),
        another={"alpha": 0.5},
        changes=[{"alpha": 0.6}, {"eps": 0.1}, {"momentum": 0}, {"capturable": False}],
        moderate={"eps": 0.1},
        drawn=st.fixed_dictionaries(
            {
                "alpha": st.sampled_from([0.99, 0.5, 0.001]),
                "eps": drawn_eps,
                "momentum": st.sampled_from([0, 0.9]),
                "centered": st.booleans(),
            }
        ),
        after=lambda buffer: {
            "step": torch.tensor(3.0),
            "square_avg": buffer.square() + 1,
            "momentum_buffer": buffer.clone(),
            "grad_avg": buffer * 0.1,
        },
        differentiable_once=("centered", "momentum"),
    ),
    Case(
        "NovoGrad",
        stateful={"lr": 0.1},
        variants=product(betas=[(0.95, 0.98), (0.8, 0.25)], grad_averaging=[False, True], weight_decay=[0, 0.1])
        + [{"maximize": True}],
        another={"betas": (0.6, 0.7)},
        changes=[{"betas": (0.5, 0.6)}, {"eps": 0.1}, {"grad_averaging": True}],
        moderate={"eps": 0.1},
        expected=PlainNovoGrad,
    ),
]
OPTIMIZERS = {case.name: case for case in CASES}
