"""python -m tests.support.torchaudio_on_cpu: lets torchaudio import beside a torch without CUDA; safe to repeat.

PyPI's torchaudio 2.11 holds two libraries of compiled operations (RNN-T loss, forced alignment) that are linked against
CUDA's part of torch. torchaudio loads them where they are there and does without them where they are not: its models
and features need neither. They are deleted where torchaudio fails to import beside a torch without CUDA, nowhere else.
`pip install --force-reinstall --no-deps torchaudio==2.11.0` brings them back.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

LIBRARIES = ("_torchaudio*.so", "libtorchaudio*.so")


def main():
    """Returns the exit code: 1 where torchaudio is there and does not import in the end."""
    found = importlib.util.find_spec("torchaudio")
    if found is None:
        print("torchaudio is not installed: nothing to do")
        return 0
    error = import_error()
    if error and not (torch.version.cuda or torch.version.hip):
        for library in [path for name in LIBRARIES for path in Path(found.origin).with_name("lib").glob(name)]:
            print(f"deleted, as it needs a torch with CUDA: {library}")
            library.unlink()
        error = import_error()
    print(f"torchaudio does not import beside torch {torch.__version__}: {error}" if error else "torchaudio imports")
    return 1 if error else 0


def import_error():
    """The last line of what a new process says to `import torchaudio`; empty where it imports."""
    done = subprocess.run([sys.executable, "-c", "import torchaudio"], stderr=subprocess.PIPE, text=True)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


if __name__ == "__main__":
    sys.exit(main())
