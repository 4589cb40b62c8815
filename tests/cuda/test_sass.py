"""Counts in the machine code of sm_80 and sm_90: registers, spills, 128-bit loads and stores, arithmetic.

Also the tests of these checks: what is planted into the source has to be found.
"""

import re
import shutil
from collections import Counter

import pytest

from . import sass

pytestmark = pytest.mark.skipif(
    bool(sass.missing("nvdisasm", "cuobjdump")), reason=sass.missing("nvdisasm", "cuobjdump") or "-"
)

VARIANTS = [variant for rule in sass.headers() for variant in sass.variants(rule)]
OF_TENSORS = [variant for variant in VARIANTS if variant.endswith(sass.OF_TENSORS)]
COMMON, RARE = (
    [v for v in VARIANTS if sass.is_common(v.split()[0]) == common and v not in OF_TENSORS] for common in (True, False)
)
NORMS = ("two", "inf")
# float16 is taken as a mixture, but where it is clipped in place.
OF_COMMON = {v: ["float32", "bfloat16", *(["float64"] if sass.has_float64(v) else [])] for v in COMMON}
OF_COMMON["ClipGrad 0"] = [*sass.DTYPES.values()]
TILES = [sass.Tile("update", variant, dtype) for variant, dtypes in OF_COMMON.items() for dtype in dtypes]
# What kernels measure by; all 16-bit dtypes of a kernel with several share a function with float32.
MEASURED_AS = {
    "float32": ["float32"],
    "bfloat16": ["bfloat16"],
    "mixed": ["mixed"],
    "any": ["float64", "mixed"],
}
TILES += [sass.Tile("measure", norm, dtype) for norm in NORMS for dtype in ("float32", "bfloat16", "float64")]
for_tiles = pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.work}-{t.variant}-{t.dtype}")


# The kernels that take states in 8 bits.
IN_8_BITS = {("SGD 1", "mixed"), ("Adam 2", "mixed"), ("Lion 1", "mixed")}


