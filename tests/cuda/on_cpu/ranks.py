"""Two ranks whose shards are stepped by the CUDA kernels: also one that has nothing, and waits for the other's sums."""

from tests.distributed.worker import PASSED, start_ranks

CASES = [
    "fsdp_steps_as_one_process_with_the_whole_model",
    "gradients_that_are_missing",
    "a_nan_on_one_rank_skips_the_step_on_all",
    "amp_verdicts_that_differ_between_ranks_are_joined",
    "a_limit_on_the_change_counts_all_ranks",
    "rules_look_at_the_norms_of_all_ranks",
    "a_nan_on_one_rank_enters_no_history",
    "a_rank_without_gradients_remembers_the_norms_of_the_others",
    "norms_by_parameter_are_those_of_all_ranks",
    "norms_of_segments_are_those_of_all_ranks",
]


def test_ranks(tmp_path):
    outcomes = start_ranks(2, tmp_path, CASES)
    assert all(outcome == PASSED for of_case in outcomes.values() for outcome in of_case.values()), outcomes
