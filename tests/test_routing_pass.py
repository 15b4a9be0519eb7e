"""The routing pass: who is remembered, when, and who is told."""

import copy
import pickle

import pytest
import torch

from moeroute.losses import BalanceLoss
from moeroute.routing_pass import RoutingPass
from moeroute.types import RouterInput, RouterOutput, RoutingRecord


def record(site="layer"):
    routing = RouterOutput(
        router_logits=torch.zeros(3, 4, requires_grad=True),
        routing_weights=torch.ones(3, 1),
        selected_experts=torch.zeros(3, 1, dtype=torch.int64),
    )
    return RoutingRecord(site=site, layer_index=0, routing=routing, losses=(BalanceLoss(),))


def test_a_rooted_pass_is_closed_outside_a_forward():
    routing_pass = RoutingPass(rooted=True)
    assert not routing_pass.wants(charged=True)
    routing_pass.begin()
    assert routing_pass.wants(charged=True)
    assert not routing_pass.wants(charged=False)
    routing_pass.end()
    assert not routing_pass.wants(charged=True)


def test_a_layer_run_twice_is_charged_twice():
    routing_pass = RoutingPass(rooted=True)
    routing_pass.begin()
    routing_pass.keep(record(), charged=True)
    routing_pass.keep(record(), charged=True)
    assert len(routing_pass.read()) == 2


def test_a_layer_on_its_own_keeps_the_last_forward():
    routing_pass = RoutingPass()
    routing_pass.keep(record(), charged=True)
    last = record()
    routing_pass.keep(last, charged=True)
    assert routing_pass.read() == (last,)


def test_unread_losses_are_reported_once():
    routing_pass = RoutingPass(rooted=True)
    routing_pass.begin()
    routing_pass.keep(record(), charged=True)
    with pytest.warns(UserWarning, match="1 routed layers reached no loss"):
        routing_pass.begin()
    routing_pass.begin()


def test_listeners_hear_everything_inside_the_block():
    routing_pass, heard = RoutingPass(), []
    with routing_pass.listening(heard.append):
        assert routing_pass.wants(charged=False)
        routing_pass.keep(record(), charged=False)
    assert not routing_pass.wants(charged=False)
    assert len(heard) == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_start_empty(duplicate):
    routing_pass = RoutingPass(rooted=True)
    routing_pass.begin()
    routing_pass.keep(record(), charged=True)
    twin = duplicate(routing_pass)
    assert twin.rooted
    assert not twin.is_open
    assert twin.records == {}


def test_side_inputs_follow_the_tokens_they_speak_of():
    routing_pass = RoutingPass(rooted=True)
    mask = torch.tensor([[True, False], [True, True]])
    routing_pass.begin(token_ids=torch.arange(4).reshape(2, 2), token_mask=mask)
    whole = routing_pass.router_input(torch.zeros(2, 2, 5))
    assert whole.sequence_shape == (2, 2)
    assert whole.token_mask is not None
    assert whole.token_mask.tolist() == [True, False, True, True]
    part = routing_pass.router_input(torch.zeros(3, 5))
    assert part.token_mask is None
    assert part.token_ids is None


def test_router_input_and_output_check_their_shapes():
    with pytest.raises(ValueError, match="flatten"):
        RouterInput(hidden_states=torch.zeros(1, 2, 3), sequence_shape=(1, 2))
    with pytest.raises(ValueError, match="does not multiply"):
        RouterInput(hidden_states=torch.zeros(5, 3), sequence_shape=(2, 2))
    good = {
        "router_logits": torch.zeros(3, 4),
        "routing_weights": torch.zeros(3, 2),
        "selected_experts": torch.zeros(3, 2, dtype=torch.int64),
    }
    for name, bad, words in (
        ("router_logits", torch.zeros(3, 4).half(), "float32"),
        ("selected_experts", torch.zeros(3, 2, dtype=torch.int32), "int64"),
        ("routing_weights", torch.zeros(3, 1), "differ"),
        ("router_logits", torch.zeros(2, 4), "2 tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            RouterOutput(**(good | {name: bad}))
