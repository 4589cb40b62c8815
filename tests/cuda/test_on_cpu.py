"""The real CUDA kernels and launches, executed on the CPU by the stand-in of `on_cpu/`, in several schedules.

Also the tests of that tester: bugs planted into the kernels have to be found.
"""

import subprocess

import pytest

from .on_cpu import build

SCHEDULES = {"in order": 0, "reversed": 1, "random": 2}
DEVICES = {"cooperative": 0, "not cooperative": 1, "little shared memory": 2}


def run(program, *arguments):
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def check_program(tmp_path_factory):
    """Builds check_step.cpp with the kernels of a copy of csrc; the rest is compiled once for each sanitizer, with all
    rules or with few."""
    compiled = {}

    def build_program(sanitizer, csrc, few_rules=True):
        folder = tmp_path_factory.mktemp("check_step")
        of_rest = "plain" if sanitizer == "quick" else sanitizer
        if (of_rest, few_rules) not in compiled:
            rest = (build.HERE / "check_step.cpp", build.HERE / "cuda_on_cpu.cpp", *(csrc / "cpu").glob("*.cpp"))
            compiled[of_rest, few_rules] = build.objects(folder / "rest", of_rest, *rest, csrc=csrc)
        kernels = build.objects(folder, sanitizer, csrc / "cuda/step.cu", csrc=csrc)
        build.compile_(sanitizer, *kernels, *compiled[of_rest, few_rules], "-o", folder / "check_step")
        return folder / "check_step"

    return build_program


@pytest.fixture(scope="module")
def plain(check_program, tmp_path_factory):
    return check_program("plain", build.copied(tmp_path_factory.mktemp("plain")), few_rules=False)


@pytest.mark.parametrize("sanitizer", ["plain", "asan"])
def test_the_stand_in_itself(sanitizer, tmp_path):
    """Toy kernels: barriers, shuffles and atomics in all schedules; what is wrong is reported."""
    program = tmp_path / "self_test"
    sources = [build.HERE / "self_test.cpp", build.HERE / "cuda_on_cpu.cpp"]
    build.compile_(sanitizer, f"-I{build.HERE}", *sources, "-o", program)
    result = run(program)
    assert result.returncode == 0 and "0 failures" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_random_steps_equal_the_cpus(schedule, device, plain):
    """Rules, dtypes, norms, sizes, alignments, groups, NaN; one device, and two that share a norm; to the bit."""
    result = run(plain, SCHEDULES[schedule], DEVICES[device], 200, 1000 * DEVICES[device])
    assert result.returncode == 0 and result.stdout == "200 steps, 0 different\n", result.stdout + result.stderr


def test_a_tensor_of_more_than_2_to_the_31_elements(plain):
    result = run(plain, "huge")
    assert result.returncode == 0 and result.stdout == "huge: right\n", result.stdout + result.stderr


def test_no_access_out_of_bounds_and_no_undefined_behaviour(check_program, tmp_path):
    program = check_program("asan", build.copied(tmp_path, few_rules=True))
    for device in DEVICES.values():
        result = run(program, 2, device, 30, 5000)
        assert result.returncode == 0 and result.stdout == "30 steps, 0 different\n", (
            result.stdout + result.stderr[-4000:]
        )


@pytest.mark.parametrize("steps", [16, pytest.param(150, marks=pytest.mark.thorough)])
def test_no_race_between_threads(steps, check_program, tmp_path):
    """Each CUDA thread is a thread of ThreadSanitizer's: it sees a race whatever order they happened to run in."""
    program = check_program("tsan", build.copied(tmp_path, few_rules=True))
    result = run(program, SCHEDULES["random"], DEVICES["little shared memory"], steps, 0)
    good = f"{steps} steps, 0 different\n"
    assert result.returncode == 0 and result.stdout == good, result.stdout + result.stderr[-4000:]


