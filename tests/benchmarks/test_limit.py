"""The limit of a step passes over every word of the step's arrays, once, and changes none."""

import ctypes
import math

import pytest
import torch

from benchmarks import cpu, large, precision
from benchmarks.core import limit, memory

SIZES = (1, 127, 128, 3 * 2**20 + 5)  # below a block, a block, and in pieces


def tensors(dtype, states, sizes=SIZES):
    params, rows = [], []
    for size in sizes:
        values = torch.arange(size).remainder(997).to(dtype)
        params.append(values.clone().requires_grad_())
        params[-1].grad = -values
        rows.append([values.clone() for _ in range(states)])
    return params, rows


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("states", [0, 1, 2, 3])
def test_a_pass_changes_no_number(states, dtype, threads):
    params, rows = tensors(dtype, states, sizes=(1, 300, 100_000))
    params[1].grad[5] = math.nan
    arrays = [p.detach() for p in params] + [state for row in rows for state in row]
    before = [array.clone() for array in arrays]
    torch.set_num_threads(threads)
    measured = limit.Limit(params, rows)
    measured.update()
    measured.norm_and_update()
    assert measured.best.keys() == {(1 + states, threads), (0, threads)}
    assert all(torch.equal(array, old) for array, old in zip(arrays, before, strict=True))


@pytest.mark.parametrize("target", limit.TARGETS, ids=" ".join)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("written", [1, 2, 3, 4])
def test_a_pass_takes_every_word_once(written, threads, target):
    params, rows = tensors(torch.float32, written - 1)
    measured = limit.Limit(params, rows)
    words = [[array.view(torch.int32).clone() for array in arrays] for _, arrays in measured.arrays]
    adds_all = ctypes.c_uint32(2**32 - 1)
    arguments = ctypes.c_int64(len(params)), written, threads, ctypes.c_int64(64), adds_all, limit.parallel(threads)
    assert limit.compiled(target).pass_seconds(measured.tensors, *arguments) > 0
    for (read, arrays), old in zip(measured.arrays, words, strict=True):
        for array, was in zip(arrays, old, strict=True):
            assert torch.equal(array.view(torch.int32), was + read.view(torch.int32))


@pytest.mark.parametrize("target", limit.TARGETS, ids=" ".join)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("numel", [1, 2049, 3 * 2**20 + 5])
def test_the_divider_divides_for_each_number(numel, threads, target):
    total = ctypes.c_double()
    arguments = ctypes.c_int64(numel), threads, ctypes.c_float(0.4), ctypes.byref(total), limit.parallel(threads)
    assert limit.compiled(target).divider_seconds(*arguments) > 0
    assert total.value == 1.0 * numel  # 6 / (2 / 0.4 + 1)
    torch.set_num_threads(threads)
    divider = limit.Divider(numel)
    divider.run()
    assert divider.best.keys() == {threads}


def test_arrays_that_no_pass_can_take_are_refused():
    params, rows = tensors(torch.float32, 4, sizes=(8,))
    with pytest.raises(ValueError, match="5 arrays that are written; 4 at most"):
        limit.Limit(params, rows)
    with pytest.raises(ValueError, match="dense arrays of one size"):
        limit.Limit(params, [[torch.zeros(9)]])


def test_a_missing_compiler_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    limit.compiled.cache_clear()
    with pytest.raises(RuntimeError, match="needs a C"):
        limit.compiled(limit.TARGETS[0])
    limit.compiled.cache_clear()


@pytest.mark.parametrize("command", [cpu.main, large.main, precision.main], ids=["cpu", "large", "precision"])
def test_a_missing_compiler_is_told_before_anything_is_timed(command, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(memory, "available", lambda: None)
    limit.compiled.cache_clear()
    options = ["--model", "dense-100m"] if command is cpu.main else []
    assert command([*options, "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("Nothing was ") and "needs a C++ compiler" in told and "no-such-compiler" in told
    assert not list(tmp_path.iterdir())
