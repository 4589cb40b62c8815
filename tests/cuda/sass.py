"""The machine code of the CUDA kernels, without a GPU: compiled, disassembled and parsed.

`python -m tests.cuda.sass` prints the table of what was found. nvdisasm and cuobjdump come with CUDA, or from PyPI.
"""

import functools
import importlib.util
import itertools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import fastclip
from tests.support.project import CSRC, load_setup

ARCHITECTURES = ("8.0", "9.0")
FOLDER = tempfile.TemporaryDirectory(prefix="fastclip_sass_")  # goes when Python does
PACK_BYTES = 16


setup = load_setup()
nvcc = setup.nvcc.find_nvcc()


@functools.cache
def tool(name):
    """The path of cuobjdump or nvdisasm: in site-packages, on PATH, or where the real nvcc is; or None."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = [b for f in (nvidia.submodule_search_locations if nvidia else ()) for b in Path(f).glob("*/bin")]
    found = shutil.which(name, path=":".join(map(str, folders))) or shutil.which(name)
    if found is None and nvcc:
        top = re.search(r"^#\$ _HERE_=(.+)$", setup.nvcc.output(nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"), re.M)
        found = top and shutil.which(name, path=top[1])
    return found


def missing(*tools):
    """Why these tests can't run here; empty where they can."""
    if nvcc is None:
        return "needs nvcc"
    absent = [name for name in tools if tool(name) is None]
    return f"needs {' and '.join(absent)}: pip install -r requirements.txt" if absent else ""


# ---- compiling -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cubin:
    path: Path
    log: str  # of ptxas -v; of what was shipped there is none

    def spills(self):
        """What ptxas says of functions that spill, as pairs (the kernel they are compiled for, the line)."""
        lines = self.log.splitlines()
        found, kernel = [], None
        for name, line in itertools.pairwise(lines):
            if "Compiling entry function" in line:
                kernel = kernel_of(line)
            if re.search(r"[1-9]\d* bytes (stack frame|spill)", line):
                found.append((kernel, f"{name}: {line.strip()}"))
        return found


