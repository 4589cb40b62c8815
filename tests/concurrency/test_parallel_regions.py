"""One OpenMP region per pass over memory: where another process is busy, every region may wait for a core."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.support.scripts import run_script

COMPILER = os.environ.get("CXX", "c++")

# In libgomp's place: counts the regions, and lets it run them.
COUNTER = """
#include <dlfcn.h>
#include <atomic>
static std::atomic<int> regions{0};
extern "C" int parallel_regions() { return regions; }
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
  using Function = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "GOMP_parallel"));
  ++regions;
  real(body, data, threads, flags);
}
"""

SCRIPT = """if True:
    import ctypes, os
    import torch, fastclip
    counter = ctypes.CDLL(os.environ["LD_PRELOAD"])
    torch.set_num_threads(2)
    params = [torch.zeros(400, requires_grad=True) for _ in range(600)]
    for p in params:
        p.grad = torch.ones_like(p)
    x = torch.randn(200_000)

    def make(**settings):
        return fastclip.SGD([{"params": [p], "lr": 0.1 + i} for i, p in enumerate(params)], momentum=0.9, **settings)

    def regions(step):
        step()  # makes what is made once
        before = counter.parallel_regions()
        step()
        return counter.parallel_regions() - before

    print(
        regions(make(clip_value=0.1).step),
        regions(make(max_norm=1.0).step),
        regions(lambda: x + x),
    )
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which(COMPILER), reason="needs Linux and c++")
def test_one_parallel_region_per_pass_over_600_tensors_in_600_groups(tmp_path):
    source, library = tmp_path / "counter.cpp", tmp_path / "counter.so"
    source.write_text(COUNTER)
    subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    result = run_script(SCRIPT, LD_PRELOAD=str(library))
    # The last one is torch's own: the counter counts.
    assert result.stdout.split() == ["1", "2", "1"], result.stdout + result.stderr
