"""Random optimizers and random steps, for the property tests.

A `Scenario` says all of it in small values that hypothesis can print and shrink; `playback.check` plays one. Most are
simple: each of the odder things is drawn `rarely`.
"""

import dataclasses
import math
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import fastclip

from . import surroundings
from .optimizers import OPTIMIZERS
from .surroundings import Around
from .tensors import Layout

# "test" is the same in every run; "fuzz" (make fuzz) draws others, from a seed that it prints. No deadlines: a machine
# may be busy.
COMMON = {"deadline": None, "print_blob": False, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("test", max_examples=300, derandomize=True, database=None, **COMMON)
settings.register_profile("fuzz", max_examples=10_000, database=None, **COMMON)

WIDE, SIXTEEN_BIT = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)
SPECIAL = [0.0, -0.0, 1e-40, 1e-45, 3e38, 65504.0]
NONFINITE = [math.inf, -math.inf, math.nan]


@dataclasses.dataclass(frozen=True)
class Param:
    shape: tuple
    dtype: torch.dtype
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Group:
    params: tuple
    settings: dict
    twice: int | None = None  # the one of its parameters that it is given twice
    together: bool = False  # parameters are views of one tensor, and their gradients of another


@dataclasses.dataclass(frozen=True)
class Step:
    """One step, and what happens before it. `missing`, `layouts`: by the parameter's place over all groups."""

    seed: int
    scale: float
    before: tuple = ()  # ("add", Group) | ("set", group, {...}) | ... : a method of `Sides`, and its arguments
    missing: frozenset = frozenset()
    layouts: Any = None  # {place: Layout} where it is not the parameter's
    special: Any = None  # (place, value)
    scaled: bool = False  # through the scenario's gradient scaler, if it has one
    unscale: bool = False  # which is told to unscale_ before
    verdict: str | None = None  # of a scaler that decides itself


@dataclasses.dataclass(frozen=True)
class Scenario:
    optimizer: str  # in the table of optimizers
    groups: tuple
    shared: dict  # max_norm, norm_type, skip_nonfinite
    steps: tuple
    around: Around = Around()


# ---- drawing -----------------------------------------------------------------------------------


def rarely(draw, one_in=8):
    return draw(st.integers(0, one_in - 1)) == one_in - 1


shapes = st.one_of(
    st.lists(st.integers(1, 5), max_size=4).map(tuple),
    st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple),
    st.sampled_from([(15,), (16,), (17,), (64,), (65,), (8, 33), (2, 4, 3, 3), (4095,), (4096,), (4097,), (3, 1500)]),
)
dtypes = st.sampled_from([*WIDE, torch.float32, *SIXTEEN_BIT])
thresholds = st.sampled_from([0.0, 1e-3, 0.1, 0.5, 2.0, 1e4, math.inf]) | st.floats(1e-6, 10)
clip_values = st.one_of(
    st.none(), thresholds, st.tuples(st.floats(-2, 2), st.floats(-2, 2)).map(lambda pair: tuple(sorted(pair)))
)


@st.composite
def layouts(draw, shape, of_gradient=False):
    order = draw(st.permutations(range(len(shape)))) if len(shape) > 1 and draw(st.booleans()) else ()
    expanded = of_gradient and len(shape) > 0 and shape[0] > 1 and draw(st.integers(0, 3)) == 0
    return Layout(tuple(order), draw(st.sampled_from([1, 1, 1, 2])), draw(st.integers(0, 5)), expanded)


@st.composite
def params(draw):
    shape = draw(shapes)
    # Mostly layouts that the kernels take.
    layout = draw(st.just(Layout()) | st.builds(Layout, offset=st.integers(0, 5)) | layouts(shape))
    return Param(shape, draw(dtypes), layout)


sixteen = st.sampled_from(SIXTEEN_BIT)
roundings = st.one_of(
    st.just({"master_weights": True}),
    st.builds(lambda seed: {"stochastic_rounding": True, "rounding_seed": seed}, st.integers(0, 2**32 - 1)),
    st.builds(lambda dtype: {"momentum_dtype": dtype}, st.sampled_from([torch.float32, *SIXTEEN_BIT])),
    st.builds(lambda dtype: {"master_weights": True, "momentum_dtype": dtype}, sixteen),
    st.builds(lambda dtype: {"stochastic_rounding": True, "momentum_dtype": dtype}, sixteen),
)


