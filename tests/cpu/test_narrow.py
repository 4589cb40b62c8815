"""Conversions of numbers of 16 and of 8 bits, each by itself: here, and on an emulated ARM where its compiler is."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.project import CSRC, load_setup

setup = load_setup()
SOURCE, CODES = (Path(__file__).with_name(name) for name in ("narrow.cpp", "codes.cpp"))
NATIVE = ["g++", "clang++"]
ARM = ("aarch64-linux-gnu-g++", "qemu-aarch64")


def built(compiler, folder, source=SOURCE):
    program = folder / "check"
    flags = [f for f in setup.CXX_FLAGS if not f.startswith("-fvisibility")]
    subprocess.run([compiler, *flags, source, CSRC / "cpu/machine.cpp", "-o", program], check=True)
    return program


@pytest.mark.parametrize("compiler", NATIVE)
def test_codes_are_the_same_by_every_instruction_set(compiler, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    output = subprocess.run([built(compiler, tmp_path, CODES)], text=True, stdout=subprocess.PIPE, check=False)
    assert output.returncode == 0, output.stdout
    assert "portable: right" in output.stdout


def test_a_border_between_codes_that_has_moved_is_found(tmp_path):
    shutil.copytree(CSRC, tmp_path / "csrc")
    shutil.copytree(SOURCE.parent, tmp_path / "tests/cpu")
    loops = tmp_path / "csrc/cpu/codes.h"
    border = "smallest[level] = level == 0 ? 0 : Map::smallest(level);"
    assert border in loops.read_text()
    loops.write_text(
        loops.read_text().replace(border, border.replace("(level);", "(level) * (level == 5 ? 1.0000002f : 1);"))
    )
    output = subprocess.run(
        [built("g++", tmp_path, tmp_path / "tests/cpu/codes.cpp")], text=True, stdout=subprocess.PIPE
    )
    if "AVX2" not in output.stdout:
        pytest.skip("needs AVX2")
    assert output.returncode == 1 and "AVX2 write: " in output.stdout


@pytest.mark.parametrize("compiler", NATIVE)
def test_each_conversion_is_exact_in_every_mode(compiler, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    output = subprocess.run([built(compiler, tmp_path)], text=True, stdout=subprocess.PIPE, check=False)
    assert output.returncode == 0, output.stdout
    assert "portable: right" in output.stdout
    if platform.machine() == "aarch64":
        assert "NEON: right" in output.stdout


def test_the_instructions_of_arm(tmp_path):
    if missing := [tool for tool in ARM if not shutil.which(tool)]:
        pytest.skip(f"needs {' and '.join(missing)}")
    program = built(ARM[0], tmp_path)
    output = subprocess.run(
        [ARM[1], "-L", "/usr/aarch64-linux-gnu", program], text=True, stdout=subprocess.PIPE, check=False
    )
    assert output.stdout == "portable: right\nNEON: right\n"
    code = setup.nvcc.output("aarch64-linux-gnu-objdump", "-d", "-C", program)
    assert "fcvtl" in code and "fcvtn" in code  # four at a time


def test_a_conversion_through_subnormal_numbers_is_found(tmp_path):
    """As it was: the product of a subnormal float32 is 0 where these are flushed."""
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    shutil.copytree(SOURCE.parent, tmp_path / "tests/cpu")
    source = tmp_path / "tests/cpu" / SOURCE.name
    text = (csrc / "rules/dtypes.h").read_text()
    exact = "magnitude < 0x00800000u ? subnormal : normal"
    assert exact in text
    (csrc / "rules/dtypes.h").write_text(text.replace(exact, "bits_from_float(float_from_bits(magnitude) * 0x1p112f)"))
    program = built("g++", tmp_path, source)
    output = subprocess.run([program], text=True, stdout=subprocess.PIPE, check=False)
    assert output.returncode == 1 and "portable float16 read, flushing: 00000001 became" in output.stdout
