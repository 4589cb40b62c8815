"""python -m fastclip.run: runs a program with fastclip's optimizers and clips in the place of torch's.

    python -m fastclip.run [--clip own|fused|defer] -m MODULE ARGUMENTS
    python -m fastclip.run [--clip own|fused|defer] SCRIPT.py ARGUMENTS
    python -m fastclip.run [--clip own|fused|defer] -c CODE ARGUMENTS

The program is not changed. --clip says what torch.nn.utils.clip_grad_norm_ and clip_grad_value_ do, see fastclip.patch:
by default, the step carries them out. At the end, a line on stderr says how many steps and clips went through fastclip.
"""

import atexit
import os
import runpy
import sys

from . import counts
from .patching import CLIPS, patch


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns the exit code of bad usage, if the program does not exit by itself."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    clip = "defer"
    while arguments and arguments[0].startswith("--"):
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
    if kind == "-m":
        sys.argv = [program, *rest]
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest]
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    else:
        sys.argv = [program, *rest]
        sys.path[0] = os.path.dirname(os.path.abspath(program))
        runpy.run_path(program, run_name="__main__")
    return 0


def _usage(message):
    print(f"fastclip.run: {message}; --help says more", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
