"""Expert choice's own properties; all else is in the contract suite."""

import pytest
import torch

import moeroute
from moeroute.layers import MoELayer, SwiGLUExperts
from moeroute.methods import ExpertChoice


def make(**fields):
    torch.manual_seed(0)
    return MoELayer(
        router=ExpertChoice(**fields).router(6, 4),
        experts=SwiGLUExperts(4, 6, 5),
        losses=ExpertChoice().losses(),
    )


def loads(layer, x):
    kept = []
    with layer.routing_pass.listening(kept.append):
        layer(x)
    ids = kept[-1].routing.selected_experts
    return torch.bincount(ids.flatten(), minlength=5)[:4]


def test_the_load_is_flat_in_training():
    layer, x = make(capacity_factor=1.5), torch.randn(2, 16, 6)
    assert loads(layer.train(), x).tolist() == [12] * 4


def test_in_eval_the_load_comes_near_once_cut_offs_were_seen():
    layer, x = make(capacity_factor=1.5), torch.randn(400, 6)
    for _ in range(60):
        layer.train()(x)
        moeroute.post_step(layer)
    off = (loads(layer.eval(), x) - 150).abs()
    assert off.max() <= 3


def test_in_eval_no_token_sees_a_later_one():
    layer, x = make().eval(), torch.randn(1, 7, 6)
    changed = x.clone()
    changed[:, 5:] += 3
    assert torch.equal(layer(x)[:, :5], layer(changed)[:, :5])
    layer.train()
    assert not torch.equal(layer(x)[:, :5], layer(changed)[:, :5])


@pytest.mark.parametrize(
    ("fields", "told"), [({"capacity_factor": 0.0}, "capacity_factor=0"), ({"num_experts": 0}, "0")]
)
def test_fields_out_of_range(fields, told):
    with pytest.raises(ValueError, match=told):
        ExpertChoice(**fields)


def test_a_compiled_training_forward_is_compiled_once():
    layer, x = make().train(), torch.randn(8, 6)
    compiles = []

    def count(graph, inputs):
        compiles.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=count)
    for _ in range(4):
        compiled(x)
        compiled(x)
        moeroute.post_step(layer)
    assert len(compiles) == 2  # the first forward of a step, and a later one
