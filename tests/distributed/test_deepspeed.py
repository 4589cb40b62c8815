"""fastclip's optimizers in DeepSpeed's engine: ZeRO leaves each rank a piece of the parameters, which has no norm."""

import importlib.util

import pytest

if not importlib.util.find_spec("deepspeed"):
    pytest.skip("needs deepspeed: pip install -r requirements-trainers.txt", allow_module_level=True)

from .worker import PASSED, start_ranks

CASES = [
    "deepspeed_clips",
    "fastclip_clips_what_is_whole",
    "a_norm_of_a_piece_is_refused",
    "the_recipe_ends_where_the_loop_ends",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    return {ranks: start_ranks(ranks, folder, CASES) for ranks in (1, 2)}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_zero(results, case, ranks):
    failed = [f"rank {rank}: {outcome}" for rank, outcome in results[ranks][case].items() if outcome != PASSED]
    assert not failed, "\n".join(failed)
