"""Subnormal numbers, with and without torch.set_flush_denormal: the same bits on any number of threads.

No float16 is subnormal in float32, in which it is computed: the mode changes nothing there, on every instruction set.
"""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

import fastclip
from tests.support.cases import flush_denormal, give_grads, reference_step
from tests.support.project import ROOT

HALVES = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)  # all of them
FINITE = HALVES[HALVES.isfinite()]
MODES = list(itertools.product([False, True], [1, 2]))
in_modes = pytest.mark.parametrize(("flush", "threads"), MODES, ids=lambda value: str(value))


def mode(flush, threads):
    torch.set_num_threads(threads)
    return flush_denormal(flush)


def bits(tensor):
    """For comparisons: which NaN a NaN is, is left open."""
    tensor = tensor.detach()
    same_nan = torch.where(tensor.isnan(), torch.nan, tensor)
    return same_nan.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def parameter(values, grad):
    """Enough elements for two threads; a gradient in float32 where `grad` is one."""
    p = torch.cat([values, values]).requires_grad_()
    p.grad_dtype = grad.dtype
    p.grad = torch.cat([grad, grad])
    return p


WAYS = {"plain": {}, "master weights": {"master_weights": True}, "stochastic": {"stochastic_rounding": True}}


@in_modes
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_step_of_no_length_moves_no_half(optimizer, way, flush, threads):
    p = parameter(FINITE, torch.ones_like(FINITE))
    before = bits(p).clone()
    with mode(flush, threads):
        getattr(fastclip, optimizer)([p], lr=0.0, **WAYS[way]).step()
    assert torch.equal(bits(p), before)


@in_modes
@pytest.mark.parametrize("way", WAYS)
def test_every_half_is_read_and_written(way, flush, threads):
    """Infinities and NaN, too: the first momentum is the gradient."""
    p = parameter(torch.zeros_like(HALVES), HALVES)
    optimizer = fastclip.SGD([p], lr=0.1, momentum=0.9, momentum_dtype=torch.float16, **WAYS[way])
    with mode(flush, threads):
        optimizer.step()
    assert torch.equal(bits(optimizer.state[p]["momentum_buffer"]), bits(p.grad))


def values_to_be_rounded():
    """Every half and the middle between it and the next, what lies next to both in float32, and any float32."""
    halves = FINITE.float().sort().values
    middles = (halves[1:] + halves[:-1]) / 2
    exact = torch.cat([halves, middles, torch.tensor([65520.0, -65520.0])])
    up, down = (torch.nextafter(exact, torch.tensor(towards)) for towards in (math.inf, -math.inf))
    anything = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
    values = torch.cat([exact, up, down, anything])
    return values[~values.isnan()]


@in_modes
@pytest.mark.parametrize("tail", range(9))
def test_rounding_to_halves_is_torchs(tail, flush, threads):
    """To nearest even, zeros with their sign; in runs of any length."""
    values = values_to_be_rounded()
    values = values[: len(values) - tail]
    p = parameter(torch.full_like(values, -0.0, dtype=torch.float16), -values)
    with mode(flush, threads):
        fastclip.SGD([p], lr=1.0).step()
    assert torch.equal(bits(p)[: len(values)], bits(values.half()))


RUNS = {
    "sgd": ("SGD", {"momentum": 0.9, "weight_decay": 0.01}),
    "adamw": ("AdamW", {"max_norm": 1e-3, "norm_type": math.inf}),
    "norm": ("SGD", {"max_norm": 1e-3}),
    "value clip": ("SGD", {"clip_value": 1e-6, "momentum": 0.9, "skip_nonfinite": True}),
    "bfloat16 momentum": ("AdamW", {"momentum_dtype": torch.bfloat16, "amsgrad": True}),
}


def steps(optimizer, settings, take_step=None):
    """Bits of all that some steps leave, and then norms: of halves of all magnitudes, most of them subnormal."""
    torch.manual_seed(1)
    params = [(torch.randn(n) * 2.0 ** -torch.randint(0, 26, (n,))).half().requires_grad_() for n in (70_001, 17)]
    optimizer = getattr(fastclip, optimizer)(params, lr=1e-3, **settings)
    norms = []
    for scale in (1e-5, 1e-7, 1.0):
        give_grads(params, scale=scale)
        take_step(optimizer) if take_step else optimizer.step()
        if optimizer.total_norm is not None:
            norms.append(optimizer.total_norm)
    states = [optimizer.state[p][name] for p in params for name in sorted(optimizer.state[p])]
    return [bits(value).clone() for value in params + states + norms]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("run", RUNS)
def test_steps_of_halves_are_the_same_in_every_mode(run, way):
    optimizer, settings = RUNS[run]
    found = []
    for flush, threads in MODES:
        with mode(flush, threads):
            found.append(steps(optimizer, {**settings, **WAYS[way]}))
    if run != "norm":  # whose sum has another order there
        with mode(True, 1):
            found.append(steps(optimizer, {**settings, **WAYS[way]}, reference_step))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@in_modes
def test_clips_of_subnormal_halves(flush, threads):
    grads = FINITE[FINITE.abs() < 2.0**-14]
    p, q = (parameter(torch.zeros_like(grads), grads) for _ in range(2))
    exact = math.hypot(*p.grad.double().tolist())
    with mode(flush, threads):
        norm = fastclip.clip_grad_norm_([p], exact / 3)
        fastclip.clip_grad_value_([q], 2.0**-20)
    assert math.isclose(norm.item(), exact, rel_tol=1e-6)
    expected = torch.cat([grads, grads]).double() / 3
    assert (p.grad.double() - expected).abs().max() <= 2.0**-25 * (1 + 1e-5)  # half of what is between two
    assert torch.equal(bits(q.grad), bits(torch.cat([grads, grads]).clamp(-(2.0**-20), 2.0**-20)))


# ---- what is subnormal in the type that it is computed in: the calling thread's mode counts ----

SUBNORMAL = {torch.float32: 1e-40, torch.bfloat16: 1e-40, torch.float64: 1e-310}


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("dtype", SUBNORMAL, ids=str)
def test_every_thread_computes_in_the_mode_of_the_calling_one(dtype, flush):
    """Which of them fetches an element is luck."""
    values = torch.full((2_000_000,), SUBNORMAL[dtype], dtype=dtype)
    expected = torch.zeros_like(values) if flush else values
    for _ in range(3):
        p = values.clone().requires_grad_()
        p.grad = torch.zeros_like(p)
        with mode(flush, 2):
            fastclip.SGD([p], lr=1.0).step()
        assert torch.equal(bits(p), bits(expected))


def test_other_threads_get_their_mode_back():
    p = torch.ones(2_000_000).requires_grad_()
    p.grad = torch.zeros_like(p)
    with mode(True, 2):
        for _ in range(5):
            fastclip.SGD([p], lr=1.0).step()
        torch.set_flush_denormal(False)
        subnormal = torch.full((2_000_000,), 1e-40)
        assert torch.equal(bits(subnormal * 1.0), bits(subnormal))


# ---- every instruction set ----


@pytest.mark.parametrize("wanted", ["AVX2", "baseline"])
def test_on_every_instruction_set(wanted):
    """The tests above, which ran on the best that there is."""
    if fastclip.build_info()["cpu_capability"] not in ("AVX512", "AVX2"):
        pytest.skip("ran on the only one")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "not instruction_set"]
    environment = {**os.environ, "FASTCLIP_CPU_CAPABILITY": wanted}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-4000:]
