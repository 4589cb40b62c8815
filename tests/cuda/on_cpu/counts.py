"""What a step costs on a GPU, counted on the emulated device: launches, copies, waits, bytes per parameter.

Run by tests/cuda/test_emulated.py, where fastclip's steps are taken by the CUDA kernels.
"""

import pytest
import torch

import fastclip
from tests.support.cases import TINY, give_grads, make_params

from . import emulator

# Parameters and gradients, as torch allocates them; around tiles, and more than are kept on chip.
SHAPES = [(1 << 18,), (300, 257), (5,), (1023,), (4096,)]
MULTIPROCESSORS = 3  # of the emulated device


def stepped(shapes, dtype=torch.float32, steps=1, cls=fastclip.SGD, **settings):
    """An optimizer that has taken some steps, its parameters and their number of elements."""
    params = make_params(shapes, dtype)
    optimizer = cls(params, lr=0.1, **settings)
    for _ in range(steps):
        give_grads(params)
        optimizer.step()
    give_grads(params)
    return optimizer, params, sum(p.numel() for p in params)


def flat(numel, offset=0, dtype=torch.float32, grad_offset=None):
    """A parameter and its gradient, each as a view that starts some elements behind an aligned address."""
    p = torch.randn(numel + 16, dtype=torch.float64).to(dtype)[offset : offset + numel].detach().requires_grad_()
    start = offset if grad_offset is None else grad_offset
    p.grad = torch.randn(numel + 16, dtype=torch.float64).to(dtype)[start : start + numel]
    return p


ADAM = {"cls": fastclip.AdamW}


@pytest.mark.parametrize("settings", [{}, {"clip_value": 0.5}, {"clip_value": 0.5, "momentum": 0.9}, ADAM], ids=str)
@pytest.mark.parametrize("shapes", [[(3,)], SHAPES, TINY[:400]], ids=["one", "mixed", "400"])
def test_one_launch_without_a_norm(shapes, settings):
    optimizer, _, _ = stepped(shapes, **settings)
    counted = emulator.count(optimizer.step)
    assert (counted.launches, counted.copies, counted.synchronizations) == (1, 0, 0)


@pytest.mark.parametrize(
    "settings",
    [{"max_norm": 1.0}, {"max_norm": 1.0, "norm_type": "inf"}, {"skip_nonfinite": True}, {"max_norm": 1.0, **ADAM}],
    ids=str,
)
def test_one_cooperative_launch_with_a_norm(settings):
    optimizer, _, _ = stepped(SHAPES, **settings)
    counted = emulator.count(optimizer.step)
    assert (counted.launches, counted.cooperative_launches, counted.synchronizations) == (1, 1, 0)


def test_groups_of_one_dtype_share_a_launch():
    params = make_params([(50,)] * 20)
    give_grads(params)
    groups = [{"params": [p], "lr": 0.1 * (i + 1), "momentum": 0.9 * (i % 2)} for i, p in enumerate(params)]
    optimizer = fastclip.SGD(groups, clip_value=0.1)
    assert emulator.count(optimizer.step).launches == 1


