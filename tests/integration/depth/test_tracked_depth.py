"""`track_routing` says how often layers ran, forced or learned."""

import json

import pytest
import torch
from integration.depth.depth_models import LAYERS, ragged, tiny

import moeroute
from moeroute.methods import DrLLM

pytestmark = pytest.mark.hf
ACTIONS = [[0, 1, 2], [1, 1, 1], [2, 2, 1]]
LENGTHS = torch.tensor([7, 4, 9])


def test_forced_depth_is_counted_by_real_tokens():
    model, (ids, mask) = tiny(), ragged("left")
    with (
        moeroute.force_depth(model, ACTIONS),
        moeroute.track_routing(model) as stats,
        torch.no_grad(),
    ):
        model(input_ids=ids, attention_mask=mask)
    wanted = (torch.tensor(ACTIONS) * LENGTHS[:, None]).sum(0) / LENGTHS.sum()
    found = torch.tensor([layer.executions for layer in stats.layers])
    torch.testing.assert_close(found, wanted)
    assert stats.layers_executed == pytest.approx(wanted.sum().item())
    assert json.loads(json.dumps(stats.to_dict()))["layers"][0]["executions"] == found[0]
    assert [line.split()[-1] for line in str(stats.summary()).splitlines() if "%" in line] == [
        f"{runs:.2f}" for runs in wanted
    ]


def test_learned_depth_and_none_at_all(tmp_path):
    model, (ids, mask) = moeroute.wrap_model(tiny(), DrLLM(router_penalty=1.0)), ragged("left")
    with moeroute.track_routing(model) as stats, torch.no_grad():
        model.eval()(input_ids=ids, attention_mask=mask)
    assert stats.layers_executed == 2 * LAYERS
    stats.plot(tmp_path / "depth.png")
    assert (tmp_path / "depth.png").stat().st_size > 0
    with (
        pytest.raises(ValueError, match="no routed layer that can be tracked"),
        moeroute.track_routing(tiny()),
    ):
        pass
