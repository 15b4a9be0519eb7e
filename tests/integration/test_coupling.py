"""The coupling of routers and experts over whole models."""

import subprocess
import sys

import pytest
import torch
from integration import tiny_models
from transformers import Trainer, TrainingArguments

import moeroute
from moeroute.integration.coupling import coupling_gauges
from moeroute.methods import Cosine, Switch
from moeroute.ops.coupling import coupling_loss

FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"]


def blocks_of(model):
    """Gate and experts of each MoE layer."""
    found = []
    for module in model.modules():
        gate = getattr(module, "gate", getattr(module, "router", None))
        if hasattr(module, "experts") and hasattr(gate, "weight"):
            found.append((gate, module.experts))
    return found


def gate_of(family, experts):
    """(E, D, H), by what is written in the family's own code."""
    if family == "gpt_oss":
        return experts.gate_up_proj[:, :, ::2].transpose(1, 2)
    return experts.gate_up_proj.chunk(2, dim=1)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_as_it_is(family):
    model = tiny_models.build(family)
    blocks = blocks_of(model)
    assert blocks
    loss = moeroute.coupling_loss(model, noise=False)
    each = [coupling_loss(gate.weight, gate_of(family, experts)) for gate, experts in blocks]
    torch.testing.assert_close(loss, torch.stack(each).mean())
    loss.backward()
    for gate, experts in blocks:
        assert gate.weight.grad.abs().sum() > 0
        assert gate_of(family, experts).requires_grad
        assert experts.gate_up_proj.grad.abs().sum() > 0
        assert experts.down_proj.grad is None


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_loss_of_training_holds_it_until_it_is_removed(family):
    model = tiny_models.build(family)
    ids = tiny_models.token_ids()
    plain = model.train()(input_ids=ids, labels=ids)
    handle = moeroute.add_coupling_loss(model, weight=0.5, noise=False)
    expected = plain.loss + 0.5 * moeroute.coupling_loss(model, noise=False)
    charged = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(charged.loss, expected)
    assert torch.equal(charged.logits, plain.logits)
    assert torch.equal(model.eval()(input_ids=ids, labels=ids).loss, plain.loss)
    with pytest.warns(UserWarning, match="reached no loss"):
        model.train()(input_ids=ids)
    handle.remove()
    assert torch.equal(model(input_ids=ids, labels=ids).loss, plain.loss)


def test_trainer_lowers_it(tmp_path):
    model = tiny_models.build("mixtral")
    moeroute.add_coupling_loss(model)
    before = moeroute.coupling_loss(model, noise=False).item()
    rows = [{"input_ids": row, "labels": row} for row in tiny_models.token_ids()]
    settings = TrainingArguments(
        tmp_path, max_steps=30, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    Trainer(model, settings, train_dataset=rows).train()
    assert moeroute.coupling_loss(model, noise=False).item() < before


def test_a_wrapped_gate_is_coupled_by_its_own_rows():
    model = moeroute.wrap_model(tiny_models.build("mixtral"), Switch(router_jitter_noise=0.0))
    equal = moeroute.coupling_loss(tiny_models.build("mixtral"), noise=False)
    torch.testing.assert_close(moeroute.coupling_loss(model, noise=False), equal)
    rows = [p for name, p in model.named_parameters() if "route_host" in name]
    with torch.no_grad():
        for parameter in rows:
            parameter.mul_(3)
    loss = moeroute.coupling_loss(model, noise=False)
    torch.testing.assert_close(loss, 3 * equal)
    gradients = torch.autograd.grad(loss, rows)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_what_cannot_be_coupled_is_named():
    with pytest.raises(ValueError, match="Linear has no layer with a linear router"):
        moeroute.coupling_loss(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has no layer with a linear router"):
        moeroute.add_coupling_loss(
            moeroute.wrap_model(tiny_models.build("mixtral"), Cosine(space_size=3))
        )


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_gauge_is_measured_on_demand(family):
    model = tiny_models.build(family)
    with moeroute.track_routing(model, coupling=True) as stats, torch.no_grad():
        model(input_ids=tiny_models.token_ids())
    gauges = list(coupling_gauges(model).values())
    assert [layer.gauge for layer in stats.layers] == gauges
    assert all(0 < gauge.epsilon < 2 and gauge.loss >= 0 for gauge in gauges)
    assert "epsilon" in str(stats.summary())
    assert stats.to_dict()["layers"][0]["gauge"] == {
        "epsilon": gauges[0].epsilon,
        "loss": gauges[0].loss,
    }
    with moeroute.track_routing(model) as stats, torch.no_grad():
        model(input_ids=tiny_models.token_ids())
    assert stats.layers[0].gauge is None
    assert "epsilon" not in str(stats.summary())


def test_the_gauge_of_layers_of_ones_own():
    layer = moeroute.MoELayer.build(hidden_size=8, intermediate_size=8, num_experts=4, top_k=2)
    with torch.no_grad():
        layer.router.score.weight.copy_(torch.eye(4, 8))
    with moeroute.track_routing(layer, coupling=True) as stats:
        layer(torch.randn(5, 8))
    assert stats.layers[0].gauge.epsilon == pytest.approx(0.5**0.5)


RANK = """
import sys
import torch
from torch import distributed
from moeroute.ops.coupling import draw_proxies

rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(rank)
draw = draw_proxies(torch.zeros(4, 8))
both = [torch.empty_like(draw) for _ in range(2)]
distributed.all_gather(both, draw)
assert torch.equal(*both)
distributed.destroy_process_group()
"""


def test_all_ranks_draw_the_same_proxies(tmp_path):
    runs = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")])
        for rank in range(2)
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
