"""The rows of the GPU suite can be made, stand in a useful order, and are not too many."""

from dataclasses import replace
from itertools import pairwise

from benchmarks.gpu_suite import gpu_cases
from benchmarks.options import GPU_DEADLINE, GPU_SECONDS
from benchmarks.registry import BENCHMARKS
from benchmarks.shapes import COMPILE_SEEN_TOKENS, COMPILE_TOKENS, GPU_SHAPES, INPUT_SETS

ELSEWHERE = {"lora_mixture", "expert_lora", "router", "depth"}
CASES = gpu_cases("cuda")
MINUTE = 60


def test_every_row_is_of_a_shape_of_its_op():
    assert len(set(CASES)) == len(CASES)
    assert all(BENCHMARKS[case.op].knows(case.shape_name) for case in CASES)
    assert {case.op for case in CASES} == set(BENCHMARKS) - ELSEWHERE
    assert {case.shape_name for case in CASES if case.op == "routed_mlp"} == set(GPU_SHAPES)


def test_everything_that_is_promised_has_a_row():
    modes = {case.mode for case in CASES}
    assert modes == {"fwd", "fwd_bwd", "mem", "launches", "compiles", "graph"}
    assert {case.routing for case in CASES} == {"uniform", "zipf"}
    assert {case.tokens for case in CASES if case.mode == "launches"} == {1}


def test_a_second_a_row_leaves_time_for_the_first_calls():
    assert len(CASES) * GPU_SECONDS < GPU_DEADLINE / 3
    assert GPU_DEADLINE < 9 * MINUTE


def test_rows_of_the_same_inputs_stand_together_and_gradients_come_first():
    keys = [replace(case, mode="") for case in CASES]
    changes = sum(one != other for one, other in pairwise(keys)) + 1
    assert changes == len(set(keys))
    for key in set(keys):
        modes = [case.mode for case in CASES if replace(case, mode="") == key]
        assert "fwd_bwd" not in modes[1:]


def test_twenty_tokens_that_were_not_seen_before():
    assert len(set(COMPILE_TOKENS)) == 20
    assert not set(COMPILE_TOKENS) & set(COMPILE_SEEN_TOKENS)
    assert min(COMPILE_SEEN_TOKENS) < min(COMPILE_TOKENS)
    assert max(COMPILE_TOKENS) < max(COMPILE_SEEN_TOKENS)


def test_a_captured_row_has_other_inputs_to_replay():
    for case in CASES:
        if case.mode == "graph":
            small = replace(case, shape_name="tiny", device="cpu")
            assert len(BENCHMARKS[case.op].make_inputs(small).batches) == INPUT_SETS
