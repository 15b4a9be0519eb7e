"""Places in queues, against a loop."""

import torch

from moeroute.ops.queue import places_in_columns, places_in_queue, rows_allowed


def by_loop(ids, priority):
    places = torch.zeros_like(ids)
    for row in range(len(ids)):
        ahead = [
            other
            for other in range(len(ids))
            if ids[other] == ids[row] and (-priority[other], other) < (-priority[row], row)
        ]
        places[row] = len(ahead)
    return places


def test_places_by_order_and_by_priority():
    torch.manual_seed(0)
    ids = torch.randint(0, 5, (60,))
    assert torch.equal(places_in_queue(ids, 4), by_loop(ids, torch.zeros(60)))
    priority = torch.randint(0, 9, (60,)).float()  # with ties, where the earlier is first
    assert torch.equal(places_in_queue(ids, 4, priority), by_loop(ids, priority))
    assert places_in_queue(ids[:0], 4).shape == (0,)


def test_places_in_columns_with_padding_last():
    wishes = torch.tensor([[0.1, 0.5], [0.9, 0.4], [0.5, 0.6]])
    assert places_in_columns(wishes, None).tolist() == [[2, 1], [0, 2], [1, 0]]
    mask = torch.tensor([True, False, True])
    assert places_in_columns(wishes, mask).tolist() == [[1, 1], [2, 2], [0, 0]]


def test_rows_allowed_round_up_once():
    assert rows_allowed(10, 1.1 * 2 / 8, None) == 3
    assert rows_allowed(40, 1.1 * 2 / 8, None) == 11  # 11.000000000000002 in floats
    mask = torch.arange(50) < 40
    assert rows_allowed(50, 1.1 * 2 / 8, mask) == 11
    assert rows_allowed(0, 0.5, None) == 0
