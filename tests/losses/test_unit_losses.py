"""Losses of units that are executed or foretold: of records that stand for two layers' units."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from moeroute.depth_types import DepthOutput, DepthRecord, UnitTrace
from moeroute.losses import ForecastLoss, ForetoldChangeLoss, SparsityTargetLoss, total_loss
from moeroute.types import RouterOutput

B, S, H = 3, 5, 6


def record(gate: Tensor | None = None, mask: Tensor | None = None, **unit: Tensor) -> DepthRecord:
    """What one unit did; `gate` is (B, S)."""
    shown = torch.ones(B, S) if gate is None else gate
    runs = shown.detach().long()
    logits = torch.stack([1.0 - shown, shown], -1)
    return DepthRecord(
        site="layers.0.mlp",
        layer_index=0,
        routing=RouterOutput(
            router_logits=logits.detach().flatten(0, 1),
            routing_weights=torch.ones(runs.numel(), 1),
            selected_experts=runs.reshape(-1, 1),
        ),
        token_mask=None if mask is None else mask.reshape(-1),
        depth=None
        if gate is None
        else DepthOutput(router_logits=logits.detach(), num_executions=runs, routing_weights=gate),
        unit=UnitTrace(**unit) if unit else None,
    )


def gates(share: float) -> Tensor:
    """The first so many of the tokens are executed."""
    return (torch.arange(B * S) < round(share * B * S)).float().reshape(B, S).requires_grad_()


def trace(**changed: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = {"tokens": torch.randn(B, S, H), "executed": torch.randn(B, S, H)}
    return made | {"forecast": torch.randn(B, S, H)} | changed


def test_the_sparsity_target_is_of_all_units_together():
    loss = SparsityTargetLoss(sparsity=0.4)
    even = [record(gates(0.6)), record(gates(0.6))]
    uneven = [record(gates(1.0)), record(gates(0.2))]
    for records in (even, uneven):
        assert loss.over(records).item() == pytest.approx(0.0, abs=1e-6)
    assert loss(uneven[0]).item() == pytest.approx(0.4, abs=1e-6)
    everything = [record(gates(1.0)), record(gates(1.0))]
    assert loss.over(everything).item() == pytest.approx(0.4, abs=1e-6)
    charged = [DepthRecord(**{**fields(one), "losses": (loss,)}) for one in everything]
    report = total_loss(charged)
    assert report.total.item() == pytest.approx(8 * 0.4, abs=1e-5)
    assert list(report.parts) == ["SparsityTargetLoss"]


def fields(one: DepthRecord) -> dict:
    return {name: getattr(one, name) for name in DepthRecord.__dataclass_fields__}


def test_the_sparsity_target_pulls_every_gate_alike():
    gate = gates(1.0)
    SparsityTargetLoss(sparsity=0.4).over([record(gate), record(gates(1.0))]).backward()
    torch.testing.assert_close(gate.grad, torch.full((B, S), 1 / (2 * B * S)))
    gate = gates(0.2)
    SparsityTargetLoss(sparsity=0.4)(record(gate)).backward()
    torch.testing.assert_close(gate.grad, torch.full((B, S), -1 / (B * S)))


def test_the_change_is_of_foretold_tokens_alone():
    loss, gate, made = ForetoldChangeLoss(), gates(0.6), trace()
    found = loss(record(gate, **made))
    tokens, executed = made["tokens"].flatten(0, 1), made["executed"].flatten(0, 1)
    change = 1 - cosine_similarity(tokens, tokens + executed, dim=-1)
    torch.testing.assert_close(found, change[9:].mean())
    found.backward()
    expected = -(change - change[9:].mean()) / 6  # what a mean does as its weights grow
    torch.testing.assert_close(gate.grad.flatten(), expected)
    assert loss(record(gates(1.0), **made)).item() == 0.0
    assert loss(record(gates(0.0), **trace(executed=2 * made["tokens"]))).item() < 1e-6


def test_no_foretold_token_has_no_gradient_either():
    gate = gates(1.0)
    ForetoldChangeLoss()(record(gate, **trace())).backward()
    assert torch.count_nonzero(gate.grad) == 0


def test_the_forecast_is_right_where_it_is_the_answer():
    made = trace()
    assert ForecastLoss()(record(**trace(forecast=made["executed"]))).item() == 0.0
    forecast = made["executed"].clone().requires_grad_()
    shifted = made["executed"] + torch.where(torch.arange(H) < 3, 0.5, 3.0)
    executed = shifted.requires_grad_()
    found = ForecastLoss()(record(**trace(forecast=forecast, executed=executed)))
    assert found.item() == pytest.approx((0.5 * 0.25 + 2.5) / 2, rel=1e-5)  # beta 1
    found.backward()
    assert executed.grad is None
    assert bool((forecast.grad < 0).all())


@pytest.mark.parametrize(
    "loss", [ForecastLoss(), ForetoldChangeLoss(), SparsityTargetLoss(sparsity=0.4)], ids=repr
)
def test_padding_does_not_matter_even_if_it_is_nan(loss):
    mask = torch.arange(S).expand(B, S) > 1
    gate, made = gates(0.7), trace()
    hidden = {name: value.masked_fill(~mask[..., None], torch.nan) for name, value in made.items()}
    expected = loss(record(gate, mask, **made))
    gate.grad = None
    found = loss(record(gate, mask, **hidden))
    torch.testing.assert_close(found, expected)
    other = torch.where(mask, gate.detach(), 1 - gate.detach()).requires_grad_()
    torch.testing.assert_close(loss(record(other, mask, **made)), expected)
    assert loss(record(gate, torch.zeros_like(mask), **made)).item() == 0.0
    none = {name: value[:0] for name, value in made.items()}
    assert loss(record(gate[:0], **none)).item() == 0.0
    if not isinstance(loss, ForecastLoss):
        loss(record(other, mask, **hidden)).backward()
        assert torch.count_nonzero(other.grad[~mask]) == 0
        assert other.grad.isfinite().all()


def test_they_compute_in_float32():
    made = {name: value.bfloat16() for name, value in trace().items()}
    for loss in (ForecastLoss(), ForetoldChangeLoss(), SparsityTargetLoss()):
        assert loss(record(gates(0.7), **made)).dtype == torch.float32


def test_what_a_layer_does_not_give_is_named():
    with pytest.raises(ValueError, match=r"layers.0.mlp: ForecastLoss needs a unit"):
        ForecastLoss()(record(gates(0.5)))
    with pytest.raises(ValueError, match="SparsityTargetLoss needs a router that draws gates"):
        SparsityTargetLoss()(record())
    with pytest.raises(ValueError, match="ForetoldChangeLoss needs a unit that was computed"):
        ForetoldChangeLoss()(record(gates(0.5)))
    with pytest.raises(ValueError, match=r"sparsity=1.5 is outside \[0, 1\]"):
        SparsityTargetLoss(sparsity=1.5)
