"""Large states lie in memory for which huge pages are asked; small ones, and others' memory, do not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastclip
from tests.support.project import ROOT

SMAPS = Path("/proc/self/smaps")
LARGE, SMALL = 4 * 2**20, 2**18  # elements

pytestmark = pytest.mark.skipif(
    not SMAPS.exists() or "VmFlags" not in SMAPS.read_text(), reason="the system does not tell what was asked of memory"
)


def asked(tensor):
    """Returns whether huge pages were asked for, where the middle of a tensor lies."""
    place = tensor.data_ptr() + tensor.nbytes // 2
    for line in SMAPS.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= place < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping holds the tensor")


def states(numel, dtype=torch.float32, **settings):
    p = torch.zeros(numel, dtype=dtype).requires_grad_()
    p.grad = torch.ones_like(p)
    optimizer = fastclip.AdamW([p], lr=0.1, **settings)
    optimizer.step()
    arrays = {name: state for name, state in optimizer.state[p].items() if state.numel() == numel}
    return p, arrays


def printed(code, **variables):
    """What a process of its own prints: elsewhere, a tensor may lie where a large state was before."""
    code = f"from tests.step.test_huge_pages import *\n{code}"
    environment = {**os.environ, **variables}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_huge_pages_are_asked_for_large_states_alone():
    assert printed(f"print(*map(asked, states({SMALL})[1].values()))") == ["False", "False"]
    of_states = "p, large = states(LARGE)\nprint(*large, *map(asked, [*large.values(), p, p.grad]))"
    assert printed(of_states) == ["exp_avg", "exp_avg_sq", "True", "True", "False", "False"]


def test_a_state_begins_as_it_should():
    p, arrays = states(LARGE, torch.bfloat16, master_weights=True, amsgrad=True)
    assert all(map(asked, arrays.values())) and len(arrays) == 4
    small, expected = states(8, torch.bfloat16, master_weights=True, amsgrad=True)
    for name, state in arrays.items():
        assert (state == expected[name][0]).all()
    assert (p == small[0]).all()
    q = torch.zeros(LARGE).requires_grad_()
    q.grad = torch.ones_like(q)
    optimizer = fastclip.Adagrad([q], lr=0.1, initial_accumulator_value=0.5)
    optimizer.state.clear()  # it makes them itself, as torch's does; now the step has to
    optimizer.step()
    assert asked(optimizer.state[q]["sum"]) and (optimizer.state[q]["sum"] == 1.5).all()


def test_the_switch_leaves_it_out():
    assert printed("print(any(map(asked, states(LARGE)[1].values())))", FASTCLIP_HUGE_PAGES="0") == ["False"]
