"""The examples in docstrings of all public names run, and print what they say."""

import doctest
import inspect

import pytest
import torch

import fastclip
from fastclip.in_backward import StepInBackward

PUBLIC = {name: getattr(fastclip, name) for name in fastclip.__all__} | {"StepInBackward": StepInBackward}


def docstrings():
    """{name: docstring} of the public names and of their attributes that are fastclip's, each once."""
    found = {name: inspect.getdoc(value) for name, value in PUBLIC.items()}
    seen = set()
    for name, value in PUBLIC.items():
        for kind in inspect.getmro(value) if inspect.isclass(value) else ():
            for attribute, member in vars(kind).items() if kind.__module__.startswith("fastclip") else ():
                if not attribute.startswith("_") and member not in seen and inspect.getdoc(member):
                    seen.add(member)
                    found[f"{name}.{attribute}"] = inspect.getdoc(member)
    return found


EXAMPLES = {name: text for name, text in docstrings().items() if ">>>" in text}


def test_every_public_name_has_an_example():
    assert set(PUBLIC) <= set(EXAMPLES)
    assert {"SGD.total_norm", "SGD.clip_stats", "StepInBackward.accumulate"} <= set(EXAMPLES)


def namespace():
    model = torch.nn.Linear(80, 64)
    opt = fastclip.SGD(model.parameters(), lr=0.1, clip_value=0.01)

    def loss(x):
        return model(x).square().sum()

    x, x1, x2 = torch.randn(3, 8, 80)
    loss(x).backward()
    return {
        "torch": torch,
        "fastclip": fastclip,
        "model": model,
        "opt": opt,
        "loss": loss,
        "log": lambda numbers: None,
        "x": x,
        "x1": x1,
        "x2": x2,
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = namespace()
    torch.save(fastclip.AdamW(names["model"].parameters()).state_dict(), "optimizer.pt")
    said = []
    test = doctest.DocTestParser().get_doctest(EXAMPLES[name], names, name, None, None)
    results = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert results.attempted > 0
    assert results.failed == 0, "".join(said)