@pytest.mark.parametrize("settings", [{"clip_value": 0.5}, {"max_norm": 1.0}], ids=["value", "norm"])
def test_a_table_in_device_memory_is_uploaded_only_when_an_address_changed(settings):
    """More tensors than the arguments of a kernel have room for."""
    params = make_params([(5,)] * 3000)
    give_grads(params)
    optimizer = fastclip.SGD(params, lr=0.1, **settings)
    pieces = -(-(3000 * 40 + 88) // 32000)
    assert emulator.count(optimizer.step).launches == 1 + pieces
    for _ in range(2):
        # The emulated device has its learning rates in turns on the device and on the host: two tables.
        emulator.count(optimizer.step)
    steps = [emulator.count(optimizer.step).launches for _ in range(2)]
    assert all(launches in (1, 1 + pieces) for launches in steps)


VALUE, NORM = {"clip_value": 0.5}, {"max_norm": 1.0}


@pytest.mark.parametrize(
    ("settings", "read", "written"),
    [
        (VALUE, 2, 1),
        ({**VALUE, "momentum": 0.9}, 3, 2),
        ({**VALUE, **ADAM}, 4, 3),
        ({**VALUE, **ADAM, "amsgrad": True}, 5, 4),
    ],
    ids=["plain", "momentum", "adam", "amsgrad"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_value_clip_moves_the_floor_and_nothing_more(dtype, settings, read, written):
    """12 bytes per float32 parameter, 20 with momentum, 28 for Adam; and each tensor's count of steps."""
    optimizer, params, numel = stepped(SHAPES, dtype, **settings)
    counted = emulator.count(optimizer.step)
    size = params[0].element_size()
    assert (counted.bytes_read, counted.bytes_written) == (read * size * numel, written * size * numel)


@pytest.mark.parametrize(
    ("settings", "read", "written"),
    [({}, 2, 1), ({"momentum": 0.9}, 3, 2), (ADAM, 4, 3)],
    ids=["plain", "momentum", "adam"],
)
def test_a_norm_reads_gradients_once_where_they_fit_on_the_chip(settings, read, written):
    """12 bytes per parameter, as a value clip: but for the few behind a whole number of 16 bytes."""
    optimizer, _, numel = stepped(SHAPES[1:], **settings, **NORM)
    counted = emulator.count(optimizer.step)
    tail = sum(torch.Size(shape).numel() % 4 for shape in SHAPES[1:])
    assert (counted.bytes_read, counted.bytes_written) == (4 * (read * numel + tail), 4 * written * numel)


CHANGE = {"max_change": 0.01, "max_relative_change": 0.01}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "norm_type": "inf"}], ids=str)
def test_a_limit_on_the_change_costs_no_byte_more_than_a_norm(settings, dtype):
    """The norm of the parameters comes from the step before; the first step measures them once."""
    whole = stepped(SHAPES, dtype, steps=2, **settings, **NORM)
    limited = stepped(SHAPES, dtype, steps=2, **settings, **CHANGE)
    expected, counted = (emulator.count(optimizer.step) for optimizer, *_ in (whole, limited))
    assert (counted.bytes_read, counted.bytes_written) == (expected.bytes_read, expected.bytes_written)
    assert (counted.launches, counted.cooperative_launches, counted.copies, counted.synchronizations) == (1, 1, 0, 0)


RULES = {"max_norm": fastclip.QuantileNorm(warmup=2), "skip_norm": fastclip.EmaNorm(z=6, warmup=2)}


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, ADAM], ids=["plain", "momentum", "adam"])
@pytest.mark.parametrize("shapes", [[(3,)], SHAPES, TINY[:400]], ids=["one", "mixed", "400"])
def test_a_rule_costs_what_its_number_costs(shapes, settings):
    """No byte per parameter, no launch, no copy, and nothing waits."""
    by_number = stepped(shapes, steps=4, **settings, max_norm=1.0, skip_nonfinite=True)
    by_rule = stepped(shapes, steps=4, **settings, **RULES)
    expected, counted = (emulator.count(optimizer.step) for optimizer, *_ in (by_number, by_rule))
    assert by_rule[0].clip_stats().threshold.isfinite()
    assert (counted.bytes_read, counted.bytes_written) == (expected.bytes_read, expected.bytes_written)
    assert (counted.launches, counted.cooperative_launches, counted.copies, counted.synchronizations) == (1, 1, 0, 0)


