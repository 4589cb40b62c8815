"""A machine with an ARM CPU, in emulation: Debian's Python for arm64, PyPI's torch, and no root to change."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.support import cuda_stand_in
from tests.support.project import ROOT

CROSS = "aarch64-linux-gnu"
PROGRAMS = (f"{CROSS}-g++", f"{CROSS}-gcc", "qemu-aarch64", "apt-get", "dpkg", "readelf", "nm")
DEBIAN = ("python3", "libpython3-dev", "libstdc++6", "libgomp1")
# Written in Python alone, and taken from the environment that runs this.
PURE = (
    *(
        "typing_extensions.py",
        "sympy",
        "mpmath",
        "networkx",
        "jinja2",
        "markupsafe",
        "fsspec",
        "filelock",
        "setuptools",
    ),
    *("pytest", "_pytest", "py.py", "pluggy", "iniconfig", "packaging", "pygments", "expecttest"),
    *("hypothesis", "_hypothesis_globals.py", "sortedcontainers", "attr", "attrs"),
)
# What torch reads of the CPU: that of the host, if it were not here. A Cortex-A76, as in a Raspberry Pi 5.
CPU = "cortex-a76"
CPUINFO = """\
processor	: 0
BogoMIPS	: 108.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x4
CPU part	: 0xd0b
CPU revision	: 1
"""
IDENTIFICATION = "sys/devices/system/cpu/cpu0/regs/identification/midr_el1"


class Unavailable(Exception):
    """What the emulation needs is not here; says what."""


class Machine:
    """In a folder that is kept: `root` of Debian, `site` with torch, `stand_in` for CUDA, `package` for fastclip."""

    def __init__(self, folder, torch_version):
        self.folder, self.torch_version = folder, torch_version
        self.root, self.site, self.stand_in = folder / "root", folder / "site", folder / "stand_in"
        self.package, self.pure = folder / "package", folder / "pure"

    def make(self, say):
        """Fetches and unpacks what is not there yet. Raises Unavailable."""
        if lacking := [program for program in PROGRAMS if shutil.which(program) is None]:
            raise Unavailable(f"{', '.join(lacking)} not found: apt-get install g++-{CROSS} qemu-user binutils")
        for done, step in (
            (self.root / "done", self._unpack_debian),
            (self.site / f"torch-{self.torch_version}", self._unpack_torch),
            (self.stand_in / f"torch-{self.torch_version}", self._make_stand_in),
        ):
            if not done.exists():
                say(step.__doc__)
                step()
                done.touch()
        self._link_pure_packages()

    def _unpack_debian(self):
        """Debian's Python for arm64, 30 MB"""
        apt = self.folder / "apt"
        for name in ("lists/partial", "archives/partial"):
            (apt / name).mkdir(parents=True, exist_ok=True)
        (apt / "status").touch()
        (apt / "conf").write_text(
            f'APT::Architecture "arm64";\nAPT::Architectures {{ "arm64"; }};\nDir::State::Lists "{apt}/lists";\n'
            f'Dir::State::status "{apt}/status";\nDir::Cache::Archives "{apt}/archives";\nAPT::Sandbox::User "root";\n'
            f'Dir::Cache::pkgcache "{apt}/pkgcache.bin";\nDir::Cache::srcpkgcache "{apt}/srcpkgcache.bin";\n'
            'Debug::NoLocking "true";\n'
        )
        environment = {**os.environ, "APT_CONFIG": str(apt / "conf")}
        fetch(["apt-get", "-qq", "update"], env=environment)
        options = ["-qq", "-y", "--no-install-recommends", "--download-only"]
        fetch(["apt-get", *options, "install", *DEBIAN], env=environment)
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        for package in (apt / "archives").glob("*.deb"):
            run(["dpkg", "-x", package, self.root])
        (self.root / "proc").mkdir(exist_ok=True)
        (self.root / "proc" / "cpuinfo").write_text(CPUINFO)
        (self.root / IDENTIFICATION).parent.mkdir(parents=True)
        (self.root / IDENTIFICATION).write_text("0x00000000414fd0b1\n")

    def _unpack_torch(self):
        """PyPI's torch and numpy for aarch64, 450 MB"""
        shutil.rmtree(self.site, ignore_errors=True)
        wheels = self.folder / "wheels"
        minor = self.python.name.removeprefix("python3.")
        fetch([
            sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--no-deps", "--dest", wheels,
            "--platform", "manylinux_2_28_aarch64", "--python-version", f"3{minor}", "--abi", f"cp3{minor}",
            f"torch=={self.torch_version}", "numpy",
        ])  # fmt: skip
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as file:
                file.extractall(self.site)
        shutil.rmtree(wheels)

    def _make_stand_in(self):
        """A stand-in for CUDA's libraries"""
        cuda_stand_in.make(self.site / "torch" / "lib", self.stand_in, f"{CROSS}-gcc", "aarch64", self._libraries())

    def _link_pure_packages(self):
        self.pure.mkdir(exist_ok=True)
        for name in PURE:
            here = next((Path(path, name) for path in sys.path if Path(path, name).exists()), None)
            if here is not None and not (self.pure / name).exists():
                (self.pure / name).unlink(missing_ok=True)
                (self.pure / name).symlink_to(here)

    @property
    def python(self):
        return next((self.root / "usr" / "bin").glob("python3.[0-9]*[0-9]"))

    def _libraries(self):
        return [self.root / "lib" / CROSS, self.root / "usr" / "lib" / CROSS]

    def command(self, *arguments, package=None):
        """Returns a command of this machine's Python, to be run from the project's folder."""
        libraries = [*self._libraries(), self.site / "torch" / "lib", self.stand_in]
        paths = [package or self.package, ROOT, self.site, self.pure]
        variables = {
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "PYTHONPATH": ":".join(map(str, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONSAFEPATH": "1",  # or the folder fastclip of the project comes first
            "OMP_NUM_THREADS": "1",
        }
        set_variables = [option for name, value in variables.items() for option in ("-E", f"{name}={value}")]
        command = ["qemu-aarch64", "-cpu", CPU, "-L", self.root, *set_variables, self.python, "-s", *arguments]
        return list(map(str, command))


def run(command, **settings):
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, **settings)


def fetch(command, **settings):
    try:
        run(command, **settings)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or error.stdout.strip() or "no output").splitlines()[-1]
        raise Unavailable(f"{Path(str(command[0])).name} could not fetch what is needed: {last}") from error
