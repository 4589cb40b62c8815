"""Conversions of 16-bit numbers, each by itself: on this machine, and on an emulated ARM where its compiler is."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.project import CSRC, load_setup

setup = load_setup()
SOURCE = Path(__file__).with_name("narrow.cpp")
NATIVE = ["g++", "clang++"]
ARM = ("aarch64-linux-gnu-g++", "qemu-aarch64")


def built(compiler, folder, source=SOURCE):
    program = folder / "check"
    flags = [f for f in setup.CXX_FLAGS if not f.startswith("-fvisibility")]
    subprocess.run([compiler, *flags, source, CSRC / "cpu/machine.cpp", "-o", program], check=True)
    return program


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
    (tmp_path / "tests/cpu").mkdir(parents=True)
    source = shutil.copy(SOURCE, tmp_path / "tests/cpu")
    text = (csrc / "rules/dtypes.h").read_text()
    exact = "magnitude < 0x00800000u ? subnormal : normal"
    assert exact in text
    (csrc / "rules/dtypes.h").write_text(text.replace(exact, "bits_from_float(float_from_bits(magnitude) * 0x1p112f)"))
    program = built("g++", tmp_path, source)
    output = subprocess.run([program], text=True, stdout=subprocess.PIPE, check=False)
    assert output.returncode == 1 and "portable float16 read, flushing: 00000001 became" in output.stdout