@pytest.mark.parametrize("max_norm", [1.0, fastclip.EmaNorm(z=1, warmup=2)], ids=["number", "rule"])
@pytest.mark.parametrize("scope", ["group", "parameter"])
@pytest.mark.parametrize("settings", [{}, ADAM], ids=["plain", "adam"])
@pytest.mark.parametrize("shapes", [[(3,)], SHAPES, TINY[:300]], ids=["one", "mixed", "300"])
def test_norms_of_segments_cost_what_the_norm_of_all_costs(shapes, settings, scope, max_norm):
    """No byte per parameter, no launch, no copy, and nothing waits."""
    of_all = stepped(shapes, steps=4, **settings, max_norm=1.0)
    scoped = stepped(shapes, steps=4, **settings, max_norm=max_norm, norm_scope=scope)
    expected, counted = (emulator.count(optimizer.step) for optimizer, *_ in (of_all, scoped))
    assert (counted.bytes_read, counted.bytes_written) == (expected.bytes_read, expected.bytes_written)
    assert (counted.launches, counted.cooperative_launches, counted.copies, counted.synchronizations) == (1, 1, 0, 0)


@pytest.mark.parametrize("max_norm", [1.0, fastclip.QuantileNorm(0.1, scale=1.0, warmup=1)], ids=["number", "rule"])
def test_a_micro_batch_costs_a_norm_and_an_addition(max_norm):
    """The first one of a step, and one that is added: one launch. Where gradients stay on the chip, 12 bytes."""
    params = make_params(SHAPES[1:])
    grads = [torch.randn_like(p) for p in params]
    micro_batch = fastclip.clipped_accumulation(torch.optim.SGD(params, lr=0.1), max_norm=max_norm)

    def add():
        with micro_batch:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()

    for _ in range(2):
        add()
    counted = emulator.count(add)
    numel, tail = sum(p.numel() for p in params), sum(p.numel() % 4 for p in params)
    assert (counted.launches, counted.copies, counted.synchronizations) == (1, 0, 0)
    assert (counted.bytes_read, counted.bytes_written) == (4 * (2 * numel + tail), 4 * numel)


@pytest.mark.parametrize(("settings", "read", "written"), [({}, 2, 1), (ADAM, 4, 3)], ids=["plain", "adam"])
def test_a_deferred_clip_reads_gradients_once_more_and_writes_none(settings, read, written):
    """4 bytes per parameter to measure, and then the step without a clip: nothing waits."""
    optimizer, params, numel = stepped(SHAPES, **settings)
    counted = emulator.count(lambda: fastclip.clip_grad_norm_(params, 1e-3, defer=True))
    assert (counted.launches, counted.copies, counted.synchronizations) == (1, 0, 0)
    assert (counted.bytes_read, counted.bytes_written) == (4 * numel, 0)
    counted = emulator.count(optimizer.step)
    assert (counted.launches, counted.copies, counted.synchronizations) == (1, 0, 0)
    assert (counted.bytes_read, counted.bytes_written) == (4 * read * numel, 4 * written * numel)


def test_only_what_was_written_to_is_measured_anew():
    optimizer, params, _ = stepped(SHAPES, steps=2, **CHANGE)
    expected = emulator.count(optimizer.step)
    give_grads(params)
    with torch.no_grad():
        params[1].mul_(2)
    counted = emulator.count(optimizer.step)
    assert counted.bytes_read - expected.bytes_read == 4 * params[1].numel() and counted.launches == 1


# What each measures before an update, in arrays besides the gradient, which stays on the chip.
MEASURED = {
    "max_update_rms": ({**ADAM, "max_update_rms": 1.0}, 1),
    "max_change": ({**ADAM, "max_change": 0.1}, 2),
    "max_relative_change": ({**ADAM, "max_relative_change": 0.1}, 3),
    "max_change and max_norm": ({**ADAM, **NORM, "max_change": 0.1}, 2),
    "max_change of each": ({**ADAM, **NORM, "max_change": 0.1, "norm_scope": "parameter"}, 2),
    "LAMB": ({"cls": fastclip.LAMB}, 3),
    "ScaledAdam": ({"cls": fastclip.ScaledAdam}, 1),
}


