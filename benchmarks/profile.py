"""python -m benchmarks profile: a few steps of one contender, for a profiler to look at."""

import argparse
import sys

import torch

from .core.contenders import CLIPS, CONTENDERS, RULES, Contender
from .core.models import MODELS
from .core.problem import Problem

BY_TITLE = {rule.title: rule for rules in RULES.values() for rule in rules}


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks profile", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--model", choices=MODELS, default="dense-100m", help="default: %(default)s")
    parser.add_argument("--clip", choices=CLIPS, default="value", help="default: %(default)s")
    parser.add_argument("--rule", choices=BY_TITLE, default="momentum 0", help="default: %(default)s")
    parser.add_argument("--contender", choices=CONTENDERS, default="fastclip", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"This torch ({torch.__version__}) sees no GPU.", file=sys.stderr)
        return 2
    copies = Problem(options.model, MODELS[options.model], device=options.device).copies[options.contender]
    contender = Contender(options.contender, copies, CLIPS[options.clip], BY_TITLE[options.rule])
    for _ in range(options.steps):
        contender.step()
    if options.device == "cuda":
        torch.cuda.synchronize()
    print(f"{options.steps} steps of {options.contender}: {options.model}, {options.clip} clip")
    return 0
