"""A program in C99 includes fastclip.h, links libfastclip.so alone, and trains to the bits of Python."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastclip
from fastclip import _extension
from tests.support.project import ROOT

from .library import FOLDER, LIBRARY

HERE = Path(__file__).parent
RELEASE = _extension._chosen.replace(".", "_")
NEEDED = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
NEEDED |= {"libdl.so.2", "librt.so.1", "libpthread.so.0"}  # of the CUDA half, with an older glibc


@pytest.fixture(scope="module", params=["cc", "c++"])
def program(request, tmp_path_factory):
    if not shutil.which(request.param):
        pytest.skip(f"needs {request.param}")
    target = tmp_path_factory.mktemp("c") / "train"
    flags = ["-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{FOLDER / 'include'}"]
    language = ["-std=c99"] if request.param == "cc" else ["-x", "c++", "-std=c++11"]
    source = [*language, HERE / "train.c", "-x", "none"]
    link = [f"-L{FOLDER}", "-lfastclip", f"-Wl,-rpath,{FOLDER}", "-o", target]
    subprocess.run([request.param, *flags, *source, *link], check=True, cwd=HERE)
    return target


def in_python():
    """What train.c does."""
    weight = (torch.arange(5000, dtype=torch.float32) % 97 - 48) / 64
    bias = (torch.arange(7, dtype=torch.float32) - 3) / 8
    params = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = fastclip.AdamW(params, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, max_norm=1.0)
    for step in range(20):
        for param in params:
            index = torch.arange(param.numel()) * 31 + step * 17
            param.grad = (index % 113 - 56).float() / 32
        optimizer.step()
    words = torch.cat(params).detach().view(torch.int32).tolist()
    hashed = 14695981039346656037
    for word in words:
        hashed = (hashed ^ (word & 0xFFFFFFFF)) * 1099511628211 % 2**64
    return f"{hashed:016x} {optimizer.total_norm.item():.17g}"


def test_it_trains_to_the_bits_of_python(program):
    said = subprocess.run([program], text=True, capture_output=True)
    assert said.returncode == 0, said.stdout + said.stderr
    assert said.stdout.splitlines() == ["there is no optimizer sdg", in_python()]


def test_the_program_of_the_documents_runs(tmp_path):
    text = (ROOT / "docs" / "c.md").read_text()
    program, command = (re.search(rf"```{language}\n(.*?)```", text, re.S)[1] for language in ("c", "sh"))
    (tmp_path / "train.c").write_text(program)
    command = command.replace("FOLDER", shlex.quote(str(FOLDER)))
    subprocess.run(["sh", "-ec", command], cwd=tmp_path, check=True)
    said = subprocess.run([tmp_path / "train"], text=True, capture_output=True, check=True).stdout
    assert said == "gradient norm 0, multiplied by 1\n"


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_the_library_needs_no_torch_and_no_python():
    said = subprocess.run(["readelf", "-dW", LIBRARY], text=True, capture_output=True, check=True).stdout
    assert set(re.findall(r"NEEDED.*\[(.+)\]", said)) <= NEEDED
    assert re.findall(r"SONAME.*\[(.+)\]", said) == ["libfastclip.so"]


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_the_libraries_export_what_is_declared_and_no_more():
    said = subprocess.run(["nm", "-DC", "--defined-only", LIBRARY], text=True, capture_output=True, check=True).stdout
    exported = {line.split(" ", 2)[2] for line in said.splitlines() if line.split(" ", 2)[1] == "T"}
    declared = set(re.findall(r"\b(fastclip_\w+)\(", (FOLDER / "include/fastclip.h").read_text()))
    in_c = {name for name in exported if "::" not in name}
    assert in_c == declared
    assert all(re.match(r"fastclip::(cpu|cuda)::\w+\(", name) for name in exported - in_c)
    (glue,) = [path for path in FOLDER.glob("_C_*.so") if path.name.startswith(f"_C_{RELEASE}.")]
    said = subprocess.run(["nm", "-D", "--defined-only", glue], text=True, capture_output=True, check=True).stdout
    assert [line.split()[-1] for line in said.splitlines()] == ["PyInit__C"]


def test_it_loads_without_torch_and_without_python():
    """In a program that is Python, but has loaded no torch."""
    script = "import ctypes, sys; l = ctypes.CDLL(sys.argv[1]); l.fastclip_capability.restype = ctypes.c_char_p\n"
    script += "print(l.fastclip_capability().decode()); print(open('/proc/self/maps').read().count('libtorch'))"
    said = subprocess.run([sys.executable, "-c", script, str(LIBRARY)], text=True, capture_output=True, check=True)
    assert said.stdout.split() == [fastclip.build_info()["cpu_capability"], "0"]
