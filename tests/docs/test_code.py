"""The Python code of README and docs runs, does what it says, and so does examples/minimal.py."""

import os
import re
import subprocess
import sys

import pytest
import torch

from .pages import DOCUMENTS, ROOT, blocks_of, namespace, python_of, run

SCRIPTS = ["docs/distributed.md"]  # under torchrun
PAGES = [
    "docs/accumulation.md",
    "docs/api.md",
    "docs/change.md",
    "docs/edge.md",
    "docs/logging.md",
    "docs/norm_scope.md",
    "docs/past_norms.md",
    "docs/patch.md",
    "docs/precision.md",
    "docs/states_in_8_bits.md",
    "docs/step_in_backward.md",
    "docs/trainers.md",
]


def test_all_python_code_of_the_documents_is_run_here():
    with_code = {str(path.relative_to(ROOT)) for path in DOCUMENTS if blocks_of(path.read_text(), "python")}
    assert with_code == {"README.md", *PAGES, *SCRIPTS}


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_trains(page):
    names = namespace()
    model = names["model"]
    before = [p.detach().double() for p in model.parameters()]
    for code in python_of(page):
        run(code, names)
    assert all((p.double() != old).any() for p, old in zip(model.parameters(), before, strict=True))


def test_the_logging_page_names_the_gradient(capsys):
    names = namespace()
    first, dominating, second = python_of("docs/logging.md")
    run(first, names)
    assert names["logged"][0].keys() == {"grad_norm", "clipped", "skipped"}
    run(second, names)
    assert "not finite: the gradient of parameter 0 of group 0 ('0.weight')" in capsys.readouterr().out


def test_the_readme_s_two_ways_give_the_same_parameters():
    ours, theirs = python_of("README.md")
    torch.manual_seed(1)
    start, after = namespace(), []
    start = {name: value.clone() for name, value in start["model"].state_dict().items()}
    for code in (ours, theirs):
        torch.manual_seed(1)
        names = run(code, namespace())
        after.append(names["model"].state_dict())
        if code == ours:
            assert names["logged"][0]["grad_norm"] > 1  # so it was clipped
    for name, value in after[0].items():
        assert (value != start[name]).any()
        torch.testing.assert_close(value, after[1][name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("page", SCRIPTS)
def test_a_script_runs_on_two_ranks(page, tmp_path):
    (script,) = python_of(page)
    (tmp_path / "train.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=120)
    # Not by the exit code: with gloo, torch 2.13 aborts now and then while Python exits, without fastclip, too.
    assert 'Traceback (most recent call last):\n  File "' + str(tmp_path) not in result.stderr, result.stderr
    norms = re.findall(r"^norm (.+)$", result.stdout, re.MULTILINE)
    assert len(norms) == 3 and all(float(norm) > 0 for norm in norms)


def test_the_minimal_example_learns():
    code = (ROOT / "examples/minimal.py").read_text()
    assert len(code.splitlines()) <= 25
    result = subprocess.run(
        [sys.executable, "-m", "examples.minimal"], cwd=ROOT, text=True, capture_output=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", result.stdout)]
    assert len(losses) == 10 and losses[-1] < 0.6 * losses[0]
