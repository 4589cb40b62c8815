"""Which environment uv and build install into. They build in a virtual environment of their own; the process that has
called tells of the other one. Read from /proc, on Linux alone.
"""

import json
import os
import subprocess
from pathlib import Path

OF_A_PROJECT = {"sync", "run", "add", "remove", "lock", "export"}  # uv's commands that use the project's environment
FOLDERS = """
import json, site
print(json.dumps([*([site.getusersitepackages()] if site.ENABLE_USER_SITE else []), *site.getsitepackages()]))
"""


def environment_of_caller(process):
    """Returns the prefix of the environment that a process with this number, uv or build, installs into.

    None if it is another program, as pip, or says nothing of an environment.
    """
    folder = Path("/proc") / str(process)
    try:
        environ, cmdline = (os.fsdecode((folder / name).read_bytes()).split("\0") for name in ("environ", "cmdline"))
        here = (folder / "cwd").readlink()
    except OSError:
        return None
    variables = dict(text.split("=", 1) for text in environ if "=" in text)
    return environment_of(cmdline[:-1], variables, here)


def environment_of(command, variables, here):
    """The same, of a command that was started in the folder `here`."""
    program, *arguments = command
    if Path(program).name == "uv":
        candidates = of_uv(arguments, variables, here)
    elif arguments[:2] == ["-m", "build"]:
        candidates = [here / program, variables.get("VIRTUAL_ENV")]
    elif arguments and Path(arguments[0]).name == "pyproject-build":  # may be a tool in an environment of its own
        candidates = [variables.get("VIRTUAL_ENV"), here / program]
    else:
        return None
    return next((prefix for prefix in map(prefix_of, candidates) if prefix is not None), None)


def of_uv(arguments, variables, here):
    """Yields paths, or None, in the order in which uv looks."""
    asked = value_of(arguments, "--python", "-p")
    for python in (asked, variables.get("UV_PYTHON")):
        if python and os.sep in python:  # not a version, as 3.12
            yield here / python
    project = here / (value_of(arguments, "--project", "--directory") or "")
    projects = [folder / ".venv" for folder in (project, *project.parents)]
    if OF_A_PROJECT & set(arguments[:3]) and "--active" not in arguments:
        yield project / variables["UV_PROJECT_ENVIRONMENT"] if variables.get("UV_PROJECT_ENVIRONMENT") else None
        yield from projects
    on_path = [folder and Path(folder) / "python" for folder in variables.get("PATH", "").split(os.pathsep)]
    if "--system" in arguments or variables.get("UV_SYSTEM_PYTHON", "0").lower() in ("1", "true"):
        yield from on_path
    yield variables.get("VIRTUAL_ENV")
    conda = variables.get("CONDA_PREFIX")
    yield conda if variables.get("CONDA_DEFAULT_ENV") not in ("base", "root") else None
    yield from projects
    yield conda
    yield from on_path


def value_of(arguments, *options):
    """Returns the value of an option, as `--python X` or `--python=X`; None where it is not given."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, equals, value = argument.partition("=")
        if name in options:
            return value if equals else following
    return None


def prefix_of(path):
    """Returns the environment of a folder or of a Python in its bin; None if there is none."""
    if not path:
        return None
    path = Path(path)
    if path.parent.name == "bin" and not os.path.isdir(path):
        path = path.parent.parent
    return path if os.path.isfile(path / "bin" / "python") else None  # os.path: of what can't be read, it says no


def folders_of(prefix):
    """Returns the folders in which this environment has its packages."""
    python = prefix / "bin" / "python"
    said = subprocess.run([python, "-c", FOLDERS], capture_output=True, text=True)
    return [Path(folder) for folder in json.loads(said.stdout)] if said.returncode == 0 else []
