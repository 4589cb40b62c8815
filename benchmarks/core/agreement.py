"""Before anything is timed: do all contenders compute the same?"""

import torch

from .contenders import OF_TORCH, Contender

# Factors of the gradients in the three steps. In small models the second's norm stays below the limit. All have one
# sign, as a sum that cancels magnifies rounding.
FACTORS = (3.0, 0.1, 1.0)

# Norm clip: torch's norms are sums in float32, which lose up to 2e-3 at 30M elements (recorded in the results).
NORM_TOLERANCE = {"fastclip": 1e-6, "loop": 1e-2, "foreach": 1e-2, "fused": 1e-2}

# What a rule computes from square roots, as Adam's parameters: torch takes them from MKL, whose last bit may differ.
ROOT_TOLERANCE = 5e-7

# In 16 bits torch rounds the norm, the coefficient and the clipped gradients, where fastclip rounds the result only.
NORM_TOLERANCE_16_BIT = 5e-2

PIECE = 2**18  # elements that are compared at a time: they stay in the cache


class Disagreement(Exception):
    """A contender does not compute what the others do: its time would say nothing."""


def check(problem, clip, rule, threads=(1,)):
    """Takes three steps of every contender from the same start, and compares parameters and states.

    The steps take turns with the thread counts. Value clip: fastclip has to give the bits of the loop (but for
    `rule.rounded`), torch's own variants 1e-6; on CUDA and in 16 bits, all one unit in the last place per step. Norm
    clip: all are compared with the loop in float64.

    Returns:
        dict: the largest deviation of each contender, relative to the largest element of its tensor.

    Raises:
        Disagreement: names the contender and the tensor.
    """
    by_norm = clip[0] == "norm"
    if by_norm:
        reference = three_steps(problem, "loop", problem.copy(torch.float64), clip, rule, threads)
    else:
        reference = three_steps(problem, "loop", problem.copies["loop"], clip, rule, threads)
    deviations = {}
    for name in rule.contenders:
        if by_norm or name != "loop":
            result = three_steps(problem, name, problem.copies[name], clip, rule, threads)
            tolerance = norm_tolerance(name, problem) if by_norm else value_tolerance(name, problem)
            rounded = dict.fromkeys(rule.rounded, max(tolerance, ROOT_TOLERANCE))
            deviations[name] = compare(name, result, reference, tolerance, rounded)
    return deviations


def three_steps(problem, name, copies, clip, rule, threads):
    """Returns parameters and states after three steps of a contender."""
    # From zero, the parameters are the sum of the updates. So no parameter hides the error of a norm, and no update in
    # 16 bits vanishes in one.
    problem.reset_params(copies, from_zero=clip[0] == "norm" or problem.dtype.itemsize == 2)
    contender = Contender(name, copies, clip, rule)
    for index, factor in enumerate(FACTORS):
        torch.set_num_threads(threads[index % len(threads)])
        problem.reset_grads(copies, factor)
        contender.step()
    return contender.results()


def norm_tolerance(name, problem):
    return NORM_TOLERANCE_16_BIT if problem.dtype.itemsize == 2 else NORM_TOLERANCE[name]


def value_tolerance(name, problem):
    if problem.dtype.itemsize == 2:
        return len(FACTORS) * torch.finfo(problem.dtype).eps
    if problem.device.type == "cuda":
        # torch's compiler chooses which products of its CUDA kernels become an fma.
        return 1e-6 if name in OF_TORCH[1:] else len(FACTORS) * torch.finfo(problem.dtype).eps
    # torch's add(other, alpha) is an fma only in its vectorised kernels, and fastclip follows those.
    vectorised = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return 1e-6 if name in OF_TORCH[1:] or not vectorised else 0.0


def compare(name, result, reference, tolerance, rounded=None):
    """Returns the largest deviation. Disagreement: one is above `tolerance`, or above that of its kind in `rounded`. A
    tolerance of 0 means the same bits."""
    largest = 0.0
    for kind, expected_tensors in reference.items():
        allowed = (rounded or {}).get(kind, tolerance)
        if len(result[kind]) != len(expected_tensors):
            raise Disagreement(f"{name}: {len(result[kind])} {kind} tensors instead of {len(expected_tensors)}")
        for index, (tensor, expected) in enumerate(zip(result[kind], expected_tensors, strict=True)):
            same = tensor.dtype == expected.dtype and torch.equal(tensor, expected)
            deviation = 0.0 if same else relative_deviation(tensor, expected)
            if not (same or deviation <= allowed > 0):  # a NaN is neither
                raise Disagreement(
                    f"{name}: {kind} {index} of shape {tuple(expected.shape)} is off by {deviation:.2g} "
                    f"after {len(FACTORS)} steps, where {allowed:.2g} is allowed"
                )
            largest = max(largest, deviation)
    return largest


def relative_deviation(tensor, expected):
    """Returns the largest difference over the largest element: an element near 0 has no relative accuracy."""
    pieces = [t.flatten().split(PIECE) for t in (tensor, expected)]
    differences = [piece.double().sub_(wanted).abs_().max() for piece, wanted in zip(*pieces, strict=True)]
    largest = [torch.linalg.vector_norm(wanted, torch.inf) for wanted in pieces[1]]
    return (torch.stack(differences).max() / torch.stack(largest).max().double()).item()
