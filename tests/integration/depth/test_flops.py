"""Operations counted as they run, against a sum by hand."""

import pytest
import torch
from integration.depth.depth_models import LAYERS, VOCAB, tiny

import moeroute
from moeroute.depth import executed_flops, flops_saved
from moeroute.methods import DrLLM, NormHalting

pytestmark = pytest.mark.hf

BATCH, LENGTH = 2, 9
WIDTH, INNER, KEYS = 32, 48, 16
HEAD = 2 * BATCH * LENGTH * WIDTH * VOCAB
LAYER = 2 * BATCH * LENGTH * (2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * INNER)
PAIRS = 2 * 2 * BATCH * LENGTH * LENGTH * WIDTH


def batch():
    torch.manual_seed(0)
    return {"input_ids": torch.randint(3, VOCAB, (BATCH, LENGTH))}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("actions", [(1, 1, 1), (1, 0, 1), (0, 0, 0), (2, 1, 0), (1, 2, 2)])
def test_a_forced_depth_costs_its_layers(attention, actions):
    model = tiny(attention=attention)
    with moeroute.force_depth(model, actions):
        counted = executed_flops(model, batch())
    rotary = counted - HEAD - sum(actions) * (LAYER + PAIRS)
    assert 0 <= rotary <= 2 * LENGTH * WIDTH  # a product of positions and frequencies


def test_what_a_method_saves_is_what_it_did_not_run():
    model = moeroute.wrap_model(tiny(), NormHalting(threshold=1e9)).eval()
    saved = flops_saved(model, [batch(), batch()])
    assert saved.base == 2 * executed_flops(tiny(), batch())
    kept_keys = 2 * BATCH * LENGTH * WIDTH * 3 * WIDTH  # of the layers skipped: keys, at most q too
    gone = (LAYERS - 1) * (LAYER + PAIRS)
    assert 2 * (gone - (LAYERS - 1) * kept_keys) <= saved.base - saved.executed <= 2 * gone
    assert saved.share == pytest.approx(1 - saved.executed / saved.base)


def test_routers_are_part_of_what_is_executed():
    model = moeroute.wrap_model(tiny(), DrLLM(router_penalty=0.5)).eval()  # all layers run
    assert flops_saved(model, [batch()]).share < 0


def test_nothing_to_count():
    with pytest.raises(ValueError, match="no batch is given"):
        flops_saved(moeroute.wrap_model(tiny(), NormHalting()), [])
    with pytest.raises(ValueError, match="has no adapters"):
        flops_saved(tiny(), [batch()])
