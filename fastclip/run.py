"""python -m fastclip.run: runs a program with fastclip's optimizers and clips in the place of torch's.

    python -m fastclip.run [--clip own|fused|defer] -m MODULE ARGUMENTS
    python -m fastclip.run [--clip own|fused|defer] SCRIPT.py ARGUMENTS
    python -m fastclip.run [--clip own|fused|defer] -c CODE ARGUMENTS

The program is not changed. --clip says what torch.nn.utils.clip_grad_norm_ and clip_grad_value_ do, see fastclip.patch:
by default, the step carries them out. At the end, a line on stderr says how many steps and clips went through fastclip.
"""

import atexit
import importlib.machinery
import os
import runpy
import sys
import types
import zipfile

from . import counts
from .patching import CLIPS, patch


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns the exit code of bad usage, if the program does not exit by itself."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    clip = "defer"
    while arguments and arguments[0].startswith("--"):
        if arguments[0] == "--":
            arguments.pop(0)
            break
        option, equals, value = arguments.pop(0).partition("=")
        if option == "--help":
            print(__doc__)
            return 0
        if option != "--clip":
            return _usage(f"no such option: {option}")
        if not equals:
            value = arguments.pop(0) if arguments else ""
        if value not in CLIPS:
            return _usage(f"--clip must be one of {', '.join(CLIPS)}, got {value!r}")
        clip = value
    if not arguments or arguments[0] == "-h":
        print(__doc__)
        return 0 if arguments else 2
    kind = arguments.pop(0) if arguments[0].startswith("-") else ""
    if kind not in ("", "-m", "-c") or not arguments:
        return _usage(f"expected -m MODULE, -c CODE or a script, got {kind}")
    program, *rest = arguments
    if not kind and not os.path.exists(program):
        return _usage(f"no such file: {program}")
    counts.are_reported = True
    atexit.register(counts.report)
    patch(clip)
    main_module = sys.modules["__main__"] = types.ModuleType("__main__")  # which stays when this function has returned
    main_module.__builtins__ = __builtins__  # type: ignore[attr-defined]
    sys.argv = ["-c" if kind == "-c" else program, *rest]
    if kind == "-m":
        runpy._run_module_as_main(program)  # type: ignore[attr-defined]  # as `python -m` does
    elif kind == "-c":
        _set_path("")
        exec(compile(program, "<string>", "exec"), main_module.__dict__)
    elif os.path.isdir(program) or zipfile.is_zipfile(program):
        runpy.run_path(program, run_name="__main__")
    else:
        _set_path(os.path.dirname(os.path.realpath(program)))
        loader = importlib.machinery.SourceFileLoader("__main__", os.path.abspath(program))
        main_module.__file__, main_module.__loader__, main_module.__spec__ = loader.path, loader, None
        main_module.__cached__ = None  # type: ignore[attr-defined]
        exec(compile(loader.get_data(loader.path), loader.path, "exec"), main_module.__dict__)
    return 0


def _set_path(first):
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = first


def _usage(message):
    print(f"fastclip.run: {message}; --help says more", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