@st.composite
def own_settings(draw, optimizer):
    """The settings of one group."""
    return {
        "lr": draw(st.sampled_from([0.1, 1.0, 0.0, 1e-3])),
        **draw(OPTIMIZERS[optimizer].drawn),
        "weight_decay": draw(st.sampled_from([0, 0.0, 0.01])),
        "maximize": draw(st.booleans()),
        "clip_value": draw(clip_values),
    }


@st.composite
def groups(draw, optimizer):
    tensors = draw(st.lists(params(), min_size=1, max_size=4))
    settings = draw(own_settings(optimizer))
    if rarely(draw):
        of_rule = {} if getattr(fastclip, optimizer)._rule.momentum else {"momentum_dtype": None}  # refuses others
        settings |= draw(roundings) | of_rule
    twice = draw(st.integers(0, len(tensors) - 1)) if rarely(draw, 16) else None
    together = rarely(draw, 16)
    if together:
        tensors = [dataclasses.replace(p, dtype=tensors[0].dtype, layout=Layout()) for p in tensors]
    return Group(tuple(tensors), settings, twice, together)


@st.composite
def events(draw, optimizer, now):
    """What happens before a step to the groups there are `now`, a list that it changes."""
    kind = draw(st.sampled_from(["set", "set", "reload", "reload", "freeze", "add", "cast", "note"]))
    places = st.integers(0, sum(len(g.params) for g in now) - 1)
    if kind == "add":
        now.append(draw(groups(optimizer)))
        return kind, now[-1]
    if kind == "reload":
        how = draw(st.sampled_from(["itself", "fresh", "file", "torch"]))
        hook = draw(st.just("renamed") | st.tuples(st.just("reset"), places)) if rarely(draw, 2) else None
        return kind, how, hook
    if kind in ("freeze", "note"):
        return kind, draw(places)
    if kind == "cast":
        return kind, draw(places), draw(st.integers(0, 2)), draw(st.sampled_from([*WIDE, *SIXTEEN_BIT]))
    changed = draw(own_settings(optimizer))
    # torch does not make a state that a later setting asks for.
    own = sorted(changed.keys() & {"betas", "eps", "rho", "alpha", "lr_decay", "momentum_decay"})
    names = draw(st.sets(st.sampled_from(["lr", "weight_decay", "maximize", "clip_value", *own]), min_size=1))
    return kind, draw(st.integers(0, len(now) - 1)), {name: changed[name] for name in sorted(names)}


@st.composite
def surrounded(draw):
    def one_of(names, plain=None):
        return draw(st.sampled_from([name for name in names if name != plain])) if rarely(draw) else plain

    step = one_of(surroundings.STEPS, "plain")
    return Around(
        step,
        one_of(surroundings.NUMBERS, "plain"),
        one_of(surroundings.PARAMS, "tensors"),
        one_of([*surroundings.SCALERS, "torch's"]),
        hooks=rarely(draw, 8 if step == "plain" else 2),
        profiled=rarely(draw, 16),
        flush=rarely(draw),
    )


@st.composite
def scenarios(draw):
    optimizer = draw(st.sampled_from([name for name, case in OPTIMIZERS.items() if case.drawn is not None]))
    now = draw(st.lists(groups(optimizer), min_size=1, max_size=3))
    first = tuple(now)
    max_norm = draw(st.none() | thresholds)
    shared = {"max_norm": max_norm, "skip_nonfinite": draw(st.booleans())}
    shared["norm_type"] = draw(st.sampled_from([2.0, 2, math.inf, "inf"]))
    around = draw(surrounded())
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        before = tuple(draw(st.lists(events(optimizer, now), max_size=1)))
        tensors = [param for group in now for param in group.params]
        places = st.integers(0, len(tensors) - 1)
        elsewhere = draw(st.none() | places)
        scaled = around.scaler is not None and not rarely(draw, 4)
        steps.append(
            Step(
                draw(st.integers(0, 2**32 - 1)),
                draw(st.sampled_from([1.0, 0.01, 1e3, 1e-20, 1e15, 1e-39])),
                before,
                draw(st.frozensets(places, max_size=2)),
                None if elsewhere is None else {elsewhere: draw(layouts(tensors[elsewhere].shape, not scaled))},
                draw(st.none() | st.tuples(places, st.sampled_from(NONFINITE if scaled else SPECIAL + NONFINITE))),
                scaled,
                scaled and draw(st.booleans()),
                draw(st.sampled_from([None, "skip", "take"])) if scaled else None,
            )
        )
    return Scenario(optimizer, first, shared, tuple(steps), around)
