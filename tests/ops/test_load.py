import math

import pytest
import torch

from moeroute import ops

IDS = torch.tensor([[0, 1], [1, 2], [1, 4], [-1, 3]])  # four experts; 4 and -1 are empty


def test_counts_skip_empty_slots_of_both_kinds():
    assert ops.tokens_per_expert(IDS, 4).tolist() == [1, 3, 1, 1]
    assert ops.tokens_per_expert(IDS, 4).dtype == torch.int64


def test_counts_skip_padding():
    mask = torch.tensor([True, False, True, True])
    assert ops.tokens_per_expert(IDS, 4, mask).tolist() == [1, 2, 0, 1]


def test_counts_of_no_tokens_and_of_expanded_ids():
    assert ops.tokens_per_expert(torch.empty(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]
    assert ops.tokens_per_expert(torch.tensor([[1]]).expand(5, 2), 3).tolist() == [0, 10, 0]


def test_co_activation_by_hand():
    pairs = ops.co_activation(IDS, 4)
    expected = [[1, 1, 0, 0], [1, 3, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert pairs.tolist() == expected
    assert pairs.dtype == torch.int64
    masked = ops.co_activation(IDS, 4, torch.tensor([False, True, True, True]))
    assert masked[0].tolist() == [0, 0, 0, 0]


def test_co_activation_counts_a_token_once_and_survives_autocast():
    ids = torch.tensor([[2, 2]]).repeat(1001, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.co_activation(ids, 3)[2, 2] == 1001


def test_balance_and_collapse():
    even, collapsed = torch.tensor([5, 5, 5, 5]), torch.tensor([0, 20, 0, 0])
    assert ops.load_entropy(even) == 1.0
    assert ops.load_entropy(collapsed) == 0.0
    assert ops.load_entropy_nats(even).item() == pytest.approx(math.log(4))
    assert ops.coefficient_of_variation(even) == 0.0
    assert ops.coefficient_of_variation(collapsed).item() == pytest.approx(math.sqrt(3))
    assert ops.max_violation(even) == 0.0
    assert ops.max_violation(collapsed) == 3.0
    assert ops.dead_experts(collapsed).tolist() == [True, False, True, True]


def test_statistics_of_nothing_are_zero_and_one_expert_is_balanced():
    nothing, single = torch.zeros(4, dtype=torch.int64), torch.tensor([7])
    for statistic in (
        ops.load_entropy,
        ops.load_entropy_nats,
        ops.coefficient_of_variation,
        ops.max_violation,
    ):
        assert statistic(nothing) == 0.0
    assert ops.load_entropy(single) == 1.0
    assert ops.max_violation(single) == 0.0


def test_statistics_take_a_table_of_layers():
    table = torch.tensor([[5, 5, 5, 5], [0, 20, 0, 0]])
    assert ops.load_entropy(table).tolist() == [1.0, 0.0]
    assert ops.max_violation(table).tolist() == [0.0, 3.0]
    assert ops.coefficient_of_variation(table).shape == (2,)


def test_counts_trace_without_a_break():
    counted = torch.compile(ops.tokens_per_expert, fullgraph=True, backend="eager")
    assert counted(IDS, 4).tolist() == [1, 3, 1, 1]