# (file, what is right, what is planted, sanitizer, arguments of check_step)
STEPS = (0, 0, 60)
BUGS = {
    "tail left out": ("cuda/tiles.cuh", "size - full * kFull;", "size - full * kFull - 1;", STEPS),
    "tile of the next tensor": ("cuda/kernels.cuh", "rest < header.tile ? rest", "rest < 0 ? rest", STEPS),
    "wrong tensor": ("cuda/table.cuh", "first_tile <= tile", "first_tile < tile", STEPS),
    "first momentum damped": (
        "cuda/tiles.cuh",
        "terms_of(hyper.terms, entry.is_first)",
        "terms_of(hyper.terms, false)",
        (0, 0, 200),
    ),
    "momentum of a group that has none": (
        "cuda/tiles.cuh",
        "writes = R::writes(terms);",
        "writes = (1 << kStates) - 1;",
        STEPS,
    ),
    "aligned where it is not": (
        "cuda/step.cu",
        "entry.aligned = is_aligned(entry.param) && is_aligned(entry.grad);",
        "entry.aligned = is_aligned(entry.param) || is_aligned(entry.grad);",
        STEPS,
    ),
    "no barrier before the sum of a block": (
        "cuda/kernels.cuh",
        "= sum;\n  __syncthreads();\n  if (threadIdx.x == 0) {\n    for",
        "= sum;\n  if (threadIdx.x == 0) {\n    for",
        STEPS,
    ),
    "no barrier before a block arrives": (
        "cuda/kernels.cuh",
        "  __syncthreads();  // the block's tiles are measured\n",
        "",
        (2, 0, 200),
    ),
    "no barrier between decision and update": (
        "cuda/kernels.cuh",
        "  __syncthreads();\n  const bool remembers",
        "  const bool remembers",
        (1, 0, 60),
    ),
    "no waiting for the grid": (
        "cuda/kernels.cuh",
        "while (outcome.opened == opened) __nanosleep(64);",
        "",
        STEPS,
    ),
    "the largest square left out": (
        "rules/adam.h",
        "writes(Terms terms) { return reads(terms); }",
        "writes(Terms terms) { return 3; }",
        STEPS,
    ),
    "steps counted while others update": (
        "cuda/kernels.cuh",
        "    if (!shared().last) return;\n    const auto",
        "    if (blockIdx.x != 0) return;\n    const auto",
        (2, 0, 200),
    ),
    "steps counted by head and rest": (
        "cuda/step.cu",
        "entry.first_of_tensor = begin == 0;",
        "entry.first_of_tensor = true;",
        STEPS,
    ),
    "steps of a skipped step": (
        "cuda/kernels.cuh",
        "    if (decision.skip) return;\n",
        "    if (decision.skip) return count_steps<K, kDTypes>(arguments, segments, tensors);\n",
        (0, 0, 400),
    ),
    "count of finished blocks not reset": (
        "cuda/kernels.cuh",
        "atomicExch(&header.outcome->finished, 0u);",
        ";",
        STEPS,
    ),
    "counter not reset": ("cuda/kernels.cuh", "atomicExch(&header.outcome->arrived, 0u);", "", STEPS),
    "counts of an earlier step": (
        "cuda/kernels.cuh",
        "i < kMaxBlocks; i += kThreads * gridDim.x",
        "i < gridDim.x; i += kThreads * gridDim.x",
        STEPS,
    ),
    "slot of another tile": ("cuda/kernels.cuh", "round * kWarps + warp;", "round * kWarps;", STEPS),
    "more slots than there are": (
        "cuda/kernels.cuh",
        "if (slots && slot < header.slots)",
        "if (slots)",
        (0, DEVICES["little shared memory"], 60),
    ),
    "shared memory read as global": (
        "cuda/mixed.cuh",
        "read<kSize, From::shared>(slot",
        "read<kSize>(slot",
        STEPS,
    ),
    "32-bit offset": (
        "cuda/kernels.cuh",
        "static_cast<int64_t>(tile - entry.first_tile) * header.tile",
        "static_cast<int32_t>(tile - entry.first_tile) * header.tile",
        ("huge",),
    ),
    "a norm remembered before all have read": (
        "rules/norm_limit.h",
        "  workers.sync();  // all have read what the first one changes\n",
        "",
        STEPS,
    ),
    "neighbours overwritten before they have moved": (
        "cuda/decision.cuh",
        "(to < from ? round : rounds - 1 - round)",
        "round",
        (0, 0, 200),
    ),
    "the norm of an earlier level": (
        "cuda/kernels.cuh",
        "if (threadIdx.x == kThreads - 1) read_levels(header);  // meanwhile\n",
        "",
        STEPS,
    ),
    "a norm remembered by each block": (
        "cuda/kernels.cuh",
        "if (remembers && blockIdx.x == 0 && ",
        "if (remembers && ",
        STEPS,
    ),
    "a segment summed before its last tile is measured": (
        "cuda/segments.cuh",
        "measures, first + lane, end, kWarp));\n  };",
        "measures, first + lane, end - 1, kWarp));\n  };",
        STEPS,
    ),
    "count of a segment's tiles not reset": ("cuda/segments.cuh", "atomicExch(&outcome.measured, 0u);", "", STEPS),
    "segments of many tiles left out": (
        "cuda/kernels.cuh",
        "if (header.segments_by_block > 0) sum_large_segments",
        "if (header.segments_by_block > 1000) sum_large_segments",
        STEPS,
    ),
    "one factor for all segments": (
        "cuda/kernels.cuh",
        "auto factors = factors_of_tile<K>(header, segments, tile, scaling);",
        "auto factors = factors_of_tile<K>(header, segments, 0, scaling);",
        STEPS,
    ),
    "the level of a segment after its norm": (
        "cuda/segments.cuh",
        "outcome.level = level_of(segments.limits[row.group], row.history);",
        "",
        STEPS,
    ),
    "a segment's norm remembered by each block": (
        "cuda/segments.cuh",
        "segment += gridDim.x * kWarps)",
        "segment += kWarps)",
        STEPS,
    ),
    "norms of segments remembered beside a NaN": (
        "rules/segment.h",
        "return !decision.skip || decision.total_norm < HUGE_VAL;",
        "return true;",
        (0, 0, 400),
    ),
    "groups count alike in the change": (
        "cuda/kernels.cuh",
        "multiplied(header.norm, sum, change)",
        "multiplied(header.norm, sum, 1.0)",
        STEPS,
    ),
    "parameters measured before they are rounded": (
        "cuda/tiles.cuh",
        "updated.params, load(param.values[j]));",
        "updated.params, x);",
        (0, 0, 200),
    ),
    "parameters that are not measured anew": (
        "cuda/kernels.cuh",
        "if (entry.param_is_measured) return;",
        "return;",
        STEPS,
    ),
    "a tensor without a gradient is updated": (
        "cuda/kernels.cuh",
        "if (K::kHasUnstepped && !entry.grad) return;",
        "",
        STEPS,
    ),
    "tensors of many tiles, or none, left out": (
        "cuda/kernels.cuh",
        "i < header.tensors_by_block",
        "i < 0",
        (0, 0, 200),
    ),
    "count of a tensor's tiles not reset": ("cuda/tensors.cuh", "atomicExch(&outcome.measured, 0u);", "", STEPS),
    "a head taken for its whole tensor": (
        "cuda/tensors.cuh",
        "i < (&row + 1)->first_entry",
        "i < row.first_entry + 1",
        (0, 0, 400),
    ),
    "factors of learning rates used before all are written": (
        "cuda/kernels.cuh",
        "change;\n  }\n  __syncthreads();  // all factors are written\n",
        "change;\n  }\n",
        (2, 0, 1500, 800),
    ),
    "factors of a rule's clip used before all are written": (
        "cuda/kernels.cuh",
        "shared().factor;\n    }\n  }\n  __syncthreads();  // all factors are written\n",
        "shared().factor;\n    }\n  }\n",
        (2, 0, 1500),
    ),
    "what is added used before all have met": (
        "cuda/kernels.cuh",
        "__syncthreads();  // the others wait for thread 0",
        "",
        (1, 0, 400),
    ),
    "one factor of the learning rate for all tensors": (
        "cuda/kernels.cuh",
        "add_tensor(header, table, tensors, tensor_of(header, tensors.rows, tile), factors);",
        "add_tensor(header, table, tensors, 0, factors);",
        (0, 0, 200),
    ),
    "what is added measured before the clip": (
        "cuda/kernels.cuh",
        "factors_of_tile<K>(header, segments, tile, scaling),",
        "{},",
        (0, 0, 200),
    ),
    "a decay that is not seen in what is added": (
        "cuda/tiles.cuh",
        "(sees_grads && R::delta_reads_param(terms))",
        "false",
        (0, 0, 600),
    ),
    "products of gradients before their clip": (
        "cuda/tensors.cuh",
        "outcome.sums[0].medium * factors.product();",
        "outcome.sums[0].medium;",
        (0, 0, 400),
    ),
    "a rule's clip of the first group for all": (
        "cuda/kernels.cuh",
        "clipped = tensors.groups[group];",
        "clipped = tensors.groups[0];",
        (0, 0, 400),
    ),
    "a rule's clip remembers a skipped step": (
        "cuda/kernels.cuh",
        "  if (skip) return;\n",
        "",
        (0, 0, 400),
    ),
    "limits on the change of the first group for all": (
        "cuda/segments.cuh",
        "limit_change(segments.changes[row.group]",
        "limit_change(segments.changes[0]",
        (0, 0, 400),
    ),
    "AMP skips a step without a norm": (
        "cuda/step.cu",
        "header.levels = step.outcome ? &step.outcome->levels : nullptr;",
        "",
        (0, 0, 400),
    ),
    "table not uploaded again": (
        "cuda/step.cu",
        "if (bytes == table.uploaded) return cudaSuccess;",
        "return cudaSuccess;",
        STEPS,
    ),
}


