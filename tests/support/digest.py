"""python -m tests.support.digest: the bits of all rules, dtypes and clips in one number, the same on every machine.

Inputs come from exact arithmetic: torch's random numbers differ between instruction sets.
"""

import hashlib
import sys

import numpy
import torch

import fastclip

RULES = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "AdamW": {"lr": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
    "Lion": {"lr": 0.01},
    "RMSprop": {"lr": 0.01, "momentum": 0.5, "centered": True},
    "Adagrad": {"lr": 0.01},
    "Adadelta": {"lr": 0.5},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "NovoGrad": {"lr": 0.01, "weight_decay": 0.01},
    "LAMB": {"lr": 0.01, "weight_decay": 0.1, "max_grad_norm": None, "max_update_rms": 0.5},
}
# The averages of large parameters in 8 bits.
IN_8_BITS = {f"{name}_8": {**RULES[name], "state_bits": 8} for name in ("SGD", "AdamW", "Adam", "Lion")}
# Arrays of 16 bits that are rounded at random: in registers on some machines, staged on others.
AT_RANDOM = {
    f"{name}_random": {**RULES[name], "stochastic_rounding": True, "rounding_seed": 3}
    for name in ("SGD", "Adam", "Lion")
}
ALL = RULES | IN_8_BITS | AT_RANDOM
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CLIPS = (
    {},
    {"clip_value": 0.25},
    {"max_norm": 0.5},
    {"max_norm": 0.1, "norm_type": float("inf")},
    {"clip_value": 0.3, "max_norm": 1.0},
)
SIZES = (1, 17, 100, 20_003)  # in runs, in chunks, and in chunks that are read side by side


def of_rule(name, settings):
    """Returns a digest of parameters and norms after three steps, of each dtype with each clip."""
    digest = hashlib.sha256()
    for dtype in DTYPES:
        for clip in CLIPS:
            optimizer_class = getattr(fastclip, name.partition("_")[0])
            if optimizer_class._rule.needs_norm and "norm_type" in clip:
                continue  # refused
            random = numpy.random.default_rng(7)

            def draw(size, random=random, dtype=dtype):
                values = torch.from_numpy(random.random(size) - 0.5)
                # By way of float32, as torch does on x86; on ARM it rounds once.
                return values if dtype == torch.float64 else values.float().to(dtype)

            params = [draw(size).requires_grad_() for size in SIZES]
            optimizer = optimizer_class(params, **settings, **clip)
            for _ in range(3):
                for p in params:
                    p.grad = draw(p.numel())
                optimizer.step()
            for p in params:
                # An invalid operation gives a NaN with a sign on x86 and without one on ARM.
                digest.update(torch.where(p.isnan(), torch.nan, p).detach().double().numpy().tobytes())
            if optimizer.total_norm is not None:
                digest.update(optimizer.total_norm.numpy().tobytes())
    return digest.hexdigest()[:16]


def main(names):
    print(fastclip.build_info()["cpu_capability"])
    for name in names or ALL:
        print(name, of_rule(name, ALL[name]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
