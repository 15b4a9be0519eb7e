"""Relative-norm halting over decoder layers."""

import pytest
import torch
from integration.depth.depth_models import (
    LAYERS,
    close,
    feed,
    grown,
    new_cache,
    ragged,
    tiny,
    whole,
)

import moeroute
from moeroute.methods import NormHalting

pytestmark = pytest.mark.hf


@pytest.fixture(autouse=True, scope="module")
def no_gradients():
    with torch.no_grad():
        yield


def wrapped(threshold, **fields):
    return moeroute.wrap_model(tiny(), NormHalting(threshold=threshold, **fields)).eval()


def executed(model, ids, mask):
    with moeroute.track_routing(model) as stats:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return [layer.executions for layer in stats.layers]


def test_zero_is_the_base_bit_for_bit_and_adds_nothing():
    ids, mask = ragged("left")
    model = wrapped(0.0)
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    assert torch.equal(whole(model, ids, mask), whole(tiny(), ids, mask))


def test_infinity_runs_the_first_layers_alone():
    ids, mask = ragged("left")
    assert executed(wrapped(float("inf")), ids, mask) == [1.0] + [0.0] * (LAYERS - 1)
    assert executed(wrapped(float("inf"), first_layer=2), ids, mask) == [1.0, 1.0, 0.0]
    base = tiny()
    with moeroute.force_depth(base, [1] + [0] * (LAYERS - 1)):
        expected = whole(base, ids, mask)
    close(whole(wrapped(float("inf")), ids, mask), expected, mask)


def test_the_rule_is_the_relative_move_and_a_stopped_token_stays():
    ids, mask = ragged("right", (9, 9, 9))
    states = tiny().model(input_ids=ids, output_hidden_states=True).hidden_states
    moved = (states[1] - states[0]).norm(dim=-1) / states[0].norm(dim=-1)
    bar = moved.median().item() + 1e-6
    runs = executed(wrapped(bar), ids, mask)
    assert runs[1] == pytest.approx((moved >= bar).float().mean().item())
    assert runs == sorted(runs, reverse=True)
    shares = [sum(executed(wrapped(t), ids, mask)) for t in (0.0, bar / 2, bar, 2 * bar)]
    assert shares == sorted(shares, reverse=True)


def test_cached_equals_whole():
    ids, mask = grown(*ragged("left"), 4)
    states = tiny().model(input_ids=ids, output_hidden_states=True).hidden_states
    moved = (states[1] - states[0]).norm(dim=-1) / states[0].norm(dim=-1)
    model = wrapped(moved.median().item())
    for cache in ("dynamic", "static"):
        found = feed(model, ids, mask, (5, 9, 10), new_cache(model, cache))
        close(found, whole(model, ids, mask), mask)


@pytest.mark.parametrize("fields", [{"threshold": -1.0}, {"first_layer": -1}])
def test_bad_numbers(fields):
    with pytest.raises(ValueError, match="must be 0 or more"):
        NormHalting(**fields)