# One of each kind; the others take `make thorough`.
EACH_TIME = {
    "tail left out",
    "no waiting for the grid",
    "steps of a skipped step",
    "shared memory read as global",
    "a norm remembered before all have read",
    "a segment summed before its last tile is measured",
    "products of gradients before their clip",
    "table not uploaded again",
}


def test_those_of_each_time_are_there():
    assert set(BUGS) >= EACH_TIME


def planted(folder, name):
    """A copy of csrc with a bug."""
    file, right, wrong, _ = BUGS[name]
    csrc = build.copied(folder, few_rules=True)
    text = (csrc / file).read_text()
    assert text.count(right) == 1, f"{name}: what is to be replaced is there {text.count(right)} times"
    (csrc / file).write_text(text.replace(right, wrong))
    return csrc


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_can_be_planted(bug, tmp_path):
    """So that `make thorough` finds what it looks for, whatever has changed since."""
    planted(tmp_path, bug)


@pytest.mark.parametrize(
    "bug", [pytest.param(bug, marks=() if bug in EACH_TIME else pytest.mark.thorough) for bug in BUGS]
)
def test_a_planted_bug_is_found(bug, tmp_path, check_program):
    result = run(check_program("quick", planted(tmp_path, bug)), *BUGS[bug][-1])
    assert result.returncode != 0, result.stdout


@pytest.mark.thorough
def test_a_race_that_happens_to_go_well_is_found(tmp_path, check_program):
    """Under the schedule that hides it: the reader runs last anyway."""
    csrc = planted(tmp_path, "no barrier before the sum of a block")
    result = run(check_program("tsan", csrc), 1, DEVICES["little shared memory"], 4, 0)
    assert result.returncode != 0 and "data race" in result.stderr
    assert "0 different" in result.stdout, "the schedule gave it away: this shows nothing about races"