def compile_cubin(architecture, source, *flags):
    folder = Path(tempfile.mkdtemp(dir=FOLDER.name))
    gencode = setup.nvcc.gencode(architecture)
    command = [nvcc, *setup.nvcc.NVCC_FLAGS, *gencode, "-Xptxas=-v", *flags, "-cubin", "-o", folder / "cubin", source]
    result = subprocess.run([*map(str, command)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout
    return Cubin(folder / "cubin", result.stdout)


@functools.cache
def compiled(architecture):
    """The CUDA half as setup.py compiles it: what it has compiled, or if it has not, once per run of the tests."""
    shipped = extracted().get(architecture)
    return Cubin(shipped, "") if shipped else compile_cubin(architecture, CSRC / "cuda/step.cu")


@functools.cache
def extracted():
    """Architecture -> its code in the library that was built; {} where that is older than its sources."""
    library = Path(fastclip.__file__).with_name("libfastclip.so")
    sources = [path for layer in ("cuda", "rules") for path in (CSRC / layer).iterdir()] + [CSRC / "step.h"]
    if tool("cuobjdump") is None or any(path.stat().st_mtime > library.stat().st_mtime for path in sources):
        return {}
    folder = Path(tempfile.mkdtemp(dir=FOLDER.name))
    subprocess.run([tool("cuobjdump"), "--extract-elf", "all", library], cwd=folder, check=True, capture_output=True)
    found = {re.search(r"\.sm_(\d+)(\d)\.cubin$", path.name): path for path in folder.glob("*.cubin")}
    return {f"{number[1]}.{number[2]}": path for number, path in found.items() if number}


# ---- what the source says ----------------------------------------------------------------------------


@functools.cache
def source(name):
    return (CSRC / name).read_text()


def enumerators(enum):
    text = "".join(map(source, ("cuda/table.cuh", "rules/measure.h")))
    return re.search(rf"enum class {enum} [^{{]*{{([^}}]*)}}", text)[1].replace(" ", "").split(",")


def constant(name):
    return int(re.search(rf"constexpr int {name} = (\d+);", source("cuda/table.cuh"))[1])


@functools.cache
def headers():
    """Each rule of rules.h: the text of its header."""
    names = re.search(r"using Rules = RuleList<([^>]*)>", source("rules/rules.h"))[1].replace(" ", "").split(",")
    texts = [path.read_text() for path in sorted((CSRC / "rules").glob("*.h"))]
    return {name: next(text for text in texts if f"struct {name} {{" in text) for name in names}


def says(rule, member, pattern):
    return re.search(rf"constexpr \w+ {member}(?:\[\])? = {pattern};", headers()[rule])[1]


BESIDE = {"nothing": "", "change": " limiting", "deltas": " measuring deltas", "products": " measuring products"}
LIMITING = BESIDE["change"]
OF_TENSORS = (BESIDE["deltas"], BESIDE["products"])


def variants(rule):
    """A rule's kernels, by how many state arrays they have: "SGD 0", "SGD 1"; and the one that measures
    more, which is the largest: "SGD 1 limiting". A rare rule has that one alone, if it measures tensors."""
    plain = [f"{rule} {states}" for states in says(rule, "kKernels", r"\{([\d, ]*)\}").split(", ")]
    members = {"kLimitsChange": "change", "kMeasuresDelta": "deltas", "kNeedsProducts": "products"}
    more = [BESIDE[what] for member, what in members.items() if says(rule, member, "(true|false)") == "true"]
    found = plain + [plain[-1] + what for what in more]
    return found if is_common(rule) or not more else found[-1:]


def has_float64(variant):
    """A rule has one kernel for float64: the largest."""
    return variant == variants(variant.split()[0])[-1]


def is_common(rule):
    """Whether it has kernels of its own for float32 and bfloat16."""
    return says(rule, "kIsCommon", "(true|false)") == "true"


def packs_in_flight(arrays):
    text = re.search(r"kInFlight\s*=\s*(.*?);", source("cuda/tiles.cuh"), re.S)[1]
    limits = re.findall(r"kArrays > (\d+)\s*\?\s*(\d+)\s*:", text)
    return next((int(packs) for limit, packs in limits if arrays > int(limit)), int(text.split()[-1]))


# ---- parsing -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    predicate: str
    opcode: str
    operands: str

    def registers(self):
        return {int(n) for n in re.findall(r"\bR(\d+)", self.operands)}


@dataclass(frozen=True)
class Kernel:
    variant: str
    dtypes: str
    table_bytes: int

    @property
    def rule(self):
        return self.variant.split()[0]

    @property
    def clips_in_place(self):
        return says(self.rule, "kClipsInPlace", "(true|false)") == "true"


@dataclass(frozen=True)
class Tile:
    """An instance of update_tile (of a rule) or measure_tile (of a norm)."""

    work: str
    variant: str
    dtype: str

    @property
    def states(self):
        return int(self.variant.split()[1]) if self.work == "update" else 0

    @property
    def is_adam(self):
        return self.variant.startswith("Adam ")

    @property
    def measures_params(self):
        return self.variant.endswith(LIMITING)

    @property
    def arrays_read(self):
        return 1 if self.work == "measure" or self.variant == "ClipGrad 0" else 2 + self.states

    @property
    def arrays_written(self):
        return 0 if self.work == "measure" else max(1, self.arrays_read - 1)

    @property
    def item_bytes(self):
        return {"float32": 4, "float64": 8}.get(self.dtype, 2)

    @property
    def at_once(self):
        return packs_in_flight(self.arrays_read)

    @property
    def elements(self):
        """Counts of one round of the loop, per lane."""
        return self.at_once * PACK_BYTES // self.item_bytes


@dataclass
class Function:
    kernel: Kernel | None
    tile: Tile | None  # None: the kernel itself, or a helper of the compiler
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def loops(self):
        """Instructions from each target of a backward branch to the branch."""
        for end, i in enumerate(self.instructions):
            label = re.search(r"`\((\.L_\w+)\)", i.operands)
            if i.opcode == "BRA" and label and self.labels.get(label[1], end + 1) <= end:
                yield self.instructions[self.labels[label[1]] : end + 1]

    def hot_loop(self):
        """The longest: the other one handles single elements."""
        return max(self.loops(), key=len)


DTYPES = {"f": "float32", "d": "float64", "BFloat16": "bfloat16", "Float16": "float16"}
VARIANT = r"KernelI\w*?_\d+([A-Za-z]+)ELi(\d)ELN\w*?BesideE(\d)EEE"
DTYPE = r"(?:NS\d*_\d)?(BFloat16|Float16|f|d)(?:E|NS)"
KERNEL = re.compile(rf"step_kernelI\w*?{VARIANT}\w*?DTypesE(\d)ELi(\d+)E")
UPDATE_TILE = re.compile(rf"\$.*\$_.*update_tileI\w*?{VARIANT}{DTYPE}")
MEASURE_TILE = re.compile(rf"\$.*\$_.*measure_tileI.*?NormE(\d)E{DTYPE}")
CODES_TILE = re.compile(rf"\$.*\$_.*update_codes_tileI\w*?{VARIANT}")
MEASURE_MIXED_TILE = re.compile(r"\$.*\$_.*measure_mixed_tileI.*?NormE(\d)E")
MIXED_TILE = re.compile(rf"\$.*\$_.*update_mixed_tileI\w*?{VARIANT}")
LABEL = re.compile(r"^([.$\w]+):$")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")


def kernel_of(symbol):
    m = KERNEL.search(symbol)
    return Kernel(variant_of(m), enumerators("DTypes")[int(m[4])], int(m[5])) if m else None


def variant_of(match):
    return f"{match[1]} {match[2]}" + BESIDE[enumerators("Beside")[int(match[3])]]


def tile_of(symbol):
    if m := MIXED_TILE.search(symbol):
        return Tile("update", variant_of(m), "mixed")
    if m := CODES_TILE.search(symbol):
        return Tile("update", variant_of(m), "codes")
    if m := UPDATE_TILE.search(symbol):
        return Tile("update", variant_of(m), DTYPES[m[4]])
    if m := MEASURE_MIXED_TILE.search(symbol):
        return Tile("measure", enumerators("Norm")[int(m[1])], "mixed")
    m = MEASURE_TILE.search(symbol)
    return Tile("measure", enumerators("Norm")[int(m[1])], DTYPES[m[2]]) if m else None


def parse(text):
    """The functions of what `nvdisasm -c` writes."""
    functions = []
    for line in text.splitlines():
        if label := LABEL.match(line.strip()):
            if label[1].startswith(".L_"):
                functions[-1].labels[label[1]] = len(functions[-1].instructions)
            else:
                functions.append(Function(kernel_of(label[1]), tile_of(label[1])))
        elif instruction := INSTRUCTION.search(line):
            functions[-1].instructions.append(Instruction(*(part or "" for part in instruction.groups())))
    return [f for f in functions if f.instructions]


def disassemble(cubin):
    return parse(setup.nvcc.output(tool("nvdisasm"), "-c", str(cubin.path)))


@functools.cache
def functions_of(architecture):
    return disassemble(compiled(architecture))


@functools.cache
def usage_of(cubin):
    """Kernel -> what it takes of a multiprocessor: {"REG": 89, "STACK": 0, "LOCAL": 0, ...}."""
    text = setup.nvcc.output(tool("cuobjdump"), "--dump-resource-usage", str(cubin.path))
    found = re.findall(r"Function (\S+):\n\s*(.+)", text)
    return {
        kernel_of(name): {key: int(n) for key, n in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line)}
        for name, line in found
        if kernel_of(name)
    }


# ---- what the code does ------------------------------------------------------------------------------


def blocks_per_multiprocessor(registers):
    """As far as registers allow. A multiprocessor of sm_80 and sm_90 has 65,536; a warp takes multiples of 256."""
    of_warp = -(-registers * constant("kWarp") // 256) * 256
    return 65536 // (of_warp * constant("kWarps"))


def is_memory(opcode):
    return re.match(r"(LD|ST|ATOM|RED)(?!C)", opcode) is not None


def loads_in_flight(loop):
    """128-bit global loads that are issued before the first instruction that needs one of them."""
    pending = {}  # register -> the load's first register
    for i in loop:
        if re.match(r"LD[GS]\..*128", i.opcode):
            first = int(re.match(r"R(\d+)", i.operands)[1])
            if pending.get(first) == first:  # the other of two alternatives under opposite predicates
                continue
            if i.registers() & pending.keys():
                break
            if i.opcode.startswith("LDG"):
                pending.update(dict.fromkeys(range(first, first + 4), first))
        elif i.registers() & pending.keys():
            break
    return len(set(pending.values()))


def loads_in_flight_on_a_path(function):
    """The same for words of 8 or 16 bytes, on the best path through a function: one that branches for each word reuses
    the registers of one branch in another."""
    most, seen, paths = 0, set(), [(0, {})]
    while paths:
        at, pending = paths.pop()
        for n in range(at, len(function.instructions)):
            i = function.instructions[n]
            load = re.fullmatch(r"LDG\.E\.EF\.(64|128)", i.opcode)
            first = int(re.match(r"R(\d+)", i.operands)[1]) if load else None
            if load and pending.get(first) == first:  # the other of two alternatives under opposite predicates
                continue
            if i.registers() & pending.keys():
                break
            if load:
                pending = pending | dict.fromkeys(range(first, first + int(load[1]) // 32), first)
            label = re.search(r"`\((\.L_\w+)\)", i.operands)
            if i.opcode == "BRA" and label:
                target = function.labels[label[1]]
                if target > n and (target, tuple(pending)) not in seen:
                    seen.add((target, tuple(pending)))
                    paths.append((target, pending))
                if not i.predicate:
                    break
        most = max(most, len(set(pending.values())))
    return most


def table(architecture):
    """Markdown; of the kernels with a small table, as the others contain the same loops."""
    usage = usage_of(compiled(architecture))
    small = min(kernel.table_bytes for kernel in usage)
    rows = [
        f"| sm_{architecture.replace('.', '')} kernel | registers | blocks | loop | 128-bit loads | in flight "
        "| 128-bit stores | instructions per element |",
        "|---|---|---|---|---|---|---|---|",
    ]
    tiles = [f for f in functions_of(architecture) if f.tile and f.kernel.table_bytes == small]
    for f in sorted(tiles, key=lambda f: (f.kernel.dtypes, str(f.tile))):
        if f.tile.work == "measure" and f.kernel.variant != "SGD 0":
            continue
        loop = f.hot_loop()
        registers = usage[f.kernel]["REG"]
        opcodes = [i.opcode for i in loop if "128" in i.opcode.split(".")]
        cells = (
            f"{f.kernel.variant}, {f.kernel.dtypes}",
            registers,
            blocks_per_multiprocessor(registers),
            f"{f.tile.work} {f.tile.variant if f.tile.work == 'measure' else ''} {f.tile.dtype}".replace("  ", " "),
            sum(o.startswith("LDG") for o in opcodes),
            loads_in_flight(loop),
            sum(o.startswith("STG") for o in opcodes),
            f"{len(loop) / f.tile.elements:.1f}",
        )
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def table_of_registers(architecture):
    """Markdown: the registers of each kernel with a large table, and the blocks on a multiprocessor that they allow."""
    usage = usage_of(compiled(architecture))
    large = max(kernel.table_bytes for kernel in usage)
    dtypes = enumerators("DTypes")
    rows = [f"| sm_{architecture.replace('.', '')} kernel | {' | '.join(dtypes)} |", "|---" * (1 + len(dtypes)) + "|"]
    for rule in headers():
        for variant in variants(rule):
            cells = []
            for used in (usage.get(Kernel(variant, name, large)) for name in dtypes):
                local = f", {used['STACK']} bytes of local memory" if used and used["STACK"] else ""
                cells.append(f"{used['REG']} ({blocks_per_multiprocessor(used['REG'])}{local})" if used else "")
            rows.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    if reason := missing("nvdisasm", "cuobjdump"):
        raise SystemExit(reason)
    print("\n\n".join(f"{table(name)}\n\n{table_of_registers(name)}" for name in ARCHITECTURES))
