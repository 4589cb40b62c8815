"""Random optimizers with limits on norms and changes in every scope, and a check of their steps against plain torch."""

import copy
import dataclasses
import math
from typing import Any

import torch
from hypothesis import strategies as st

import fastclip
from fastclip.plain import step as plain

from .cases import exact_square_roots

KINDS = {
    "SGD": {"momentum": [0.0, 0.9], "dampening": [0.0, 0.3]},
    "AdamW": {"weight_decay": [0.0, 0.1], "amsgrad": [False, True], "maximize": [False, True]},
    "Adam": {"weight_decay": [0.0, 0.1], "betas": [(0.9, 0.99), (0.0, 0.5)]},
    "LAMB": {"weight_decay": [0.0, 0.1], "use_nvlamb": [False, True], "adam_w_mode": [False, True]},
}
SHAPES = [(), (0, 2), (1,), (7,), (33,), (3, 5), (4097,)]
LIMITS = st.sampled_from([None, math.inf, 1e3, 0.5, 1e-2, 1e-4, 0.0])
SCALES = st.sampled_from([1.0, 1e-3, 1e3, 0.0, 1e-20, math.inf, math.nan])


@dataclasses.dataclass
class Scenario:
    kind: str
    groups: list[dict[str, Any]]  # settings, and the shapes of the parameters
    shared: dict[str, Any]
    dtype: torch.dtype
    steps: list[list[float | None]]  # the scale of each gradient; None: there is none
    seed: int


@st.composite
def scenarios(draw):
    kind = draw(st.sampled_from(list(KINDS)))
    scope = draw(st.sampled_from(["global", "group", "parameter"]))
    names = ["max_norm", "max_change", "max_relative_change"]
    drawn = [draw(st.fixed_dictionaries(dict.fromkeys(names, LIMITS))) for _ in range(2)]
    own, shared = ([{}, {}], drawn[0]) if scope == "global" else (drawn, {})
    if kind != "SGD":
        own = [{**group, "max_update_rms": draw(LIMITS)} for group in own]
    for group in own:
        group["lr"] = draw(st.sampled_from([0.1, 1e-3, 0.0]))
        group["shapes"] = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    settings = {name: draw(st.sampled_from(values)) for name, values in KINDS[kind].items()}
    switches = {"norm_scope": scope, "skip_nonfinite": draw(st.booleans())}
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    count = sum(len(group["shapes"]) for group in own)
    scales = st.lists(st.one_of(st.none(), st.just(1.0), SCALES), min_size=count, max_size=count)
    return Scenario(
        kind,
        own,
        {**settings, **switches, **shared},
        dtype,
        draw(st.lists(scales, min_size=1, max_size=4)),
        draw(st.integers(0, 2**20)),
    )


def check(scenario):
    """Raises AssertionError where the kernels and plain torch differ."""
    random = torch.Generator().manual_seed(scenario.seed)

    def drawn(shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(scenario.dtype)

    groups = [
        {
            **{k: v for k, v in group.items() if k != "shapes"},
            "params": [drawn(s).requires_grad_() for s in group["shapes"]],
        }
        for group in scenario.groups
    ]
    ours = getattr(fastclip, scenario.kind)(groups, **scenario.shared)
    theirs = copy.deepcopy(ours)
    lists = [[p for group in o.param_groups for p in group["params"]] for o in (ours, theirs)]
    for scales in scenario.steps:
        for p, q, scale in zip(*lists, scales, strict=True):
            p.grad = None if scale is None else drawn(p.shape)
            if scale is not None and p.numel() > 0:
                p.grad.view(-1)[0] *= scale if not math.isfinite(scale) else 1.0
                p.grad *= scale if math.isfinite(scale) else 1.0
            q.grad = None if p.grad is None else p.grad.clone()
        ours.step()
        with exact_square_roots():
            stats = plain.step(theirs._rule, theirs.param_groups, theirs.state)
        assert_same_stats(ours.clip_stats(), stats)
        for p, q in zip(*lists, strict=True):
            rtol = 1e-5 if scenario.dtype == torch.float32 else 1e-11
            torch.testing.assert_close(p, q, rtol=rtol, atol=rtol, equal_nan=True)


def assert_same_stats(ours, theirs):
    for name in ("total_norm", "clip_coefficient", "skipped", "change"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-12, equal_nan=True, msg=name)
