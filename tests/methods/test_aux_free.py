"""AuxFree: the bias chooses, does not weigh, and moves against the load once a step."""

import pytest
import torch
from integration import tiny_models

import moeroute
from moeroute.integration.adapters.gate_host import hosted_gates
from moeroute.methods import AuxFree
from moeroute.types import RouterInput


def biases(model):
    return [
        gate.route_host.moeroute_site["default"].router.select.selection_bias
        for _, gate in hosted_gates(model)
    ]


def test_the_bias_moves_against_the_load_and_only_in_a_step():
    ids = tiny_models.token_ids()
    model = moeroute.wrap_model(tiny_models.build("mixtral"), AuxFree(update_rate=0.25)).train()
    with moeroute.track_routing(model) as stats:
        model(ids, labels=ids)
    bias = biases(model)[0]
    assert not bias.e_score_correction_bias.any()
    moeroute.post_step(model)
    counts = stats.layers[0].counts.float()
    assert torch.equal(bias.e_score_correction_bias, 0.25 * torch.sign(counts.mean() - counts))
    model.eval()(ids)
    before = bias.e_score_correction_bias.clone()
    moeroute.post_step(model)
    assert torch.equal(bias.e_score_correction_bias, before)


def test_a_checkpoints_bias_is_the_start():
    model = tiny_models.build("deepseek_v3")
    own = model.model.layers[0].mlp.gate.e_score_correction_bias
    own.copy_(torch.randn_like(own))
    wrapped = moeroute.wrap_model(model, AuxFree())
    assert torch.equal(biases(wrapped)[0].e_score_correction_bias, own)


def test_balance_comes_without_a_loss():
    torch.manual_seed(0)
    router = AuxFree(update_rate=0.02, top_k=1).router(8, 4).train()
    with torch.no_grad():
        router.score.weight.copy_(torch.randn(4, 8))
    bias = router.select.selection_bias
    tokens = torch.randn(400, 8) + 1.0
    given = RouterInput(hidden_states=tokens, sequence_shape=(1, 400))

    def load():
        return router(given).selected_experts.flatten().bincount(minlength=4)

    start = load()
    for _ in range(150):
        bias.update(load())
    assert start.max() > 1.5 * 100
    assert load().max() < 1.2 * 100


def test_weights_do_not_see_the_bias():
    router = AuxFree(top_k=2).router(8, 4)
    with torch.no_grad():
        router.select.selection_bias.e_score_correction_bias[3] = 10.0
    routing = router(RouterInput(hidden_states=torch.randn(9, 8), sequence_shape=(1, 9)))
    assert (routing.selected_experts == 3).any(-1).all()
    kept = routing.router_logits.sigmoid().gather(1, routing.selected_experts)
    torch.testing.assert_close(routing.routing_weights, kept / kept.sum(-1, keepdim=True))


def test_fields_out_of_range():
    with pytest.raises(ValueError, match="update_rate"):
        AuxFree(update_rate=-1.0)
    with pytest.raises(ValueError, match="top_k"):
        AuxFree(top_k=0)
