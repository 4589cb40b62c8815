"""The CPU's tests, on the real CUDA kernels: by an extension that is linked with the stand-in of `on_cpu/`."""

import re

import pytest

from .on_cpu import build


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """A fastclip whose CPU steps are taken by the CUDA kernels."""
    folder = tmp_path_factory.mktemp("emulated")
    return folder, build.package(folder)


STEP_TESTS = ["step/test_step", "step/test_norm", "step/test_adam", "step/test_precision"]
TWO_LAUNCHES = ["step/test_norm", "step/test_skip_nonfinite", "step/test_scaled_adam", "cuda/on_cpu/two_launches"]
RANDOM = [*STEP_TESTS, "step/test_scaled_adam", "step/test_lamb"]
ALL_TESTS = [
    *STEP_TESTS,
    "step/test_quantized",
    "step/test_clip_grad",
    "step/test_skip_nonfinite",
    "step/test_deferred",
    "step/test_clip_stats",
    "step/test_change",
    "step/test_norm_rules",
    "step/test_norm_scope",
    "step/test_novograd",
    "step/test_change_scope",
    "step/test_lamb",
    "step/test_scaled_adam",
    "step/test_norm_diagnostics",
    "drop_in/test_histories",
    "drop_in/test_drop_in",
    "step/test_errors",
    "step/test_layouts",
    "step/test_numbers",
    "step/test_between_steps",
    "step/test_not_covered",
    "concurrency/test_threads",
    "concurrency/test_meanwhile",
    "concurrency/test_processes",
    "drop_in/test_amp",
]
# A model that learns for a quarter of a minute shows nothing about kernels that one step does not.
# No GPU kernel has states in 8 bits beside these, and a step in plain torch has other square roots than the reference.
# A child that is forked in the middle of a step waits for the emulated device's lock.
NOT_EMULATED = [
    "--deselect=tests/concurrency/test_processes.py::test_data_loader_workers_beside_steps",
    "--deselect=tests/step/test_quantized.py::test_same_bits_with_amsgrad",
    "--deselect=tests/step/test_quantized.py::test_clips_see_the_same_numbers_as_in_the_reference",
    "--deselect=tests/step/test_precision.py::test_a_model_in_bfloat16_learns_as_in_float32_but_with_plain_rounding",
]


@pytest.mark.parametrize(
    ("schedule", "cooperative", "files"),
    [
        pytest.param("in order", 1, ALL_TESTS, id="in order"),
        pytest.param(
            "reversed",
            1,
            [*STEP_TESTS, "step/test_deltas", "step/test_quantized"],
            id="reversed",
            marks=pytest.mark.thorough,
        ),
        pytest.param("random", 1, RANDOM, id="random"),
        pytest.param("reversed", 0, TWO_LAUNCHES, id="two launches"),
    ],
)
def test_the_tests_of_the_cpu_pass_on_the_kernels(schedule, cooperative, files, emulated):
    folder, variables = emulated
    variables = {**variables, "FASTCLIP_SCHEDULE": schedule, "FASTCLIP_COOPERATIVE": str(cooperative)}
    result = build.run_tests(folder, variables, *NOT_EMULATED, *(f"tests/{name}.py" for name in files))
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) >= 100, result.stdout[-500:]


def test_launches_and_bytes(emulated):
    """What a step costs on a GPU, counted: see on_cpu/counts.py."""
    result = build.run_tests(*emulated, "tests/cuda/on_cpu/counts.py")
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-6000:] + result.stderr[-2000:]


def test_ranks_of_a_sharded_model(emulated):
    """Each a process with an emulated GPU of its own, and one norm."""
    result = build.run_tests(*emulated, "tests/cuda/on_cpu/ranks.py")
    assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout[-6000:] + result.stderr[-2000:]
