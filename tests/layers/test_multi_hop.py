"""Hops through one set of experts."""

import pytest
import torch
from torch import nn

import moeroute
from moeroute.layers import MoELayer, MultiHopLayer, SwiGLUExperts
from moeroute.losses import BalanceLoss
from moeroute.methods import Cosine

H, E = 8, 4


def parts(count=1):
    torch.manual_seed(0)
    routers = [Cosine(space_size=5).router(H, E) for _ in range(count)]
    return routers, SwiGLUExperts(E, H, 6)


def test_one_hop_is_an_moe_layer():
    routers, experts = parts()
    x = torch.randn(2, 3, H)
    expected = MoELayer(router=routers[0], experts=experts)(x)
    torch.testing.assert_close(MultiHopLayer(routers, experts, hops=1)(x), expected)


@pytest.mark.parametrize("count", [1, 3])
def test_hops_are_the_recursion(count):
    routers, experts = parts(count)
    x = torch.randn(5, H)
    now = x
    for hop in range(3):
        now = now + MoELayer(router=routers[hop % count], experts=experts)(now)
    torch.testing.assert_close(MultiHopLayer(routers, experts, hops=3)(x), now - x)


@pytest.mark.parametrize("connected", [False, True])
def test_every_hop_is_charged_and_counted(connected):
    routers, experts = parts()
    layer = MultiHopLayer(routers, experts, hops=3, losses=(BalanceLoss(),)).train()
    model = moeroute.connect_layers(nn.Sequential(layer)) if connected else layer
    with moeroute.track_routing(model) as stats:
        model(torch.randn(2, 5, H))
    assert [one.tokens for one in stats.layers] == [10, 10, 10]
    records = layer.routing_pass.records
    assert [name.rpartition(".")[2] for name in records] == ["hop0", "hop1", "hop2"]
    total = moeroute.aux_losses(model)
    each = [BalanceLoss()(record) for record in records.values()]
    torch.testing.assert_close(total.parts["BalanceLoss"], torch.stack(each).mean())
    total.total.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in routers[0].parameters())


class TestHalting:
    def layer(self, halt_below):
        return MultiHopLayer(*parts(), hops=4, halt_below=halt_below).eval()

    def slots(self, layer, x):
        with moeroute.track_routing(layer) as stats:
            layer(x)
        return [int(one.counts.sum()) for one in stats.layers]

    def test_never_and_at_once(self):
        x = torch.randn(6, H)
        assert torch.equal(self.layer(0.0)(x), self.layer(1e-9)(x))
        once = self.layer(1e9)
        torch.testing.assert_close(once(x), MultiHopLayer(*parts(), hops=1)(x))
        assert self.slots(once, x) == [12, 0, 0, 0]

    def test_work_falls_as_the_bar_rises(self):
        x = torch.randn(200, H)
        work = [sum(self.slots(self.layer(bar), x)) for bar in (0.0, 0.02, 0.05, 0.1, 0.2)]
        assert work == sorted(work, reverse=True)
        assert work[0] > work[2] > work[-1]

    def test_a_token_that_stops_stays_stopped(self):
        x = torch.randn(200, H)
        slots = self.slots(self.layer(0.05), x)
        assert slots == sorted(slots, reverse=True)

    def test_training_never_halts(self):
        x = torch.randn(6, H)
        assert torch.equal(self.layer(1e9).train()(x), self.layer(0.0).train()(x))


@pytest.mark.parametrize("fields", [{"hops": 0}, {"halt_below": -1.0}, {"hops": 3}])
def test_bad_numbers(fields):
    with pytest.raises(ValueError, match=r"hops=|halt_below="):
        MultiHopLayer(*parts(2), **fields)
