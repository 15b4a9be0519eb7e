"""Rounds, errors and bytes are what they are said to be."""

import math

import pytest
import torch

from benchmarks.cases import AGAIN, OURS, Bound, Case, Inputs, Tensors, plainly
from benchmarks.measure import Budget, error_of, interleave, peak_bytes, rounds_for, saved_bytes

CASE = Case("routed_mlp", "fwd_bwd", "tiny", 1000, "fp32", "uniform", "cpu")
SIZE = 4000


def make_inputs(sets: int = 1) -> Inputs:
    weights = {"w": torch.randn(1000, requires_grad=True)}
    batches = tuple({"x": torch.randn(1000, requires_grad=True)} for _ in range(sets))
    return Inputs(weights, batches, tuple(torch.randn(1000) for _ in range(sets)))


def test_error_is_relative_and_the_greatest():
    wanted = [torch.full((4,), 2.0), torch.ones(4)]
    assert error_of([torch.full((4,), 2.1), torch.ones(4)], wanted) == pytest.approx(0.05)
    assert error_of([torch.full((4,), 2.0), torch.zeros(4)], wanted) == 1.0
    assert error_of([torch.tensor([1.0, math.nan, 1, 1]), torch.ones(4)], wanted) == math.inf


def test_missing_gradients_are_no_agreement():
    with pytest.raises(ValueError, match="zip"):
        error_of([torch.ones(1)], [torch.ones(1), torch.ones(1)])


def test_contenders_share_their_rounds_and_slow_ones_get_fewer():
    budget = Budget(seconds=4, slow_seconds=2, least=7, most=101)

    def rounds(**seconds: float) -> dict[str, int]:
        return rounds_for(seconds, budget, ["ours"], [name for name in seconds if name != "line"])

    assert rounds(ours=0.1, b=0.3, slow=1.0) == {"ours": 10, "b": 10, "slow": 2}
    assert rounds(ours=1.0, b=1.0, slow=9.0) == {"ours": 7, "b": 7, "slow": 1}
    assert rounds(ours=1e-5, b=1e-5) == {"ours": 101, "b": 101}


def test_ours_gets_its_rounds_however_slow_it_is():
    seconds = {"ours": 5.0, "peer": 0.5, "line": 0.01}
    rounds = rounds_for(seconds, Budget(), ["ours"], ["ours", "peer"])
    assert rounds == {"ours": 7, "peer": 7, "line": 7}


def test_a_line_of_orientation_sets_no_pace():
    rounds = rounds_for({"ours": 0.2, "peer": 0.3, "line": 0.01}, Budget(), [], ["ours", "peer"])
    assert rounds == {"ours": 7, "peer": 7, "line": 7}


def test_rounds_can_be_asked_for():
    assert rounds_for({"a": 1.0, "b": 9.0}, Budget(exact=3), [], ["a"]) == {"a": 3, "b": 3}


def test_rounds_call_everyone_once_on_the_same_batch_in_changing_order():
    inputs, calls = make_inputs(sets=3), []

    def recorder(name: str) -> Bound:
        def run(index: int) -> torch.Tensor:
            calls.append((name, index))
            return inputs.batches[index]["x"] * 2

        return Bound(run, lambda index: {"x": inputs.batches[index]["x"]})

    names = [OURS, AGAIN, "c"]
    bound = {name: recorder(name) for name in names}
    times = interleave(bound, inputs, CASE, Budget(exact=12), dict.fromkeys(names, 1e-3), names)
    assert {name: len(own) for name, own in times.items()} == dict.fromkeys(names, 12)
    rounds = [calls[i : i + 3] for i in range(3, len(calls), 3)]
    assert len(rounds) == 12
    for turn, together in enumerate(rounds):
        assert set(together) == {(name, turn % 3) for name in names}
    assert len({tuple(name for name, _ in together) for together in rounds}) > 3


def test_saved_bytes_leave_the_weights_out_and_count_storages_once():
    inputs = make_inputs()
    product = plainly(lambda weights, batch: weights["w"] * batch["x"])(inputs)
    assert saved_bytes(product, inputs) == SIZE  # x; w is there anyway
    square = plainly(lambda weights, batch: (batch["x"] * batch["x"]) * weights["w"])(inputs)
    assert saved_bytes(square, inputs) == 2 * SIZE  # x once, and its square


def test_peak_bytes_follow_what_is_alive():
    inputs = make_inputs()

    def short_lived(weights: Tensors, batch: Tensors) -> torch.Tensor:
        with torch.no_grad():
            torch.zeros(5000).add_(1)
        return weights["w"] + batch["x"]

    lean = plainly(lambda weights, batch: weights["w"] + batch["x"])(inputs)
    low, high = (
        peak_bytes(lean, inputs, CASE),
        peak_bytes(plainly(short_lived)(inputs), inputs, CASE),
    )
    assert SIZE <= low < 4 * SIZE
    assert 5 * SIZE <= high < 5 * SIZE + low
