"""What every loss must do."""

import math

import pytest
import torch

from moeroute.losses import BalanceLoss, ImportanceLoss, ZLoss
from moeroute.losses.entropy import EntropyLoss
from moeroute.losses.weight_balance import WeightBalanceLoss
from moeroute.routers import All, TopK, TopKSoftmax
from moeroute.types import RouterOutput, RoutingRecord

TOKENS, EXPERTS = 24, 6
AT_BALANCE = {
    BalanceLoss: 1.0,
    EntropyLoss: 1.0,
    ImportanceLoss: 0.0,
    WeightBalanceLoss: 2 / EXPERTS,  # two of six experts kept, not renormalised
    ZLoss: math.log(EXPERTS) ** 2,
}
OF_WEIGHTS = (ImportanceLoss, WeightBalanceLoss)
every_loss = pytest.mark.parametrize("make", list(AT_BALANCE))


def record(logits, mask=None, select=None):
    selection = (select or TopK(2, normalize=False))(logits)
    routing = RouterOutput(
        router_logits=logits,
        routing_weights=selection.routing_weights,
        selected_experts=selection.selected_experts,
    )
    return RoutingRecord(site="", layer_index=0, routing=routing, token_mask=mask)


def balanced():
    """Logits whose two best rotate through the experts and whose mean probabilities are even."""
    return torch.eye(EXPERTS).roll(0).add(torch.eye(EXPERTS).roll(1, 0)).repeat(4, 1) * 1e-4


@every_loss
def test_value_at_perfect_balance(make):
    assert make()(record(balanced())).item() == pytest.approx(AT_BALANCE[make], abs=2e-3)


@every_loss
@pytest.mark.parametrize("select", [TopK(1, normalize=False), TopKSoftmax(2), All()], ids=repr)
def test_scalar_finite_and_not_negative(make, select):
    loss = make()(record(3 * torch.randn(TOKENS, EXPERTS), select=select))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert 0 <= loss < math.inf


@every_loss
def test_gradient_reaches_the_logits_and_agrees_with_finite_differences(make):
    logits = torch.randn(TOKENS, EXPERTS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: make()(record(z)), (logits,), atol=1e-5)
    make()(record(logits)).backward()
    assert logits.grad.abs().sum() > 0


@every_loss
def test_padding_does_not_matter_even_if_it_is_nan(make):
    logits = torch.randn(TOKENS, EXPERTS)
    mask = torch.arange(TOKENS) % 3 > 0
    logits[~mask] = float("nan")
    logits.requires_grad_()
    selection = TopKSoftmax(2)
    masked = make()(record(logits, mask, selection))
    kept = make()(record(logits.detach()[mask], None, selection))
    torch.testing.assert_close(masked, kept)
    masked.backward()
    assert logits.grad[mask].isfinite().all()
    if make not in OF_WEIGHTS:  # whose gradient passes through a softmax of NaN padding
        assert torch.count_nonzero(logits.grad[~mask]) == 0


@every_loss
@pytest.mark.parametrize("tokens", [0, 5])
def test_no_real_tokens_cost_nothing(make, tokens):
    logits = torch.randn(tokens, EXPERTS, requires_grad=True)
    loss = make()(record(logits, torch.zeros(tokens, dtype=torch.bool)))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.isfinite().all()
    assert make()(record(logits[:0])).item() == 0


@every_loss
def test_order_of_tokens_does_not_matter(make):
    logits = torch.randn(TOKENS, EXPERTS)
    shuffled = logits[torch.randperm(TOKENS)]
    torch.testing.assert_close(make()(record(logits)), make()(record(shuffled)))


@every_loss
def test_autocast_changes_nothing(make):
    one = record(torch.randn(TOKENS, EXPERTS))
    expected = make()(one)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(make()(one), expected)


@every_loss
def test_losses_are_frozen_compare_by_value_and_trace(make):
    assert make(weight=0.5) == make(weight=0.5) != make(weight=0.25)
    with pytest.raises(AttributeError):
        make().weight = 2.0
    with pytest.raises(TypeError):
        make(0.5)
    logits = torch.randn(TOKENS, EXPERTS)
    compiled = torch.compile(lambda z: make()(record(z)), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits), make()(record(logits)))
