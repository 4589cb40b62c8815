"""Random optimizers and random steps, for the property tests, and the plain loop that they are checked against.

A `Scenario` says all of it in small values that hypothesis can print and shrink; `check` plays one.
"""

import dataclasses
import math
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# "test" is the same in every run; "fuzz" (make fuzz) draws anew, from a seed that it prints. No deadlines: a machine
# may be busy.
COMMON = {"deadline": None, "print_blob": False, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("test", max_examples=300, derandomize=True, database=None, **COMMON)
settings.register_profile("fuzz", max_examples=10_000, database=None, **COMMON)

WIDE, SIXTEEN_BIT = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)
SPECIAL = [0.0, -0.0, 1e-40, 1e-45, 3e38, 65504.0]
NONFINITE = [math.inf, -math.inf, math.nan]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a tensor's elements lie: the order of its dimensions in memory, the gap between them, the first one."""

    order: tuple = ()  # outermost first; () is the contiguous one
    gap: int = 1
    offset: int = 0
    expanded: bool = False  # of gradients: the first dimension has stride 0


@dataclasses.dataclass(frozen=True)
class Param:
    shape: tuple
    dtype: torch.dtype
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Group:
    params: tuple
    settings: dict


@dataclasses.dataclass(frozen=True)
class Step:
    """One step, and what happens before it. `missing`, `layouts`: by the parameter's place over all groups."""

    seed: int
    scale: float
    before: tuple = ()  # ("add", Group) | ("set", group, {...}) | ("freeze", place) | ("reload", how)
    missing: frozenset = frozenset()
    layouts: Any = None  # {place: Layout} where it is not the parameter's
    special: Any = None  # (place, value)


@dataclasses.dataclass(frozen=True)
class Scenario:
    optimizer: str  # "SGD", "Adam" or "AdamW"
    groups: tuple
    shared: dict  # max_norm, norm_type, skip_nonfinite
    steps: tuple


# ---- drawing -----------------------------------------------------------------------------------

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


@st.composite
def settings_of_sgd(draw):
    momentum = draw(st.sampled_from([0, 0.0, 0.9, 0.5]))
    nesterov = momentum > 0 and draw(st.booleans())
    dampening = 0 if nesterov else draw(st.sampled_from([0, 0.3]))
    return {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}


# Not beta1 = 0: torch's averages then have 0.0 or -0.0, in a vector's lanes otherwise than behind them.
settings_of_adam = st.fixed_dictionaries(
    {
        "betas": st.tuples(st.sampled_from([0.9, 0.5, 0.3, 0.001]), st.sampled_from([0.999, 0.0, 0.5])),
        "eps": st.sampled_from([1e-8, 0.0, 1e-3, 1.0]),
        "amsgrad": st.booleans(),
    }
)


@st.composite
def own_settings(draw, optimizer):
    """Of one group."""
    return {
        "lr": draw(st.sampled_from([0.1, 1.0, 0.0, 1e-3])),
        **draw(settings_of_sgd() if optimizer == "SGD" else settings_of_adam),
        "weight_decay": draw(st.sampled_from([0, 0.0, 0.01])),
        "maximize": draw(st.booleans()),
        "clip_value": draw(clip_values),
    }


def groups(optimizer):
    return st.builds(Group, st.lists(params(), min_size=1, max_size=4).map(tuple), own_settings(optimizer))


@st.composite
def events(draw, optimizer, now):
    """What happens before a step to the groups there are `now`, a list that it changes."""
    kind = draw(st.sampled_from(["set", "set", "reload", "freeze", "add"]))
    if kind == "add":
        now.append(draw(groups(optimizer)))
        return kind, now[-1]
    if kind == "reload":
        return kind, draw(st.sampled_from(["itself", "fresh", "file", "torch"]))
    if kind == "freeze":
        return kind, draw(st.integers(0, sum(len(g.params) for g in now) - 1))
    changed = draw(own_settings(optimizer))
    own = ["betas", "eps"] if "betas" in changed else []
    names = draw(st.sets(st.sampled_from(["lr", "weight_decay", "maximize", "clip_value", *own]), min_size=1))
    return kind, draw(st.integers(0, len(now) - 1)), {name: changed[name] for name in sorted(names)}


@st.composite
def scenarios(draw):
    optimizer = draw(st.sampled_from(["SGD", "SGD", "Adam", "AdamW"]))
    now = draw(st.lists(groups(optimizer), min_size=1, max_size=3))
    first = tuple(now)
    max_norm = draw(st.none() | thresholds)
    shared = {"max_norm": max_norm, "skip_nonfinite": draw(st.booleans())}
    shared["norm_type"] = draw(st.sampled_from([2.0, 2, math.inf, "inf"]))
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        before = tuple(draw(st.lists(events(optimizer, now), max_size=1)))
        tensors = [param for group in now for param in group.params]
        places = st.integers(0, len(tensors) - 1)
        elsewhere = draw(st.none() | places)
        steps.append(
            Step(
                draw(st.integers(0, 2**32 - 1)),
                draw(st.sampled_from([1.0, 0.01, 1e3, 1e-20, 1e15])),
                before,
                draw(st.frozensets(places, max_size=2)),
                None if elsewhere is None else {elsewhere: draw(layouts(tensors[elsewhere].shape, True))},
                draw(st.none() | st.tuples(places, st.sampled_from(SPECIAL + NONFINITE))),
            )
        )
    return Scenario(optimizer, first, shared, tuple(steps))


# ---- tensors -----------------------------------------------------------------------------------


def placed(values, layout):
    """(tensor, the memory it is a view of): `values` in a layout of memory that is full of sevens."""
    sizes = list(values.shape)
    if layout.expanded:
        values = values[:1].expand(sizes)
    strides, stride = [0] * len(sizes), layout.gap
    for dim in reversed(layout.order or range(len(sizes))):
        if not (layout.expanded and dim == 0):
            strides[dim] = stride
            stride *= max(sizes[dim], 1)
    memory = torch.full((layout.offset + stride + 9,), 7.0, dtype=values.dtype)
    view = memory.as_strided(sizes, strides, layout.offset)
    (view[:1] if layout.expanded else view).copy_(values[:1] if layout.expanded else values)
    return view, memory


def bits(tensor):
    """Its elements as integers: 0.0 and -0.0 differ. All NaN are one: which one an operation makes is not said."""
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    tensor = tensor.detach()
    return torch.where(tensor.isnan(), torch.full_like(tensor, math.nan), tensor).contiguous().view(size)


def raw(memory):
    return memory.view(torch.uint8).clone()


# ---- the plain loop ----------------------------------------------------------------------------


def exact_norm(grads, norm_type):
    """By Python's math.hypot, which is right to the last bit and neither overflows nor vanishes."""
    values = [value for g in grads for value in g.double().flatten().tolist()]
    if any(map(math.isnan, values)):
        return math.nan
    if float(norm_type) == math.inf:
        return max(map(abs, values), default=0.0)
    return math.hypot(*values)
