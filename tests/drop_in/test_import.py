"""What `import fastclip` leaves alone, in torch and in the process; torch's errors keep their types, also in a step."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils.cpp_extension import include_paths

import fastclip
from tests.support.scripts import run_script

COMPILER = os.environ.get("CXX", "c++")

UNCHANGED = """if True:
    import atexit, copyreg, gc, locale, logging, os, signal, sys, types, warnings
    import torch
    from torch.optim import optimizer

    def classes_of(module):
        values = list(vars(module).values())
        return [v for v in values if issubclass(type(v), type) and v.__module__ == module.__name__]

    def state(modules):
        found = {}
        for name, module in modules.items():
            for owner in [module, *classes_of(module)]:
                for attribute, value in list(vars(owner).items()):
                    found[name, "" if owner is module else owner.__qualname__, attribute] = value
        return found

    def settings():
        return {
            "warnings": list(warnings.filters),
            "dtype": torch.get_default_dtype(),
            "device": torch.get_default_device(),
            "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
            "threads of the process": len(os.listdir("/proc/self/task")) if sys.platform == "linux" else None,
            "random numbers": torch.get_rng_state().tolist(),
            "modes": (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()),
            "matmul": torch.get_float32_matmul_precision(),
            "subnormals": (5e-324 * 1.0, (torch.full((100,), 1e-45) * 1.0).tolist()),
            "signals": {s: signal.getsignal(s) for s in signal.valid_signals()},
            "environment": (dict(os.environ), os.getcwd(), locale.setlocale(locale.LC_ALL)),
            "path": (list(sys.path), list(sys.meta_path), list(sys.path_hooks)),
            "hooks": (sys.excepthook, sys.displayhook, sys.getprofile(), sys.gettrace(), list(gc.callbacks)),
            "at exit": atexit._ncallbacks(),
            "collector": (gc.isenabled(), gc.get_threshold(), sys.getrecursionlimit(), sys.getswitchinterval()),
            "pickle": dict(copyreg.dispatch_table),
            "logging": (list(logging.root.handlers), logging.root.level, sorted(logging.root.manager.loggerDict)),
            "hooks of steps": [dict(v) for n, v in vars(optimizer).items() if n.endswith("_hooks")],
        }

    def modules_there():
        modules = {n: m for n, m in list(sys.modules.items()) if isinstance(m, types.ModuleType)}
        return {n: m for n, m in modules.items() if vars(m) is not globals()}

    state(modules_there()), settings()  # to look imports some, too
    modules = modules_there()
    before, settings_before = state(modules), settings()
    PLANTED
    import fastclip
    settings_after, after = settings(), state(modules)
    for name in settings_before:
        if settings_before[name] != settings_after[name]:
            print("changed:", name, settings_before[name], settings_after[name])
    for name in before.keys() | after.keys():
        if before.get(name) is not after.get(name):
            print("changed:", *name)
    print("imported:", *sorted(n for n in modules_there().keys() - modules.keys() if n.split(".")[0] != "fastclip"))
"""


def side_effects(planted="pass"):
    result = run_script(UNCHANGED.replace("PLANTED", planted))
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_import_changes_nothing():
    """No attribute of a module or class that is there, no setting of the process; and imports nothing but itself."""
    assert side_effects() == "imported:"


PLANTED = {
    "torch.optim.SGD.step = lambda self: 1": "changed: torch.optim.sgd SGD step",
    "torch.nn.utils.clip_grad_norm_ = None": "changed: torch.nn.utils  clip_grad_norm_",
    "optimizer.register_optimizer_step_pre_hook(print)": "changed: hooks of steps",
    "warnings.simplefilter('ignore')": "changed: warnings",
    "torch.manual_seed(1)": "changed: random numbers",
    "torch.set_default_dtype(torch.float64)": "changed: dtype",
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)": "changed: signals",
    "os.environ['OMP_NUM_THREADS'] = '3'": "changed: environment",
    "logging.basicConfig()": "changed: logging",
    "import torch._dynamo": " torch._dynamo ",
}


def test_changes_are_found():
    found = side_effects("; ".join(PLANTED))
    assert not [change for change in PLANTED.values() if change not in found]


# An allocator that fails as CUDA's does: by an exception of c10's.
FAILING_ALLOCATOR = """
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>

template <class Error>
struct Failing : c10::Allocator {
  c10::DataPtr allocate(size_t) override { throw Error({__func__, __FILE__, __LINE__}, "planted"); }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void*, const void*, size_t) const override {}
};
template <class Error>
void fail() {
  static Failing<Error> allocator;
  c10::SetCPUAllocator(&allocator, 100);
}
static c10::Allocator* const torchs = c10::GetCPUAllocator();
extern "C" void Nothing() { c10::SetCPUAllocator(torchs, 100); }
#define FAIL(ERROR) extern "C" void ERROR() { fail<c10::ERROR>(); }
"""

# What c10 throws, and what torch makes of it.
ERRORS = {
    "IndexError": "IndexError",
    "ValueError": "ValueError",
    "TypeError": "TypeError",
    "NotImplementedError": "NotImplementedError",
    "LinAlgError": "_LinAlgError",
    "OutOfMemoryError": "OutOfMemoryError",
    "DistStoreError": "DistStoreError",
    "DistNetworkError": "DistNetworkError",
    "Error": "RuntimeError",
}

ERRORS_SCRIPT = """if True:
    import ctypes, os
    import torch
    library = ctypes.CDLL(os.environ["FAILING"])

    def raised(work):
        for name in os.environ["ERRORS"].split():
            getattr(library, name)()
            try:
                work()
            except Exception as error:
                library.Nothing()
                assert "planted" in str(error) and "Exception raised from" not in str(error), str(error)
                yield type(error).__name__

    def makes_a_tensor():
        return torch.ops.aten.empty([7])

    print(*raised(makes_a_tensor))
    import fastclip
    print(*raised(makes_a_tensor))
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    for clip in ({}, {"max_norm": 1.0}, {"clip_value": 0.1, "skip_nonfinite": True}):
        print(*raised(lambda: fastclip.AdamW([p], **clip).step()))
    print(*raised(lambda: fastclip.clip_grad_norm_([p], 1.0)))
    assert p.tolist() == p.grad.tolist() == [1, 1, 1]
"""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which(COMPILER.split()[0]), reason="needs Linux and c++")
def test_torchs_errors_keep_their_types(tmp_path):
    """Raised by torch before and after the import, and by torch within steps and clips."""
    source, library = tmp_path / "failing.cpp", tmp_path / "failing.so"
    source.write_text(FAILING_ALLOCATOR + "".join(f"FAIL({error})\n" for error in ERRORS))
    includes = [f"-I{path}" for path in include_paths()]
    torchs = [f"-L{os.path.dirname(torch.__file__)}/lib", "-lc10"]
    command = [*COMPILER.split(), "-std=c++20", "-shared", "-fPIC", "-O0", *includes, "-o", library, source, *torchs]
    subprocess.run([*map(str, command)], check=True)
    result = run_script(ERRORS_SCRIPT, FAILING=str(library), ERRORS=" ".join(ERRORS))
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows == [list(ERRORS.values())] * 6


class Refuses(torch.Tensor):
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise KeyError("planted")


def test_an_error_of_python_within_torch_within_a_step_arrives_as_it_is():
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    optimizer = fastclip.SGD([p], lr=0.1)
    optimizer.found_inf = torch.zeros(1).as_subclass(Refuses)
    with pytest.raises(KeyError, match="planted"):
        optimizer.step()
    assert p.tolist() == [1, 1, 1]
