"""RMoE: the GRU is torch's, it recurs over depth, and its gradient goes through all layers."""

import pytest
import torch
from torch import nn

import moeroute
from moeroute.layers import MoELayer, SwiGLUExperts
from moeroute.methods import RMoE
from moeroute.routers.recurrent import RecurrentRouter, gru_step, shared_cell
from moeroute.routers.select import TopK
from moeroute.types import RouterInput

HIDDEN, EXPERTS, STATE, TOKENS = 12, 6, 8, 5


def routers(count=2):
    torch.manual_seed(0)
    made = RMoE(state_size=STATE, top_k=2).routers(HIDDEN, EXPERTS, count)
    for router in made:
        for parameter in router.parameters():
            nn.init.normal_(parameter, std=0.5)
    return made


def given(tokens, state=None):
    return RouterInput(hidden_states=tokens, sequence_shape=(1, tokens.shape[0]), state=state)


def test_the_step_is_that_of_torch():
    cell = shared_cell(STATE)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.normal_()
    inputs, state = torch.randn(TOKENS, STATE), torch.randn(TOKENS, STATE)
    torch.testing.assert_close(gru_step(cell, inputs, state), cell(inputs, state))


def test_the_equations_by_hand():
    (router,) = routers(1)
    tokens = torch.randn(TOKENS, HIDDEN)
    state = torch.randn(TOKENS, STATE)
    routing = router(given(tokens, state))
    new = router.cell(tokens @ router.down.weight.T, state)
    torch.testing.assert_close(routing.state, new)
    torch.testing.assert_close(routing.router_logits, new @ router.head.weight.T)
    kept = (new @ router.head.weight.T).softmax(-1).topk(2).values
    torch.testing.assert_close(routing.routing_weights, kept / kept.sum(-1, keepdim=True))


def test_the_gradient_reaches_the_layer_before_and_not_without_the_state():
    first, second = routers()
    tokens = torch.randn(TOKENS, HIDDEN)
    state = first(given(tokens)).state
    second(given(tokens, state)).router_logits.sum().backward()
    assert first.down.weight.grad.abs().sum() > 0
    first.zero_grad()
    second(given(tokens, state.detach())).router_logits.sum().backward()
    assert first.down.weight.grad is None


def test_tokens_have_states_of_their_own():
    first, second = routers()
    tokens, order = torch.randn(TOKENS, HIDDEN), torch.randperm(TOKENS)
    straight = second(given(tokens, first(given(tokens)).state))
    shuffled = second(given(tokens[order], first(given(tokens[order])).state))
    torch.testing.assert_close(straight.state[order], shuffled.state)


def test_one_layer_owns_the_cell_and_all_use_it():
    first, second = routers()
    assert first._cell[0] is second._cell[0]
    assert any(key.startswith("cell.") for key in first.state_dict())
    assert not any(key.startswith("cell.") for key in second.state_dict())


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens):
    first, second = routers()
    state = first(given(torch.randn(tokens, HIDDEN))).state
    assert second(given(torch.randn(tokens, HIDDEN), state)).state.shape == (tokens, STATE)


def test_a_state_of_other_tokens_is_an_error():
    first, second = routers()
    state = first(given(torch.randn(3, HIDDEN))).state
    with pytest.raises(ValueError, match="see the same tokens"):
        second(given(torch.randn(4, HIDDEN), state))


def test_a_cell_of_two_widths_is_an_error():
    with pytest.raises(ValueError, match="nn.GRUCell"):
        RecurrentRouter(HIDDEN, EXPERTS, TopK(2), cell=nn.GRUCell(3, 4))
    with pytest.raises(ValueError, match="state_size=0"):
        RMoE(state_size=0)


class Stack(nn.Module):
    """Two MoE layers of ours with one recurrent router."""

    def __init__(self):
        super().__init__()
        method = RMoE(state_size=STATE, top_k=2)
        self.layers = nn.ModuleList(
            MoELayer(
                router=router,
                experts=SwiGLUExperts(EXPERTS, HIDDEN, 8),
                losses=method.losses(),
            )
            for router in method.routers(HIDDEN, EXPERTS, 2)
        )

    def forward(self, hidden_states):
        for layer in self.layers:
            hidden_states = hidden_states + layer(hidden_states)
        return hidden_states


def test_connected_layers_of_ones_own_hand_the_state_on():
    model = Stack()
    routing_pass = moeroute.connect_layers(model).layers[0].routing_pass
    tokens = torch.randn(2, 3, HIDDEN)
    model(tokens)
    records = list(routing_pass.records.values())
    (gradient,) = torch.autograd.grad(
        records[1].routing.state.sum(), model.layers[0].router.down.weight
    )
    assert gradient.abs().sum() > 0
    assert moeroute.aux_losses(model).parts["BalanceLoss"] > 0


def test_layers_that_are_not_connected_route_as_first_layers():
    model = Stack().eval()
    tokens = torch.randn(2, 3, HIDDEN)
    once = model(tokens)
    assert torch.equal(model(tokens), once)
