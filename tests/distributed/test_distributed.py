"""Data parallel, sharded and tensor parallel models on 1, 2 and 4 ranks, each a process of its own."""

import sys
import types

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import fastclip
from tests.support.cases import param

from . import (
    accumulation,
    checkpoints,
    deferred,
    deltas,
    disagreement,
    histories,
    models,
    pieces,
    placements,
    quantized,
    scalers,
    scopes,
    stages,
)
from .compare import CASES
from .worker import PASSED, start_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of all cases. Processes take seconds to start, so each number of ranks starts them once."""
    folder = tmp_path_factory.mktemp("distributed")

    def run(ranks):
        return start_ranks(ranks, folder, [name for name, (_, sizes) in CASES.items() if ranks in sizes])

    return {ranks: run(ranks) for ranks in (2, 1, 4)}  # 2 save the checkpoints


def cases_of(module):
    """(name, number of ranks) of each case in a file of tests/distributed."""
    found = [
        (name, ranks) for name, (case, sizes) in CASES.items() if case.__module__ == module.__name__ for ranks in sizes
    ]
    return pytest.mark.parametrize(("case", "ranks"), found, ids=[f"{name}-{ranks}" for name, ranks in found])


def assert_passed(outcomes):
    failed = [f"rank {rank}: {outcome}" for rank, outcome in outcomes.items() if outcome != PASSED]
    assert not failed, "\n".join(failed)


@cases_of(models)
def test_models(results, case, ranks):
    assert_passed(results[ranks][case])


@cases_of(placements)
def test_placements(results, case, ranks):
    assert_passed(results[ranks][case])


@cases_of(disagreement)
def test_ranks_that_see_something_else(results, case, ranks):
    assert_passed(results[ranks][case])


@cases_of(accumulation)
def test_clipped_accumulation(results, case, ranks):
    assert_passed(results[ranks][case])


@cases_of(deferred)
def test_deferred_clips(results, case, ranks):
    assert_passed(results[ranks][case])


@cases_of(checkpoints)
def test_checkpoints(results, case, ranks):
    assert_passed(results[ranks][case])


@cases_of(quantized)
def test_states_in_8_bits(results, case, ranks):
    assert_passed(results[ranks][case])


@cases_of(histories)
def test_limits_by_past_norms(results, case, ranks):
    assert_passed(results[ranks][case])


@cases_of(scopes)
def test_norms_of_segments(results, case, ranks):
    assert_passed(results[ranks][case])


@cases_of(deltas)
def test_limits_on_what_is_added(results, case, ranks):
    assert_passed(results[ranks][case])


@cases_of(stages)
def test_norms_over_the_stages_of_a_pipeline(results, case, ranks):
    assert_passed(results[ranks][case])


@cases_of(pieces)
def test_groups_that_were_exchanged(results, case, ranks):
    assert_passed(results[ranks][case])


@cases_of(scalers)
def test_scalers_whose_verdict_is_their_own(results, case, ranks):
    assert_passed(results[ranks][case])


def test_a_rank_that_fails_or_does_not_come_is_told(tmp_path):
    """The tests above can fail: an error of one rank reaches them, and what could not run after it."""
    outcomes = start_ranks(2, tmp_path, ["fails_on_rank_1", "passes"])
    assert outcomes["fails_on_rank_1"][0] == PASSED
    assert "as it has to" in outcomes["fails_on_rank_1"][1]
    assert all("did not run" in outcome for outcome in outcomes["passes"].values())
    with pytest.raises(AssertionError, match="as it has to"):
        assert_passed(outcomes["fails_on_rank_1"])


def test_a_norm_of_the_shards_of_one_rank_is_refused():
    """FullyShardedDataParallel's parameters are plain tensors with a mark."""
    p = param(3)
    p._fsdp_flattened = True
    for settings in ({"max_norm": 1.0}, {"max_norm": 1.0, "norm_scope": "parameter"}, {"skip_nonfinite": True}):
        with pytest.raises(TypeError, match=f"{next(iter(settings))} can't be applied to param_groups.0.: each rank"):
            fastclip.SGD([p], lr=0.1, **settings)
    for kind in (fastclip.LAMB, fastclip.NovoGrad, fastclip.ScaledAdam):  # steps as large as a whole parameter says
        settings = {"max_grad_norm": None} if kind is fastclip.LAMB else {}
        with pytest.raises(TypeError, match=f"{kind.__name__} can't be applied to param_groups.0.: each rank"):
            kind([p], **settings)
    fastclip.SGD([p], lr=1.0, clip_value=0.5).step()
    assert p.tolist() == [-0.5] * 3


def test_a_norm_of_the_parameters_of_one_rank_is_refused():
    """ZeroRedundancyOptimizer shares the parameters out: the optimizer of a rank sees some of them."""
    zero = pytest.importorskip("torch.distributed.optim").ZeroRedundancyOptimizer
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for settings in ({"max_norm": 1.0}, {"skip_nonfinite": True}):
            with pytest.raises(TypeError, match=f"{next(iter(settings))} can't be applied under ZeroRedundancy"):
                zero([param(3)], fastclip.SGD, lr=0.1, **settings)
        p, q = param(3), param(3)
        zero([p], fastclip.SGD, lr=1.0, clip_value=0.5).step()
        one = param(3)  # whole, and its norm concerns no other
        zero([one], fastclip.SGD, lr=1.0, max_norm=1.0, norm_scope="parameter").step()
        assert one.detach().norm().item() == pytest.approx(1.0, rel=1e-5)
        fastclip.SGD([q], lr=1.0, clip_value=0.5, max_norm=10.0).step()  # one made elsewhere may have a norm
        assert p.tolist() == q.tolist() == [-0.5] * 3
    finally:
        torch.distributed.destroy_process_group()


def test_a_norm_under_fairscale_is_refused(monkeypatch):
    """A module of that name, which makes an optimizer for a share as FairScale's OSS does."""
    oss = types.ModuleType("fairscale.optim.oss")
    exec("def share(optim, params, **settings):\n    return optim(params[:1], **settings)", vars(oss))
    monkeypatch.setitem(sys.modules, oss.__name__, oss)
    params = [param(3), param(3)]
    for settings in ({"max_norm": 1.0}, {"skip_nonfinite": True}):
        with pytest.raises(TypeError, match=f"{next(iter(settings))} can't be applied under FairScale's OSS"):
            oss.share(fastclip.SGD, params, lr=0.1, **settings)
        fastclip.SGD(params, lr=0.1, **settings)
    oss.share(fastclip.SGD, params, lr=1.0, clip_value=0.5).step()
    assert [p.tolist() for p in params] == [[-0.5] * 3, [0.0] * 3]
