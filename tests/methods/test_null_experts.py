"""MoE++'s own properties; all else is in the contract suite."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import moeroute
from moeroute.layers import MoELayer
from moeroute.losses import BalanceLoss, KindsBalanceLoss
from moeroute.methods import NullExperts
from moeroute.routers import PathwayRouter
from moeroute.types import RouterOutput, RoutingRecord

FFN, HIDDEN = 3, 6
KINDS = FFN + 1 + 1 + 2


def make(**fields):
    torch.manual_seed(0)
    return NullExperts(gating_residual=False, **fields).layer(HIDDEN, 5, FFN)


def answer(layer, x, ids, weights):
    routing = RouterOutput(
        router_logits=torch.zeros(x.shape[0], KINDS),
        routing_weights=weights,
        selected_experts=ids,
    )
    return layer.experts(x, routing)


def test_each_kind_gives_what_the_paper_says():
    layer, x = make(), torch.randn(4, HIDDEN)
    experts, weights = layer.experts, torch.full((4, 1), 0.5)
    assert experts.num_experts == KINDS
    with torch.no_grad():
        experts.constants.normal_()
    assert (answer(layer, x, torch.full((4, 1), FFN), weights) == 0).all()
    torch.testing.assert_close(answer(layer, x, torch.full((4, 1), FFN + 1), weights), 0.5 * x)
    for constant in range(2):
        ids = torch.full((4, 1), FFN + 2 + constant)
        rows = experts.mix.weight[2 * constant : 2 * constant + 2]
        a, b = (x @ rows.T).softmax(1).split(1, dim=1)
        expected = 0.5 * (a * x + b * experts.constants[constant])
        torch.testing.assert_close(answer(layer, x, ids, weights), expected)
    both = answer(layer, x, torch.tensor([[0, FFN + 1]] * 4), torch.tensor([[0.7, 0.3]] * 4))
    alone = answer(layer, x, torch.zeros(4, 1, dtype=torch.int64), torch.full((4, 1), 0.7))
    torch.testing.assert_close(both, alone + 0.3 * x)
    assert (answer(layer, x, torch.full((4, 1), KINDS), 0 * weights) == 0).all()  # empty slots


@pytest.mark.parametrize("absent", ["num_null", "num_copy", "num_constant"])
def test_a_kind_may_be_absent(absent):
    layer = make(**{absent: 0})
    layer(torch.randn(9, HIDDEN)).sum().backward()
    assert layer.router.score.weight.grad.abs().sum() > 0


def test_cheap_experts_cost_less_in_the_loss():
    logits = torch.zeros(KINDS, KINDS)
    routing = RouterOutput(
        router_logits=logits,
        routing_weights=torch.ones(KINDS, 1),
        selected_experts=torch.arange(KINDS)[:, None],
    )
    record = RoutingRecord(site="", layer_index=0, routing=routing)
    even = KindsBalanceLoss(num_first=FFN, cheapness=0.5)(record)
    torch.testing.assert_close(even, torch.tensor((FFN + 0.5 * (KINDS - FFN)) / KINDS))
    same = KindsBalanceLoss(num_first=FFN, cheapness=1.0)(record)
    torch.testing.assert_close(same, BalanceLoss()(record))
    logits = logits.requires_grad_()
    loss = KindsBalanceLoss(num_first=FFN, cheapness=0.5)(
        RoutingRecord(
            site="",
            layer_index=0,
            routing=RouterOutput(
                router_logits=logits,
                routing_weights=routing.routing_weights,
                selected_experts=routing.selected_experts,
            ),
        )
    )
    loss.backward()
    assert (logits.grad[:, :FFN] > 0).all()  # away from those that compute
    assert (logits.grad[:, FFN:] < 0).all()


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def wrapped():
    model = moeroute.wrap_model(llama(), NullExperts(num_experts=2, intermediate_size=4))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "moeroute_site" in key:
                parameter.normal_(std=0.3)
    return model


def test_layers_know_the_logits_of_the_layer_before():
    model, kept = wrapped().eval(), []
    ids = torch.arange(10).reshape(2, 5)
    hosts = [module for module in model.modules() if isinstance(module, MoELayer)]
    assert [router.pathway is None for router in moeroute.routers(model).values()] == [
        True,
        False,
        False,
    ]
    seen = []
    for host in hosts:
        host.register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, 16)))
    with hosts[0].routing_pass.listening(kept.append):
        model(input_ids=ids)
    logits = [record.routing.router_logits for record in kept]
    for before, now, tokens, host in zip(logits, logits[1:], seen[1:], hosts[1:], strict=False):
        expected = tokens @ host.router.score.weight.T + before @ host.router.pathway.T
        torch.testing.assert_close(now, expected)


def test_recomputation_gives_the_same_gradients():
    ids, found = torch.arange(10).reshape(2, 5), []
    for checkpointing in (False, True):
        model = wrapped().train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
            model.enable_input_require_grads()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
    pathways = [key for key in found[0] if key.endswith("pathway")]
    assert len(pathways) == 2
    assert all(found[0][key].abs().sum() > 0 for key in pathways)
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, msg=key)


def test_a_pathway_of_other_sizes_is_an_error():
    from moeroute.routers import LinearScore, TopK
    from moeroute.types import RouterInput

    router = PathwayRouter(LinearScore(4, 3), TopK(1))
    given = RouterInput(
        hidden_states=torch.randn(2, 4), sequence_shape=(1, 2), state=torch.zeros(2, 5)
    )
    with pytest.raises(ValueError, match="gating residuals need layers"):
        router(given)


@pytest.mark.parametrize("fields", [{"num_copy": -1}, {"top_k": 9}, {"intermediate_size": 0}])
def test_fields_out_of_range(fields):
    with pytest.raises(ValueError, match=f"NullExperts: .*{next(iter(fields))}"):
        NullExperts(**fields)
