"""Each reason to refuse a step, or to leave the kernels, is worded once: in fastclip/reasons.py, for both ways."""

import ast
import inspect
import math
import re
from collections import defaultdict

import pytest
import torch

import fastclip
from fastclip import reasons
from fastclip.plain import step as plain
from tests.step.test_atomic_failure import CASES, CASES_OF_ADAM, buffer, make
from tests.support.project import CSRC, ROOT

HOST = sorted((CSRC / "host").glob("*.*"))
PYTHON = sorted((ROOT / "fastclip").rglob("*.py"))

# ---- worded once -------------------------------------------------------------------------------------


def texts_in_cpp(source):
    """String literals, those that follow each other as one."""
    code = re.sub(r"//.*|#include.*", "", source)
    literal = r'"((?:[^"\\\n]|\\.)*)"'
    return ["".join(re.findall(literal, run[0])) for run in re.finditer(rf"{literal}(\s*{literal})*", code)]


def texts_in_python(source):
    """The fixed pieces of strings and of f-strings, but for docstrings."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return [node.value for node in constants if isinstance(node.value, str)]


def worded_twice(texts, words=5):
    """Runs of so many words that are in several of the texts, of pairs (where, text)."""
    found = defaultdict(set)
    for number, (where, text) in enumerate(texts):
        sequence = re.findall(r"[\w'-]+", text.lower())
        for i in range(len(sequence) - words + 1):
            found[" ".join(sequence[i : i + words])].add((number, where))
    return {run: sorted(where for _, where in places) for run, places in found.items() if len(places) > 1}


def test_no_two_messages_share_five_words():
    texts = [(path.name, text) for path in HOST for text in texts_in_cpp(path.read_text())]
    texts += [(path.name, text) for path in PYTHON for text in texts_in_python(path.read_text())]
    assert len(texts) > 500
    assert not worded_twice(texts)


def test_a_reason_that_is_worded_twice_is_found():
    cpp = 'raise(type, "the ", name, " has another shape "\n  "than its parameter");  // has another shape than that\n'
    python = '"""It has another shape than its parameter."""\nf"{what} has another shape than its parameter: {shape}"'
    texts = [("walk.cpp", text) for text in texts_in_cpp(cpp)]
    texts += [("checks.py", text) for text in texts_in_python(python)]
    assert worded_twice(texts) == {
        "has another shape than its": ["checks.py", "walk.cpp"],
        "another shape than its parameter": ["checks.py", "walk.cpp"],
    }


def test_the_host_asks_for_reasons_that_there_are():
    """And all that there are, are asked for, by the host or in Python."""
    asks = r'(?:refuse|raise_refusal|refuse_setting|Reason|ask|not_covered)\(\{?\s*"(\w+)"'
    asked = {name for path in HOST for name in re.findall(asks, path.read_text())}
    there = {name for name, value in vars(reasons).items() if inspect.isfunction(value) and not name.startswith("_")}
    there = {name for name in there if getattr(reasons, name).__module__ == reasons.__name__}
    assert len(asked) > 20 and asked <= there
    python = "".join(path.read_text() for path in PYTHON)
    assert [name for name in there - asked if len(re.findall(rf"\b{name}\(", python)) < 2] == []


# ---- the same words on both ways ---------------------------------------------------------------------


def inference(name):
    def made(optimizer, p):
        with torch.inference_mode():
            optimizer.state[p][name] = torch.ones_like(optimizer.state[p][name])

    return made


def in_bfloat16(name, value):
    """A parameter with master weights, one of whose states is replaced."""

    def replaced(optimizer, p):
        p.data, p.grad = p.data.bfloat16(), None
        p.grad = torch.ones(4, 3, dtype=torch.bfloat16)
        optimizer.state[p]["master_param"] = torch.ones(4, 3)
        optimizer.state[p][name] = value()

    return replaced


def taken_from(cases, *names):
    return {name: cases[name][0] for name in names}


MASTER = {"master_weights": True}
BROKEN = [
    (
        fastclip.SGD,
        {},
        {
            **taken_from(CASES, "resized with gradient", "buffer's shape", "buffer broadcasts", "no buffer", "state"),
            "inference": inference("momentum_buffer"),
        },
    ),
    (
        fastclip.AdamW,
        {},
        {
            **taken_from(CASES_OF_ADAM, "resized with gradient", "shape", "state", "no tensor", "number of steps"),
            **taken_from(CASES_OF_ADAM, "steps of two", "no steps", "no exp_avg", "no max_exp_avg_sq"),
            **taken_from(CASES_OF_ADAM, "negative count", "negative count, float64", "infinite count"),
            "NaN count": buffer(lambda: torch.tensor(math.nan), "step"),
            "inference": inference("exp_avg_sq"),
            "inference, step": inference("step"),
        },
    ),
    (
        fastclip.SGD,
        MASTER,
        {
            "master's dtype": in_bfloat16("master_param", lambda: torch.ones(4, 3, dtype=torch.float64)),
            "master's shape": in_bfloat16("master_param", lambda: torch.ones(4)),
            "no master": in_bfloat16("master_param", lambda: 1.0),
            "buffer's shape": in_bfloat16("momentum_buffer", lambda: torch.ones(3)),
        },
    ),
    (
        fastclip.SGD,
        {"stochastic_rounding": True},
        {
            "steps of two": buffer(lambda: torch.ones(2), "step"),
            "no tensor": buffer(lambda: 3, "step"),
            "negative count": buffer(lambda: torch.tensor(-1.0), "step"),
        },
    ),
]


@pytest.mark.parametrize(
    ("cls", "settings", "broken"),
    [
        pytest.param(cls, settings, broken, id=f"{cls.__name__} {' '.join(settings)} {name}")
        for cls, settings, cases in BROKEN
        for name, broken in cases.items()
    ],
)
def test_the_kernels_and_plain_torch_refuse_in_the_same_words(cls, settings, broken, monkeypatch):
    """Once by the optimizer's step, which must not come to plain torch; once by plain torch's, without the kernels."""
    monkeypatch.setattr(cls, "_step_in_plain_torch", lambda *_: pytest.fail("the step left the kernels"))
    optimizer, params = make(cls, **settings)
    broken(optimizer, params[2])
    before = [p.detach().clone() for p in params]
    raised = []
    for step in (optimizer.step, lambda: plain.step(optimizer._rule, optimizer.param_groups, optimizer.state)):
        with pytest.raises((ValueError, TypeError, KeyError, RuntimeError)) as error:
            step()
        raised.append((type(error.value), str(error.value)))
        assert all(map(torch.equal, params, before))
    assert raised[0] == raised[1]
    assert "parameter 1 of group 1 ('b')" in raised[0][1]


@pytest.mark.parametrize("name", ["max_norm", "norm_type", "skip_nonfinite"])
def test_a_new_group_and_a_step_refuse_another_norm_in_the_same_words(name):
    value = {"max_norm": 2.0, "norm_type": math.inf, "skip_nonfinite": True}[name]
    optimizer, _ = make()
    with pytest.raises(ValueError, match=f"{name} must be the same in all groups") as in_new_group:
        optimizer.add_param_group({"params": [("c", torch.ones(2))], name: value})
    optimizer.add_param_group({"params": [("c", torch.ones(2))]})
    optimizer.param_groups[2][name] = value
    with pytest.raises(ValueError, match=f"{name} must be the same in all groups") as in_step:
        optimizer.step()
    assert str(in_new_group.value) == str(in_step.value)
    assert f"{value} in param_groups[2], {optimizer.param_groups[0][name]} in param_groups[0]" in str(in_step.value)


# ---- why the kernels are left ------------------------------------------------------------------------


def dense(dtype=torch.float32):
    return torch.ones(4, 3, dtype=dtype)


def with_gaps():
    return torch.ones(4, 6)[:, ::2]


@pytest.mark.falls_back
@pytest.mark.parametrize(
    ("param", "grad", "settings", "words"),
    [
        (dense, lambda: dense().to_sparse(), {}, "the gradient of parameter 0 of group 0 is sparse"),
        (
            dense,
            lambda: torch.ones(3, 4).t(),
            {},
            "the gradient of parameter 0 of group 0 has another memory layout than its parameter: strides (1, 4) "
            "instead of (3, 1)",
        ),
        (
            with_gaps,
            with_gaps,
            {},
            "the gradient of parameter 0 of group 0 has gaps or overlaps in memory: strides (6, 2) for shape (4, 3)",
        ),
        (
            lambda: dense(torch.complex64),
            lambda: dense(torch.complex64),
            {},
            "parameter 0 of group 0 is complex",
        ),
        (
            lambda: dense().to("meta"),
            lambda: dense().to("meta"),
            {},
            "parameter 0 of group 0 is on device 'meta', which fastclip has no kernels for",
        ),
        (
            lambda: dense(torch.float64),
            lambda: dense(torch.float64),
            {"momentum": 0.9, "momentum_dtype": torch.bfloat16},
            "the momentum_buffer of parameter 0 of group 0 is torch.bfloat16, and its parameter is torch.float64",
        ),
    ],
)
def test_the_warning_says_why(param, grad, settings, words):
    p = param().requires_grad_()
    p.grad = grad()
    optimizer = fastclip.SGD([p], **{"lr": 0.1, **settings})
    with pytest.warns(UserWarning) as warned:
        optimizer.step()
    assert [str(w.message) for w in warned] == [f"fastclip falls back to plain torch (slower): {words}"]


@pytest.mark.falls_back
def test_the_warning_names_a_count_that_the_kernels_can_not_keep():
    optimizer, params = make(fastclip.AdamW)
    optimizer.state[params[2]]["step"] = torch.tensor(1, dtype=torch.int64)
    words = r"step of parameter 1 of group 1 \('b'\) is torch.int64 on cpu, and the kernels count in float32 or float64"
    with pytest.warns(UserWarning, match=words):
        optimizer.step()


def test_the_kernels_have_no_learning_rate_of_another_device():
    """Plain torch can't read one on this device, so the engine is asked."""
    optimizer, _ = make(max_norm=None)
    optimizer.param_groups[1]["lr"] = torch.tensor(0.1, device="meta")
    not_covered = optimizer._engine.step(optimizer.param_groups, optimizer.state, None, None, None)
    assert not_covered.reason == "lr is a torch.float32 tensor on meta, which fastclip has no kernels for"