@pytest.fixture(params=sass.ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture
def loops(architecture, tile):
    """The hot loop of a tile's function, in each kernel that has it."""
    return [f.hot_loop() for f in sass.functions_of(architecture) if f.tile == tile]


# ---- the checks: they raise AssertionError -------------------------------------------------------------


# Bytes of local memory where there is no way out: float64 where what is added is measured.
STACK = {("Adam 3 measuring deltas", "any"): 32, ("LAMB 2 measuring deltas", "any"): 32}


def stack_of(kernel):
    return STACK.get((kernel.variant, kernel.dtypes), 0) if kernel else 0


def check_no_spills(cubin, functions):
    assert not [(kernel, said) for kernel, said in cubin.spills() if not stack_of(kernel)]
    for kernel, usage in sass.usage_of(cubin).items():
        assert usage["STACK"] <= stack_of(kernel) and usage["LOCAL"] == 0, f"{kernel} uses local memory: {usage}"
    instructions = [i.opcode for f in functions if not stack_of(f.kernel) for i in f.instructions]
    local = {opcode for opcode in instructions if opcode.startswith(("LDL", "STL"))}
    assert not local, f"local memory: {local}"


def check_memory(loop, tile):
    """Nothing but 128-bit accesses, as many as the source asks for, each with its cache hint."""
    found = Counter(i.opcode for i in loop if sass.is_memory(i.opcode))
    n = tile.at_once
    if tile.work == "update":  # everything streams (.cs); a gradient may lie in shared memory instead
        wanted = {
            "LDG.E.EF.128": n * tile.arrays_read,
            "STG.E.EF.128": n * tile.arrays_written,
            "LDS.128": n,
        }
    else:  # streams (.cs) and is kept in shared memory, or is to stay in L2 (.cg)
        wanted = {"LDG.E.EF.128": n, "LDG.E.128.STRONG.GPU": n, "STS.128": n}
    assert found == wanted, f"memory accesses of {tile}: {dict(found)}"
    calls = [i.operands for i in loop if i.opcode.startswith("CALL") and "$" in i.operands]
    counted = Counter("sqrt" if "sqrt_rn" in call else "div" if "div_rn" in call else call for call in calls)
    # The ways of denormals and infinities.
    wanted = {"div": 2 * tile.elements, "sqrt": tile.elements} if tile.is_adam else {}
    assert counted == wanted, f"calls in the loop of {tile}: {counted}"


def check_in_flight(loop, tile):
    found = sass.loads_in_flight(loop)
    assert found == tile.at_once * tile.arrays_read, f"loads in flight in {tile}: {found}"


def fma_calls(variant):
    """Those that its header writes per element, in `update` or in the `delta` that this calls; SGD's for momentum stand
    in one block."""
    rule, states = variant.split()[:2]
    body = "".join(re.findall(r"static (?:void update|T delta)\(.*?\n  }\n", sass.headers()[rule], re.S))
    if (rule, states) == ("SGD", "0"):
        body = re.sub(r"if \(terms & kHasMomentum\) {.*?\n    }\n", "", body, flags=re.S)
    return len(re.findall(r"= [^;]*?\b(?:fma|lerp)\(", body))


# What two correctly rounded divisions and a square root take, per element.
DIVISIONS_AND_ROOT = {"FMA": 12, "MUL": 2, "ADD": 0}


def check_arithmetic(loop, tile):
    """As many products and fmas as written: nothing is contracted."""
    found = Counter(i.opcode.split(".")[0] for i in loop)
    letter = "D" if tile.dtype == "float64" else "F"
    if tile.work == "update":
        # x * unscale, value * coefficient; buffer * momentum
        products = 3 if tile.variant.startswith("SGD 1") else 2
        wanted = {"FMA": fma_calls(tile.variant), "MUL": products, "ADD": 0}
        if tile.is_adam:
            # Besides: param * decay, (1 - beta2) * d, square * beta2, step * average; d - average, + eps, param +
            wanted = {"FMA": wanted["FMA"], "MUL": 2 + 4, "ADD": 3}
            wanted = {what: n + DIVISIONS_AND_ROOT[what] for what, n in wanted.items()}
        narrow = {i.opcode for i in loop if re.match(r"H(ADD2(?!\.F32)|MUL2)", i.opcode)}  # HADD2.F32 converts
        assert not narrow, f"{tile} computes in 16 bits: {narrow}"
        if tile.measures_params and letter == "D":  # the sums of the parameters are in the same type
            assert found["DFMA"] == wanted["FMA"] * tile.elements, f"{tile} contracts its sum of squares"
            return
        if tile.measures_params:  # fma(x, x, sum)
            of_sum = found["DFMA"], found["DMUL"], found["DADD"]
            assert of_sum == (tile.elements, 0, 0), f"sum of {tile}: {found}"
    else:
        # x * unscale; unscaled - unscaled
        wanted = {"FMA": 0, "MUL": 1, "ADD": 1}
        if letter == "D":  # see Measure: besides, the three sums and their scales
            assert not found["DFMA"], f"{tile} contracts its sum of squares"
            return
        squares = tile.elements if tile.variant == "two" else 0  # fma(x, x, sum)
        of_sum = found["DFMA"], found["DMUL"], found["DADD"]
        assert of_sum == (squares, 0, 0), f"sum of {tile}: {found}"
    per_element = {what: found[letter + what] / tile.elements for what in wanted}
    assert per_element == wanted, f"arithmetic of {tile} per element: {per_element}"


def is_double(instruction):
    opcode = instruction.opcode
    return re.match(r"D(ADD|MUL|FMA|SETP|MNMX)", opcode) or (".F64" in opcode or "64H" in opcode)


def check_no_double(loop, tile):
    """Where elements are not."""
    found = Counter(i.opcode for i in loop if is_double(i))
    assert not found, f"double precision in {tile}: {dict(found)}"


# H100 (SXM): 132 multiprocessors issue 4 warp instructions per clock, at about 1.7 GHz, while 3.35 TB/s come and go.
ISSUED_PER_SECOND = 132 * 4 * 1.7e9 * 32
BYTES_PER_SECOND = 3.35e12


def instructions_that_bandwidth_allows(tile):
    """Per element: 103 for SGD in float32 (12 bytes), 34 to measure float32, 17 to measure 16 bits."""
    moved = (tile.arrays_read + tile.arrays_written) * tile.item_bytes
    return ISSUED_PER_SECOND * moved / BYTES_PER_SECOND


# Instructions per element: the most of sm_80 and sm_90 under nvcc 13.0, and 10 %. Both sides of each branch count.
MEASURED = {
    ("SGD 0", 4): 17.4,
    ("SGD 0", 2): 17.7,
    ("SGD 1 limiting", 4): 50,
    ("SGD 1 limiting", 2): 50,
    ("SGD 1", 4): 35.5,
    ("SGD 1", 2): 35.9,
    ("Adam 2", 4): 70.8,
    ("Adam 2", 2): 74.9,
    ("Adam 3", 4): 81.2,
    ("Adam 3", 2): 83.9,
    ("ClipGrad 0", 4): 10.6,
    ("ClipGrad 0", 2): 10.8,
    ("two", 4): 14.4,
    ("two", 2): 13.3,
    ("inf", 4): 15.4,
    ("inf", 2): 14.2,
}


def check_budget(loop, tile):
    """float64 is for `any` alone, and has the bandwidth's limit only."""
    found = len(loop) / tile.elements
    budget = 1.1 * MEASURED.get((tile.variant, tile.item_bytes), float("inf"))
    assert found <= budget, f"instructions per element of {tile}: {found:.1f}"


# ---- of what is shipped --------------------------------------------------------------------------------


def test_no_spills_and_no_local_memory(architecture):
    check_no_spills(sass.compiled(architecture), sass.functions_of(architecture))


def test_registers_leave_room_for_blocks(architecture):
    usage = sass.usage_of(sass.compiled(architecture))
    # float32 and bfloat16 with both sizes of the table, those that limit the change with the large one only; mixtures,
    # but for gradients to be clipped; float64 once for each rule.
    limiting = [variant for variant in COMMON if variant.endswith(sass.LIMITING)]
    uniform, mixed = len(COMMON) * 2 * 2 - len(limiting) * 2, len(VARIANTS) - 1
    assert len(usage) == uniform + mixed + len(sass.headers())
    for kernel, used in usage.items():
        blocks = sass.blocks_per_multiprocessor(used["REG"])
        one = kernel.dtypes == "any" or kernel.variant.endswith(sass.BESIDE["deltas"])
        assert blocks >= (1 if one else 2), f"{kernel}: {used['REG']} registers"


def test_tiles_are_functions_of_their_own(architecture):
    """Each kernel has a copy of those it can call, and no 128-bit access to global memory outside them."""
    functions = sass.functions_of(architecture)
    rare = [sass.Tile("update", variant, "float64") for variant in RARE + OF_TENSORS]  # and mixed ones, for all else
    for kernel in sass.usage_of(sass.compiled(architecture)):
        dtypes = [kernel.dtypes]
        if kernel.dtypes == "any":
            dtypes = sass.DTYPES.values() if kernel.clips_in_place else ["float64"]
        wanted = {t for t in TILES + rare if t.work == "update" and t.dtype in dtypes and t.variant == kernel.variant}
        wanted |= {sass.Tile("measure", norm, dtype) for norm in NORMS for dtype in MEASURED_AS[kernel.dtypes]}
        if kernel.dtypes in ("mixed", "any") and not kernel.clips_in_place:
            wanted.add(sass.Tile("update", kernel.variant, "mixed"))
        if (kernel.variant, kernel.dtypes) in IN_8_BITS:
            wanted.add(sass.Tile("update", kernel.variant, "codes"))
        assert {f.tile for f in functions if f.kernel == kernel and f.tile} == wanted
    for f in functions:
        wide = [i for i in f.instructions if re.match(r"(LDG|STG).*\.128", i.opcode)]
        assert f.tile or not wide, wide


@for_tiles
def test_hot_loops_move_128_bits_at_a_time(loops, tile):
    assert loops
    for loop in loops:
        check_memory(loop, tile)


# The kernel for float64 has no registers left for them. Strict: who mends one takes it out of here.
WAITS = {t for t in TILES if t.dtype == "float64" and t.variant.startswith("SGD ")}


@for_tiles
def test_all_loads_are_issued_before_the_first_is_needed(loops, tile, request):
    if tile in WAITS:
        request.applymarker(pytest.mark.xfail(strict=True, reason="float64 waits between its loads"))
    assert loops
    for loop in loops:
        check_in_flight(loop, tile)


@pytest.mark.parametrize("norm", NORMS)
def test_a_mixture_is_measured_with_as_many_loads_in_flight(architecture, norm):
    tile = sass.Tile("measure", norm, "mixed")
    loops = [list(f.loops()) for f in sass.functions_of(architecture) if f.tile == tile]
    assert len(loops) >= 10
    for of_function in loops:
        assert max(map(sass.loads_in_flight, of_function)) == tile.at_once


def test_a_mixture_is_updated_with_as_many_loads_in_flight(architecture):
    functions = [f for f in sass.functions_of(architecture) if f.kernel and f.kernel.dtypes == "mixed"]
    updates = [f for f in functions if f.tile and (f.tile.work, f.tile.dtype) == ("update", "mixed")]
    assert len(updates) == len(VARIANTS) - 1
    for f in updates:
        assert sass.loads_in_flight_on_a_path(f) == f.tile.at_once * f.tile.arrays_read, f.kernel


@for_tiles
def test_arithmetic_is_what_is_written(loops, tile):
    assert loops
    for loop in loops:
        check_arithmetic(loop, tile)


@pytest.mark.parametrize(
    "tile", [t for t in TILES if t.work == "update" and t.dtype != "float64" and not t.measures_params], ids=str
)
def test_updates_compute_nothing_in_double(loops, tile):
    assert loops
    for loop in loops:
        check_no_double(loop, tile)


@for_tiles
def test_instructions_per_element(loops, tile):
    assert loops
    for loop in loops:
        check_budget(loop, tile)


@for_tiles
def test_instructions_leave_bandwidth_the_bottleneck(loops, tile):
    assert loops
    for loop in loops:
        assert len(loop) / tile.elements <= instructions_that_bandwidth_allows(tile)


# ---- of the checks themselves ----------------------------------------------------------------------------

ONE_KERNEL = """
#include "cuda/kernels.cuh"
namespace fastclip::cuda {
namespace {
template __global__ void step_kernel<Kernel<SGD, 0, Beside::nothing>, DTypes::DTYPES, kSmallTable>(
    const __grid_constant__ Arguments<kSmallTable>);
}
}
"""
UPDATE = sass.Tile("update", "SGD 0", "float32")
MEASURE = sass.Tile("measure", "two", "float32")


def compile_one(folder, *flags, file=None, old=None, new=None, dtypes="float32"):
    """A kernel that is quickly compiled, of the sources with one change."""
    shutil.copytree(sass.CSRC, folder / "csrc")
    if file:
        text = (folder / "csrc" / file).read_text()
        assert text.count(old) == 1
        (folder / "csrc" / file).write_text(text.replace(old, new))
    (folder / "one.cu").write_text(ONE_KERNEL.replace("DTYPES", dtypes))
    cubin = sass.compile_cubin("8.0", folder / "one.cu", f"-I{folder / 'csrc'}", *flags)
    return cubin, sass.disassemble(cubin)


def check_everything(cubin, functions):
    check_no_spills(cubin, functions)
    (kernel,) = {f.kernel for f in functions if f.kernel}
    assert sass.blocks_per_multiprocessor(sass.usage_of(cubin)[kernel]["REG"]) >= 2, "too many registers"
    for tile in (UPDATE, MEASURE):
        (loop,) = [f.hot_loop() for f in functions if f.tile == tile]
        check_memory(loop, tile)
        check_arithmetic(loop, tile)
        if tile == UPDATE:
            check_no_double(loop, tile)
        check_in_flight(loop, tile)
        check_budget(loop, tile)


def test_one_kernel_as_it_is(tmp_path):
    check_everything(*compile_one(tmp_path))


TILES_FILE, CLIP_FILE = "cuda/tiles.cuh", "rules/clip.h"
PLANTED = {
    "four bytes at a time": (
        TILES_FILE,
        "int kFull = kPackBytes / int{sizeof(Stored)},",
        "int kFull = 1,",
        "memory accesses",
    ),
    "stores without a hint": (
        TILES_FILE,
        "__stcs(param_words + i, param.word());",
        "param_words[i] = param.word();",
        "memory accesses",
    ),
    "a use between loads": (
        TILES_FILE,
        "{ g[k] = __ldcs(grad_words + i); }",
        "{ g[k] = __ldcs(grad_words + i); if (Values(g[k]).values[0] == Stored(42)) g[k] = Word{}; }",
        "loads in flight",
    ),
    "a comparison in double": (
        CLIP_FILE,
        "x < low ? low : x;",
        "double(x) < low + 1e-9 ? low : x;",
        "double precision",
    ),
    "a division": (
        CLIP_FILE,
        "return value(x) * coefficient;",
        "return value(x) * coefficient / low;",
        "calls in|arith",
    ),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_planted_is_found(planted, tmp_path):
    file, old, new, message = PLANTED[planted]
    with pytest.raises(AssertionError, match=message):
        check_everything(*compile_one(tmp_path, file=file, old=old, new=new))


def test_a_use_between_loads_of_a_mixture_is_found(tmp_path):
    right = "g[k] = read<kSize>(grads, entry.grad_dtype, at(i));"
    use = " if (g[k].x == 42) g[k].x = 0;"
    _, functions = compile_one(tmp_path, file="cuda/mixed.cuh", old=right, new=right + use, dtypes="mixed")
    (update,) = [f for f in functions if f.tile == sass.Tile("update", "SGD 0", "mixed")]
    assert sass.loads_in_flight_on_a_path(update) < update.tile.at_once * update.tile.arrays_read


def test_few_registers_spill_and_it_is_found(tmp_path):
    cubin, functions = compile_one(
        tmp_path,
        file="cuda/kernels.cuh",
        old="__launch_bounds__(kThreads, min_blocks<K, kDTypes>())",
        new="__maxnreg__(32)",
    )
    with pytest.raises(AssertionError):
        check_no_spills(cubin, functions)
    assert cubin.spills()
    assert any(i.opcode.startswith("STL") for f in functions for i in f.instructions)


def test_contraction_is_found(tmp_path):
    """Squares in float64 are contracted: the update in float32 has nothing to contract. The last flag counts."""
    tile = sass.Tile("measure", "two", "float64")
    _, functions = compile_one(tmp_path, "-fmad=true", dtypes="any")
    (loop,) = [f.hot_loop() for f in functions if f.tile == tile]
    with pytest.raises(AssertionError, match="contracts"):
        check_arithmetic(loop, tile)


def test_registers_of_a_multiprocessor():
    assert [sass.blocks_per_multiprocessor(n) for n in (32, 64, 80, 85, 128, 129, 255)] == [8, 4, 3, 2, 2, 1, 1]


LISTING = """
.text._Z1k:
_Z1k:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P1 LDG.E.EF.128 R8, [R2.64+0x200] ;
        /*0030*/               @P1 LDS.128 R8, [R20] ;
        /*0040*/                   FMUL R12, R7, R0.reuse ;
        /*0050*/                   LDG.E.EF.128 R16, [R2.64+0x400] ;
        /*0060*/              @!P0 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
"""


def test_parser():
    (function,) = sass.parse(LISTING)
    (loop,) = function.loops()
    assert len(function.instructions) == 8 and len(loop) == 6 and loop == function.hot_loop()
    assert loop[1] == sass.Instruction("!P1", "LDG.E.EF.128", "R8, [R2.64+0x200]")
    assert loop[3].registers() == {12, 7, 0}
    assert sass.loads_in_flight(loop) == 2
    assert [sass.is_memory(o) for o in ("LDG.E", "LD.E", "STS.128", "LDC.64", "LEA")] == [True] * 3 + [False] * 2


def test_numbers_from_the_source():
    assert [sass.packs_in_flight(n) for n in (1, 2, 3, 4, 5)] == [4, 4, 2, 1, 1]
    assert {variant: fma_calls(variant) for variant in COMMON} == {
        "SGD 0": 2,
        "SGD 1": 4,
        "SGD 1 limiting": 4,
        "Adam 2": 3,
        "Adam 3": 3,
        "ClipGrad 0": 0,
    }
