"""Steps in the backward pass against ordinary ones, over random passes and random changes between them."""

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402  after the check
from hypothesis import strategies as st  # noqa: E402

import fastclip  # noqa: E402
from tests.support import scenarios  # noqa: E402, F401  registers the profiles
from tests.support.cases import assert_same_bits  # noqa: E402
from tests.support.in_backward_cases import SOME_KIB, groups, loss_of, net  # noqa: E402

PARAMETERS = 8  # of Net
OPTIMIZERS = {"SGD": {"momentum": 0.9}, "AdamW": {}}
SETTINGS = {"lr": [0.1, 0.01, 0.0], "weight_decay": [0, 0.1], "clip_value": [None, 0.01, (-0.1, 0.02)]}
BUCKETS = [0, SOME_KIB, 4]


class Pass(NamedTuple):
    seed: int
    sometimes: bool  # whether it uses all layers
    accumulates: bool
    zeroes: bool  # gradients are zeros beforehand, not None


class Change(NamedTuple):
    what: str
    param: int
    group: int
    setting: tuple
    bucket_cap_mb: float


passes = st.builds(Pass, st.integers(0, 99), st.booleans(), st.sampled_from([False, False, True]), st.booleans())
changes = st.builds(
    Change,
    st.sampled_from(
        ["freeze", "leave", "join", "add", "swap", "exchange", "drop a group", "set", "load", "restart", "replace"]
    ),
    st.integers(0, PARAMETERS - 1),
    st.integers(0, 3),
    st.sampled_from([(name, value) for name, values in SETTINGS.items() for value in values]),
    st.sampled_from(BUCKETS),
)


class Training:
    """A model and its optimizer, with ordinary steps or with steps in the backward pass."""

    def __init__(self, optimizer, bucket_cap_mb=None):
        self.model = net()
        self.optimizer = getattr(fastclip, optimizer)(groups(self.model), lr=0.1, **OPTIMIZERS[optimizer])
        self.in_backward = None
        self.step_in_backward(bucket_cap_mb)

    def step_in_backward(self, bucket_cap_mb):
        if bucket_cap_mb is not None:
            self.in_backward = fastclip.step_in_backward(self.model, self.optimizer, bucket_cap_mb=bucket_cap_mb)

    def change(self, change):
        param, lists = list(self.model.parameters())[change.param], self.optimizer.param_groups
        group = lists[change.group % len(lists)]
        held = any(param is p for g in lists for p in g["params"])
        if change.what == "freeze":
            param.requires_grad_(not param.requires_grad)
        elif change.what == "leave":
            for each in lists:
                each["params"] = [p for p in each["params"] if p is not param]
            self.optimizer.state.pop(param, None)
        elif change.what == "join" and not held:
            group["params"].insert(change.param % (len(group["params"]) + 1), param)
        elif change.what == "add" and not held:
            self.optimizer.add_param_group({"params": [param]})
        elif change.what == "swap":
            lists.append(lists.pop(0))
        elif change.what == "exchange" and held and group["params"]:
            there, *_ = ((g, i) for g in lists for i, p in enumerate(g["params"]) if p is param)
            index = change.param % len(group["params"])
            there[0]["params"][there[1]], group["params"][index] = group["params"][index], param
        elif change.what == "drop a group" and len(lists) > 1:
            lists.remove(group)
            for p in group["params"]:
                self.optimizer.state.pop(p, None)
        elif change.what == "set":
            group.update([change.setting])
        elif change.what == "load":
            self.optimizer.load_state_dict(self.optimizer.state_dict())
        elif change.what == "restart" and self.in_backward is not None:
            self.in_backward.remove()
            self.step_in_backward(change.bucket_cap_mb)
        elif change.what == "replace":
            saved, kind = self.optimizer.state_dict(), type(self.optimizer)
            stepped = None if self.in_backward is None else change.bucket_cap_mb
            if stepped is not None and sum(len(g["params"]) for g in lists) < PARAMETERS:
                self.in_backward.remove()  # else the others tell that the optimizer is gone
            self.in_backward = self.optimizer = None
            self.optimizer = kind([{"params": g["params"]} for g in lists])
            self.optimizer.load_state_dict(saved)
            self.step_in_backward(stepped)

    def run(self, one):
        if one.zeroes:
            self.optimizer.zero_grad(set_to_none=False)
        x, y = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(one.seed))
        loss = loss_of(x, y, self.model, sometimes=one.sometimes)
        if not loss.requires_grad:
            return
        if one.accumulates and self.in_backward is not None:
            with self.in_backward.accumulate():
                loss.backward()
        else:
            loss.backward()
        if not one.accumulates:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def check_hooks(self):
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for p in self.model.parameters():
            assert len(p._post_accumulate_grad_hooks or ()) <= (1 if id(p) in held else 0)


@settings(settings.get_profile("test"), max_examples=120)
@given(st.sampled_from(sorted(OPTIMIZERS)), st.sampled_from(BUCKETS), st.lists(passes | changes, max_size=12))
def test_same_bits_as_ordinary_steps_whatever_happens_between_passes(optimizer, bucket_cap_mb, events):
    ordinary, stepped = Training(optimizer), Training(optimizer, bucket_cap_mb)
    for event in events:
        for training in (ordinary, stepped):
            training.run(event) if isinstance(event, Pass) else training.change(event)
        assert_same_bits(ordinary.model.parameters(), stepped.model.parameters(), ordinary.optimizer, stepped.optimizer)
        for p, q in zip(ordinary.model.parameters(), stepped.model.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad))
    done = Pass(0, True, False, False)
    for training in (ordinary, stepped):
        training.model.requires_grad_(True)
        training.run(done)
    stepped.check_hooks()