@pytest.mark.parametrize(("settings", "arrays"), MEASURED.values(), ids=MEASURED)
def test_what_is_measured_of_tensors_is_read_once_more(settings, arrays):
    """4 to 12 bytes beside Adam's 28: the average squares for max_update_rms, or the parameters for ScaledAdam, to all
    three. One launch, and nothing waits."""
    optimizer, _, numel = stepped(SHAPES[1:], steps=2, **settings)
    counted = emulator.count(optimizer.step)
    tails = 2 * sum(torch.Size(shape).numel() % 4 for shape in SHAPES[1:])  # of gradients, which are not kept
    assert (counted.bytes_read, counted.bytes_written) == (4 * ((4 + arrays) * numel + tails), 4 * 3 * numel)
    assert (counted.launches, counted.cooperative_launches, counted.copies, counted.synchronizations) == (1, 1, 0, 0)


@pytest.mark.parametrize("scope", ["group", "parameter"])
def test_a_limit_on_the_change_of_segments_costs_what_their_norms_cost(scope):
    scoped = stepped(SHAPES, steps=2, **NORM, norm_scope=scope)
    limited = stepped(SHAPES, steps=2, **CHANGE, norm_scope=scope)
    expected, counted = (emulator.count(optimizer.step) for optimizer, *_ in (scoped, limited))
    assert (counted.bytes_read, counted.bytes_written) == (expected.bytes_read, expected.bytes_written)
    assert (counted.launches, counted.cooperative_launches) == (1, 1)


@pytest.mark.parametrize(("settings", "read", "written"), [({}, 3, 1), (ADAM, 5, 3)], ids=["plain", "adam"])
def test_beyond_that_only_the_rest_is_read_again(settings, read, written):
    """16 bytes per parameter, 32 for Adam, less what shared memory keeps, which is nearly all there is of it."""
    optimizer, _, numel = stepped([(1 << 20,)], **settings, **NORM)
    counted = emulator.count(optimizer.step)
    kept = read * numel - counted.bytes_read // 4
    shared = counted.last_blocks * counted.last_shared_bytes
    assert counted.bytes_written == 4 * written * numel
    assert 0.9 * shared < 4 * kept <= shared
    assert shared > 0.9 * MULTIPROCESSORS * (227 << 10)


def test_clip_grad_norm_leaves_gradients_that_are_short_enough():
    params = make_params(SHAPES)
    give_grads(params)
    numel = sum(p.numel() for p in params)
    counted = emulator.count(lambda: fastclip.clip_grad_norm_(params, 1e9))
    assert (counted.bytes_read, counted.bytes_written) == (4 * numel, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_16_bytes_at_once_wherever_alignment_allows(offset, dtype):
    """Also where views into a flat buffer start anywhere, as long as all arrays start at the same place."""
    numel, per_pack = 40_000, 16 // dtype.itemsize
    p = flat(numel, offset, dtype)
    aligned = make_params([(4096,)], dtype)
    give_grads(aligned)
    counted = emulator.count(fastclip.SGD([p, *aligned], lr=0.1, **VALUE).step)
    head = (per_pack - offset) % per_pack
    packs = (numel - head) // per_pack + 4096 // per_pack
    assert (counted.wide_reads, counted.wide_writes) == (2 * packs, packs)
    assert counted.narrow_reads == 2 * (head + (numel - head) % per_pack)


def test_a_gradient_in_another_order_costs_no_more_bytes():
    """As in a bucket of DistributedDataParallel, with gradient_as_bucket_view=True."""
    p = flat(10_000, grad_offset=1)
    counted = emulator.count(fastclip.SGD([p], lr=0.1, **VALUE).step)
    assert counted.bytes_read + counted.bytes_written == 12 * 10_000 and counted.wide_reads == 0


def test_every_block_has_work_before_any_has_twice_as_much():
    """A single tensor is dealt out to all multiprocessors."""
    optimizer, _, _ = stepped([(1 << 16,)], **VALUE)
    counted = emulator.count(optimizer.step)
    assert counted.last_blocks >= 2 * MULTIPROCESSORS


def test_a_small_model_does_not_start_blocks_for_nothing():
    optimizer, _, _ = stepped([(10,)], **VALUE)
    assert emulator.count(optimizer.step).last_blocks == 1
