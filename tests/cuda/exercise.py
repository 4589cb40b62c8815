"""python -m tests.cuda.exercise: steps on a GPU against the same steps on the CPU, without pytest.

For machines that have no pytest, and for tools that slow everything down too much for the tests (compute-sanitizer).
Only fastclip's kernels and copies run on the device.
"""

import argparse
import itertools
import sys

import torch

import fastclip
from tests.support.cases import CLIPS, RULES, SHAPES

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PLAIN, MOMENTUM, NESTEROV = RULES[0], RULES[5], RULES[15]
ADAMW, AMSGRAD = {"optimizer": "AdamW"}, {"optimizer": "Adam", "amsgrad": True, "weight_decay": 0.01}
# What measures each tensor before its update: a last bit of the sums may differ.
MEASURING = {
    "ScaledAdam": {"optimizer": "ScaledAdam", "max_norm": 2.0},
    "LAMB": {"optimizer": "LAMB", "max_grad_norm": 1.0},
    "max_update_rms": {**ADAMW, "max_update_rms": 1.0, "max_norm": 1e9},
    "max_change": {**ADAMW, "max_change": 0.1, "max_norm": 1.0},
    "max_relative_change of each": {**ADAMW, "max_relative_change": 0.01, "norm_scope": "parameter", "max_norm": 1.0},
    "max_change of each": {**MOMENTUM, "max_change": 0.1, "norm_scope": "parameter", "max_norm": 1.0},
}
STEPS = 3
# Where a norm is summed in another order, the last bit of a coefficient may differ.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def cases(small):
    """(name, [(shape, dtype), ...], settings) of each case."""
    for dtype, rule, clip in itertools.product(DTYPES, (PLAIN, MOMENTUM, NESTEROV, ADAMW, AMSGRAD), CLIPS):
        if not small or rule in (MOMENTUM, NESTEROV) or dtype is torch.float32:
            words = ", ".join(f"{key} {value}" for key, value in rule.items() if value)
            name = f"{str(dtype).removeprefix('torch.')}, {clip}, {words or 'plain'}"
            yield name, [(shape, dtype) for shape in SHAPES], {**rule, **CLIPS[clip]}
    for dtype, (name, settings) in itertools.product(DTYPES, MEASURING.items()):
        if not small or dtype is torch.float32:
            yield f"{str(dtype).removeprefix('torch.')}, {name}", [(shape, dtype) for shape in SHAPES], settings
    mixed = list(itertools.product(SHAPES, DTYPES))
    for clip in ("value and norm",) if small else ("value", "norm", "inf norm", "value and norm"):
        yield f"mixed dtypes, {clip}", mixed, {**MOMENTUM, **CLIPS[clip]}
        yield f"mixed dtypes, {clip}, AdamW", mixed, {**ADAMW, **CLIPS[clip]}
        yield f"1,200 tensors, {clip}, AdamW", 1200 * [((5,), torch.float32)], {**ADAMW, **CLIPS[clip]}
        yield f"600 tensors, {clip}", 600 * [((5,), torch.float32)], {**MOMENTUM, **CLIPS[clip]}
        yield f"1,200 tensors, {clip}", 1200 * [((5,), torch.float32)], {**MOMENTUM, **CLIPS[clip]}
        if not small:  # more chunks than blocks fit the largest GPU
            yield f"33M elements, {clip}", [((2**25 + 7,), torch.float32)], {**MOMENTUM, **CLIPS[clip]}


def main(arguments=None):
    """Returns the exit code: 1 where a case differs, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m tests.cuda.exercise", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--device", default="cuda", help="cpu is a rehearsal; default: %(default)s")
    parser.add_argument("--small", action="store_true", help="fewer and smaller cases")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"This torch ({torch.__version__}) sees no GPU.", file=sys.stderr)
        return 2
    count, wrong = 0, 0
    for name, tensors, settings in cases(options.small):
        count += 1
        found = difference(tensors, settings, options.device)
        if found:
            wrong += 1
            print(f"differs: {name}: {found}", flush=True)
    print(f"exercise: {count} cases on {options.device}, {wrong} differ")
    return 1 if wrong else 0


def difference(tensors, settings, device):
    """What differs after a few steps; None where nothing does."""
    generator = torch.Generator().manual_seed(0)

    def random(shape, dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    expected = [random(shape, dtype).requires_grad_() for shape, dtype in tensors]
    found = [views(p.detach(), device).requires_grad_() for p in expected]
    settings = {"lr": 0.1, **settings}
    cls = getattr(fastclip, settings.pop("optimizer", "SGD"))
    optimizers = [cls(params, **settings) for params in (expected, found)]
    for _ in range(STEPS):
        for a, b in zip(expected, found, strict=True):
            a.grad = random(a.shape, a.dtype)
            b.grad = views(a.grad, device)
        for optimizer in optimizers:
            optimizer.step()
    norm = not {"max_norm", "max_grad_norm"}.isdisjoint(settings)
    if norm:
        a, b = (float(optimizer.total_norm) for optimizer in optimizers)
        if abs(a - b) > 1e-9 * abs(a):
            return f"norm {b!r} instead of {a!r}"
    for index, (a, b) in enumerate(zip(expected, found, strict=True)):
        pairs = {"parameter": (a.detach(), b.detach().cpu())}
        for name, value in optimizers[0].state.get(a, {}).items():
            pairs[name] = (value, optimizers[1].state[b][name].cpu())
        for kind, (x, y) in pairs.items():
            rtol = TOLERANCE[a.dtype] if norm else 0
            if not torch.allclose(y, x, rtol=rtol, atol=rtol):
                largest = (x.double() - y.double()).abs().max().item()
                return f"{kind} {index} of shape {tuple(a.shape)} and {a.dtype} by up to {largest:.3g}"
    return None


def views(tensor, device):
    """A copy on the device; of odd lengths it begins at an address that is no multiple of 16 bytes."""
    if tensor.dim() != 1 or tensor.numel() % 2 == 0:
        return tensor.to(device, copy=True)
    room = torch.cat([tensor[:1], tensor]).to(device)
    return room[1:]


if __name__ == "__main__":
    sys.exit(main())
