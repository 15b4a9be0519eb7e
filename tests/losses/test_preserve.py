"""The distance of experts to what they were."""

import pytest
import torch

from moeroute.layers.ragged_bank import RaggedLoRABank
from moeroute.losses import PreserveLoss
from moeroute.types import RouterOutput, RoutingRecord


def record(experts):
    nothing = torch.zeros(0, 2)
    routing = RouterOutput(
        router_logits=nothing, routing_weights=nothing, selected_experts=nothing.long()
    )
    return RoutingRecord(site="q_proj", layer_index=0, routing=routing, experts=experts)


def test_zero_at_first_and_then_the_sum_of_squares():
    bank = RaggedLoRABank(
        ranks=[2, 0, 1], scalings=[1, 1, 1], in_features=3, out_features=4, anchored=True
    )
    assert PreserveLoss()(record(bank)) == 0
    given = torch.randn(2, 3), torch.randn(4, 2)
    bank.set_expert(0, *given)
    assert PreserveLoss()(record(bank)) == 0
    with torch.no_grad():
        bank.lora_a[1, 2] += 3.0
        bank.lora_b[0, 2] -= 4.0
    loss = PreserveLoss()(record(bank))
    torch.testing.assert_close(loss, torch.tensor(25.0))
    loss.backward()
    torch.testing.assert_close(bank.lora_a.grad[1, 2], torch.tensor(6.0))
    torch.testing.assert_close(bank.lora_b.grad[0, 2], torch.tensor(-8.0))


def test_the_start_is_saved_with_the_bank():
    sizes = {"ranks": [1], "scalings": [1.0], "in_features": 3, "out_features": 4}
    bank = RaggedLoRABank(**sizes, anchored=True)
    with torch.no_grad():
        bank.lora_a += 1
    again = RaggedLoRABank(**sizes, anchored=True)
    again.load_state_dict(bank.state_dict())
    torch.testing.assert_close(again.drift(), torch.tensor(3.0))
    assert set(RaggedLoRABank(**sizes).state_dict()) == {"lora_a", "lora_b"}


def test_experts_without_a_memory():
    with pytest.raises(ValueError, match="q_proj: PreserveLoss needs experts that remember"):
        PreserveLoss()(record(torch.nn.Identity()))
