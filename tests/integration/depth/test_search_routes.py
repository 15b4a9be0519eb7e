"""Routes, forced and searched: their number, their order, the oracle's inequalities."""

import itertools
import math

import pytest
import torch
from integration.depth.depth_models import LAYERS, VOCAB, ragged, tiny
from methods.duo_models import duo, records, widths_of
from torch.nn.functional import cross_entropy

import moeroute
from moeroute.depth import Width, force_widths, search_routes
from moeroute.integration.depth.force_widths import width_layers
from moeroute.methods import DuoLLM
from moeroute.ops.widths import all_routes, count_routes

pytestmark = pytest.mark.hf


def text(rows=3, length=8):
    torch.manual_seed(4)
    return torch.randint(3, VOCAB, (rows, length))


def search(model, ids, **settings):
    return search_routes(model, ids, show_progress=False, **settings)


@torch.no_grad()
def losses(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    each = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.reshape(ids.shape[0], -1)


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_routes_are_counted_and_all_there_cheapest_first(layers):
    routes = [tuple(route) for route in all_routes(layers).tolist()]
    assert len(routes) == count_routes(layers) == 2**layers
    assert set(routes) == set(itertools.product((0, 1), repeat=layers))
    assert [route.count(Width.BIG) for route in routes] == sorted(
        route.count(Width.BIG) for route in routes
    )
    three = [tuple(route) for route in all_routes(layers, bypass=True).tolist()]
    assert len(three) == count_routes(layers, bypass=True) == 3**layers
    assert set(three) == set(itertools.product((0, 1, 2), repeat=layers))
    costs = [(route.count(Width.BIG), route.count(Width.SMALL)) for route in three]
    assert costs == sorted(costs)
    for big in range(layers + 1):
        some = [tuple(route) for route in all_routes(layers, num_big=big).tolist()]
        assert len(set(some)) == len(some) == math.comb(layers, big)
        assert count_routes(layers, num_big=big) == len(some)
        assert all(route.count(Width.BIG) == big and Width.BYPASS not in route for route in some)
        wide = all_routes(layers, num_big=big, bypass=True)
        assert len(wide) == count_routes(layers, num_big=big, bypass=True)
        assert len(wide) == math.comb(layers, big) * 2 ** (layers - big)


def test_the_paper_has_924_routes_of_six_big_blocks():
    assert count_routes(12, num_big=6) == 924
    assert len(all_routes(12, num_big=6)) == 924


@pytest.mark.parametrize("at_once", [1, 5, 64])
def test_the_oracle_is_the_least_of_routes_run_one_by_one(at_once):
    model, ids = duo(bypass=True), text()
    found = search(model, ids, routes_at_once=at_once)
    each = []
    for route in found.routes:
        with force_widths(model, route):
            each.append(losses(model, ids))
    table = torch.stack(each)  # (R, B, S - 1)
    assert len(table) == 3**LAYERS
    torch.testing.assert_close(found.losses, table.amin(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.route_losses, table.mean((1, 2)), rtol=1e-4, atol=1e-4)
    chosen = table.gather(0, found.best[None])[0]
    torch.testing.assert_close(chosen, table.amin(0), rtol=1e-4, atol=1e-4)
    small = table[(found.routes == Width.SMALL).all(1)][0]
    torch.testing.assert_close(found.difficulty, small - found.losses, rtol=1e-3, atol=1e-3)
    assert bool((found.difficulty >= -1e-4).all())
    torch.testing.assert_close(found.big_losses, losses(tiny(), ids), rtol=1e-4, atol=1e-4)
    big = (found.routes[found.best.flatten()] == Width.BIG).float().mean(0)
    torch.testing.assert_close(found.big_share, big)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("bypass", [False, True])
def test_the_oracle_is_below_every_route_and_a_budget_costs(family, bypass):
    model, ids = duo(family, bypass=bypass), text()
    whole = search(model, ids)
    assert whole.loss <= whole.route_losses.min() + 1e-5
    assert len(whole.route_losses) == (3 if bypass else 2) ** LAYERS
    for num_big in range(LAYERS + 1):
        some = search(model, ids, num_big=num_big)
        assert bool((some.losses >= whole.losses - 1e-4).all())
        assert some.loss <= some.route_losses.min() + 1e-5
        assert bool(((some.routes == Width.BIG).sum(1) == num_big).all())
    least = min(search(model, ids, num_big=big).loss for big in range(LAYERS + 1))
    assert whole.loss <= least + 1e-5


def test_in_one_layer_no_router_is_below_the_oracle():
    ids = text(4, 12)
    for seed in range(5):
        model = moeroute.wrap_model(tiny(num_hidden_layers=1), DuoLLM(bypass=True)).eval()
        torch.manual_seed(seed)
        layer = width_layers(model)[0]
        with torch.no_grad():
            layer.router.score.weight.normal_()
            for weight in layer.small.parameters():
                weight.normal_(std=0.3)
        found = search(model, ids)
        routed = losses(model, ids)
        assert len(widths_of(model, ids, torch.ones_like(ids)).unique()) == 3
        assert bool((routed >= found.losses - 1e-4).all())
        assert routed.mean() > found.loss
        best = torch.nn.functional.pad(found.routes[found.best], (0, 0, 0, 1))  # (B, S, 1)
        with force_widths(model, best):
            torch.testing.assert_close(losses(model, ids), found.losses, rtol=1e-4, atol=1e-4)


def test_the_search_is_deterministic_and_leaves_the_model_as_it_was():
    model, ids = duo().train(), text()
    first, again = search(model, ids), search(model, ids)
    assert model.training
    for name in ("routes", "route_losses", "best", "losses", "small_losses"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert all(layer.forced is None for layer in width_layers(model))


def test_of_equal_routes_the_cheapest_is_best():
    model, ids = duo(), text()
    with torch.no_grad():  # blocks that answer 0, whichever
        for layer in width_layers(model):
            layer.small.down_proj.weight.zero_()
        for layer in model.get_base_model().model.layers:
            layer.mlp.base_layer.down_proj.weight.zero_()
    found = search(model, ids)
    assert bool((found.routes[found.best] == Width.BYPASS).all())


def test_padding_is_no_place():
    model = duo()
    ids, mask = ragged("right")
    found = search(model, ids, attention_mask=mask)
    assert found.is_place.sum(1).tolist() == [6, 3, 8]
    assert torch.count_nonzero(found.losses[~found.is_place]) == 0
    alone = search(model, ids[1:2, :4])
    torch.testing.assert_close(found.losses[1, :3], alone.losses[0], rtol=1e-4, atol=1e-4)
    both = search(model, ids[:2], attention_mask=mask[:2])
    weights = both.is_place.sum(1).float()
    parts = [search(model, ids[:1, :7]).route_losses, alone.route_losses]
    mean = (weights[0] * parts[0] + weights[1] * parts[1]) / weights.sum()
    torch.testing.assert_close(both.route_losses, mean, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_searched():
    model, ids = duo(bypass=False), text()
    with pytest.raises(ValueError, match=r"8 routes through 3 blocks .* most_routes=7"):
        search(model, ids, most_routes=7)
    with pytest.raises(ValueError, match=r"num_big=4 is outside \[0, 3\]"):
        search(model, ids, num_big=4)
    with pytest.raises(ValueError, match="at least two tokens"):
        search(model, ids[:, :1])
    with pytest.raises(ValueError, match="no token to predict"):
        search(model, ids, attention_mask=torch.zeros_like(ids))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 2\)"):
        search(model, ids, attention_mask=ids[:, :2])
    with pytest.raises(ValueError, match="routes_at_once=0"):
        search(model, ids, routes_at_once=0)
    with pytest.raises(ValueError, match="blocks of several widths"):
        search(tiny(), ids)
    with pytest.raises(ValueError, match="layers=0"):
        all_routes(0)


def test_forced_routes_hold_for_all_for_sequences_and_for_tokens():
    model, ids = duo(), text()
    mask = torch.ones_like(ids)
    generator = torch.Generator().manual_seed(0)
    for shape in ((LAYERS,), (3, LAYERS), (*ids.shape, LAYERS)):
        route = torch.randint(0, 3, shape, generator=generator)
        with force_widths(model, route):
            found = widths_of(model, ids, mask)
        sizes = (1,) * (3 - route.ndim)
        grid = route.reshape(*route.shape[:-1], *sizes, LAYERS)
        assert torch.equal(found, grid.expand(*ids.shape, LAYERS).movedim(-1, 0))
    logits = records(model)[0].routing.router_logits
    assert set(logits.unique().tolist()) == {0.0, -torch.inf}


def test_after_a_forced_block_all_is_as_it_was():
    model, ids = duo(), text()
    layers = width_layers(model)
    outer, inner = [Width.BIG] * LAYERS, [Width.SMALL] * LAYERS
    with force_widths(model, outer):
        with force_widths(model, inner):
            assert [int(layer.forced) for layer in layers] == inner
        assert [int(layer.forced) for layer in layers] == outer
    assert [layer.forced for layer in layers] == [None] * LAYERS
    two, message = torch.zeros(2, LAYERS, dtype=torch.int64), "forced on 3 sequences of 8 tokens"
    with pytest.raises(ValueError, match=message), force_widths(model, two):
        losses(model, ids)
    assert [layer.forced for layer in layers] == [None] * LAYERS


def test_what_cannot_be_forced():
    model = duo(bypass=False)
    for route, message in (
        ([1, 1], r"shape \(2,\) but the model has 3 routed blocks"),
        ([1, 1, 2], r"\[1, 2\]; these blocks have the widths 0 small, 1 big; DuoLLM\(bypass=True"),
        ([1, 1, -1], r"\[-1, 1\]"),
        ([1.0, 1.0, 1.0], r"\[1.0\]"),
        ([True, True, True], r"\[True\]"),
    ):
        with pytest.raises(ValueError, match=message), force_widths(model, route):
            pass
    no_adapter = pytest.raises(ValueError, match="no active adapter")
    with model.disable_adapter(), no_adapter, force_widths(model, [1, 1, 1]):
        pass
