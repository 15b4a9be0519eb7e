"""The ERC loss in layers."""

import pytest
import torch
from torch import nn

import moeroute
from moeroute.layers import MLPExperts, MoELayer, SwiGLUExperts
from moeroute.losses import ERCLoss
from moeroute.ops.coupling import coupling_loss
from moeroute.routers import mixtral_router

H, WIDTH, E = 8, 12, 4
EXPERTS = {
    "swiglu": lambda: SwiGLUExperts(E, H, WIDTH),
    "transposed": lambda: SwiGLUExperts(E, H, WIDTH, transposed=True, bias=True),
    "interleaved": lambda: SwiGLUExperts(E, H, WIDTH, transposed=True, interleaved=True, bias=True),
    "mlp": lambda: MLPExperts(E, H, WIDTH),
    "mlp transposed": lambda: MLPExperts(E, H, WIDTH, transposed=True, bias=True),
}


def layer(experts=None, **fields):
    torch.manual_seed(0)
    return MoELayer(
        router=mixtral_router(H, E, 2),
        experts=experts or SwiGLUExperts(E, H, WIDTH),
        losses=(ERCLoss(**fields),),
    ).train()


@pytest.mark.parametrize("kind", EXPERTS)
def test_the_gate_weights_are_what_tokens_meet_first(kind):
    experts = EXPERTS[kind]()
    gates, x = experts.gate_weights(), torch.randn(H)
    assert gates.shape == (E, WIDTH, H)
    first = next(p for name, p in experts.named_parameters() if name in ("gate_up_proj", "up_proj"))
    (gradient,) = torch.autograd.grad((gates[1] @ x).sum(), first)
    assert gradient[[0, 2, 3]].abs().sum() == 0
    assert (gradient[1] != 0).sum() == WIDTH * H


@pytest.mark.parametrize("kind", EXPERTS)
def test_gradients_reach_rows_and_gates_and_nothing_else(kind):
    made = layer(EXPERTS[kind]())
    made(torch.randn(2, 5, H))
    moeroute.aux_losses(made).total.backward()
    learned = {name for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    first = "experts.up_proj" if kind.startswith("mlp") else "experts.gate_up_proj"
    assert learned == {"router.score.weight", first}


def test_tokens_do_not_matter_and_routing_is_as_without_it():
    made = layer(noise=False)
    values = []
    for tokens in (1, 7, 0):
        made(torch.randn(tokens, H))
        values.append(moeroute.aux_losses(made).parts["ERCLoss"])
    assert values[0] == values[1] == values[2]
    rows, gates = made.router.score.weight, made.experts.gate_weights()
    torch.testing.assert_close(values[0], coupling_loss(rows, gates))
    x = torch.randn(3, H)
    expected = made(x)
    made.losses = ()
    assert torch.equal(made(x), expected)


def test_each_step_draws_anew_and_a_seed_decides():
    made = layer()
    values = []
    for seed in (1, 2, 1):
        made(torch.randn(3, H))
        torch.manual_seed(seed)
        values.append(moeroute.aux_losses(made).total.item())
    assert values[0] == values[2] != values[1]


def test_training_on_it_couples_router_and_experts():
    made = layer(alpha=0.8)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.05)
    losses = []
    for _ in range(150):
        made(torch.randn(1, H))
        loss = moeroute.aux_losses(made).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_what_is_missing_is_named():
    class Opaque(nn.Module):
        num_experts = E

        def forward(self, tokens, routing):
            return tokens

    made = layer(Opaque())
    made(torch.randn(3, H))
    with pytest.raises(ValueError, match="needs experts with gate_weights.*Opaque"):
        moeroute.aux_losses(made)
    with pytest.raises(ValueError, match="alpha=-1.0 is below 0"):
        ERCLoss(alpha=-1.0)
